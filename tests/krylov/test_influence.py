"""Influence of training examples against retraining without them in closed form, and against dense float64 solves."""

import dataclasses
import sys
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_models import TINY, batch_of, network, random_model, tokens

import jaxhess
from jaxhess import BlockDiagonal, Blocks, FiniteDifferenceHessian, GaussNewton, Hessian, SoftmaxCrossEntropy
from jaxhess.distributed.mesh import batch_sharding
from jaxhess.errors import InputError

MODULE = sys.modules["jaxhess.krylov.influence"]  # the function of its name stands before it
DRAW = np.random.default_rng(0).normal
X, NEW = DRAW(size=(24, 5)), DRAW(size=(3, 5))
LABELS = np.random.default_rng(1).integers(0, 3, 24)
WEIGHTS = DRAW(size=(5, 3))


def squares(w, batch):
    x, y = batch
    return jnp.sum((x @ w - y) ** 2), x.shape[0]


def outputs(w, batch):
    return jnp.sum(batch @ w), batch.shape[0]


def logits(params, inputs):
    return inputs @ params["kernel"] + params["bias"]


CROSS_ENTROPY = SoftmaxCrossEntropy(logits)


def by_kind(w, batch):
    """Squared errors of training pairs, and the mean prediction of new inputs alone."""
    return squares(w, batch) if isinstance(batch, tuple) else outputs(w, batch)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_ridge_regression_without_each_example(float64, damping):
    # Without example i the solution moves by A^-1 g_i / (n (1 - h_i)), h_i its leverage: the prediction is first order
    # in 1 / n, and lacks that factor. The test loss is linear in the weights.
    y = X @ DRAW(size=5) + DRAW(size=24)
    a = 2 * X.T @ X / 24 + damping * np.eye(5)
    w = np.linalg.solve(a, 2 * X.T @ y / 24)
    H = Hessian(by_kind, jnp.asarray(w), [(jnp.asarray(X), jnp.asarray(y))], accumulation_dtype="float64")
    found = jaxhess.influence(H, [jnp.asarray(NEW)], damping=damping, tolerance=1e-12)
    leverage = np.einsum("ij,ij->i", X, np.linalg.solve(a, 2 * X.T / 24).T)
    for i in range(24):
        kept = np.arange(24) != i
        retrained = np.linalg.solve(2 * X[kept].T @ X[kept] / 24 + damping * np.eye(5), 2 * X[kept].T @ y[kept] / 24)
        change = NEW.mean(0) @ (retrained - w)
        assert found.scores[i] == pytest.approx(change * (1 - leverage[i]), rel=1e-9, abs=1e-12)


def softmax_regression(dtype: str = "float64") -> Hessian:
    params = {"bias": jnp.zeros(3, dtype), "kernel": jnp.asarray(WEIGHTS, dtype)}
    batches = [(jnp.asarray(X[k], dtype), jnp.asarray(LABELS[k])) for k in (slice(0, 10), slice(10, 20), slice(20, 24))]
    return Hessian(CROSS_ENTROPY, params, batches)


def dense(damping: float, keep: np.ndarray | None = None) -> np.ndarray:
    """Scores by the textbook's gradients and Hessian of softmax regression; entries of the latter by a mask."""
    wide = np.concatenate([np.ones((24, 1)), X], axis=1)
    new = np.concatenate([np.ones((3, 1)), NEW], axis=1)

    def slopes(inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = inputs[:, 1:] @ WEIGHTS
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        return p, np.einsum("ni,nc->nic", inputs, p - np.eye(3)[labels]).reshape(len(inputs), -1)

    p, g = slopes(wide, LABELS)
    curved = np.einsum("nc,cd->ncd", p, np.eye(3)) - np.einsum("nc,nd->ncd", p, p)
    h = np.einsum("ni,nj,ncd->icjd", wide, wide, curved).reshape(18, 18) / 24
    h = h if keep is None else np.where(keep, h, 0)
    return g @ np.linalg.solve(h + damping * np.eye(18), slopes(new, np.array([0, 1, 2]))[1].mean(0)) / 24


TEST = (jnp.asarray(NEW, jnp.float32), jnp.arange(3))


def test_every_curvature_gives_the_scores_of_its_dense_matrix(float64):
    H = softmax_regression()
    fields = {"loss": H.loss, "params": H.params, "batches": H.batches}
    blocks = Blocks.by(H, "matrices")  # bias, which is the first row of the dense matrix's features, and kernel
    first = np.arange(18) < 3
    everything, apart = dense(0.1), dense(0.1, first[:, None] == first[None])
    assert np.abs(everything - apart).max() > 0.01 * np.abs(everything).max()
    test = [(jnp.asarray(NEW), jnp.arange(3))]
    for curvature, expected, error in (
        (None, everything, 1e-10),
        (GaussNewton(**fields), everything, 1e-10),  # equal for linear logits
        (BlockDiagonal(H, blocks), apart, 1e-10),
        (FiniteDifferenceHessian(**fields, step=1e-4), everything, 1e-6),  # truncation is of the order of step^2
    ):
        found = jaxhess.influence(H, test, curvature=curvature, damping=0.1, tolerance=max(1e-12, error / 100))
        np.testing.assert_allclose(found.scores, expected, rtol=0, atol=error * np.abs(expected).max())
        assert found.solution.converged


def test_a_restricted_operator_moves_its_own_parameters_alone(float64):
    H = softmax_regression().restrict("kernel")
    keep = np.zeros((18, 18), bool)
    keep[3:, 3:] = True
    # With the bias decoupled and its gradients left out: large curvature holds it still.
    found = jaxhess.influence(H, [(jnp.asarray(NEW), jnp.arange(3))], damping=0.1, tolerance=1e-12)
    with_bias = dense(0.1, keep)
    bias_alone = jaxhess.influence(
        softmax_regression().restrict("bias"),
        [(jnp.asarray(NEW), jnp.arange(3))],
        curvature=0.0 * softmax_regression().restrict("bias"),
        damping=0.1,
        tolerance=1e-12,
    )
    np.testing.assert_allclose(found.scores + bias_alone.scores, with_bias, atol=1e-9 * np.abs(with_bias).max())


def test_weights_and_padding_count_as_in_the_loss():
    H = softmax_regression("float32")
    x, labels = jnp.asarray(X, jnp.float32), jnp.asarray(LABELS)
    padded = (jnp.concatenate([x, x[:2]]), jnp.concatenate([labels, labels[:2]]), jnp.array([1.0] * 24 + [0.0] * 2))
    padded = dataclasses.replace(H, batches=jaxhess.Hessian(H.loss, H.params, [padded]).batches)
    plain = jaxhess.influence(H, [TEST], damping=0.1, tolerance=1e-5).scores
    found = jaxhess.influence(padded, [TEST], damping=0.1, tolerance=1e-5).scores
    np.testing.assert_array_equal(found[24:], 0)
    # The tolerance of the solve in a matrix whose condition number is below 20.
    np.testing.assert_allclose(found[:24], plain, atol=20 * 1e-5 * np.abs(plain).max())


def test_scores_do_not_depend_on_the_mesh():
    one = network(sizes=(8, 8))
    mesh = jaxhess.make_mesh("data=2,fsdp=4")
    cut, rows = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "fsdp"), (None, "data")))
    params = {
        "layers": jax.device_put(one.params["layers"], cut),
        "out": jax.device_put(one.params["out"], NamedSharding(mesh, PartitionSpec("fsdp"))),
    }
    batches = tuple(jaxhess.Microbatches(jax.device_put(group.stacked, rows)) for group in one.batches)
    test = [jax.tree.map(lambda x: x[0, :3] + 1, one.batches[0].stacked)]
    alone = jaxhess.influence(one, test, damping=10.0)
    many = jaxhess.influence(Hessian(one.loss, params, batches), test, damping=10.0)
    assert alone.scores.shape == (16,)
    assert many.solution.solution["layers"].sharding.is_equivalent_to(cut, 3)
    assert max(alone.solution.residual, many.solution.residual) <= 1e-4
    # Each solve errs by its tolerance of 1e-4 times a condition number of 4, relative to |x| |g_i|.
    np.testing.assert_allclose(alone.scores, many.scores, atol=5e-3 * np.abs(alone.scores).max())


@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.slow), pytest.param("bfloat16", marks=pytest.mark.study)]
)
def test_sequences_of_a_language_model(dtype):
    config = dataclasses.replace(TINY, dtype=dtype)
    stacked = jnp.asarray(tokens(8, 6, TINY.vocab_size)).reshape(2, 4, 7)
    test = [batch_of(tokens(2, 6, TINY.vocab_size, seed=2))]
    found = []
    for mesh in (None, jaxhess.make_mesh("data=2,fsdp=4")):
        model = random_model(config, mesh)
        batches = jaxhess.data.TokenBatch(stacked, jnp.ones((2, 4, 6)))
        if mesh is not None:
            batches = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "data")))
        G = GaussNewton(model.loss(), model.params, jaxhess.Microbatches(batches))
        found.append(jaxhess.influence(G, test, damping=1.0, tolerance=1e-2 if dtype == "bfloat16" else 1e-4).scores)
    one, eight = found
    assert one.shape == (8,)
    assert (one != 0).all()
    # The damped matrix's smallest eigenvalue is one; of products in bfloat16 the rounding is a few hundredths.
    np.testing.assert_allclose(one, eight, atol=(0.1 if dtype == "bfloat16" else 2e-3) * np.abs(one).max())


def saddle(w, x):
    return jnp.sum(x @ jnp.array([1.0, -0.5]) * 0 + w[0] ** 2 - 0.25 * w[1] ** 2 + x @ w), x.shape[0]


def test_an_indefinite_curvature_is_refused_with_the_damping_that_does():
    H = Hessian(saddle, jnp.zeros(2), [jnp.eye(2)])  # eigenvalues 2 and -0.5
    with pytest.raises(InputError, match=r"Ritz values of the curvature go from -0.5 to 2. Take a damping above 0.5"):
        jaxhess.influence(H, [jnp.ones((1, 2))], damping=0.4)
    found = jaxhess.influence(H, [jnp.ones((1, 2))], damping=0.6)
    # Each example's gradient is its input, the test gradient (1, 1), the count 2; w[0] has 2.6, w[1] 0.1.
    np.testing.assert_allclose(found.scores, [1 / 2.6 / 2, 1 / 0.1 / 2], rtol=1e-4)


def test_a_singular_curvature_asks_for_damping():
    G = GaussNewton(CROSS_ENTROPY, softmax_regression("float32").params, [(jnp.ones((2, 5)), jnp.array([0, 1]))])
    with pytest.raises(InputError, match=r"not positive definite.*Take a damping above"):
        jaxhess.influence(G, [TEST], tolerance=1e-6)


def test_a_solve_that_has_not_converged_is_told():
    H = softmax_regression("float32")
    with pytest.warns(UserWarning, match="after 1 steps the residual is .*, not 0.0001. Use more max_steps"):
        found = jaxhess.influence(H, [TEST], damping=0.1, max_steps=1)
    assert not found.solution.converged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxhess.influence(H, [TEST], damping=0.1)


def test_products_that_are_not_symmetric_are_told():
    # Ritz values of 1 do not explain a direction without curvature at a damping of 0.5.
    error = MODULE._not_positive(jaxhess.MatrixOperator(jnp.eye(2)), jnp.ones(2), 0.5, 1)
    assert "from 1 to 1: its products are not symmetric to the needed accuracy" in str(error)


class Weighted(NamedTuple):
    x: jax.Array
    weights: jax.Array


def squared_weights(w, batch):
    """Named, as weights, but the loss is not proportional to them."""
    return jnp.sum(batch.weights**2 * (batch.x - w) ** 2), batch.x.shape[0]


def proportional(w, batch):
    return jnp.sum(batch.weights * (batch.x - w) ** 2), batch.x.shape[0]


@pytest.mark.parametrize(("loss", "power"), [(squared_weights, 2), (proportional, 1)])
def test_weights_are_those_of_the_loss(loss, power):
    weights, x = np.array([1.0, 2.0, 3.0]), np.array([1.0, -1.0, 2.0])
    H = Hessian(loss, jnp.array(0.5), [Weighted(jnp.asarray(x), jnp.asarray(weights))])
    assert MODULE._check_examples(H) == [power == 1]
    scores = jaxhess.influence(H, [Weighted(jnp.array([1.0]), jnp.array([1.0]))], damping=0.1).scores
    curvature = 2 * (weights**power).mean() + 0.1
    np.testing.assert_allclose(scores, -1.0 / curvature * 2 * weights**power * (0.5 - x) / 3, rtol=1e-4)


def test_slopes_on_a_mesh_cost_a_pass_of_the_whole_batch():
    mesh = jaxhess.make_mesh("data=2,fsdp=4")
    model = random_model(TINY, mesh)
    stacked = jaxhess.data.TokenBatch(jnp.asarray(tokens(16, 8, TINY.vocab_size))[None], jnp.ones((1, 16, 8)))
    G = GaussNewton(model.loss(), model.params, jaxhess.Microbatches(jax.device_put(stacked, batch_sharding(mesh, 1))))

    def along(operator, group, direction):
        def slope(batch):
            return jax.jvp(lambda free: operator.sum_and_count(free, batch)[0], (operator.free,), (direction,))[1]

        return jax.lax.map(slope, group.stacked)

    arguments = (G, G.batches[0], G.params)
    programs = [
        lowered.compile()
        for lowered in (
            jax.jit(along).lower(*arguments),
            MODULE._slopes.lower(*arguments, True),
            MODULE._slopes.lower(*arguments, False),
        )
    ]
    whole, weighted, apart = (program.cost_analysis()["flops"] for program in programs)
    # A factor of the weights is less than a hundredth of it; a batch that is not cut costs more than half again.
    assert weighted < 1.1 * whole
    assert apart > 1.5 * whole
    assert MODULE._check_examples(G) == [True]
    found = [program(*arguments) for program in programs[1:]]
    np.testing.assert_allclose(*found, atol=1e-4 * np.abs(found[1]).max())


def contrastive(w, x):
    """Every example against the others of its batch."""
    scaled = x * w
    return -jnp.sum(jnp.diagonal(jax.nn.log_softmax(scaled @ scaled.T))), x.shape[0]


def normalised(w, x):
    """With the statistics of the batch."""
    return jnp.sum(((x - x.mean(0)) / (x.std(0) + 1) - w) ** 2), x.shape[0]


def mean_of_squares(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


@pytest.mark.parametrize(
    ("training", "test", "options", "sentence"),
    [
        (
            Hessian(mean_of_squares, jnp.zeros(2), [(jnp.eye(2), jnp.ones(2))]),
            [(jnp.eye(2), jnp.ones(2))],
            {},
            r"The count of a batch is 1 and its examples' counts add up to 2.*Return \(sum, count\)",
        ),
        (
            Hessian(contrastive, jnp.ones(2), [jnp.eye(2)]),
            [jnp.eye(2)],
            {},
            r"The loss of a batch is 0.626523 and its examples' losses, each computed alone, add up to -?0: influence",
        ),
        (
            Hessian(normalised, jnp.ones(2), [jnp.eye(2)]),
            [jnp.eye(2)],
            {},
            "a sum over examples, without batch statistics",
        ),
        (
            Hessian(squares, jnp.zeros(2), [(jnp.eye(2), jnp.ones(1))]),
            [(jnp.eye(2), jnp.ones(2))],
            {},
            r"shapes \(2, 2\), \(1,\): its examples are along a first axis",
        ),
        (
            Hessian(squares, jnp.zeros(2), [(jnp.eye(2), jnp.ones(2))]),
            [(jnp.eye(2), jnp.full(2, jnp.nan))],
            {},
            "The loss of microbatch 0 is nan",
        ),
        (
            Hessian(squares, jnp.zeros(2), [(jnp.eye(2), jnp.ones(2))]),
            [],
            {},
            "batches is empty",
        ),
        (
            Hessian(squares, jnp.zeros(2), [(jnp.eye(2), jnp.ones(2))]),
            [(jnp.eye(2), jnp.ones(2))],
            {"curvature": jaxhess.MatrixOperator(jnp.eye(3))},
            r"shape \(3,\); it must be \(2,\)",
        ),
        (
            Hessian(squares, jnp.zeros(2), [(jnp.eye(2), jnp.ones(2))]),
            [(jnp.eye(2), jnp.ones(2))],
            {"damping": -1.0},
            "damping is -1.0",
        ),
    ],
)
def test_bad_input_is_refused(training, test, options, sentence):
    with pytest.raises(InputError, match=sentence):
        jaxhess.influence(training, test, **options)
