"""One second moment per block: Adam where a block is an entry, and partitions that cover what they say."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhess
from jaxhess.models import abstract_params
from scripts.training import block_adam as script
from scripts.training.block_adam import adamw, authors_blocks, block_adamw, hessian_blocks, scale_by_block_adam
from scripts.training.small_decoder import byte_config

PARAMS = {"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.zeros(2)}


def gradients(count: int) -> list:
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PARAMS) for _ in range(count)]


def ends(rule: optax.GradientTransformation) -> dict:
    params, state = PARAMS, rule.init(PARAMS)
    for gradient in gradients(4):
        updates, state = rule.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_blocks_of_one_entry_are_adamw():
    entries = jaxhess.Blocks.by(PARAMS, "matrices").split("*", 0).split("a/kernel", 1)
    assert len(entries) == 8

    def rate(count):
        return 0.1 / (count + 1)

    ours, theirs = ends(block_adamw(rate, entries)), ends(adamw(rate))
    # Four steps of at most 0.1 with a few roundings each, and entries of size 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, theirs)
    whole = ends(block_adamw(rate, jaxhess.Blocks.by(PARAMS, "matrices")))
    assert np.abs(whole["a"]["kernel"] - theirs["a"]["kernel"]).max() > 1e-3


def test_the_update_is_the_first_moment_over_the_root_mean_square_of_the_block():
    rule = scale_by_block_adam(jaxhess.Blocks.by(PARAMS, "matrices"), b1=0.5, b2=0.75, eps=0.0)
    state = rule.init(PARAMS)
    first, second = gradients(2)
    _, state = rule.update(first, state)
    update, state = rule.update(second, state)
    for name, (g1, g2) in {"a": (first["a"]["kernel"], second["a"]["kernel"]), "b": (first["b"], second["b"])}.items():
        mean = (0.25 * g1 + 0.5 * g2) / (1 - 0.5**2)
        square = (0.75 * 0.25 * (g1**2).mean() + 0.25 * (g2**2).mean()) / (1 - 0.75**2)
        found = update["a"]["kernel"] if name == "a" else update["b"]
        np.testing.assert_allclose(found, mean / np.sqrt(square), rtol=1e-5)
    assert state.nu.shape == (2,)


def test_partitions_of_a_decoder():
    width, layers, heads = 16, 2, 2
    like = abstract_params(byte_config(width, layers, heads, 8))
    total = sum(x.size for x in jax.tree.leaves(like))
    norms = 2 + 4 * layers
    queries = 2 * 2 * heads * layers  # kernels and biases of queries and keys
    rows = 2 * (width + width + 4 * width + width) * layers  # of value, out, up, down: kernels and biases
    found = hessian_blocks(like)
    assert len(found) == 2 * 256 + norms + queries + rows
    assert found.sizes.sum() == total
    sizes = dict(zip(found.names, found.sizes.tolist(), strict=True))
    assert sizes["embed/kernel[65]"] == width
    assert sizes["layers/1/attention/query/kernel[1]"] == width * width // heads
    assert sizes["layers/0/mlp/down/kernel[3]"] == 4 * width
    arrays = 8 * layers  # of value, out, up, down
    assert len(authors_blocks(like)) == 2 * 256 * width + norms + queries + arrays
    with pytest.raises(jaxhess.InputError, match="No parameter matches 'embed/kernel'"):
        hessian_blocks(PARAMS)


def test_blocks_of_other_parameters_are_refused():
    with pytest.raises(jaxhess.InputError, match="The blocks are of other vectors"):
        scale_by_block_adam(jaxhess.Blocks.by(PARAMS, "matrices")).init({"a": jnp.ones(2)})


def test_the_examples_run():
    assert doctest.testmod(script).failed == 0
