"""What the storage of Lanczos vectors costs: every figure of a run stays within the bounds that the run states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known_spectra import run_record
from small_models import Diagonal

from jaxhess import LinearOperator, MatrixOperator, Storage, lanczos_segment, leading_eigenpairs, random_probe, spectrum
from jaxhess.errors import InputError
from jaxhess.krylov import abstract_lanczos, start_lanczos
from jaxhess.krylov.ghosts import tolerances
from jaxhess.krylov.lanczos import _rounding_error, _segment_program
from jaxhess.results.summary import summary
from jaxhess.slq.spectrum import Spectrum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Reflected(LinearOperator):
    """A diagonal matrix between two Householder reflections: no eigenvector is localised."""

    entries: jax.Array
    normal: jax.Array

    def mv(self, v):
        def reflect(x):
            return x - 2 * self.normal * jnp.vdot(self.normal, x)

        return reflect(self.entries * reflect(v))

    @property
    def shape_dtype(self):
        return jax.ShapeDtypeStruct(self.entries.shape, self.entries.dtype)


def bulk_and_outliers(n, outliers):
    """n eigenvalues: a bulk of ten values from 0.1 to 1, each about n/10 times, and these outliers."""
    bulk = np.resize(np.linspace(0.1, 1, 10), n - len(outliers))
    return np.concatenate([bulk, outliers]).astype(np.float32)


def operator_of(entries, spread):
    if not spread:
        return Diagonal(jnp.asarray(entries))
    normal = np.random.default_rng(0).normal(size=entries.size)
    return Reflected(jnp.asarray(entries), jnp.asarray(normal / np.linalg.norm(normal), jnp.float32))


def check_bounds(found, entries):
    """Every unflagged Ritz value has an eigenvalue within its bound and tolerance; the extremes are eigenvalues."""
    eigenvalues = np.unique(entries.astype(np.float64))
    for probe, nodes in enumerate(found._quadratures):
        left = ~found.ghosts[probe, : nodes.ritz_values.size]
        allowed = nodes.residual_bounds + tolerances(nodes, found.run.rounding)
        distance = np.abs(nodes.ritz_values[:, None] - eigenvalues).min(1)
        assert (distance <= allowed)[left].all()
        # No bound is so wide that it says nothing about an outlier.
        assert abs(nodes.ritz_values[-1] - eigenvalues[-1]) <= allowed[-1]
        assert found.orthogonality_lost[probe] or allowed[-1] < 0.05 * eigenvalues[-1]


STORAGE = [
    Storage("none"),
    Storage("none", "bfloat16"),
    *(
        Storage(kept, **dtype)
        for kept in (8, 16, "full")
        for dtype in ({}, {"vector_dtype": "bfloat16"}, {"basis_dtype": "bfloat16"})
    ),
]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reorthogonalize": "some"}, "'none', 'full' or a window"),
        ({"reorthogonalize": 1}, "the number of last vectors, at least 2"),
        ({"reorthogonalize": True}, "Unknown re-orthogonalisation True"),
        ({"basis_memory": "disk"}, "'device' or 'host'"),
        ({"basis_dtype": "int8"}, "basis_dtype is int8; it is one of float32, bfloat16"),
        ({"vector_dtype": "wide"}, "vector_dtype is 'wide'"),
        ({"scalar_dtype": "float16"}, "scalar_dtype is float16; it is one of float32, float64"),
        ({"scalar_dtype": None}, "scalar_dtype is None"),
    ],
)
def test_storage_that_there_is_not_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Storage(**options)


def test_dtypes_are_kept_by_name():
    assert Storage(vector_dtype=jnp.bfloat16, basis_dtype=np.float32) == Storage("full", "bfloat16", "float32")


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize(
    ("outliers", "spread"),
    [([1e6], False), ([1e3], True), ([3e2, 5e2, 1e3], True)],
    ids=["1e6 localised", "1e3 spread", "three spread"],
)
def test_unflagged_values_lie_within_their_bounds(storage, spread, outliers):
    entries = bulk_and_outliers(1000, outliers)
    found = spectrum(operator_of(entries, spread), steps=40, probes=2, seed=2, storage=storage)
    check_bounds(found, entries)


@pytest.mark.study
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("spread", [False, True], ids=["localised", "spread"])
@pytest.mark.parametrize(("n", "steps"), [(200, 10), (200, 200), (10_000, 200), (1_000_000, 40)])
@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e6])
def test_unflagged_values_lie_within_their_bounds_whatever_the_size(storage, spread, n, steps, ratio):
    for outliers in ([ratio], ratio * np.linspace(0.1, 1, 10)):
        entries = bulk_and_outliers(n, outliers)
        operator = operator_of(entries, spread)
        found = spectrum(operator, steps=steps, probes=2, seed=2, storage=storage)
        check_bounds(found, entries)


@pytest.mark.parametrize("seed", [2, 5])
@pytest.mark.parametrize("storage", [{"vector_dtype": "bfloat16"}, {"basis_dtype": "bfloat16"}])
@pytest.mark.parametrize("window", [8, 16])
def test_a_window_of_narrow_vectors_does_not_diverge(window, storage, seed):
    entries = np.append(np.linspace(0, 1, 999), 1e3).astype(np.float32)
    operator = MatrixOperator(jnp.diag(jnp.asarray(entries)))
    found = spectrum(operator, steps=60, probes=1, seed=seed, storage=Storage(window, **storage))
    largest = found.extreme().largest
    # It was 1.9e20 for bfloat16 vectors, 1.1 and 35 times too large for a bfloat16 basis.
    assert abs(largest.value - 1e3) <= largest.residual_bound < 2
    # What a window promises: its own vectors are orthogonal within the rounding of storage, 2^-8 an entry and more
    # where several share a coordinate.
    assert max(found.run.lanczos.orthogonality) < 2.0**-5
    assert not found.orthogonality_lost.any()


@pytest.mark.parametrize("reorthogonalize", ["none", 8, "full"])
def test_ten_outliers_on_single_coordinates_are_found_once_each(reorthogonalize):
    entries = np.concatenate([np.linspace(0, 1e-3, 19_990), np.arange(1, 11)]).astype(np.float32)
    found = spectrum(
        Diagonal(jnp.asarray(entries)), steps=40, probes=1, storage=Storage(reorthogonalize, vector_dtype="bfloat16")
    )
    check_bounds(found, entries)
    left = ~found.ghosts[0]
    theta, bounds = found.ritz_values[0][left], found.residual_bounds[0][left]
    outliers = theta > 0.5
    np.testing.assert_array_less(np.abs(theta[outliers] - np.arange(1, 11)), bounds[outliers])  # of these ten


@pytest.mark.parametrize("storage", [{}, {"vector_dtype": "bfloat16"}, {"basis_dtype": "bfloat16"}])
def test_errors_of_the_steps_are_those_of_the_recurrence(storage):
    """|A Q - Q T - beta_m q_{m+1} e_m'|, column by column in float64, from the vectors that the run stored."""
    entries = bulk_and_outliers(300, [30.0, 1e3])
    operator, steps = operator_of(entries, spread=True), 10  # of twelve that exhaust the space
    state = start_lanczos([random_probe(jax.random.key(1), operator.shape_dtype)], steps, Storage(**storage))
    vectors = []
    for step in range(steps):
        vectors.append(np.asarray(state.current[0], np.float64))
        state = lanczos_segment(operator, state, step + 1)
    vectors.append(np.asarray(state.current[0], np.float64))
    q = np.array(vectors).T / np.linalg.norm(vectors, axis=1)
    normal = np.asarray(operator.normal, np.float64)
    matrix = np.eye(normal.size) - 2 * np.outer(normal, normal)
    matrix = matrix @ np.diag(entries.astype(np.float64)) @ matrix
    alphas, betas, errors = state.tridiagonal()
    t = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    f = matrix @ q[:, :-1] - q[:, :-1] @ t
    f[:, -1] -= betas[-1] * q[:, -1]
    missing = np.linalg.norm(f, axis=0)
    products = 4 * 2.0**-24 * np.sqrt(normal.size) * 1e3  # the rounding of two reflections in float32
    assert (missing <= 1.02 * errors + products).all()
    if storage.get("vector_dtype"):  # and they say little more: a change of a vector's length alone, which is none
        assert np.linalg.norm(errors) <= 2 * np.linalg.norm(missing)


def test_products_in_the_dtype_of_narrower_vectors_round_as_it_does():
    key = jax.random.key(0, impl="threefry2x32")  # of the probes that spectrum draws
    with jax.enable_x64(True):
        eigenvalues = np.concatenate([np.linspace(1, 2, 99), [300.0]])
        basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 100)))
        operator = MatrixOperator(jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T, "float64"))
        found = spectrum(operator, steps=60, probes=2, storage=Storage(vector_dtype="float32"))
        assert found.run.rounding == 2.0**-23
        x = np.linspace(0.9, 310, 4001)
        lower, upper = found.distribution_bounds(x)
        for probe in range(2):
            start = random_probe(jax.random.fold_in(key, probe), operator.shape_dtype).astype("float32")
            masses = (np.asarray(start, np.float64) @ basis) ** 2
            truth = masses / masses.sum() @ (eigenvalues[:, None] <= x)
            # In a gap of 0.01 rounding moves less mass than its slack over the gap (Davis and Kahan 1970).
            spare = tolerances(found._quadratures[probe], found.run.rounding).max() / 0.01
            assert (lower[probe] - truth <= spare).all()
            assert (truth - upper[probe] <= spare).all()
            assert spare < 0.1


@pytest.mark.parametrize("reorthogonalize", ["none", 4, "full"])
def test_large_entries_do_not_overflow(reorthogonalize):
    ones = np.linspace(1, 2, 100)
    found, scaled = (
        spectrum(Diagonal(jnp.asarray(f * ones, jnp.float32)), steps=20, probes=1, storage=Storage(reorthogonalize))
        for f in (1.0, 2.0**86)  # 7.7e25, whose squares are infinite in float32
    )
    assert scaled.sizes.tolist() == [20]
    np.testing.assert_allclose(scaled.alphas, 2.0**86 * found.alphas, rtol=1e-5)


def test_narrow_vectors_count_by_their_lengths():
    found = spectrum(Diagonal(jnp.ones(1000)), steps=3, probes=8, storage=Storage(vector_dtype="bfloat16"))
    # All Rayleigh quotients are one, but for the rounding of sums in float32; those of vectors taken for unit vectors
    # were off by the rounding of storage, 2^-9.
    np.testing.assert_allclose(found.alphas[:, 0], 1, rtol=8 * 2.0**-24)


def test_the_last_batch_of_probes_runs_the_program_of_the_others():
    operator = Diagonal(jnp.linspace(1, 2, 77))
    program = _segment_program(abstract_lanczos(operator.shape_dtype, 11))  # of any number of runs
    compiled = program._cache_size()
    found = spectrum(operator, steps=11, probes=5, batch_size=2)
    assert program._cache_size() == compiled + 1
    assert found.run.lanczos.batch_size == 2
    alone = spectrum(operator, steps=11, probes=5, batch_size=1)
    np.testing.assert_allclose(found.alphas, alone.alphas, rtol=1e-5)


@pytest.mark.parametrize(("probes", "most", "size"), [(9, 8, 5), (4, 8, 4), (6, 4, 3), (1, 3, 1)])
def test_batches_are_of_equal_size(probes, most, size):
    found = spectrum(Diagonal(jnp.linspace(1, 2, 20)), steps=2, probes=probes, batch_size=most)
    assert found.run.lanczos.batch_size == size


def test_the_time_of_compilation_is_recorded_where_memory_was_looked_at_first():
    found = spectrum(Diagonal(jnp.linspace(1, 2, 83)), steps=13, probes=3)
    assert found.run.lanczos.batch_size == 3
    assert found.run.program.compile_seconds > 0.01  # the second look at a compiled program takes 0.4 ms


def test_lost_orthogonality_is_marked():
    tridiagonal = (np.ones((2, 4)), np.ones((2, 4)), [4, 4], 10)
    for kept, measured, lost in (
        ("full", (0.01, 0.2), [False, True]),
        (2, (0.01, 0.3), [False, True]),
        (2, (0.01, 0.2), [False, False]),
        ("none", (None, None), [False, False]),
        (None, (1e-4, 0.6), [False, True]),  # what earlier versions had
    ):
        found = Spectrum(*tridiagonal, run=run_record(kept, measured))
        assert found.orthogonality_lost.tolist() == lost
        assert summary(found)["num_orthogonality_lost"] == sum(lost)


@pytest.mark.parametrize("storage", [{}, {"vector_dtype": "bfloat16"}])
@pytest.mark.parametrize("reorthogonalize", ["none", 6, "full"])
def test_converged_eigenpairs_have_residuals_within_the_tolerance(reorthogonalize, storage):
    """Past exhaustion too: 21 distinct eigenvalues, 60 steps."""
    operator = Diagonal(jnp.asarray(np.append(np.arange(1, 21), np.zeros(480)), jnp.float32))
    found = leading_eigenpairs(operator, 8, steps=60, tolerance=1e-3, storage=Storage(reorthogonalize, **storage))
    eigenvalues = np.arange(20, 12, -1)
    assert (found.residuals[found.converged] <= 1e-3 * 20 * (1 + 1e-6)).all()
    good = found.converged
    np.testing.assert_array_less(np.abs(found.values - eigenvalues[: len(found.values)])[good], 0.02 + 1e-5)
    if not storage:
        assert good.all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_stored_vectors_is_measured_down_to_subnormal_numbers(dtype):
    q = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    q /= np.linalg.norm(q)
    measured = float(_rounding_error(jnp.asarray(q), jax.ShapeDtypeStruct(q.shape, dtype), "float32"))
    true = np.linalg.norm(q - np.asarray(jnp.asarray(q).astype(dtype), np.float64))
    assert true <= 1.001 * measured <= 2 * true


@pytest.mark.parametrize("storage", [{"basis_dtype": "bfloat16"}, {"vector_dtype": "bfloat16"}])
def test_an_outlier_does_not_exhaust_the_space_of_a_narrow_basis(storage):
    """An outlier a million times the bulk; sizes of eight probes were 8, 21, 50, 50, 7, 50, 50, 50."""
    entries = jnp.append(jnp.linspace(0, 1, 800), 1e6)
    found = spectrum(Diagonal(entries), steps=50, probes=8, storage=Storage(**storage))
    assert found.sizes.tolist() == [50] * 8
