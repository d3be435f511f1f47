"""All studies: the index has every claim with its verdict."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import run_command

from jaxhess.results.study import Study
from scripts.studies import all as script

ROOT = Path(__file__).parents[3]


def test_every_study_is_found():
    assert {"ghosts", "scaling", "step_size"} <= set(script.STUDIES)
    for name in script.STUDIES:
        assert (ROOT / "scripts" / "studies" / f"{name}.py").is_file()


@pytest.mark.parametrize(
    "names",
    [pytest.param(("scaling",), marks=pytest.mark.slow), pytest.param(script.STUDIES, marks=pytest.mark.study)],
    ids=["one", "all"],
)
def test_the_index_has_every_claim_with_its_verdict(tmp_path, names):
    command = [sys.executable, "-m", script.__name__, "--out", str(tmp_path / "out"), "--only", *names]
    environment = {**os.environ, **({} if names == ("scaling",) else {"XLA_FLAGS": ""})}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    index = (tmp_path / "out" / "index.html").read_text()
    for name in names:
        assert f'href="{name}/study.html"' in index
        claims = Study.load(tmp_path / "out" / name).claims
        assert claims
        for claim in claims:
            row = next(row for row in index.split("<tr>") if claim.statement in row and claim.place in row)
            assert f"<td>{claim.verdict}: " in row


def test_an_unknown_study_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(script, "--only", "nothing", "--out", str(tmp_path / "out"))
    assert f"the studies are {', '.join(script.STUDIES)}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
