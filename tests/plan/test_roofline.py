"""The roofline of programs written by hand is the sum that is worked out by hand."""

import pytest

from jaxhess.plan import roofline, whole_copies
from jaxhess.plan.hardware import ACCELERATORS, accelerator
from jaxhess.plan.hlo import Program
from jaxhess.plan.roofline import CUSTOM, LAUNCH, LINK, MATMUL, MEMORY

H200 = ACCELERATORS["H200"]
RATE = MEMORY * H200.bandwidth


def program(body: str, *others: str) -> Program:
    entry = "ENTRY %main (p: bf16[8]) -> bf16[8] {\n" + body + "\n}\n"
    return Program.read("HloModule m\n\n" + "\n\n".join([*others, entry]))


def product(dtype: str, attributes: str = "") -> str:
    dims = f"lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}{attributes}"
    return (
        f"  %a = {dtype}[4096,8192]{{1,0}} parameter(0)\n  %b = {dtype}[8192,4096]{{1,0}} parameter(1)\n"
        f"  ROOT %c = {dtype}[4096,4096]{{1,0}} dot(%a, %b), {dims}"
    )


FLOPS = 2.0 * 4096 * 8192 * 4096


def test_a_kernel_that_only_moves_takes_the_time_of_its_bytes():
    found = roofline(program("  %x = f32[1048576]{0} parameter(0)\n  ROOT %y = f32[1048576]{0} negate(%x)"), "h200")
    assert found.bytes == 2 * 2**22
    assert found.seconds == pytest.approx(2 * 2**22 / RATE + LAUNCH)
    assert found.ceiling == 0


@pytest.mark.parametrize(
    ("dtype", "attributes", "rate"),
    [
        ("bf16", "", 989e12),
        ("f32", "", 494e12),
        ("f32", ", operand_precision={highest,highest}", 67e12),
        ("f32", ", algorithm=dot_bf16_bf16_f32_x3", 989e12 / 3),
        ("f32", ", algorithm=dot_bf16_bf16_f32_x6", 989e12 / 6),
        ("f32", ", algorithm=dot_tf32_tf32_f32", 494e12),
        ("f32", ", algorithm=dot_tf32_tf32_f32_x3", 494e12 / 3),
        ("f32", ", algorithm=dot_f32_f32_f32", 67e12),
    ],
)
def test_a_product_takes_the_time_of_its_operations_on_what_computes_it(dtype, attributes, rate):
    found = roofline(program(product(dtype, attributes)), "H200")
    assert found.seconds == pytest.approx(FLOPS / (MATMUL * rate) + LAUNCH)
    assert found.ceiling == pytest.approx(1, abs=0.03)  # but for the launch


def test_a_dtype_without_a_rate_is_refused():
    with pytest.raises(ValueError, match="rate of NVIDIA H200 in float64 products is not in the table"):
        roofline(program(product("f64")), "H200")


LOOP = """  %x = (s32[], f32[1048576]{{0}}) parameter(0)
  ROOT %w = (s32[], f32[1048576]{{0}}) while(%x), condition=%cond, body=%body{trips}"""
COND = """%cond (c: (s32[], f32[1048576])) -> pred[] {
  %c = (s32[], f32[1048576]{0}) parameter(0)
  ROOT %t = pred[] constant(true)
}"""


def body(name: str, inside: str = "  %y = f32[1048576]{0} negate(%e)") -> str:
    return f"""%{name} (c: (s32[], f32[1048576])) -> (s32[], f32[1048576]) {{
  %c = (s32[], f32[1048576]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %e = f32[1048576]{{0}} get-tuple-element(%c), index=1
{inside}
  ROOT %r = (s32[], f32[1048576]{{0}}) tuple(%i, %y)
}}"""


def test_loops_count_as_often_as_they_run_and_steps_once():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    five = roofline(program(LOOP.format(trips=known), COND, body("body")), "H200")
    assert five.launches == 5
    assert five.seconds == pytest.approx(5 * (2 * 2**22 / RATE + LAUNCH))
    # A copy before the loop over steps is not part of a step.
    step = LOOP.format(trips="").replace("while(%x)", "while(%z)")
    before = "  %k = f32[1048576]{0} get-tuple-element(%x), index=1\n  %z = f32[1048576]{0} copy(%k)\n"
    first, _, rest = step.partition("\n")
    one = roofline(program(first + "\n" + before + rest, COND, body("body")), "H200")
    assert one.launches == 1


GATHER = """  %x = bf16[4194304]{0} parameter(0)
  %v = f32[1048576]{0} parameter(1)
  %s = (bf16[4194304]{0}, bf16[GROUP]{0}) all-gather-start(%x), replica_groups=[1,DEVICES]<=[DEVICES], dimensions={0}
MEANWHILE  %d = bf16[GROUP]{0} all-gather-done(%s)
  ROOT %y = f32[1048576]{0} negate(%v)"""


def gather(devices: int, meanwhile: str = "") -> Program:
    text = GATHER.replace("GROUP", str(4194304 * devices)).replace("DEVICES", str(devices))
    return program(text.replace("MEANWHILE", meanwhile))


def test_collectives_run_beside_kernels_until_they_are_waited_for():
    received = 7 * 2**23
    took = received / (LINK * H200.link)
    alone = roofline(gather(8), "H200")
    assert alone.communication_seconds == pytest.approx(took)
    assert alone.waiting_seconds == pytest.approx(took - LAUNCH)
    work = "".join(f"  %{name} = f32[1048576]{{0}} negate(%v)\n" for name in "mno")
    kernel = 2 * 2**22 / RATE + LAUNCH
    beside = roofline(gather(8, work), "H200")
    assert beside.waiting_seconds == pytest.approx(took - LAUNCH - 3 * kernel)
    assert beside.seconds == pytest.approx(alone.seconds)  # what is hidden costs nothing
    assert dict(beside.by_cause())["communication"][0] == received


def test_between_servers_the_network_is_the_limit():
    received = 15 * 2**23
    found = roofline(gather(16), "H200")
    assert found.communication_seconds == pytest.approx(received / (LINK * 8 * H200.network))


def test_a_pallas_kernel_declares_its_operations_and_vmap_repeats_them():
    backend = (
        'backend_config={grid_x = 64 : i32, grid_y = 8 : i32, grid_z = 1 : i32, ir = "dot\\00 (,}%", '
        r'serialized_metadata = "{\22flops\22: \22550024249344\22, \22programs\22: \22256\22}"}'
    )
    text = (
        "  %a = bf16[8]{0} parameter(0)\n"
        f'  ROOT %p = bf16[8]{{0}} custom-call(%a, %a), custom_call_target="__gpu$xla.gpu.triton", {backend}'
    )
    found = roofline(program(text), "H200")
    assert found.flops == 2 * 550024249344
    assert found.seconds == pytest.approx(found.flops / (CUSTOM * 989e12) + LAUNCH)
    undeclared = text.replace("flops", "name")
    with pytest.raises(ValueError, match="p is a Pallas kernel that does not declare its operations"):
        roofline(program(undeclared), "H200")


def test_copies_of_whole_arrays_in_a_step_are_found():
    inside = "  %k = f32[1048576]{0} copy(%e)\n  %y = f32[1048576]{0} fusion(%k), kind=kLoop, calls=%moves"
    moves = """%moves (q: f32[1048576]) -> f32[1048576] {
  %q = f32[1048576]{0} parameter(0)
  %q2 = f32[1024,1024]{1,0} bitcast(%q)
  %q3 = f32[1024,1024]{1,0} transpose(%q2), dimensions={1,0}
  ROOT %q4 = f32[1048576]{0} bitcast(%q3)
}"""
    text = program(LOOP.format(trips=""), moves, COND, body("body", inside))
    assert whole_copies(text, 2**22) == {"k": 2**22, "y": 2**22}
    assert whole_copies(text, 2**22 + 1) == {}
    added = program(LOOP.format(trips=""), moves.replace("transpose(%q2), dim", "negate(%q2), dim"), COND, body("body"))
    assert whole_copies(added, 2**22) == {}


@pytest.mark.parametrize("name", ["a100", "A100-80GB", "h100", "B200"])
def test_cards_have_names_in_any_case(name):
    assert accelerator(name).kind.startswith("NVIDIA")
