"""`scripts/plan.py`: plans are written, made again by the command they name, and refused in one sentence."""

import json
import shlex
from pathlib import Path

import pytest
import tyro
from small_models import run_command

from jaxhess.command import simulated_devices
from scripts import plan as script
from scripts.run_options import TINY

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "scripts" / "benchmarks" / "configs" / "llama-3.1-8b.json")


def read(command: str) -> script.Options:
    return tyro.cli(script.Options, args=shlex.split(command)[2:])


def test_a_plan_is_compiled_and_written(tmp_path):
    chosen = ["--mesh", "fsdp=2", "--seq-len", "32", "--reorthogonalize", "none"]
    run_command(script, *chosen, "--out", str(tmp_path / "plan.json"))
    facts = json.loads((tmp_path / "plan.json").read_text())
    formula, compiled = facts["formula"]["bytes_per_device"], facts["compiled"]
    assert formula["arguments"] == pytest.approx(compiled["arguments"], rel=0.1)
    assert facts["formula"]["flops_per_product_per_device"] == pytest.approx(compiled["flops"], rel=0.001)
    assert facts["cards"]["A100-80GB"]["fits"]
    assert facts["command"] == "python scripts/plan.py --seq-len 32 --reorthogonalize none --mesh fsdp=2"


def test_the_command_of_a_plan_makes_it_again():
    options = "--mesh fsdp=4,tensor=2 --hvp finite-difference --step 0.001 --no-audit --card h200 --compiler none"
    made = script.command(read(f"python scripts/plan.py --out out.json {options}"))
    assert read(made) == read(f"python scripts/plan.py {options}")


def test_a_plan_that_does_not_fit_says_what_to_change():
    options = read(f"python scripts/plan.py --model {CONFIG} --compiler none --microbatch 1 --no-audit")
    facts = script.run(options)
    assert facts["parameters"] == 8_030_261_248
    assert facts["dtype"] == "bfloat16"
    small, large = facts["cards"]["A100-80GB"], facts["cards"]["H200"]
    assert not small["fits"]
    assert not large["fits"]  # 30 vectors of 16 GB are kept by default
    assert [change.split()[0] for change in small["changes"]] == ["--mesh"]
    assert "--basis-memory host" in large["changes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operator", "gauss-newton"], "There is no plan for --operator gauss-newton"),
        (["--precondition", "optimizer.pt"], "There is no plan for --precondition optimizer.pt"),
        (["--card", "V100"], "The card 'V100' is not in the table; it has A100-80GB, H100, H200, B200."),
        (["--compiler", "gpu"], "--compiler gpu compiles for one card: add --card, one of A100-80GB"),
        (["--price", "-1"], "--price -1.0 must be a number, 0 or more"),
        (["--mesh", "rows=2"], "Mesh axis rows=2"),
        (["--model", "no/such/config.json"], "There is no directory no/such/config.json"),
    ],
)
def test_errors_are_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(script, *([] if "--compiler" in arguments else ["--compiler", "none"]), *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_plan_becomes_a_run_by_one_word():
    run_fields = {field.name for field in script.dataclasses.fields(script.run_options.Options)}
    assert run_fields < {field.name for field in script.dataclasses.fields(script.Options)}
    assert read("python scripts/plan.py").model == str(TINY)


def test_a_configuration_is_read_without_weights(tmp_path):
    directory = script.convert.read_config(TINY)
    assert script.convert.read_config(TINY / "config.json") == directory == script.convert.load_config(TINY)
    assert script.convert.read_config(CONFIG, "float32").dtype == "float32"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json names no model_type"):
        script.convert.read_config(tmp_path)
    with pytest.raises(ValueError, match="Unknown dtype 'int8'"):
        script.convert.read_config(CONFIG, "int8")


def test_more_devices_than_this_process_has_are_refused():
    with pytest.raises(ValueError, match=r"JAX has started in this process with \d+ CPU devices; 4096 are needed"):
        simulated_devices(4096)
