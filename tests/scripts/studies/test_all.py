"""All studies: the index has every claim with its verdict."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import run_command

from jaxhess.results.study import Study
from scripts.studies import all as script
from scripts.studies import scaling

ROOT = Path(__file__).parents[3]


def test_every_study_is_found():
    assert {"ghosts", "scaling", "step_size"} <= set(script.STUDIES)
    for name in script.STUDIES:
        assert (ROOT / "scripts" / "studies" / f"{name}.py").is_file()


@pytest.mark.study
def test_the_command_makes_every_study(tmp_path):
    command = [sys.executable, "-m", script.__name__, "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, stdout=subprocess.DEVNULL)
    check_index(tmp_path / "out", script.STUDIES)


def check_index(folder: Path, names: list[str]) -> None:
    """It has every claim of these studies with its verdict."""
    index = (folder / "index.html").read_text()
    for name in names:
        assert f'href="{name}/study.html"' in index
        claims = Study.load(folder / name).claims
        assert claims
        for claim in claims:
            row = next(row for row in index.split("<tr>") if claim.statement in row and claim.place in row)
            assert f"<td>{claim.verdict}: " in row


@pytest.mark.study
def test_a_study_is_measured_and_the_index_has_every_claim_with_its_verdict(tmp_path, monkeypatch):
    sizes = scaling.Sizes(tokens=64, layers=1, width=16, length=8)
    monkeypatch.setattr(scaling, "SMALL", scaling.Options(
        base=sizes, mesh_devices=2, tokens=(64, 128), layers=(1,), widths=(16,), lengths=(8,), devices=(1, 2), rounds=1
    ))  # fmt: skip
    run_command(script, "--only", "scaling", "--out", str(tmp_path))
    check_index(tmp_path, ["scaling"])
    found = Study.load(tmp_path / "scaling")
    assert len(found.figures[0].png) > 10_000
    assert len(found.claims) == 6
    assert found.record["exponents"]["tokens"]["flops"] == pytest.approx(1, abs=1e-6)
    assert found.record["exponents"]["layers"] == {}
    one, two = (point["programs"]["exact"] for point in found.record["sweeps"]["devices"])
    assert one["received"] == 0
    assert two["received"] > 0
    assert two["flops"] < one["flops"]


def test_an_unknown_study_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(script, "--only", "nothing", "--out", str(tmp_path / "out"))
    assert f"the studies are {', '.join(script.STUDIES)}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
