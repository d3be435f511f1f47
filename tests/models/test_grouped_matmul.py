"""Grouped products and their derivatives are those of the dense one-hot product, without its work for other groups."""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from small_models import relative

from jaxhess.models import grouped_kernels, grouped_loops
from jaxhess.models.grouped_matmul import grouped_matmul
from jaxhess.models.grouped_tiles import Cut, most_tiles, tiles_of
from jaxhess.plan import gpu
from jaxhess.plan.hlo import matmul_flops


def dense(rows, kernels, sizes):
    """Every row with every kernel, of which a one-hot number keeps its own."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(len(rows))[:, None]
    own = ((row >= ends - sizes) & (row < ends)).astype(rows.dtype)
    return jnp.einsum("re,rd,edf->rf", own, rows, kernels)


def arrays(rows, groups, seed=0, dtype="float64", vectors=()):
    numbers = np.random.default_rng(seed)
    shapes = (*vectors, rows, 6), (*vectors, groups, 6, 5)
    return tuple(jnp.asarray(numbers.normal(size=s), dtype) for s in shapes)


def derivatives(matmul, x, v, sizes):
    """Value, gradient, and product of the Hessian of a loss that is not linear in what is returned."""

    def loss(x):
        out = matmul(*x, sizes)
        return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    gradient, product = jax.jvp(jax.grad(loss), (x,), (v,))
    return matmul(*x, sizes), gradient, product


def agree(ours, theirs):
    """To float64's rounding of sums of at most a few hundred numbers of moderate size."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


SIZES = {
    "ragged": (90, [7, 40, 1, 42]),
    "empty groups, rows of none": (90, [0, 40, 0, 0, 37, 0]),
    "one group": (90, [90]),
    "all rows of one": (90, [0, 0, 90]),
    "fewer rows than a tile": (5, [2, 3]),
    "no rows of any": (9, [0, 0]),
    "many small": (40, [3] * 12),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("rows", "sizes"), SIZES.values(), ids=SIZES)
def test_value_gradient_and_exact_product_are_those_of_the_dense_product(rows, sizes):
    x, v = (arrays(rows, len(sizes), seed) for seed in (0, 1))
    agree(*(jax.jit(functools.partial(derivatives, f))(x, v, jnp.array(sizes)) for f in (grouped_matmul, dense)))


def test_tiles_are_those_of_the_groups_rows():
    for rows, sizes in itertools.islice(SIZES.values(), 2):
        for size in (4, 16):
            count, tiles = jax.tree.map(np.asarray, tiles_of(jnp.array(sizes, jnp.int32), rows, size))
            assert count <= len(tiles.group) == most_tiles(rows, len(sizes), size)
            own = [list(range(f, min(f + size, e))) for f, e in zip(tiles.first, tiles.end, strict=True)]
            assert list(itertools.chain(*own)) == list(range(sum(sizes)))
            groups = [int(g) for g, these in zip(tiles.group, own, strict=True) for _ in these]
            assert groups == [g for g, n in enumerate(sizes) for _ in range(n)]
            assert not any(own[count:])


@pytest.mark.usefixtures("float64")
def test_layers_scanned_and_recomputed_several_vectors_at_once_and_linearised():
    """The gated feed-forward of a mixture."""
    sizes = jnp.array([13, 0, 9], jnp.int32)

    def draw(seed, vectors=()):
        numbers = np.random.default_rng(seed)
        shapes = (24, 6), *(2 * [(2, 3, 6, 8)]), (2, 3, 8, 6)
        return [jnp.asarray(numbers.normal(size=(*vectors, *s)) / 2) for s in shapes]

    def loss(matmul, x):
        def layer(rows, kernels):
            gate, up, down = kernels
            hidden = jax.nn.silu(matmul(rows, gate, sizes)) * matmul(rows, up, sizes)
            return rows + matmul(hidden, down, sizes), None

        rows, *kernels = x
        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), rows, kernels)[0]))

    @functools.partial(jax.jit, static_argnums=0)
    def products(matmul, x, vs):
        gradient = jax.grad(functools.partial(loss, matmul))
        return jax.vmap(lambda v: jax.jvp(gradient, (x,), (v,))[1])(vs)

    @jax.jit
    def linearized(x, vs):
        return jax.vmap(jax.linearize(jax.grad(functools.partial(loss, grouped_matmul)), x)[1])(vs)

    x, vs = draw(0), draw(1, (8,))
    expected = products(dense, x, vs)
    assert relative(products(grouped_matmul, x, vs), expected) < 1e-12
    assert relative(linearized(x, vs), expected) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ((0, 0, None), [4, 0, 7]),
        ((0, None, None), [4, 0, 7]),
        ((None, 0, None), [4, 0, 7]),
        ((None, 0, 0), [[4, 0, 7], [1, 9, 1]]),
    ],
)
def test_derivatives_of_several_products_at_once(axes, sizes):
    """Each of the arrays is one for all, or one for each."""
    x, v = (arrays(12, 3, seed, vectors=(2,)) for seed in (0, 1))
    x, v = ([a if axis == 0 else a[0] for a, axis in zip(z, axes[:2], strict=True)] for z in (x, v))
    several = [jax.vmap(f, in_axes=axes) for f in (grouped_matmul, dense)]
    agree(*(jax.jit(functools.partial(derivatives, f))(x, v, jnp.array(sizes)) for f in several))


@pytest.mark.usefixtures("float64")
def test_vectors_of_vectors():
    rows, kernels = arrays(6, 2, vectors=(2, 3))
    several = [jax.vmap(jax.vmap(f, in_axes=(0, 0, None)), in_axes=(0, 0, None)) for f in (grouped_matmul, dense)]
    agree(*(jax.jit(f)(rows, kernels, jnp.array([4, 1])) for f in several))


def test_no_row_is_multiplied_with_another_groups_kernel():
    rows, groups, width, columns, vectors = 1024, 8, 16, 32, 8

    def operations(axes):
        shapes = (rows, width), (groups, width, columns)
        shapes = [s if axis is None else (vectors, *s) for s, axis in zip(shapes, axes, strict=True)]
        given = *(jax.ShapeDtypeStruct(s, "float32") for s in shapes), jax.ShapeDtypeStruct((groups,), "int32")
        found = grouped_matmul if axes == (None, None) else jax.vmap(grouped_matmul, in_axes=(*axes, None))
        return matmul_flops(jax.jit(found).lower(*given).compile())

    single = operations((None, None))
    assert single < 1.25 * 2 * rows * width * columns
    assert operations((None, 0)) == operations((0, 0)) == vectors * single
    assert vectors * 2 * rows * width * columns < operations((0, None)) <= vectors * single  # the tiles are fuller


def test_in_bfloat16_sums_are_accumulated_in_float32():
    x, v = arrays(90, 4, 0, "bfloat16"), arrays(90, 4, 1, "bfloat16")
    sizes = jnp.array([7, 40, 1, 42])
    found = jax.jit(functools.partial(derivatives, grouped_matmul))(x, v, sizes)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    rows = jnp.ones((300, 6), "bfloat16")  # bfloat16 does not count further than 256
    summed = jax.grad(lambda k: jnp.sum(grouped_matmul(rows, k, jnp.array([0, 300])).astype("float32")))
    np.testing.assert_array_equal(
        summed(jnp.ones((2, 6, 5), "bfloat16")), np.array([0, 300])[:, None, None] + np.zeros((2, 6, 5))
    )


@pytest.mark.parametrize("how", ["loop", "kernel"])
def test_rows_of_no_group_give_zeros_whatever_they_are(how):
    rows, kernels = arrays(20, 3, dtype="float32")
    rows = rows.at[12:].set(jnp.nan)
    others = jnp.full((20, 5), jnp.inf).at[:12].set(1)
    sizes = jnp.array([5, 0, 7], jnp.int32)
    if how == "loop":
        product, outer = functools.partial(grouped_loops.product, transposed=False), grouped_loops.outer
    else:
        small = {"precision": None, "cut": Cut(16, 16, 16, 4, 1), "interpret": True}
        product = functools.partial(grouped_kernels.product_kernel, transposed=False, **small)
        outer = functools.partial(grouped_kernels.outer_kernel, **small)
    found = product(rows, kernels, sizes)
    assert jnp.all(jnp.isfinite(found[:12]))
    assert jnp.all(found[12:] == 0)
    summed = outer(rows, others, sizes)
    assert jnp.all(jnp.isfinite(summed))
    assert jnp.all(summed[1] == 0)


KERNELS = {
    "ragged": (50, [7, 20, 0, 13], 24, 20),
    "fewer rows than a tile": (9, [4, 5], 16, 16),
    "wider than a block": (70, [0, 0, 70], 40, 33),
}


@pytest.mark.parametrize(
    ("case", "several"),
    [
        ("ragged", (False, False)),
        ("ragged", (True, False)),
        ("ragged", (False, True)),
        ("ragged", (True, True)),
        ("fewer rows than a tile", (False, False)),
        ("wider than a block", (False, True)),
    ],
)
def test_kernels_for_gpus_are_the_loops(case, several):
    count, sizes, width, columns = KERNELS[case]
    numbers = np.random.default_rng(0)
    sizes = jnp.array(sizes, jnp.int32)

    def draw(*shape):
        return jnp.asarray(numbers.normal(size=shape), "float32")

    how = {"precision": None, "cut": Cut(16, 16, 16, 4, 1), "interpret": True}
    rows, others = (
        draw(*([count, 2, n] if more else [count, n])) for n, more in zip((width, columns), several, strict=True)
    )
    pairs = [(grouped_kernels.outer_kernel(rows, others, sizes, **how), grouped_loops.outer(rows, others, sizes))]
    kernels = draw(*([2] if any(several) else []), len(sizes), width, columns)
    for given, transposed in ((rows, False), (others, True)):
        ours = grouped_kernels.product_kernel(given, kernels, sizes, transposed=transposed, **how)
        pairs.append((ours, grouped_loops.product(given, kernels, sizes, transposed=transposed)))
    for ours, theirs in pairs:
        # Sums of at most 70 products of a few units, in another order.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=70 * 10 * 2**-23)


@pytest.mark.usefixtures("float64")
def test_every_device_has_experts_and_rows_of_its_own():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    cut = PartitionSpec("expert")
    sharded = jax.shard_map(grouped_matmul, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut, check_vma=False)

    def apart(rows, kernels, sizes):
        parts = zip(*(jnp.split(x, 4) for x in (rows, kernels, sizes)), strict=True)
        return jnp.concatenate([dense(*part) for part in parts])

    x, v = (arrays(40, 8, seed) for seed in (0, 1))
    sizes = jnp.array([3, 2, 0, 9, 4, 4, 0, 0], jnp.int32)
    agree(*(jax.jit(functools.partial(derivatives, f))(x, v, sizes) for f in (sharded, apart)))


def test_products_are_made_later_in_the_precision_of_the_call():
    def product(*given):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(jnp.sin(grouped_matmul(*given)))

    program = str(jax.make_jaxpr(jax.grad(product, (0, 1)))(*arrays(6, 2, dtype="float32"), jnp.array([4, 2])))
    assert program.count("precision=highest") == 3


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((4, 6), (2, 5, 3), (2,)), ("float32", "float32", "int32"), r"Rows \(4, 6\), kernels \(2, 5, 3\)"),
        (((4, 6), (2, 6, 3), (3,)), ("float32", "float32", "int32"), r"sizes \(3,\) do not fit"),
        (((4, 6), (2, 6, 3), (2,)), ("float32", "bfloat16", "int32"), "kernels bfloat16"),
        (((4, 6), (2, 6, 3), (2,)), ("float32", "float32", "float32"), "sizes integers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(shapes, dtypes, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*(jnp.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True)))


COMPILE = """
import functools, jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxhess import plan
from jaxhess.models.grouped_matmul import grouped_matmul

jax.config.update("jax_enable_x64", True)

def products(card, dtype, vectors, precision, count, width, hidden, groups):
    mesh = Mesh(plan.gpu_devices(card, 1), "x")
    place = NamedSharding(mesh, PartitionSpec())

    def loss(rows, kernels, sizes):
        with jax.default_matmul_precision(precision):
            matmul = functools.partial(grouped_matmul, sizes=sizes, mesh=mesh)
            gate, up, down = kernels
            return jnp.sum(jnp.sin(matmul(jax.nn.silu(matmul(rows, gate)) * matmul(rows, up), down)))

    def product(x, v, sizes):
        return jax.jvp(lambda x: jax.grad(loss, (0, 1))(*x, sizes), (x,), (v,))[1]

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def arrays(*lead):
        kernels = 2 * [struct(*lead, groups, width, hidden)] + [struct(*lead, groups, hidden, width)]
        return struct(*lead, count, width), kernels

    several = jax.vmap(product, in_axes=(None, 0, None)) if vectors else product
    given = arrays(), arrays(*[vectors] if vectors else []), struct(groups, dtype="int32")
    compiled = jax.jit(several).lower(*given).compile()
    # The exact product of as many rows with one dense feed-forward has 22 products of these sizes.
    return plan.hlo.matmul_flops(compiled) / (22 * 2 * count * width * hidden * max(1, vectors))

single, eight = (products("H200", "bfloat16", n, "highest", 16384, 2048, 768, 64) for n in (0, 8))
assert 1 < single < 1.25, single
assert eight < 0.85 * single, (single, eight)
for card, dtype, precision in (
    ("H200", "float32", "highest"),
    ("H100", "float32", "BF16_BF16_F32_X3"),
    ("H100", "float16", "highest"),
    ("H100", "float64", "highest"),
    ("A100-80GB", "bfloat16", "highest"),
    ("A100-80GB", "float32", "TF32_TF32_F32"),
    ("B200", "bfloat16", "highest"),
):
    for count, width, hidden, groups in ((16384, 2880, 720, 8), (100, 24, 40, 4)):
        products(card, dtype, 2, precision, count, width, hidden, groups)
        print(card, dtype, precision, count, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not gpu.available(), reason="needs the extra gpu-plan")
def test_kernels_compile_for_gpus_and_do_the_work_of_the_active_experts_alone():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
