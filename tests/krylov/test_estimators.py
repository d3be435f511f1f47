"""Estimators of trace, diagonal and Frobenius norm, on matrices where all three are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_models import matrix, operator_of

from jaxhess import (
    Hessian,
    MatrixOperator,
    diagonal,
    frobenius_norm,
    hutch_plus_plus,
    hutchinson,
    make_mesh,
    random_probe,
    xtrace,
)
from jaxhess.errors import InputError

CLUSTERS = np.repeat([-1.0, 0.0, 2.0, 7.0], 25)  # indefinite and singular
DECAYING = 1 / np.arange(1, 101.0) ** 2


def probes(operator, count: int, distribution: str, seed: int = 0, first: int = 0) -> np.ndarray:
    """[n, count] probes of these numbers, as columns."""
    key = jax.random.key(seed, impl="threefry2x32")
    drawn = [random_probe(jax.random.fold_in(key, first + k), operator.shape_dtype, distribution) for k in range(count)]
    return np.stack([flat(x) for x in drawn], axis=1)


def flat(x) -> np.ndarray:
    return np.concatenate([np.asarray(e, np.float64).ravel() for e in jax.tree.leaves(x)])


def mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error along the last axis."""
    return values.mean(axis=-1), values.std(axis=-1, ddof=1) / np.sqrt(values.shape[-1])


def fields(estimate) -> list[float]:
    return [estimate.value, estimate.standard_error, estimate.freedom]


def hutch_plus_plus_of(a: np.ndarray, s: np.ndarray, g: np.ndarray) -> tuple[float, float, float]:
    q, _ = np.linalg.qr(a @ s)
    g = g - q @ (q.T @ g)
    value, error = mean(np.sum(g * (a @ g), axis=0))
    return np.trace(q.T @ a @ q) + value, error, g.shape[1] - 1


def xtrace_of(a: np.ndarray, omega: np.ndarray) -> tuple[float, float, float]:
    """By the definition and none of the update formulas: every sketch has a QR factorisation of its own."""
    n, m = omega.shape

    def estimate(i: int, without: set[int]) -> float:
        sketch = [k for k in range(m) if k not in without]
        q, _ = np.linalg.qr(a @ omega[:, sketch])
        w = omega[:, i] - q @ (q.T @ omega[:, i])
        w *= np.sqrt((n - len(sketch)) / (w @ w))
        return np.trace(q.T @ a @ q) + w @ a @ w

    t = np.array([estimate(i, {i}) for i in range(m)])
    gained = np.array([[t[i] - estimate(i, {i, j}) for j in range(m)] for i in range(m)])
    covariance = (gained * gained.T)[~np.eye(m, dtype=bool)].mean()
    assert covariance > 0.1 * mean(t)[1] ** 2  # or the test below would not see it
    return t.mean(), np.sqrt(mean(t)[1] ** 2 + covariance), m - 1


@pytest.mark.usefixtures("float64")
def test_sample_means_are_those_of_numpy():
    a = matrix(CLUSTERS)
    operator = operator_of(a, "float64")
    v = probes(operator, 50, "rademacher", seed=3)
    options = {"samples": 50, "seed": 3, "batch_size": 20}  # two batches and a half
    squares, entries = np.sum((a @ v) ** 2, axis=0), v * (a @ v)
    half = np.var(entries, axis=1, ddof=1).sum()
    freedom = 2 * 50 * half**2 / np.var(squares, ddof=1) - 2
    expected = [np.sum(entries, axis=0).mean(), np.sqrt(2 * half / 50), freedom]
    np.testing.assert_allclose(fields(hutchinson(operator, **options)), expected, rtol=1e-11)
    c = 1 / (np.mean(squares) ** 2 / np.var(squares, ddof=1) - 1 / 50)
    expected = [np.sqrt(np.mean(squares)), np.sqrt(c / 50) * np.sqrt(np.mean(squares)) / 2, 49]
    np.testing.assert_allclose(fields(frobenius_norm(operator, **options)), expected, rtol=1e-11)
    v = probes(operator, 50, "normal", seed=3)
    squares = np.sum((a @ v) ** 2, axis=0)
    freedom = 2 * 50 * squares.mean() ** 2 / np.var(squares, ddof=1) - 2
    expected = [np.mean(np.sum(v * (a @ v), axis=0)), np.sqrt(2 * squares.mean() / 50), freedom]
    np.testing.assert_allclose(fields(hutchinson(operator, distribution="normal", **options)), expected, rtol=1e-11)
    v = probes(operator, 50, "rademacher", seed=3)
    found, expected = diagonal(operator, **options), mean(v * (a @ v))
    np.testing.assert_allclose(found.value, expected[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.standard_error, expected[1], rtol=1e-11)


@pytest.mark.usefixtures("float64")
def test_deflated_estimates_are_their_definitions_in_numpy():
    a = matrix(DECAYING)
    operator = operator_of(a, "float64")
    # Both are what is left of a trace of about one by a cancellation: 1e-16 relative to that, not to errors of 1e-3.
    expected = hutch_plus_plus_of(a, probes(operator, 20, "rademacher"), probes(operator, 22, "rademacher", first=20))
    np.testing.assert_allclose(fields(hutch_plus_plus(operator, 62, batch_size=8)), expected, rtol=1e-11)
    expected = xtrace_of(a, probes(operator, 20, "normal"))
    np.testing.assert_allclose(fields(xtrace(operator, 40, batch_size=8)), expected, rtol=1e-11)


@pytest.mark.parametrize(
    ("name", "eigenvalues"),
    [
        ("hutchinson", CLUSTERS),
        ("hutchinson", DECAYING),
        ("normal", DECAYING),
        ("frobenius", DECAYING),
        ("hutch++", CLUSTERS),
        ("hutch++", DECAYING),
        ("xtrace", CLUSTERS),
        ("xtrace", DECAYING),
        ("diagonal", CLUSTERS),
    ],
    ids=lambda x: x if isinstance(x, str) else "clusters" if x is CLUSTERS else "decaying",
)
def test_intervals_cover_the_truth_as_often_as_they_say(name, eigenvalues):
    # 95%, a little less often where one eigenvalue dominates and the samples are skewed; 200 repetitions add 1.6%.
    # Few samples are the subject of test_coverage.
    a = matrix(eigenvalues)
    operator = operator_of(a)
    trace = np.trace(a)
    truth, estimate = {
        "hutchinson": (trace, lambda k: hutchinson(operator, 40, seed=k, batch_size=20)),
        "normal": (trace, lambda k: hutchinson(operator, 40, seed=k, distribution="normal", batch_size=20)),
        "frobenius": (np.linalg.norm(a), lambda k: frobenius_norm(operator, 40, seed=k, batch_size=20)),
        "hutch++": (trace, lambda k: hutch_plus_plus(operator, 60, seed=k, batch_size=20)),
        "xtrace": (trace, lambda k: xtrace(operator, 40, seed=k, batch_size=20)),
        "diagonal": (np.diagonal(a), lambda k: diagonal(operator, 40, seed=k, batch_size=20)),
    }[name]
    found = [estimate(k) for k in range(200)]
    values, errors = np.array([e.value for e in found]), np.array([e.standard_error for e in found])
    away = np.abs(values - truth)
    low, high = np.moveaxis(np.array([e.interval() for e in found]), 1, 0)
    assert 0.90 <= np.mean((low <= truth) & (truth <= high)) <= 0.99
    # They are of the right size too, not only often large enough: the repetitions tell the root of their mean square
    # to one in sqrt(2 * 200), twice that for skewed samples.
    ratio = np.sqrt(np.mean(errors**2) / np.mean(away**2))
    assert abs(ratio - 1) < 2 * 2 / np.sqrt(2 * 200)


def test_deflation_pays_where_the_spectrum_decays():
    # Hutchinson's error is sqrt(2/60) |A|_F = 0.19. A sketch of 20 leaves at best the eigenvalues beyond 20, of
    # Frobenius norm 0.006, so that even a poor one is a decade better; XTrace has such a sketch, and as many samples,
    # with two thirds of the products.
    operator = operator_of(matrix(DECAYING))

    def error(method, products: int) -> float:
        values = [method(operator, products, seed=k, batch_size=20).value for k in range(20)]
        return np.sqrt(np.mean((np.array(values) - DECAYING.sum()) ** 2))

    assert error(hutch_plus_plus, 60) < error(hutchinson, 60) / 10
    assert error(xtrace, 40) < error(hutchinson, 40) / 10


@pytest.mark.parametrize(("dtype", "batch_size"), [("float32", 20), ("float64", 8)])
@pytest.mark.parametrize("eigenvalues", [[3.0], [5.0, -4.0, 3.0, -2.0, 1.0], [1e3, 1.0, 1e-3], [0.0]])
def test_low_rank_is_exact(eigenvalues, dtype, batch_size):
    with jax.enable_x64(dtype == "float64"):
        operator = operator_of(matrix(eigenvalues + [0.0] * (100 - len(eigenvalues))), dtype)
        # Each of 20 terms q'Aq is rounded relative to the largest eigenvalue, and so is the product in it.
        rounding = 2 * 20 * float(jnp.finfo(dtype).eps) * max(np.abs(eigenvalues))
        for method, products in ((hutch_plus_plus, 60), (xtrace, 40)):
            found = method(operator, products, batch_size=batch_size)
            assert abs(found.value - sum(eigenvalues)) <= rounding
            assert found.standard_error <= rounding


@pytest.mark.parametrize("method", [hutch_plus_plus, xtrace])
def test_as_many_products_as_rows_are_the_exact_trace(method):
    for n, products in ((1, 1), (7, 7), (7, 300)):
        a = matrix(np.linspace(-1, 2, n))
        found = method(operator_of(a), products, batch_size=4)
        assert abs(found.value - np.trace(a)) <= 1e-6 * n
        assert found.standard_error == 0


def test_one_sample_has_no_standard_error():
    operator = operator_of(matrix(CLUSTERS))
    for estimate in (hutchinson(operator, 1), xtrace(operator, 2)):
        assert np.isfinite(estimate.value)
        assert np.isnan([estimate.standard_error, estimate.freedom, *estimate.interval()]).all()
        assert str(estimate).endswith("(error not known)")


def test_entries_of_a_diagonal_have_student_s_interval():
    found = diagonal(operator_of(matrix(CLUSTERS)), 4)
    low, high = found.interval(0.9)
    assert found.freedom == 3
    np.testing.assert_allclose((high - low) / 2, 2.35336 * found.standard_error, rtol=1e-4)  # tables: t(3), 95%
    assert np.isnan(diagonal(operator_of(matrix(CLUSTERS)), 1).interval()[0]).all()


def test_diagonal_matrices_have_no_error_under_rademacher_probes():
    d = np.linspace(-2, 3, 100)
    found = diagonal(operator_of(np.diag(d)), 40, batch_size=20)
    np.testing.assert_allclose(found.value, d, rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-6)
    assert hutchinson(operator_of(np.diag(d)), 40, batch_size=20).standard_error < 1e-5


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**80])
def test_a_scaled_operator_has_scaled_estimates(factor):
    # By a power of two, and none that under- or overflows: the same rounding, scaled.
    operator = operator_of(matrix(DECAYING))
    scaled = MatrixOperator(jnp.float32(factor) * operator.matrix)
    for method, count in ((hutchinson, 40), (frobenius_norm, 40), (hutch_plus_plus, 60), (xtrace, 40)):
        plain = method(operator, count, batch_size=20)
        found = fields(method(scaled, count, batch_size=20))
        # The error of hutch++ and xtrace is a small difference of numbers of the trace's size, which round by some eps.
        atol = 10 * 2.0**-23 * factor * abs(plain.value)
        np.testing.assert_allclose(found, fields(plain.times(factor)), rtol=1e-5, atol=atol)


def test_narrow_operators_keep_their_vectors_in_float32():
    a = jnp.asarray(matrix(DECAYING), jnp.bfloat16)
    wide, narrow = (hutch_plus_plus(MatrixOperator(m), 60, batch_size=20) for m in (a.astype(jnp.float32), a))
    # The same signs and the same matrix: a sketch in bfloat16 would be orthogonal to 1e-2 only.
    np.testing.assert_allclose(fields(narrow), fields(wide), rtol=1e-4)


def square_loss(params, batch):
    return jnp.sum((batch @ params["kernel"] + params["bias"]) ** 2), 1.0 * batch.shape[0]


@pytest.fixture(scope="module")
def sharded():
    """The Hessian of least squares, its vectors (8 + 16 x 8 entries) in eight shards, and its matrix in closed form."""
    x = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    sharding = NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp"))
    params = jax.device_put({"bias": jnp.zeros(8), "kernel": jnp.zeros((16, 8))}, sharding)
    batch = jax.device_put(jnp.asarray(x), NamedSharding(sharding.mesh, PartitionSpec()))
    extended = np.concatenate([np.ones((40, 1)), x.astype(np.float64)], axis=1)
    return Hessian(square_loss, params, [batch]), np.kron(extended.T @ extended / 20, np.eye(8))


def test_sharded_estimates_are_those_of_the_matrix(sharded):
    # Rounding of products and sums in float32, some of it before a cancellation.
    operator, a = sharded
    signs = probes(operator, 8, "rademacher")
    found = hutch_plus_plus(operator, 12, batch_size=4)
    np.testing.assert_allclose(fields(found), hutch_plus_plus_of(a, signs[:, :4], signs[:, 4:]), rtol=1e-4)
    found = xtrace(operator, 8, batch_size=4)
    np.testing.assert_allclose(fields(found), xtrace_of(a, probes(operator, 4, "normal")), rtol=1e-4)


def test_sharded_diagonals_are_those_of_the_matrix_and_stay_in_shards(sharded):
    operator, a = sharded
    signs = probes(operator, 6, "rademacher")
    for found, expected in zip(diagonal(operator, 6, batch_size=4)[:2], mean(signs * (a @ signs)), strict=True):
        for x, like in zip(jax.tree.leaves(found), jax.tree.leaves(operator.shape_dtype), strict=True):
            assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
        np.testing.assert_allclose(flat(found), expected, rtol=0, atol=1e-6 * np.abs(a).sum(axis=1).max())


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda a: hutchinson(a, 0), "samples is 0"),
        (lambda a: hutchinson(a, 2.5), "samples is 2.5; it must be a whole number"),
        (lambda a: hutchinson(a, 2, distribution="cauchy"), "'normal' or 'rademacher'"),
        (lambda a: hutchinson(a, 2, batch_size=0), "batch_size is 0"),
        (lambda a: frobenius_norm(a, 0), "samples is 0"),
        (lambda a: diagonal(a, 0), "samples is 0"),
        (lambda a: diagonal(a, 3, batch_size=-1), "batch_size is -1"),
        (lambda a: hutch_plus_plus(a, 2), "products is 2; it must be a whole number, at least 3"),
        (lambda a: xtrace(a, 1), "products is 1; it must be a whole number, at least 2"),
        (lambda a: xtrace(a, 4, batch_size=0), "batch_size is 0"),
    ],
)
def test_bad_options_are_refused_before_any_product(run, sentence):
    class Untouchable(MatrixOperator):
        def mv(self, v):
            raise AssertionError("a product was asked for")

    jax.tree_util.register_dataclass(Untouchable, ["matrix"], [])
    with pytest.raises(ValueError, match=sentence):
        run(Untouchable(jnp.eye(9)))


def test_a_sketch_beyond_memory_is_refused():
    class Huge(MatrixOperator):
        @property
        def shape_dtype(self):
            sharding = NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp"))
            return jax.ShapeDtypeStruct((10**12,), jnp.bfloat16, sharding=sharding)

    jax.tree_util.register_dataclass(Huge, ["matrix"], [])
    with pytest.raises(ValueError, match=r"keeps 10 vectors, 5000\.0 GB on each device"):
        xtrace(Huge(jnp.eye(2)), 20)


@pytest.mark.parametrize("method", [diagonal, xtrace])
def test_products_that_are_not_finite_are_named(method):
    finite = MatrixOperator(jnp.eye(9))
    with pytest.raises(InputError, match=r"probe 1 is not finite: term 1 of the sum \(MatrixOperator\)"):
        method(finite + MatrixOperator(jnp.full((9, 9), jnp.inf)), 4)


def test_hutch_plus_plus_does_not_know_its_error_where_few_samples_agree_by_chance():
    found = hutch_plus_plus(MatrixOperator(2 * jnp.eye(9)), 4)
    assert found.value != pytest.approx(18, rel=0.01)
    assert str(found).endswith("(error not known)")
    # Of rank one nothing is left: the trace is exact, and said to be.
    low, high = hutch_plus_plus(MatrixOperator(jnp.diag(jnp.append(jnp.zeros(8), 2.0))), 4).interval()
    assert low <= 2 + 1e-6
    assert high >= 2 - 1e-6
    assert high - low < 1e-4
