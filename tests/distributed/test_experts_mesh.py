"""Experts on eight simulated devices: the products of one device, and nothing larger than a layer's part gathered."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL, batch_of, relative, scaled_up, tokens

from jaxhess import Hessian, Microbatches, RopeConfig, make_mesh, random_probe
from jaxhess.data import TokenBatch
from jaxhess.distributed.mesh import WHOLE_BELOW, batch_sharding
from jaxhess.models import ExpertsConfig, LatentConfig, initialize
from jaxhess.plan.hlo import read_program

EXPERTS = ExpertsConfig(num_experts=8, top_k=2, mlp_dim=48, layers=(False, True, True, True))
WIDE = dataclasses.replace(SMALL, dtype="float64", num_layers=4, embed_dim=64, num_heads=4, num_kv_heads=2)
DEEPSEEK = dataclasses.replace(
    WIDE,
    qk_norm=False,
    num_kv_heads=4,
    latent=LatentConfig(kv_rank=24, query_rank=16, value_dim=8),
    rope=RopeConfig(dims=4, interleaved=True),
    experts=dataclasses.replace(
        EXPERTS, scores="sigmoid", selection_bias=True, groups=4, top_groups=2, group_score="best two", shared_dim=24
    ),
)
GPT_OSS = dataclasses.replace(
    WIDE,
    activation="clamped_silu",
    qkv_bias=True,
    out_bias=True,
    attention_sinks=True,
    experts=dataclasses.replace(EXPERTS, layers=(), scores="softmax of chosen", router_bias=True, bias=True),
)
CASES = [
    pytest.param(config, axes, sequences, id=f"{name} {axes} {sequences}", marks=mark)
    for name, config, axes, sequences, mark in [
        ("deepseek", DEEPSEEK, "fsdp=2,expert=4", 8, pytest.mark.slow),
        ("deepseek", DEEPSEEK, "fsdp=8", 8, pytest.mark.study),
        ("deepseek", DEEPSEEK, "expert=8", 8, pytest.mark.study),
        ("deepseek", DEEPSEEK, "fsdp=2,expert=2,tensor=2", 8, pytest.mark.study),
        ("deepseek", DEEPSEEK, "expert=4", 8, pytest.mark.study),
        ("gpt-oss", GPT_OSS, "expert=4,tensor=2", 8, pytest.mark.study),
        ("gpt-oss", GPT_OSS, "fsdp=2,expert=2,tensor=2", 3, pytest.mark.study),
        ("gpt-oss", GPT_OSS, "fsdp=2,expert=4", 3, pytest.mark.study),
        ("gpt-oss", GPT_OSS, "data=2,expert=4", 8, pytest.mark.slow),
    ]
]


def random_everywhere(model):
    """Biases, sinks and gains too, which are zero or one at first; the same on every mesh."""
    keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(model.params))))
    add = lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape, x.dtype) if x.ndim <= 3 else x  # noqa: E731
    return dataclasses.replace(model, params=jax.tree.map(add, model.params))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("config", "axes", "sequences"), CASES)
def test_exact_products_do_not_depend_on_the_mesh_and_gather_a_layers_part(config, axes, sequences):
    alone = random_everywhere(scaled_up(initialize(config, jax.random.key(0))))
    ids = tokens(sequences, 8, 101)
    operator = Hessian(alone.loss(4096), alone.params, [batch_of(ids, np.ones((sequences, 8)))])
    v = random_probe(jax.random.key(1), operator.shape_dtype)
    expected = jax.jit(lambda op, x: op.mv(x))(operator, v)
    if config.experts.selection_bias:
        assert not np.asarray(expected["layers"]["experts"]["selection_bias"]).any()

    mesh = make_mesh(axes, jax.devices()[: math.prod(int(part.split("=")[1]) for part in axes.split(","))])
    model = initialize(config, jax.random.key(0), mesh)
    place = lambda tree: jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, model.params)  # noqa: E731
    batch = TokenBatch(jnp.asarray(ids)[None], jnp.ones((1, sequences, 8)))
    if sequences % mesh.size == 0:
        batch = jax.device_put(batch, batch_sharding(mesh, axis=1))
    operator = Hessian(model.loss(4096), place(alone.params), Microbatches(batch))
    compiled = jax.jit(lambda op, x: op.mv(x)).lower(operator, place(v)).compile()
    assert relative(jax.device_get(compiled(operator, place(v))), jax.device_get(expected)) < 1e-10

    gathered = [
        math.prod(shape)
        for computation in read_program(compiled).computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "all-gather"
        for dtype, shape in instruction.arrays
        if dtype == "f64"
    ]
    # A device's experts in one layer, or some rows of the output matrix.
    own = 8 // mesh.shape["expert"] * 64 * 48 // mesh.shape["tensor"]
    assert max(gathered) <= max(own, 101 * 64)
    for x in jax.tree.leaves(operator.params):
        if x.size >= WHOLE_BELOW:
            assert math.prod(x.sharding.shard_shape(x.shape)) * mesh.size == x.size * mesh.shape["data"]
