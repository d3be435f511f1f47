"""Leading eigenpairs against matrices whose eigenvectors are known."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_models import Diagonal

from jaxhess import MatrixOperator, Storage, lanczos_segment, leading_eigenpairs, random_probe, spectrum, start_lanczos
from jaxhess.errors import InputError
from jaxhess.krylov.quadrature import quadrature

EIGENVALUES = np.concatenate([np.linspace(-1, 1, 195), [5.0, 8.0, 20.0, -6.0, -12.0]])
BASIS = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 200)))[0]
EXPECTED = {"magnitude": [20, -12, 8], "largest": [20, 8, 5], "smallest": [-12, -6, -1]}


@pytest.fixture(scope="module")
def operator():
    return MatrixOperator(jnp.asarray((BASIS * EIGENVALUES) @ BASIS.T, jnp.float32))


@pytest.mark.parametrize("which", EXPECTED)
@pytest.mark.parametrize("reorthogonalize", ["full", "none", 6])
def test_values_vectors_and_residuals(operator, which, reorthogonalize):
    pairs = leading_eigenpairs(operator, 3, which=which, tolerance=1e-4, steps=150, storage=Storage(reorthogonalize))
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, EXPECTED[which], atol=2e-4 * 20 if which == "smallest" else 1e-5 * 20)
    vectors = np.asarray(pairs.vectors, np.float64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    # Residuals are what they say, and small enough for the tolerance and for float32.
    dense = np.asarray(operator.matrix, np.float64)
    true = np.linalg.norm(vectors @ dense - pairs.values[:, None] * vectors, axis=1)
    np.testing.assert_allclose(pairs.residuals, true, atol=2e-6 * 20)
    assert (true < 2e-4 * 20).all()
    for value, vector in zip(pairs.values[:2], vectors, strict=False):
        own = BASIS[:, np.argmin(np.abs(EIGENVALUES - value))]
        assert abs(own @ vector) > 1 - 1e-4


def test_a_run_stops_when_the_pairs_have_converged(operator):
    seen = []
    pairs = leading_eigenpairs(operator, 1, tolerance=1e-3, steps=100, callback=lambda *x: seen.append(x))
    assert pairs.steps == seen[-1][0] <= 15
    assert seen[-1][2][0] <= 1e-3 * 20 < (seen[-2][2][0] if len(seen) > 1 else np.inf)


@pytest.mark.parametrize("storage", [Storage(), Storage(basis_memory="host"), Storage(basis_dtype="bfloat16")], ids=str)
@pytest.mark.parametrize(("room", "probes"), [(60, 1), (60, 3), (4, 1), (4, 3)])
def test_a_state_goes_on_and_gives_the_pairs_of_a_run_of_its_own(operator, storage, room, probes):
    """4 steps do not suffice: more are taken. With the host's memory there is one run."""
    drawn = [random_probe(jax.random.key(k), operator.shape_dtype) for k in range(probes)]
    drawn = drawn[:1] if storage.basis_memory == "host" else drawn
    state = lanczos_segment(operator, start_lanczos(drawn, room, storage), room)
    steps, tolerance = [], 1e-4 if storage.basis_dtype is None else 1e-2  # combinations of rows in bfloat16
    found = leading_eigenpairs(
        operator, 2, tolerance=tolerance, steps=60, state=state, callback=lambda done, *_: steps.append(done)
    )
    whole = lanczos_segment(operator, start_lanczos(drawn[:1], 60, storage), found.steps)
    assert steps[0] == room
    assert steps == [60] if room == 60 else found.steps > room
    np.testing.assert_allclose(quadrature(*whole.tridiagonal()).ritz_values[-1], found.values[0], rtol=1e-6)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, [20, -12], rtol=2 * tolerance)
    dense, vectors = np.asarray(operator.matrix, np.float64), np.asarray(found.vectors, np.float64)
    true = np.linalg.norm(vectors @ dense - found.values[:, None] * vectors, axis=1)
    np.testing.assert_allclose(found.residuals, true, atol=2e-6 * 20)


def test_a_spectrum_hands_out_its_last_state(operator):
    seen = []
    spectrum(operator, steps=40, probes=2, callback=seen.append)
    products = []
    found = leading_eigenpairs(operator, 2, steps=40, state=seen[-1].state, callback=lambda *x: products.append(x))
    assert len(products) == 1  # no step more
    np.testing.assert_allclose(found.values, [20, -12], rtol=1e-3)
    assert found.converged.all()


def test_a_state_without_all_vectors_is_refused(operator):
    probe = random_probe(jax.random.key(0), operator.shape_dtype)
    with pytest.raises(ValueError, match="does not keep all Lanczos vectors"):
        leading_eigenpairs(operator, 2, state=start_lanczos([probe], 20, Storage(4)))


def test_what_has_not_converged_is_said(operator):
    pairs = leading_eigenpairs(operator, 3, which="smallest", tolerance=1e-6, steps=12)
    assert pairs.steps == 12
    assert not pairs.converged[-1]
    assert pairs.residuals[-1] > 1e-6 * 20


def test_in_bfloat16_neighbours_are_not_taken_for_copies():
    operator = Diagonal(jnp.asarray(np.append(np.linspace(-1, 1, 5000), [20.0, 15.0, 12.0, 10.0]), jnp.float32))
    pairs = leading_eigenpairs(operator, 2, tolerance=1e-2, steps=40, storage=Storage("none", vector_dtype="bfloat16"))
    np.testing.assert_allclose(pairs.values, [20, 15], rtol=1e-2)


def test_the_krylov_space_may_end_first():
    pairs = leading_eigenpairs(MatrixOperator(jnp.diag(jnp.array([3.0, 3.0, 0.0, 0.0]))), 3, steps=4)
    assert len(pairs.values) == 2  # distinct ones
    np.testing.assert_allclose(pairs.values, [3, 0], atol=1e-6)
    np.testing.assert_allclose(pairs.residuals, 0, atol=1e-6)


def test_vectors_are_trees_like_the_operators_and_are_saved(tmp_path):
    entries = {"layers": {"kernel": jnp.linspace(-1, 1, 24).reshape(2, 3, 4)}, "norm": jnp.array([3.0, -2.0])}
    operator = Diagonal(entries)
    pairs = leading_eigenpairs(operator, 2, tolerance=1e-4, steps=20)
    np.testing.assert_allclose(pairs.values, [3, -2], rtol=1e-5)
    assert jax.tree.structure(pairs.vectors) == jax.tree.structure(entries)
    np.testing.assert_allclose(jnp.abs(pairs.vectors["norm"]), np.eye(2), atol=1e-3)
    pairs.save(tmp_path / "pairs")
    with np.load(tmp_path / "pairs" / "eigenpairs.npz") as saved:
        np.testing.assert_array_equal(saved["values"], pairs.values)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(tmp_path / "pairs" / "vectors")
    np.testing.assert_array_equal(stored["layers/kernel"], pairs.vectors["layers"]["kernel"])
    with pytest.raises(InputError, match="overwrite=True"):
        pairs.save(tmp_path / "pairs")
    pairs.save(tmp_path / "pairs", overwrite=True)


@pytest.mark.parametrize(
    ("count", "options", "sentence"),
    [
        (0, {}, "from 1 to 100"),
        (101, {}, "from 1 to 100"),
        (1, {"which": "middle"}, "'magnitude', 'largest' or 'smallest'"),
        (1, {"tolerance": 0.0}, "between 0 and 1"),
    ],
)
def test_bad_options_are_refused(operator, count, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        leading_eigenpairs(operator, count, **options)
