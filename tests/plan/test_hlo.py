"""Counts read off compiled programs equal those made by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxhess.distributed.memory import temporary_bytes
from jaxhess.plan.hlo import Program, arrays_of, bytes_accessed, bytes_of, matmul_flops


def compiled(f, *shapes: tuple[int, ...]) -> jax.stages.Compiled:
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def scanned(x, layers):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, layers)[0]


def loss(layers, x):
    return jnp.sum(scanned(x, layers) ** 2)


ONE = 2 * 8 * 16 * 16  # operations of one layer's product: 8 rows, width 16


def nested(x, layers):
    return jax.lax.scan(lambda h, _: (scanned(h, layers), None), x, length=3)[0]


def product_with_the_hessian(layers, x, v):
    return jax.jvp(lambda p: jax.grad(loss)(p, x), (layers,), (v,))[1]


@pytest.mark.parametrize(
    ("f", "shapes", "expected"),
    [
        (jnp.matmul, [(8, 16), (16, 32)], 2 * 8 * 16 * 32),
        (lambda x, y: jnp.einsum("bij,bkj->bik", x, y), [(3, 8, 16), (3, 5, 16)], 2 * 3 * 8 * 5 * 16),
        (scanned, [(8, 16), (7, 16, 16)], 7 * ONE),
        (nested, [(8, 16), (7, 16, 16)], 21 * ONE),
        # A layer forward, its states' gradient, its weights' gradient.
        (jax.grad(loss), [(5, 16, 16), (8, 16)], 15 * ONE),
        # A layer forward and its two tangents; the states' gradient and its two tangents; two of the weights' gradient.
        (product_with_the_hessian, [(5, 16, 16), (8, 16), (5, 16, 16)], 40 * ONE),
    ],
    ids=["product", "batched", "scan", "nested scans", "gradient", "hessian product"],
)
def test_matmul_flops_equal_the_analytic_count(f, shapes, expected):
    assert matmul_flops(compiled(f, *shapes)) == expected


def test_xla_counts_the_body_of_a_loop_once():
    # Why this module exists. If it ever fails, cost_analysis() may be good enough.
    program = compiled(scanned, (8, 16), (7, 16, 16))
    assert program.cost_analysis()["flops"] < 2 * ONE < matmul_flops(program)


def test_the_dearest_branch_of_a_conditional_counts():
    def f(p, x, w):
        return jax.lax.cond(p[0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert matmul_flops(compiled(f, (1,), (8, 16), (16, 16))) == 2 * ONE


def test_a_loop_of_unknown_length_is_refused_or_told():
    def f(n, x, w):
        return jax.lax.fori_loop(0, n[0].astype(jnp.int32), lambda _, h: h @ w, x)

    program = compiled(f, (1,), (8, 16), (16, 16))
    with pytest.raises(ValueError, match="has no known trip count"):
        matmul_flops(program)
    assert matmul_flops(program, unknown_trips=20) == 20 * ONE


BACKEND = (
    '{"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],'
    '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}'
)
GPU = f"""HloModule jit_f

%gemm_fusion_dot.1 (left: bf16[8,16], right: bf16[16,32]) -> bf16[8,32] {{
  %left = bf16[8,16]{{1,0}} parameter(0)
  %right = bf16[16,32]{{1,0}} parameter(1)
  ROOT %dot.1 = bf16[8,32]{{1,0}} dot(%left, %right), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

ENTRY %main (a: bf16[8,16], b: bf16[16,32], c: f32[3,8,16], d: f32[3,5,16]) -> (bf16[8,32], f32[3,8,5]) {{
  %a = bf16[8,16]{{1,0}} parameter(0)
  %b = bf16[16,32]{{1,0}} parameter(1)
  %c = f32[3,8,16]{{2,1,0}} parameter(2)
  %d = f32[3,5,16]{{2,1,0}} parameter(3)
  %triton = bf16[8,32]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%gemm_fusion_dot.1
  %call = (f32[3,8,5]{{2,1,0}}, s8[64]{{0}}) custom-call(%c, %d), custom_call_target="TARGET", backend_config={BACKEND}
  %out = f32[3,8,5]{{2,1,0}} get-tuple-element(%call), index=0
  ROOT %tuple = (bf16[8,32]{{1,0}}, f32[3,8,5]{{2,1,0}}) tuple(%triton, %out)
}}
"""


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_products_of_a_gpu_program_count(target):
    assert matmul_flops(Program.read(GPU.replace("TARGET", target))) == 2 * 8 * 16 * 32 + 2 * 3 * 8 * 5 * 16


def test_products_that_are_not_counted_are_refused():
    with pytest.raises(ValueError, match="a call of __cudnn"):
        matmul_flops(Program.read(GPU.replace("TARGET", "__cudnn$fmhaSoftmax")))
    convolution = compiled(lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"), (1, 1, 8, 8), (1, 1, 3, 3))
    with pytest.raises(ValueError, match="only plain matrix products are counted"):
        matmul_flops(convolution)
    with pytest.raises(ValueError, match="not an HLO module"):
        Program.read("nothing")


def test_types_are_read():
    several = "(f32[2,3]{1,0}, /*index=1*/s32[], bf16[<=4]{0})"
    assert arrays_of(several) == [("f32", (2, 3)), ("s32", ()), ("bf16", (4,))]
    assert bytes_of("(f32[2,3]{1,0}, pred[5]{0}, bf16[4]{0}, s4[6]{0}, f8e4m3fn[8]{0})") == 24 + 5 + 8 + 3 + 8


def test_bytes_are_those_of_operands_and_results():
    assert bytes_accessed(compiled(lambda x: x + 1, (1000,))) == pytest.approx(8000, abs=16)
    # A loop reads one slice of the stacked weights in each turn, and not the stack.
    weights, states = 4 * 16 * 16, 4 * 8 * 16
    assert 7 * weights < bytes_accessed(compiled(scanned, (8, 16), (7, 16, 16))) < 7 * 4 * (weights + 2 * states)


def test_temporary_memory_is_reported():
    stored = 4 * 5 * 8 * 16  # the states before every layer
    assert temporary_bytes(compiled(jax.grad(loss), (5, 16, 16), (8, 16))) >= stored
