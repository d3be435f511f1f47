"""Laws of the vector algebra, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from convert.text import load_blocks
from jaxhess import MatrixOperator, audit, leading_eigenpairs, make_mesh, random_probe, spectrum
from jaxhess.data import random_blocks
from jaxhess.krylov import diagonal, hutch_plus_plus, hutchinson, xtrace
from jaxhess.vectors import add_basis_sum, add_scaled, basis_dot, basis_sum, dot, in_order, norm, random_key, scale


def tree(seed: int, dtype=jnp.float32):
    a, b = jax.random.split(jax.random.key(seed))
    return {"a": jax.random.normal(a, (16, 33), dtype), "b": [jax.random.normal(b, (1000,), dtype)]}


def flat(x) -> np.ndarray:
    return np.concatenate([np.asarray(e, np.float64).ravel() for e in jax.tree.leaves(x)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dot_accumulates_in_float32(dtype):
    x, y = tree(0, dtype), tree(1, dtype)
    product = dot(x, y)
    assert product.dtype == jnp.float32
    # Rounding of 1,528 products summed in float32; bf16 accumulation would be off by 1e-2.
    np.testing.assert_allclose(product, flat(x) @ flat(y), rtol=0, atol=1e-6 * norm(x) * norm(y))


def test_dot_of_many_small_entries_does_not_stagnate():
    # 2^24 equal terms: a sequential float32 sum would stop growing at 2^24 units of the first.
    x = jnp.full((20_000_000,), 3e-4, jnp.float32)
    np.testing.assert_allclose(dot(x, x), 20_000_000 * np.float64(np.float32(3e-4)) ** 2, rtol=1e-6)


def test_linear_combinations_match_numpy():
    x, y = tree(0), tree(1)
    np.testing.assert_allclose(flat(add_scaled(y, jnp.float32(-0.3), x)), flat(y) - 0.3 * flat(x), rtol=0, atol=1e-6)
    np.testing.assert_allclose(flat(scale(jnp.float32(2.5), x)), 2.5 * flat(x), rtol=1e-6)


def test_basis_products_match_numpy():
    vectors = [tree(k) for k in range(5)]
    basis = jax.tree.map(lambda *v: jnp.stack(v), *vectors)
    x = tree(9)
    dense = np.stack([flat(v) for v in vectors])
    np.testing.assert_allclose(basis_dot(basis, x), dense @ flat(x), rtol=0, atol=1e-4)
    c = jnp.arange(5.0)
    np.testing.assert_allclose(flat(basis_sum(c, basis)), np.arange(5.0) @ dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 8, 9, 11, 24])  # several rounds, and a last one that overlaps the one before
def test_a_sum_of_many_vectors_takes_each_once(dtype, rows):
    basis = jax.tree.map(lambda *v: jnp.stack(v).astype(dtype), *[tree(k) for k in range(rows)])
    y, c = tree(99), jax.random.normal(jax.random.key(0), rows)
    dense = np.stack([flat(jax.tree.map(lambda b, k=k: b[k].astype("float32"), basis)) for k in range(rows)])
    expected = flat(y) + np.asarray(c, np.float64) @ dense
    np.testing.assert_allclose(flat(add_basis_sum(y, c, basis)), expected, rtol=0, atol=1e-5)


def test_a_norm_reads_the_vector_once_unless_its_squares_vanish():
    # A conditional that XLA turns into a choice would scale every vector by its largest entry, and sum it again.
    for batched, name in ((norm, "one"), (jax.vmap(norm), "several")):
        program = jax.jit(batched).lower(jnp.ones((3, 1000))).compile().as_text()
        assert program.count(" conditional(") == 1, name
    tiny = jnp.array([[3.0, 4.0], [3e-25, 4e-25], [0.0, 0.0], [3e30, 4e30]])
    np.testing.assert_allclose(jax.vmap(norm)(tiny), [5, 5e-25, 0, 5e30], rtol=1e-6)


def test_leaves_are_put_in_order_on_every_device():
    sharding = NamedSharding(make_mesh("fsdp=4,tensor=2"), PartitionSpec("fsdp", None, "tensor"))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (8, 3, 6)), sharding)
    lowered = jax.jit(lambda x: in_order([x], [sharding])[0]).lower(x)
    assert jnp.array_equal(lowered.compile()(x), x)
    assert "LayoutConstraint" in lowered.as_text()
    text = lowered.compile().as_text()
    assert "all-gather" not in text  # of the constraint alone the partitioner would make one of the whole array


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_probes_are_the_same_bits_on_every_mesh(distribution):
    like = {"w": jax.ShapeDtypeStruct((24, 40), jnp.float32), "odd": jax.ShapeDtypeStruct((8, 17), jnp.float32)}
    key = jax.random.key(3, impl="threefry2x32")
    alone = random_probe(key, like, distribution)
    for axes in ("fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=4"):
        sharding = NamedSharding(make_mesh(axes), PartitionSpec("fsdp"))
        placed = jax.tree.map(lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like)
        probe = random_probe(key, placed, distribution)
        assert all(x.sharding == sharding for x in jax.tree.leaves(probe))
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(probe), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_probe_leaves_are_independent_and_unit_variance():
    like = {name: jax.ShapeDtypeStruct((100_000,), jnp.float32) for name in "abc"}
    for distribution in ("normal", "rademacher"):
        x = np.stack([np.asarray(v, np.float64) for v in random_probe(jax.random.key(0), like, distribution).values()])
        # Standard errors of the entries of a sample covariance of 1e5 draws are at most sqrt(2/1e5) = 0.0045.
        np.testing.assert_allclose(np.cov(x), np.eye(3), atol=5 * 0.0045)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 1.0, True])
def test_a_seed_that_jax_would_cut_is_refused_before_any_product(seed):
    class Untouchable(MatrixOperator):
        def mv(self, v):
            raise AssertionError("a product was asked for")

        def validate(self):
            raise AssertionError("the loss was asked for")

    jax.tree_util.register_dataclass(Untouchable, ["matrix"], [])
    operator = Untouchable(jnp.eye(4))
    entries = (
        lambda: random_key(seed),
        lambda: spectrum(operator, steps=2, seed=seed),
        lambda: leading_eigenpairs(operator, 1, steps=2, seed=seed),
        lambda: audit(operator, seed=seed),
        lambda: hutchinson(operator, 2, seed=seed),
        lambda: diagonal(operator, 2, seed=seed),
        lambda: hutch_plus_plus(operator, 3, seed=seed),
        lambda: xtrace(operator, 2, seed=seed),
        lambda: random_blocks(seq_len=2, vocab_size=3, sequences=1, seed=seed),
        lambda: load_blocks("random", "none", seq_len=2, vocab_size=3, sequences=1, seed=seed),
    )
    for entry in entries:
        with pytest.raises(ValueError, match=r"The seed is .*; it must be a whole number from 0 to 2\^32 - 1"):
            entry()


def test_the_largest_seed_is_another_than_zero():
    keys = [jax.random.key_data(random_key(seed)) for seed in (0, np.int64(2**32 - 1))]
    assert (np.asarray(keys[0]) != np.asarray(keys[1])).any()


def test_probe_refuses_integers_and_unknown_distributions():
    with pytest.raises(ValueError, match=r"Leaf \['n'\] has dtype int32"):
        random_probe(jax.random.key(0), {"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="'normal' or 'rademacher'"):
        random_probe(jax.random.key(0), {"n": jnp.ones(3)}, "cauchy")
