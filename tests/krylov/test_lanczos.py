"""The Lanczos iteration on matrices whose spectrum is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import matrix

from jaxhess import MatrixOperator, Storage, lanczos_segment, random_probe, spectrum, start_lanczos
from jaxhess.errors import InputError
from jaxhess.krylov import compile_segment
from jaxhess.operators import LinearOperator


def coefficients(operator: LinearOperator, steps: int, reorthogonalize="full", seed: int = 0, segments=None):
    probe = random_probe(jax.random.key(seed), operator.shape_dtype)
    state = start_lanczos([probe], steps, Storage(reorthogonalize))
    for end in segments or [steps]:
        state = lanczos_segment(operator, state, end)
    return state


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "eigenvalues",
    [
        np.linspace(-3, 5, 120),
        np.concatenate([[-1e3, 2e3], 1e-3 * np.linspace(-1, 1, 98)]),  # gaps of six decades
        np.repeat([-1.0, 0.0, 2.0, 7.0], 25),  # clusters: only distinct values can be found
    ],
)
def test_full_reorthogonalisation_finds_every_distinct_eigenvalue(eigenvalues):
    distinct = np.unique(eigenvalues)
    operator = MatrixOperator(jnp.asarray(matrix(eigenvalues)))
    result = spectrum(operator, steps=len(distinct), probes=1)
    found = result.ritz_values[0][: result.sizes[0]]
    np.testing.assert_allclose(found, distinct, rtol=0, atol=1e-10 * np.abs(distinct).max())


@pytest.mark.usefixtures("float64")
def test_basis_stays_orthonormal_and_reduces_the_matrix_to_t():
    a = matrix(np.concatenate([[100.0], np.linspace(-1, 1, 149)]))
    state = coefficients(MatrixOperator(jnp.asarray(a)), 60)
    basis = np.asarray(state.basis)[0]
    np.testing.assert_allclose(basis @ basis.T, np.eye(60), atol=1e-12)
    alphas, betas, _ = state.tridiagonal()
    t = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    np.testing.assert_allclose(basis @ a @ basis.T, t, atol=1e-11 * 100)


@pytest.mark.usefixtures("float64")
def test_without_reorthogonalisation_ghosts_appear_and_extremes_hold():
    eigenvalues = np.concatenate([[1000.0, 500.0], np.linspace(-1, 1, 198)])
    result = spectrum(MatrixOperator(jnp.asarray(matrix(eigenvalues))), steps=60, probes=1, storage=Storage("none"))
    theta = result.ritz_values[0]
    assert np.sum(np.abs(theta - 1000) < 1e-6) > 1
    np.testing.assert_allclose(theta[-1], 1000, rtol=1e-10)


@pytest.mark.parametrize("reorthogonalize", ["none", "full"])
@pytest.mark.usefixtures("float64")
def test_rank_one_breaks_down_after_two_steps(reorthogonalize):
    operator = MatrixOperator(jnp.asarray(matrix([3.0] + [0.0] * 79)))
    result = spectrum(operator, steps=30, probes=3, storage=Storage(reorthogonalize))
    assert (result.sizes == 2).all()
    np.testing.assert_allclose(result.ritz_values[:, :2], np.tile([0.0, 3.0], (3, 1)), atol=1e-13)
    assert np.isnan(result.ritz_values[:, 2:]).all()


@pytest.mark.parametrize("reorthogonalize", ["none", "full"])
@pytest.mark.usefixtures("float64")
def test_low_rank_has_its_eigenvalues_and_nothing_else_with_weight(reorthogonalize):
    # Whether the exhausted space is noticed depends on how rounding was amplified; if not, the run goes on in noise,
    # which must carry no weight.
    eigenvalues = np.concatenate([np.arange(1.0, 6.0), np.zeros(75)])
    a = matrix(eigenvalues)
    result = spectrum(MatrixOperator(jnp.asarray(a)), steps=30, probes=3, storage=Storage(reorthogonalize))
    theta, weights = result.ritz_values[result.weights > 1e-18], result.weights[result.weights > 1e-18]
    assert np.abs(theta[:, None] - np.arange(6.0)).min(axis=1).max() < 1e-11
    np.testing.assert_allclose(weights.sum(), 3, rtol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_multiples_of_the_identity_break_down_at_once(scale):
    result = spectrum(MatrixOperator(scale * jnp.eye(50)), steps=10, probes=2)
    assert (result.sizes == 1).all()
    np.testing.assert_allclose(result.ritz_values[:, 0], scale, rtol=1e-6)


def test_one_by_one_matrix():
    result = spectrum(MatrixOperator(jnp.full((1, 1), -3.0)), steps=4, probes=1)
    assert result.sizes[0] == 1
    np.testing.assert_allclose(result.ritz_values[0, 0], -3, rtol=1e-6)


@pytest.mark.parametrize("reorthogonalize", ["none", "full"])
def test_segments_give_the_same_bits_as_one_run(reorthogonalize):
    operator = MatrixOperator(jnp.asarray(matrix(np.linspace(-1, 2, 100)), jnp.float32))
    whole = coefficients(operator, 12, reorthogonalize)
    cut = coefficients(operator, 12, reorthogonalize, segments=[1, 2, 7, 12])
    for name in ("alphas", "betas", "current"):
        assert np.asarray(getattr(whole, name)).tobytes() == np.asarray(getattr(cut, name)).tobytes()


def compilations(run) -> int:
    """How many programs were compiled while `run()` ran."""
    events = []
    listener = lambda name, seconds, **_: events.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    return len(events)


@pytest.mark.parametrize("reorthogonalize", ["none", "full"])
def test_one_compilation_serves_every_segment_probe_and_seed(reorthogonalize):
    operator = MatrixOperator(jnp.diag(jnp.arange(31.0)))
    assert compilations(lambda: coefficients(operator, 9, reorthogonalize, segments=[1, 3, 9])) > 0
    assert compilations(lambda: coefficients(operator, 9, reorthogonalize, segments=[2, 5, 6, 9], seed=1)) == 0
    other = MatrixOperator(jnp.diag(2 * jnp.arange(31.0)))
    assert compilations(lambda: coefficients(other, 9, reorthogonalize, segments=[9], seed=2)) <= 2  # the diagonal


def test_a_segment_ends_where_its_room_does():
    operator = MatrixOperator(jnp.asarray(matrix(np.linspace(-1, 2, 50)), jnp.float32))
    state = coefficients(operator, 6, segments=[99])
    assert int(state.step) == int(state.size[0]) == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("factor", [1, 1e-3])
def test_narrow_storage_breaks_down_instead_of_diverging(dtype, factor):
    # Rank 20 and 60 steps: what the rounding of a stored basis leaves must not be taken for a new direction.
    eigenvalues = factor * np.concatenate([np.linspace(-1, 3, 20), np.zeros(180)])
    operator = MatrixOperator(jnp.asarray(matrix(eigenvalues), jnp.float32))
    result = spectrum(operator, steps=60, probes=2, storage=Storage(vector_dtype=dtype))
    assert (result.sizes < 60).all()
    # The stored vectors are rounded to 8 (11) bits: so are the ends of the spectrum.
    assert abs(result.extreme().largest.value - 3 * factor) < 0.02 * factor
    assert abs(result.extreme().smallest.value + factor) < 0.02 * factor


@pytest.mark.parametrize("reorthogonalize", ["none", "full"])
def test_state_is_donated(reorthogonalize):
    operator = MatrixOperator(jnp.asarray(matrix(np.linspace(-1, 2, 500)), jnp.float32))
    state = start_lanczos([random_probe(jax.random.key(0), operator.shape_dtype)], 8, Storage(reorthogonalize))
    memory = compile_segment(operator, state).memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize("factor", [1e-25, 1e-7, 1e7, 1e25])
def test_a_scaled_operator_has_the_scaled_spectrum(factor):
    eigenvalues = np.zeros(200)
    eigenvalues[:20] = np.linspace(-1, 3, 20)
    a = jnp.asarray(matrix(eigenvalues), jnp.float32)
    plain = spectrum(MatrixOperator(a), steps=30, probes=2)
    scaled = spectrum(MatrixOperator(jnp.float32(factor) * a), steps=30, probes=2)
    assert (plain.sizes == scaled.sizes).all()
    ends = np.s_[:, [0, 19]]
    np.testing.assert_allclose(np.sort(scaled.ritz_values)[ends], factor * np.sort(plain.ritz_values)[ends], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"probes": 0}, "probes is 0"),
        ({"steps": 2**60}, "Full re-orthogonalisation keeps"),
        ({"storage": Storage(vector_dtype="float64")}, "JAX_ENABLE_X64"),
    ],
)
def test_bad_options_are_refused_before_any_product(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        spectrum(MatrixOperator(jnp.eye(4)), **options)


def test_non_finite_products_name_probe_and_step():
    a = np.eye(10, dtype=np.float32)
    a[3, 4] = np.nan
    with pytest.raises(InputError, match="step 1 of probe 1 is not finite"):
        spectrum(MatrixOperator(jnp.asarray(a)), steps=3, probes=1)


def test_vectors_stored_in_bfloat16_keep_the_extremes():
    eigenvalues = np.concatenate([[40.0, -15.0], np.linspace(-1, 1, 298)])
    operator = MatrixOperator(jnp.asarray(matrix(eigenvalues), jnp.float32))
    result = spectrum(operator, steps=20, probes=2, storage=Storage(vector_dtype="bfloat16"))
    # Rounding the basis to 8 bits perturbs the matrix by about 2^-9 of its norm.
    np.testing.assert_allclose(result.extreme().largest.value, 40, rtol=1e-2)
    np.testing.assert_allclose(result.extreme().smallest.value, -15, rtol=2e-2)


@pytest.mark.parametrize("power", [-100, 100])
def test_vectors_in_16_bits_do_not_lose_a_norm_whose_squares_vanish_or_overflow(power):
    dense = jnp.asarray(matrix(np.linspace(-3, 5, 60)), jnp.float32)
    found = []
    for factor in (1.0, 2.0**power):  # exact
        probe = random_probe(jax.random.key(0), jax.ShapeDtypeStruct((60,), jnp.bfloat16))
        state = start_lanczos([probe, probe], 8, Storage("none"))
        state = lanczos_segment(MatrixOperator(factor * dense), state, 8)
        found.append(np.float64(state.betas) / factor)
    # Sums of 60 terms, none above the matrix norm of 5, in another order. From then on an entry of a stored vector may
    # be rounded the other way, by at most 2^-8: A q and alpha q move by 5 times that each.
    np.testing.assert_allclose(found[0][:, 0], found[1][:, 0], rtol=0, atol=60 * 5 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(found[0][:, 1], found[1][:, 1], rtol=0, atol=2 * 5 * 2.0**-8)
    assert (np.min(found) > 0.1) & (np.max(found) < 5)  # later ones: neither vanished nor overflowed
