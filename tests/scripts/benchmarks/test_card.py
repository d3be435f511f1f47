"""`scripts.benchmarks.card`: on a card prediction and measurement are written; elsewhere it says that there is none."""

import json

import jax
import pytest
from small_models import SMALL, run_command

from jaxhess import make_mesh
from jaxhess.plan import Job
from scripts.benchmarks import card as script


def test_a_device_that_is_not_a_known_card_is_refused(capsys):
    with pytest.raises(SystemExit):
        run_command(script)
    assert "The device 'cpu' is not in the table of cards; it has A100-80GB" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_measured_here_is_the_program_that_is_planned(monkeypatch):
    """On CPUs, which have no rates: the roofline, and the verdict on memory, are those of a card."""

    job = Job(
        SMALL,
        {"fsdp": 8},
        seq_len=16,
        sequences=8,
        microbatch=8,
        steps=4,
        probes=1,
        storage=script.jaxhess.Storage("none"),
    )
    found = script.measured(job, "H200")
    planned = script.plan.compiled(job, make_mesh("fsdp=8"))
    assert found["predicted"]["bytes"] == planned.arguments + planned.temporaries
    assert found["predicted"]["seconds"] == script.plan.roofline(planned.program, "H200").seconds
    assert found["measured"]["seconds"] > 0


@pytest.mark.gpu
def test_predicted_and_measured_agree_on_a_card(tmp_path):
    """Within a factor of two in time (the roofline is a lower bound) and a tenth in memory."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU here")
    run_command(script, "--models", "qwen3-0.6b", "llama-3.1-8b", "--out", str(tmp_path / "card.json"))
    for found in json.loads((tmp_path / "card.json").read_text())["models"].values():
        before, after = found["predicted"], found["measured"]
        if after is not None:
            assert 0.8 * before["seconds"] < after["seconds"] < 2 * before["seconds"]
            assert after["bytes"] == pytest.approx(before["bytes"], rel=0.1)
