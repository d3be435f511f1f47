"""Grouped matrix products and their derivatives are those of the dense one-hot product, and no work is done for rows of
other groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import relative

from jaxhess import InputError
from jaxhess.models.grouped_matmul import grouped_matmul
from jaxhess.plan.hlo import matmul_flops


def dense(rows, kernels, sizes):
    """Every row with every kernel, of which a one-hot number keeps its own."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(len(rows))[:, None]
    own = ((row >= ends - sizes) & (row < ends)).astype(rows.dtype)
    rows = jnp.where(own.any(1, keepdims=True), rows, 0)
    return jnp.einsum("re,rd,edf->rf", own, rows, kernels)


def arrays(rows, sizes, width=6, out=5, seed=0, dtype="float64"):
    numbers = np.random.default_rng(seed)
    shapes = (rows, width), (len(sizes), width, out)
    return tuple(jnp.asarray(numbers.normal(size=s), dtype) for s in shapes)


SIZES = {
    "ragged": (90, [7, 40, 1, 42]),
    "empty experts, rows of none": (90, [0, 40, 0, 0, 37, 0]),
    "one expert": (90, [90]),
    "all rows of one": (90, [0, 0, 90]),
    "fewer rows than a tile": (5, [2, 3]),
    "no rows of any": (9, [0, 0]),
    "many small": (40, [3] * 12),
}


def derivatives(matmul, x, v, sizes):
    def loss(x):
        out = matmul(*x, sizes)
        return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    gradient, product = jax.jvp(jax.grad(loss), (x,), (v,))
    return matmul(*x, sizes), gradient, product


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("rows", "sizes"), SIZES.values(), ids=SIZES)
def test_value_gradient_and_exact_product_are_those_of_the_dense_product(rows, sizes):
    x, v = arrays(rows, sizes), arrays(rows, sizes, seed=1)
    sizes = jnp.array(sizes, jnp.int32)
    ours, theirs = (jax.jit(functools.partial(derivatives, f))(x, v, sizes) for f in (grouped_matmul, dense))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def feed_forward(matmul, x, sizes):
    """A gated feed-forward of each expert, as mixtures have it, in layers that are scanned and recomputed."""
    rows, layers = x

    def layer(rows, kernels):
        gate, up, down = kernels
        hidden = jax.nn.silu(matmul(rows, gate, sizes)) * matmul(rows, up, sizes)
        return rows + matmul(hidden, down, sizes), None

    return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), rows, layers)[0]))


def feed_forward_arrays(vectors=(), seed=0, rows=24, groups=3, width=6, hidden=8):
    numbers = np.random.default_rng(seed)
    shapes = (rows, width), *(2 * [(2, groups, width, hidden)]), (2, groups, hidden, width)
    found = [jnp.asarray(numbers.normal(size=(*vectors, *s)) / 2) for s in shapes]
    return found[0], tuple(found[1:])


@pytest.mark.usefixtures("float64")
def test_layers_scanned_and_recomputed_several_vectors_at_once_and_linearised():
    sizes = jnp.array([13, 0, 9], jnp.int32)
    x, vs = feed_forward_arrays(), feed_forward_arrays((8,), seed=1)

    @functools.partial(jax.jit, static_argnums=0)
    def products(matmul, x, vs):
        gradient = jax.grad(functools.partial(feed_forward, matmul))
        return jax.vmap(lambda v: jax.jvp(lambda x: gradient(x, sizes), (x,), (v,))[1])(vs)

    @jax.jit
    def linearized(x, vs):
        return jax.vmap(
            jax.linearize(lambda x: jax.grad(functools.partial(feed_forward, grouped_matmul))(x, sizes), x)[1]
        )(vs)

    expected = products(dense, x, vs)
    assert relative(products(grouped_matmul, x, vs), expected) < 1e-12
    assert relative(linearized(x, vs), expected) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes_differ", [False, True])
def test_several_arrays_at_once_and_derivatives_of_that(sizes_differ):
    """Each of the arrays is one for all vectors, or one for each; and gradients are taken of all at once."""
    sizes = jnp.array([[4, 0, 7], [1, 9, 1]], jnp.int32) if sizes_differ else jnp.array([4, 0, 7], jnp.int32)
    x, v = (
        [jnp.stack(pair) for pair in zip(*(arrays(12, [0] * 3, seed=s) for s in seeds), strict=True)]
        for seeds in ((0, 1), (2, 3))
    )
    for axes in ((0, 0), (0, None), (None, 0)):
        given, changes = ([a if axis == 0 else a[0] for a, axis in zip(z, axes, strict=True)] for z in (x, v))
        found = []
        for matmul in (grouped_matmul, dense):
            many = jax.vmap(matmul, in_axes=(*axes, 0 if sizes_differ else None))
            found.append(jax.jit(functools.partial(derivatives, many))(given, changes, sizes))
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
