"""Bytes through collectives equal those counted by hand; products and Lanczos steps exchange no more than they must."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_models import SMALL, Diagonal

from jaxhess import Hessian, Microbatches, Storage, make_mesh
from jaxhess.data import TokenBatch
from jaxhess.distributed.mesh import batch_sharding
from jaxhess.krylov import abstract_lanczos, compile_segment
from jaxhess.models import abstract_params, model_shardings
from jaxhess.models.language_model import NextTokenLoss
from jaxhess.operators.base import compiled_mv
from jaxhess.plan.collectives import KINDS, bytes_by_kind, collective_traffic, replica_groups
from jaxhess.plan.compiled import gradient
from jaxhess.plan.hlo import Program

P = PartitionSpec
N = 1024 * 512 * 4  # bytes of the matrix that is exchanged


def program(f, mesh, out, *arguments):
    structs = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
    return jax.jit(f, out_shardings=NamedSharding(mesh, out)).lower(*structs).compile()


WHOLE, ROWS, COLUMNS = P(), P("fsdp"), P(None, "fsdp")
MATRIX = (1024, 512)


@pytest.mark.parametrize(
    ("f", "out", "arguments", "expected"),
    [
        (lambda x: x, WHOLE, [(MATRIX, ROWS)], {"all-gather": 7 / 8 * N}),
        (lambda x: x, COLUMNS, [(MATRIX, ROWS)], {"all-to-all": 7 / 8 * N / 8}),
        (lambda x, y: x @ y, WHOLE, [((1024, 64), COLUMNS), ((64, 512), ROWS)], {"all-reduce": 2 * 7 / 8 * N}),
        (lambda x, y: x @ y, ROWS, [((1024, 64), COLUMNS), ((64, 512), ROWS)], {"reduce-scatter": 7 / 8 * N}),
        # The sum of two products is reduced once.
        (
            lambda x, y: x @ y + (2 * x) @ y,
            WHOLE,
            [((1024, 64), COLUMNS), ((64, 512), ROWS)],
            {"all-reduce": 14 / 8 * N},
        ),
        (
            lambda x, y: x @ y + (2 * x) @ y,
            ROWS,
            [((1024, 64), COLUMNS), ((64, 512), ROWS)],
            {"reduce-scatter": 7 / 8 * N},
        ),
    ],
    ids=["gather", "transpose", "reduce", "scatter", "two reductions", "two scatters"],
)
def test_bytes_equal_the_analytic_count(f, out, arguments, expected):
    traffic = collective_traffic(program(f, make_mesh("fsdp=8"), out, *arguments))
    assert bytes_by_kind(traffic) == {**dict.fromkeys(KINDS, 0.0), **expected}
    assert {(t.group, t.reach) for t in traffic} == {(8, 8)}


def test_a_loops_collectives_count_as_often_as_it_runs():
    mesh = make_mesh("fsdp=8")

    def layer(h, w):
        return jnp.tanh(h @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, WHOLE))), None

    def scanned(h, layers):
        return jax.lax.scan(layer, h, layers)[0]

    compiled = program(scanned, mesh, ROWS, ((8, 64), ROWS), ((5, 64, 64), P(None, "fsdp")))
    assert bytes_by_kind(collective_traffic(compiled))["all-gather"] == 5 * 7 / 8 * 64 * 64 * 4


SUM = """ENTRY %main (x: f32[8,4], i: s32[]) -> (f32[1,4], f32[8,4]) {
  %x = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %sum = f32[8,4]{1,0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
  %own = f32[1,4]{1,0} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={1,4}
  ROOT %out = (f32[1,4]{1,0}, f32[8,4]{1,0}) tuple(%own, USED)
}
"""


@pytest.mark.parametrize(("used", "kind", "times"), [("%x", "reduce-scatter", 1), ("%sum", "all-reduce", 2)])
def test_a_sum_is_scattered_where_only_a_slice_of_it_is_used(used, kind, times):
    (traffic,) = collective_traffic(Program.read(SUM.replace("USED", used)))
    assert (traffic.kind, traffic.received) == (kind, times * 7 / 8 * 8 * 4 * 4)


@pytest.mark.parametrize(
    ("axes", "group", "reach"),
    [("fsdp=8", 8, 8), ("data=4,fsdp=2", 2, 2), ("fsdp=2,tensor=4", 2, 5), ("data=2,fsdp=2,tensor=2", 2, 3)],
)
def test_groups_are_those_of_the_mesh_axis(axes, group, reach):
    (traffic,) = collective_traffic(program(lambda x: x, make_mesh(axes), WHOLE, (MATRIX, ROWS)))
    assert (traffic.group, traffic.reach) == (group, reach)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_0'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'c','a'}", [[0, 2, 1, 3]]),
    ],
)
def test_every_way_of_writing_groups_is_read(written, groups):
    program = Program.read(SUM.replace("replica_groups=[1,8]<=[8]", written))
    assert np.array_equal(replica_groups(program.computations["main"].instructions["sum"]), groups)


def test_groups_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="The groups of sum cannot be read"):
        collective_traffic(Program.read(SUM.replace("[1,8]<=[8]", "?")))


def operator(axes: str) -> Hessian:
    mesh = make_mesh(axes)
    config = dataclasses.replace(SMALL, vocab_size=256, num_heads=4, num_kv_heads=2)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract_params(config),
        model_shardings(config, mesh),
    )
    cut = batch_sharding(mesh, 1)
    tokens = jax.ShapeDtypeStruct((2, 8, 17), jnp.int32, sharding=cut)
    weights = jax.ShapeDtypeStruct((2, 8, 16), jnp.float32, sharding=cut)
    return Hessian(NextTokenLoss(config, mesh), params, Microbatches(TokenBatch(tokens, weights)))


@pytest.mark.parametrize("axes", ["fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_a_hessian_product_moves_at_most_twice_the_bytes_of_a_gradient(axes):
    op = operator(axes)
    product, once = (
        sum(bytes_by_kind(collective_traffic(f.lower(*arguments).compile())).values())
        for f, arguments in ((compiled_mv, (op, op.shape_dtype)), (gradient, (op,)))
    )
    assert 0 < once < product <= 2 * once


@pytest.mark.parametrize("reorthogonalize", ["none", 3, "full"])
def test_lanczos_steps_exchange_scalars_only(reorthogonalize):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    entries = {
        "layers": jax.ShapeDtypeStruct(
            (3, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", "tensor"))
        ),
        "gain": jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, P())),
    }
    state = abstract_lanczos(entries, 5, Storage(reorthogonalize))
    traffic = collective_traffic(compile_segment(Diagonal(entries), state), unknown_trips=1)
    assert traffic
    assert max(t.largest for t in traffic) <= 5
