"""Meshes and the shardings that follow from logical axes."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxhess import DecoderConfig, make_mesh
from jaxhess.distributed.mesh import across_nodes, partition_spec
from jaxhess.models import abstract_params, initialize, model_shardings


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ("fsdp=3", "needs 3 devices, but 8 are available.*JAX_NUM_CPU_DEVICES=3"),
        ("fsdp=4,fsdp=2", "cannot be read"),
        ("fsdp", "axis=size"),
        ("pipeline=8", "Unknown mesh axis 'pipeline'; the axes are data, fsdp, expert, tensor"),
        ({"fsdp": 0}, "fsdp=0: a size is at least 1"),
    ],
)
def test_bad_meshes_are_refused_in_a_sentence(axes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_mesh(axes)


def test_default_mesh_is_fsdp_over_all_devices():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the order of devices is made from."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "imagined"


def chips(nodes: int, per_node: int, one_process_each: bool) -> list[Chip]:
    """Devices of several nodes in an order that knows nothing of them."""
    found = [
        Chip(id=k, process_index=k if one_process_each else k // per_node, slice_index=k // per_node)
        for k in range(nodes * per_node)
    ]
    if not one_process_each:
        found = [dataclasses.replace(chip, slice_index=None) for chip in found]
    return found[::2] + found[1::2]


@pytest.mark.parametrize("one_process_each", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 4), (2, 4, 4), (4, 1, 8), (1, 32, 1), (4, 4, 2)])
def test_on_several_nodes_tensor_stays_inside_one_and_fsdp_as_far_as_it_fits(shape, one_process_each):
    mesh = across_nodes(shape, chips(4, 8, one_process_each))
    assert mesh.shape == shape
    assert sorted(chip.id for chip in mesh.flat) == list(range(32))
    node = np.vectorize(lambda chip: chip.id // 8)(mesh)
    assert (node == node[..., :1]).all()
    inside = 8 // shape[2]  # places in a node that tensor leaves
    rows = node[..., 0].reshape(shape[0], -1, min(inside, shape[1]))
    assert (rows == rows[..., :1]).all()


def test_a_tensor_axis_that_must_cross_nodes_is_told(recwarn):
    mesh = across_nodes((1, 2, 16), chips(4, 8, True))
    assert "tensor=16 crosses nodes, which have 8 devices each" in str(recwarn.pop().message)
    assert all(len({chip.id // 8 for chip in row}) == 2 for row in mesh[0])  # and no more than it must
    across_nodes((1, 4, 8), chips(4, 8, True))
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"different numbers of devices \(4, 5, 8\)"):
        across_nodes((1, 25, 1), chips(4, 8, True)[:25])


def test_axes_that_do_not_divide_find_another_place():
    mesh = make_mesh("fsdp=4,tensor=2")
    assert partition_spec((512, 256), ("embed", "mlp"), mesh) == P("fsdp", "tensor")
    # An odd vocabulary: the tensor axis joins the cut of the width.
    assert partition_spec((1001, 512), ("vocab", "embed"), mesh) == P(None, ("fsdp", "tensor"))
    # One key head on two devices: likewise.
    assert partition_spec((2, 256, 1, 64), ("layers", "embed", "kv_heads", "head_dim"), mesh) == P(
        None, ("fsdp", "tensor"), None, None
    )
    # A width that does not divide by four: fsdp goes to the other dimension, beside tensor.
    assert partition_spec((250, 512), ("embed", "mlp"), mesh) == P(None, ("tensor", "fsdp"))
    # Nothing divides: whole.
    assert partition_spec((251, 333), ("embed", "mlp"), mesh) == P(None, None)


@pytest.mark.parametrize("axes", ["fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=4"])
def test_no_parameter_is_replicated(axes):
    config = DecoderConfig(
        vocab_size=1001,
        embed_dim=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        head_dim=32,
        mlp_dim=344,
        max_positions=64,
    )
    mesh = make_mesh(axes)
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    shardings = model_shardings(config, mesh)
    whole = sum(x.size for x in jax.tree.leaves(abstract_params(config)))
    local = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype), abstract_params(config), shardings
    )
    assert sum(x.size for x in jax.tree.leaves(local)) <= 1.05 * whole / shards


def test_initial_weights_do_not_depend_on_the_mesh():
    config = DecoderConfig(
        vocab_size=64,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=64,
        max_positions=64,
    )
    alone = initialize(config, jax.random.key(0)).params
    sharded = initialize(config, jax.random.key(0), make_mesh("fsdp=8")).params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((jax.device_get(a) == jax.device_get(b)).all()), alone, sharded))


def test_a_mesh_that_divides_nothing_warns_by_name():
    config = DecoderConfig(
        vocab_size=4097,
        embed_dim=252,
        num_layers=6,
        num_heads=7,
        num_kv_heads=7,
        head_dim=36,
        mlp_dim=756,
        max_positions=8,
    )
    with pytest.warns(UserWarning, match=r"8\.0 times its share .* embed/kernel \[4097, 252\]"):
        model_shardings(config, make_mesh("fsdp=8"))
