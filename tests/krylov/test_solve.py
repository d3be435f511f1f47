"""Conjugate gradients against dense solutions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_models import matrix, operator_of

from jaxhess import Hessian, MatrixOperator, make_mesh
from jaxhess.errors import InputError
from jaxhess.krylov.solve import conjugate_gradients
from jaxhess.operators import LinearOperator

SPREAD = np.logspace(-2, 2, 60)
CLUSTERS = np.repeat([1.0, 10.0, 30.0], 20)
B = np.random.default_rng(1).normal(size=60)


def solve(operator: LinearOperator, b, **options):
    """With one number of steps for most tests, and so one compilation."""
    return conjugate_gradients(operator, b, max_steps=400, **options)


def relative_residual(a: np.ndarray, x, b: np.ndarray) -> float:
    return float(np.linalg.norm(b - a @ np.asarray(x, np.float64)) / np.linalg.norm(b))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(
    ("eigenvalues", "damping"),
    [(SPREAD, 0.0), (SPREAD, 0.3), (CLUSTERS, 0.0), (np.linspace(-1, 5, 60), 1.1), (np.zeros(60), 2.0)],
    ids=["spread", "damped", "clusters", "indefinite-damped", "zero-damped"],
)
def test_solutions_are_those_of_the_dense_system(eigenvalues, damping, dtype, tolerance):
    a = matrix(eigenvalues)
    damped = a + damping * np.eye(60)
    condition = np.linalg.cond(damped)
    with jax.enable_x64(dtype == "float64"):
        eps = float(jnp.finfo(dtype).eps)
        tolerance = max(tolerance, eps * condition)  # below, rounding of x decides
        found = solve(operator_of(a, dtype), jnp.asarray(B, dtype), damping=damping, tolerance=tolerance)
    assert found.converged
    assert not found.nonpositive_curvature
    assert found.history[-1] <= tolerance < found.history[:-1].min()
    # Measured in the dtype: a product of rows of 60 is off by eps |A||x|, at most eps cond(A) |b|.
    residual = relative_residual(damped, found.solution, B)
    assert abs(found.residual - residual) <= 4 * eps * condition
    # |x - x*| = |A^-1 r| <= |r| / smallest, and |x*| >= |b| / largest.
    exact = np.linalg.solve(damped, B)
    error = np.linalg.norm(np.asarray(found.solution, np.float64) - exact) / np.linalg.norm(exact)
    assert error <= condition * residual * (1 + 1e-9)


@pytest.mark.usefixtures("float64")
def test_as_many_steps_as_distinct_eigenvalues():
    a = matrix(CLUSTERS)
    found = solve(operator_of(a, "float64"), jnp.asarray(B), tolerance=1e-12)
    assert len(found.history) - 1 == 3
    assert relative_residual(a, found.solution, B) <= 2e-12


@pytest.mark.usefixtures("float64")
def test_errors_are_the_smallest_of_their_krylov_space():
    # The law that defines the method: x_k minimises the energy norm of the error over the Krylov space of dimension k.
    a, steps = matrix(np.linspace(0.1, 5, 60)), 12
    found = conjugate_gradients(operator_of(a, "float64"), jnp.asarray(B), max_steps=steps)
    assert not found.converged
    assert len(found.history) == steps + 1
    basis = np.linalg.qr(np.stack([np.linalg.matrix_power(a / 5, k) @ B for k in range(steps)], axis=1))[0]
    best = basis @ np.linalg.solve(basis.T @ a @ basis, basis.T @ B)
    # The powers of A are a basis of condition about 1e8 at k = 12.
    np.testing.assert_allclose(found.solution, best, rtol=0, atol=1e-7 * np.linalg.norm(best))
    assert abs(found.history[-1] - relative_residual(a, best, B)) <= 1e-6


@pytest.mark.usefixtures("float64")
def test_history_is_that_of_the_true_residuals():
    a = matrix(SPREAD)
    whole = solve(operator_of(a, "float64"), jnp.asarray(B), tolerance=1e-10)
    assert whole.history[0] == pytest.approx(1, rel=1e-15)
    # The recursion's residual parts from the true one by rounding, eps times the condition number of 1e4 in a step.
    assert abs(whole.history[-1] - whole.residual) <= 400 * 1e4 * 2.3e-16
    # Residuals may rise, but none above sqrt(cond): the energy norm of the error, which bounds them, only falls.
    assert whole.history.max() <= 1e2


def test_what_float32_cannot_reach_has_not_converged():
    # Condition number 1e4: x, and so the residual, is rounded by up to eps times that, 1e-3, which no recursion sees.
    a = np.asarray(jnp.asarray(matrix(SPREAD), jnp.float32), np.float64)
    found = solve(operator_of(a), jnp.asarray(B, jnp.float32), tolerance=1e-6)
    assert not found.converged
    assert not found.nonpositive_curvature
    assert found.residual == pytest.approx(relative_residual(a, found.solution, B), rel=0.5)
    assert found.residual > 1e-5


def test_converged_is_said_of_the_measured_residual():
    # Three decades of eigenvalues: where the recursion says 1e-5 the measured residual is two to four times that.
    a = np.asarray(jnp.asarray(matrix(np.logspace(-1.5, 1.5, 60)), jnp.float32), np.float64)
    for seed in range(3):
        b = np.random.default_rng(seed).normal(size=60)
        found = solve(operator_of(a), jnp.asarray(b, jnp.float32), tolerance=1e-5)
        assert found.converged == (found.residual <= 1e-5)
        assert abs(found.residual - relative_residual(a, found.solution, b)) <= 4 * 1e3 * 1.2e-7
        assert found.history[-1] == np.float32(found.residual)  # the recursion had reached the tolerance


def test_a_preconditioner_that_is_the_inverse_needs_one_step():
    a = matrix(SPREAD)
    inverse = operator_of(np.linalg.inv(a))
    b = jnp.asarray(B, jnp.float32)
    # Rounding of both matrices leaves up to eps cond(A) = 1e-3.
    found = solve(operator_of(a), b, tolerance=2e-3, preconditioner=inverse)
    assert found.converged
    assert len(found.history) == 2
    with pytest.raises(ValueError, match="preconditioner M is not positive definite: r'M r is not positive at step 0"):
        solve(operator_of(a), b, preconditioner=operator_of(-np.linalg.inv(a)))


@pytest.mark.parametrize("smallest", [-1.0, -1e-3, 0.0])
def test_nonpositive_curvature_stops_the_run(smallest):
    # In the eigenvector of the smallest eigenvalue b has a sixtieth of its square; in that of the largest as well.
    a = matrix(np.concatenate([[smallest], np.linspace(1, 5, 59)]))
    found = solve(operator_of(a), jnp.asarray(B, jnp.float32))
    assert found.nonpositive_curvature
    assert not found.converged
    assert len(found.history) < 61
    assert found.residual == pytest.approx(found.history[-1], rel=1e-3)
    assert solve(operator_of(a), jnp.asarray(B, jnp.float32), damping=2.0).converged


def test_a_direction_of_negative_curvature_at_once_leaves_zero():
    found = solve(operator_of(-matrix(CLUSTERS)), jnp.asarray(B, jnp.float32))
    assert found.nonpositive_curvature
    np.testing.assert_array_equal(found.solution, np.zeros(60))
    np.testing.assert_allclose(found.history, [1], rtol=1e-6)
    assert found.residual == pytest.approx(1, rel=1e-6)


def test_zero_gives_zero():
    found = solve(operator_of(matrix(CLUSTERS)), jnp.zeros(60))
    assert found.converged
    assert found.residual == 0
    np.testing.assert_array_equal(found.history, [0])
    np.testing.assert_array_equal(found.solution, np.zeros(60))


@pytest.mark.parametrize(("of_matrix", "of_b"), [(2.0**-80, 1.0), (1.0, 2.0**-90), (2.0**60, 2.0**60)])
def test_scales_do_not_matter(of_matrix, of_b):
    operator, b = operator_of(matrix(CLUSTERS)), jnp.asarray(B, jnp.float32)
    plain = solve(operator, b)
    scaled = solve(MatrixOperator(jnp.float32(of_matrix) * operator.matrix), jnp.float32(of_b) * b)
    np.testing.assert_allclose(scaled.history, plain.history, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(scaled.solution, of_b / of_matrix * np.asarray(plain.solution), rtol=1e-4, atol=0)


def test_narrow_operators_are_solved_in_float32():
    a = jnp.asarray(matrix(CLUSTERS), jnp.bfloat16)
    found = conjugate_gradients(MatrixOperator(a), jnp.asarray(B, jnp.bfloat16))
    assert found.solution.dtype == jnp.float32
    b = np.asarray(jnp.asarray(B, jnp.bfloat16), np.float64)
    assert found.converged
    # Vectors rounded to bfloat16 would leave 1e-2.
    assert relative_residual(np.asarray(a, np.float64), found.solution, b) <= 1e-5


def square_loss(params, batch):
    return jnp.sum((batch @ params["kernel"] + params["bias"]) ** 2), 1.0 * batch.shape[0]


def test_a_sharded_tree_is_solved_in_its_shards():
    # Least squares of a linear layer: its Hessian is known, 2 X'X / 40 for each output, X with a column of ones.
    draw = np.random.default_rng(0).normal
    x = draw(size=(40, 8))
    b = {"bias": draw(size=8), "kernel": draw(size=(8, 8))}
    sharding = NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp"))
    params = jax.device_put({"bias": jnp.zeros(8), "kernel": jnp.zeros((8, 8))}, sharding)
    batch = jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(sharding.mesh, PartitionSpec()))
    right = jax.tree.map(lambda e: jnp.asarray(e, jnp.float32), b)
    found = conjugate_gradients(Hessian(square_loss, params, [batch]), right, damping=0.1)
    assert all(e.sharding.is_equivalent_to(sharding, e.ndim) for e in jax.tree.leaves(found.solution))
    extended = np.concatenate([np.ones((40, 1)), x], axis=1)
    exact = np.linalg.solve(
        extended.T @ extended / 20 + 0.1 * np.eye(9), np.concatenate([b["bias"][None], b["kernel"]])
    )
    solution = np.concatenate([np.asarray(found.solution["bias"])[None], np.asarray(found.solution["kernel"])])
    # The tolerance of 1e-6 times a condition number of about 20.
    assert np.linalg.norm(solution - exact) <= 1e-6 * 20 * np.linalg.norm(exact)


def test_another_damping_tolerance_or_limit_compiles_nothing_again():
    traced = []

    class Counting(MatrixOperator):
        def mv(self, v):
            traced.append(1)
            return super().mv(v)

    jax.tree_util.register_dataclass(Counting, ["matrix"], [])
    operator = Counting(jnp.asarray(matrix(CLUSTERS), jnp.float32))
    conjugate_gradients(operator, jnp.ones(60))
    before = len(traced)
    conjugate_gradients(operator, 2 * jnp.ones(60), damping=0.5, tolerance=1e-3)
    conjugate_gradients(operator, jnp.ones(60), max_steps=1)
    assert len(conjugate_gradients(operator, jnp.asarray(B, jnp.float32), max_steps=2).history) == 3
    conjugate_gradients(operator, jnp.ones(60), max_steps=1023)
    assert len(traced) == before


@pytest.mark.parametrize(
    ("b", "options", "sentence"),
    [
        (jnp.ones(4), {}, r"shape \(4,\); it must be \(3,\)"),
        ({"x": jnp.ones(3)}, {}, "structure"),
        (jnp.arange(3), {}, "floating point"),
        (jnp.array([1.0, jnp.nan, 0.0]), {}, "b has entries that are not finite"),
        (jnp.ones(3), {"damping": -1.0}, "damping is -1.0"),
        (jnp.ones(3), {"damping": float("nan")}, "damping is nan"),
        (jnp.ones(3), {"tolerance": 0.0}, "tolerance is 0.0"),
        (jnp.ones(3), {"tolerance": 1.0}, "tolerance is 1.0"),
        (jnp.ones(3), {"max_steps": 0}, "max_steps is 0"),
        (jnp.ones(3), {"max_steps": 2.5}, "max_steps is 2.5"),
        (jnp.ones(3), {"preconditioner": MatrixOperator(jnp.eye(4))}, r"shape \(4,\); it must be \(3,\)"),
    ],
)
def test_bad_input_is_refused_before_any_product(b, options, sentence):
    class Untouchable(MatrixOperator):
        def mv(self, v):
            raise AssertionError("a product was asked for")

    jax.tree_util.register_dataclass(Untouchable, ["matrix"], [])
    with pytest.raises(ValueError, match=sentence):
        conjugate_gradients(Untouchable(jnp.eye(3)), b, **options)


def test_products_that_are_not_finite_are_named():
    operator = MatrixOperator(jnp.eye(3)) + MatrixOperator(jnp.full((3, 3), jnp.nan))
    with pytest.raises(InputError, match=r"step 1 of conjugate gradients is not finite: term 1 of the sum"):
        conjugate_gradients(operator, jnp.ones(3))
