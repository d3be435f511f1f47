"""The table of published models in the docs is what the command prints."""

import shlex
from pathlib import Path

import pytest
import tyro

from jaxhess.command import terminal
from scripts import plan
from scripts.benchmarks import plans as script

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_docs_have_the_table_that_the_command_prints(monkeypatch):
    """By the formulas alone; that compiled programs agree with them is the subject of tests/plan."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plan, "terminal", lambda: terminal(quiet=True))

    def made(name: str, devices: int, hvp: str) -> dict:
        options = tyro.cli(plan.Options, args=[*script.arguments(name, devices, hvp), "--compiler", "none"])
        command = shlex.split(plan.command(options))[2:]
        assert tyro.cli(plan.Options, args=command) == options
        return plan._rounded(plan.run(options))

    assert script.table(made) in (ROOT / "docs" / "planning.md").read_text()


@pytest.mark.study
def test_plans_are_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "CONFIGS", {"pythia-160m": "Pythia-160M"})
    monkeypatch.setattr(script, "DEVICES", (1,))
    options = script.Options(folder=tmp_path, compile=False)
    for times in (2, 0):
        exact, central = (script.made(options, "pythia-160m", 1, hvp) for hvp in script.PRODUCTS)
        assert capsys.readouterr().out.count("scripts/plan.py") == times
    assert exact["formula"]["flops_per_product_per_device"] > central["formula"]["flops_per_product_per_device"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "pythia-160m-1-exact.json",
        "pythia-160m-1-finite-difference.json",
    }
