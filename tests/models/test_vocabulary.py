"""The output matrix in slices: the same loss, curvature and draws as from all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhess import make_mesh
from jaxhess.distributed import mesh as mesh_rules
from jaxhess.distributed.mesh import batch_sharding, param_shardings
from jaxhess.models import vocabulary
from jaxhess.models.likelihood import draw_tokens, head_curvature
from jaxhess.models.losses import cross_entropy_sum
from jaxhess.models.vocabulary import vocabulary_slices
from jaxhess.plan.hlo import read_program

WIDTH = 16


def data(vocab: int, seed: int = 0):
    """States [4, 6, D], output matrix [V, D], targets and weights [4, 6], one weight being zero."""
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (4, 6, WIDTH))
    table = jax.random.normal(keys[1], (vocab, WIDTH))
    weights = jnp.ones((4, 6)).at[1, 2].set(0)
    return hidden, table, jax.random.randint(keys[2], (4, 6), 0, vocab), weights


def plain_sum(hidden, table, targets, weights):
    log_p = jax.nn.log_softmax(hidden @ table.T)
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0])


@pytest.mark.parametrize(
    ("vocab", "axes", "count"),
    [
        (12, None, 3),
        (101, None, 3),
        (101, "fsdp=4,tensor=2", 3),
        (96, "fsdp=4,tensor=2", 2),
        (97, "data=4,tensor=2", 3),
    ],
)
def test_slices_give_the_loss_its_gradient_and_its_second_derivative(vocab, axes, count):
    mesh = None if axes is None else make_mesh(axes)
    hidden, table, targets, weights = data(vocab)
    shape = table.shape
    if mesh is not None:
        table = jax.device_put(table, param_shardings(table, ("vocab", "embed"), mesh))
        hidden, targets, weights = (jax.device_put(x, batch_sharding(mesh)) for x in (hidden, targets, weights))

    def sliced_sum(hidden, table, targets, weights):
        held = shape[0] if mesh is None or shape[0] % mesh.shape["tensor"] else shape[0] // mesh.shape["tensor"]
        slices = vocabulary_slices(table, 4, 4 * -(-held // count), 0, mesh)
        assert len(slices) == count
        return cross_entropy_sum(hidden, slices, targets, weights)

    direction = data(vocab, seed=1)[:2]

    def derivatives(f):
        gradient = jax.grad(f, argnums=(0, 1))
        first = gradient(hidden, table, targets, weights)
        return (
            f(hidden, table, targets, weights),
            first,
            jax.jvp(lambda h, t: gradient(h, t, targets, weights), (hidden, table), direction)[1],
        )

    found, expected = jax.jit(derivatives, static_argnums=0)(sliced_sum), derivatives(plain_sum)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_slices_give_the_curvature_of_all_logits(chunk):
    hidden, table, targets, weights = data(23)
    hidden_tangent, table_tangent, *_ = data(23, seed=1)
    for labels in (None, jnp.stack([targets, (targets + 1) % 23], axis=-1)):
        slices, changes = (vocabulary_slices(x, 4, chunk, 0, None) for x in (table, table_tangent))
        pulled, kernels = head_curvature(hidden, slices, hidden_tangent, changes.kernels, weights, labels)

        def logits(h, t):
            return h @ t.T

        z, push = jax.linearize(logits, hidden, table)
        p, dz = jax.nn.softmax(z), push(hidden_tangent, table_tangent)
        if labels is None:
            curved = p * (dz - jnp.sum(p * dz, -1, keepdims=True))
        else:
            scores = p[..., None, :] - jax.nn.one_hot(labels, 23)  # [4, 6, S, V]
            curved = jnp.mean(scores * jnp.sum(scores * dz[..., None, :], -1, keepdims=True), axis=-2)
        expected = jax.linear_transpose(push, hidden, table)(weights[..., None] * curved)
        for a, b in zip((pulled, slices.merged(kernels)), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.max(jnp.abs(b))))


def test_draws_follow_the_softmax_and_do_not_depend_on_slices():
    hidden, table, *_ = data(23)
    hidden = hidden[:1, :2] / 2
    keys = jax.random.split(jax.random.key(1), 1)
    draw = jax.jit(draw_tokens, static_argnums=3)
    whole = np.asarray(draw(hidden, vocabulary_slices(table, 1, 10**6, 0, None), keys, 20_000))
    sliced = np.asarray(draw(hidden, vocabulary_slices(table, 1, 5, 0, None), keys, 20_000))
    assert (whole != sliced).mean() < 1e-3  # products of another shape may round differently, and tip a tie
    p = np.asarray(jax.nn.softmax(hidden @ table.T))[0]
    for t in range(2):
        counts = np.bincount(whole[0, t], minlength=23)
        expected = 20_000 * p[t]
        chi_squared = np.sum((counts - expected)[expected > 5] ** 2 / expected[expected > 5])
        assert chi_squared < 60  # 22 degrees of freedom: exceeded once in 50,000 times


def test_slices_in_bfloat16_round_no_more_than_one_slice_does():
    hidden, table, targets, weights = data(211)
    exact = jax.grad(plain_sum)(hidden, table, targets, weights)
    narrow = [x.astype(jnp.bfloat16) for x in (hidden, table)]
    errors = []
    for chunk in (10**6, 4):  # of one token: one slice, or 53
        slices = vocabulary_slices(narrow[1], 1, chunk, 0, None)
        found = jax.jit(jax.grad(cross_entropy_sum))(narrow[0], slices, targets, weights)
        errors.append(float(jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)))
    assert errors[1] < 1.5 * errors[0] < 0.02


@pytest.mark.parametrize("axes", ["fsdp=4,tensor=2", "fsdp=8"])
def test_no_more_than_a_slice_is_gathered(monkeypatch, axes):
    monkeypatch.setattr(vocabulary, "GATHERED", 64)
    monkeypatch.setattr(mesh_rules, "WHOLE_BELOW", 0)
    mesh = make_mesh(axes)
    vocab, width = 96, 16 if "tensor" in axes else 18  # eight devices do not divide 18: the vocabulary is cut instead
    hidden, table, targets, weights = data(vocab)
    hidden, table = (jnp.tile(x, 2)[..., :width] for x in (hidden, table))
    table = jax.device_put(table, param_shardings(table, ("vocab", "embed"), mesh))
    hidden, targets, weights = (
        jax.device_put(jnp.concatenate([x, x]), batch_sharding(mesh)) for x in (hidden, targets, weights)
    )

    def product(table, v, hidden, targets, weights):
        def total(table):
            slices = vocabulary_slices(table, 6, 10**6, 16 * width, mesh)
            return cross_entropy_sum(hidden, slices, targets, weights)

        return jax.jvp(jax.grad(total), (table,), (v,))[1]

    compiled = jax.jit(product).lower(table, table, hidden, targets, weights).compile()
    gathered = [
        np.prod(shape)
        for computation in read_program(compiled).computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "all-gather"
        for dtype, shape in instruction.arrays
        if dtype == "f32"
    ]
    assert 2 <= max(gathered) / width <= 16  # rows, of 48 or 96 that the table has along `fsdp`
