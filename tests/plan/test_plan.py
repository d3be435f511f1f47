"""Plans agree with the compiled program, compiled programs hold what the design allows, and advice makes jobs fit."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import convert
from jaxhess import Storage, make_mesh
from jaxhess.distributed.mesh import data_shards
from jaxhess.plan import USABLE, Job, changes, compiled, flops, forecast, memory, traffic
from jaxhess.plan.hardware import ACCELERATORS
from jaxhess.vectors import _drawer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "scripts" / "benchmarks" / "configs"


def job(model: str, axes: dict[str, int], dtype: str = "float32", each: int = 1, **options) -> Job:
    options = {"storage": Storage("none"), **options}
    config = convert.read_config(CONFIGS / f"{model}.json", dtype)
    layers = options.pop("num_layers", config.num_layers)
    made = Job(dataclasses.replace(config, num_layers=layers), axes, **{"sequences": 4096, **options})
    shards = data_shards(made.shape)
    options = {"microbatch": each * shards, "sequences": each * shards, **options}
    return dataclasses.replace(made, **options)


def facts_on(devices: int, *jobs: Job) -> list[dict]:
    """`compiled` of every job, in a process that simulates so many devices; also seconds of processor time."""
    code = f"""
import os, json, time, dataclasses, pickle, sys
import jax
from jaxhess.command import compile_quickly
compile_quickly()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", {devices})
from jaxhess.plan import compiled
from jaxhess.distributed.mesh import make_mesh
for job in pickle.load(sys.stdin.buffer):
    began = time.process_time()
    found = compiled(job).facts()
    print(json.dumps({{**found, "processor": time.process_time() - began}}), flush=True)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(jobs),
        stdout=subprocess.PIPE,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return [json.loads(line) for line in ran.stdout.splitlines()]


def check_formula(planned: Job, found: dict) -> None:
    formula = memory(planned)
    assert formula.arguments == pytest.approx(found["arguments"], rel=0.1)
    assert formula.outputs == pytest.approx(found["outputs"], rel=0.1)
    assert flops(planned) == pytest.approx(found["flops"], rel=0.001)
    assert sum(traffic(planned).values()) == pytest.approx(sum(found["traffic"].values()), rel=0.1)


@pytest.mark.parametrize("hvp", ["exact", pytest.param("finite-difference", marks=pytest.mark.slow)])
def test_the_formula_agrees_with_the_compiled_program(hvp):
    planned = job("pythia-160m", {"fsdp": 4, "tensor": 2}, hvp=hvp)
    check_formula(planned, compiled(planned).facts())


SMALL = ("pythia-160m", "qwen3-0.6b", "deepseek-r1-distill-qwen-1.5b", "llama-3.1-8b")
LARGE = ("deepseek-r1-distill-llama-70b", "llama-shaped-109b")


@pytest.mark.study
@pytest.mark.parametrize("hvp", ["exact", "finite-difference"])
@pytest.mark.parametrize(("devices", "small", "large"), [
    (1, {"fsdp": 1}, {"fsdp": 1}),
    (8, {"fsdp": 8}, {"fsdp": 8}),
    (64, {"fsdp": 64}, {"fsdp": 8, "tensor": 8}),
    (512, {"data": 8, "fsdp": 64}, {"fsdp": 64, "tensor": 8}),
])  # fmt: skip
def test_the_formula_agrees_for_every_committed_plan(hvp, devices, small, large):
    jobs = [job(model, small if model in SMALL else large, hvp=hvp) for model in (*SMALL, *LARGE)]
    for planned, found in zip(jobs, facts_on(devices, *jobs), strict=True):
        check_formula(planned, found)


@pytest.mark.study
def test_large_programs_hold_two_vectors_a_result_and_no_more():
    """The slope of temporaries between two depths, without the states that every layer saves, is that of what is as
    large as the parameters: the result, and one more at the most."""
    for devices, axes in ((64, {"fsdp": 8, "tensor": 8}), (512, {"fsdp": 64, "tensor": 8})):
        depths = (40, 80)
        jobs = [job(model, axes, num_layers=n) for model in LARGE for n in depths]
        facts = facts_on(devices, *jobs)
        for k, model in enumerate(LARGE):
            (shallow, deep), (few, many) = jobs[2 * k : 2 * k + 2], facts[2 * k : 2 * k + 2]
            small, large = memory(shallow), memory(deep)
            share = large.theta - small.theta
            grown = many["temporaries"] - few["temporaries"] - (large.saved - small.saved)
            assert grown <= 2.05 * share, (model, devices)
            # Theta and two vectors come in, two vectors go out in their place.
            assert many["arguments"] - few["arguments"] == pytest.approx(3 * share, rel=0.01)


@pytest.mark.study
def test_70b_compiles_on_64_devices_within_a_minute_of_processor_time():
    (found,) = facts_on(64, job("deepseek-r1-distill-llama-70b", {"fsdp": 64}))
    assert found["processor"] < 60


def test_temporaries_shrink_with_microbatch_and_chunks():
    base = job("llama-3.1-8b", {"fsdp": 8}, each=4)
    total = memory(base).total
    assert memory(dataclasses.replace(base, microbatch=8)).total < total
    fewer = dataclasses.replace(base, config=dataclasses.replace(base.config, query_chunk=32))
    assert memory(fewer).total < total


@pytest.mark.parametrize("card", ["A100", "B200"])
@pytest.mark.parametrize(
    ("model", "axes", "options"),
    [
        ("llama-3.1-8b", {"fsdp": 1}, {"storage": Storage()}),
        ("deepseek-r1-distill-llama-70b", {"fsdp": 1}, {}),
        ("deepseek-r1-distill-llama-70b", {"fsdp": 8}, {"storage": Storage()}),
        ("llama-shaped-109b", {"fsdp": 8, "tensor": 8}, {"each": 64, "seq_len": 8192}),
        ("llama-3.1-8b", {"fsdp": 1}, {"hvp": "finite-difference", "step": "auto", "storage": Storage()}),
    ],
)
def test_what_is_advised_fits(card, model, axes, options):
    planned = job(model, axes, **options)
    found = changes(planned, card)
    assert not forecast(planned, card).fits
    assert found
    for words, changed in found:
        assert words.startswith("--")
        assert forecast(changed, card).fits
        assert changed != planned


def test_the_first_advice_keeps_the_result():
    planned = job("llama-3.1-8b", {"fsdp": 8}, dtype="bfloat16", each=64)
    words, changed = changes(planned, "A100")[0]
    assert words == f"--microbatch {changed.microbatch}"
    twice = dataclasses.replace(changed, microbatch=2 * changed.microbatch)
    assert memory(twice).total > USABLE * 80e9  # halving it once less would not do


def test_the_audit_counts_and_is_the_first_to_go():
    planned = job("llama-3.1-8b", {"fsdp": 1}, dtype="bfloat16", audit=True)
    assert forecast(dataclasses.replace(planned, audit=False), "H200").fits
    assert not forecast(planned, "H200").fits
    assert [words for words, _ in changes(planned, "H200")] == ["--no-audit"]


def test_a_basis_on_the_host_fits_the_servers_memory():
    planned = job("deepseek-r1-distill-llama-70b", {"fsdp": 8}, dtype="bfloat16", storage=Storage(), steps=30)
    assert memory(planned).basis * 8 > 2e12  # so it is no way out
    assert not any("host" in words for words, _ in changes(planned, "H200"))


def test_two_steps_take_the_time_of_two():
    once = forecast(job("llama-3.1-8b", {"fsdp": 8}, dtype="bfloat16", steps=10), "H100")
    twice = forecast(job("llama-3.1-8b", {"fsdp": 8}, dtype="bfloat16", steps=20), "H100")
    assert twice.device_hours == pytest.approx(2 * once.device_hours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"hvp": "reverse"}, "no plan for products 'reverse'"),
        ({"axes": {"rows": 2}}, "Mesh axis rows=2"),
        ({"hvp": "finite-difference", "step": "auto", "compute_dtype": "bfloat16"}, "no plan for the step auto in bf"),
        ({"storage": Storage(scalar_dtype="float64")}, "needs JAX in 64-bit mode"),
        ({"axes": {"tensor": 8}}, "no plan for tensor=8, which does not divide num_heads=12"),
    ],
)
def test_bad_jobs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(job("pythia-160m", {}), **change)


def test_unknown_hardware_is_refused():
    with pytest.raises(ValueError, match="The card 'V100' is not in the table; it has A100-80GB, H100, H200, B200"):
        forecast(job("pythia-160m", {}), "V100")


def test_random_probes_of_a_huge_leaf_are_drawn_shard_by_shard():
    """A leaf of 2^34 entries, as in the feed-forward of 70B: each device draws its part, and exchanges nothing."""
    mesh = make_mesh("fsdp=8")
    shape = (80, 8192, 28672)
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    drawer = _drawer((1,), ((shape, jnp.dtype("float32")),), (sharding,), "normal")
    program = drawer.lower(jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))).compile()
    share = 80 * 8192 * 28672 * 4 // 8
    found = program.memory_analysis()
    assert found.output_size_in_bytes == pytest.approx(share, rel=0.01)
    assert found.temp_size_in_bytes <= 3.01 * share  # two words of a counter, and one of the generator's
    text = program.as_text()
    assert "all-gather" not in text
    assert "all-reduce" not in text
    # Counters are 64 bits wide: the part's own numbers in the whole, and their high words by a shift.
    assert "u64[80,1024,28672]" in text
    assert "shift-right-logical" in text


def test_passes_over_a_window_are_charged_row_by_row():
    """A pass over a stored row reads it twice and the new vector twice, and writes that once; two passes, or three."""
    kinds = {
        "none": Storage("none"),
        "window": Storage(8),
        "window, bf16": Storage(8, basis_dtype="bfloat16"),
    }
    seconds, vector = {}, 0.0
    for name, kind in kinds.items():
        planned = job("llama-3.1-8b", {"fsdp": 8}, dtype="float32", steps=10, storage=kind)
        seconds[name] = forecast(planned, "H200").seconds_per_product
        vector = memory(planned).vector / ACCELERATORS["H200"].bandwidth
    passes = {name: (x - seconds["none"]) / vector for name, x in seconds.items()}
    assert passes["window"] == pytest.approx(2 * 8 * (3 + 2))
    assert passes["window, bf16"] == pytest.approx(3 * 8 * (3 + 1))
