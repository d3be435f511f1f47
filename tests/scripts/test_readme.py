"""The Python examples of the README and of docs/ run as they stand; every public name is on the API page."""

import re
from pathlib import Path

import numpy as np
import pytest

import jaxhess

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"foreign_results.md"}
"""Pages whose examples need results of other tools: see test_interchange.py."""


def run(page: Path, space: dict) -> dict:
    """Runs the page's examples one after the other; returns the names that they leave, beside those given."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block.replace('"scripts/tiny', f'"{ROOT}/scripts/tiny'), str(page), "exec"), space)
    return space


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch):
    """Those of a page go on from the README's. One test, because the README's takes half of the time."""
    monkeypatch.chdir(tmp_path)
    readme: dict = {}
    run(ROOT / "README.md", readme)
    assert isinstance(readme["same"], jaxhess.Spectrum)
    np.testing.assert_array_equal(readme["same"].ritz_values, readme["result"].ritz_values)
    assert len(readme["figure"].axes) >= 1
    pages = {page.name: page for page in (ROOT / "docs").glob("*.md") if page.name not in ELSEWHERE}
    spaces = {name: run(page, dict(readme)) for name, page in sorted(pages.items())}

    space = spaces["python.md"]
    assert space["first_mlp"].dim == 2 * 128 * 512 + 128 + 512
    assert (space["pairs"].residuals < 0.1 * abs(space["pairs"].values[0])).all()
    assert space["solution"].history[-1] < 1
    assert (space["lower"] <= space["upper"]).all()
    # The softmax is blind to a shift of all logits: of 15 parameters' directions, 5 are flat.
    result = jaxhess.spectrum(space["H"], steps=15, probes=1)
    assert np.sum(result.ritz_values[0] > 1e-4) == 10


def test_every_public_name_is_on_the_api_page():
    listed = re.findall(r"^::: jaxhess\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert set(jaxhess.__all__) - {"plan"} <= set(listed)
    assert "::: jaxhess.plan" in (ROOT / "docs" / "api.md").read_text()


def test_the_commands_that_ci_reads_are_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for heading in ("## Run", "## Test"):
        assert text.split(f"\n{heading}\n")[1].split("```sh\n")[1].startswith("python3 -m venv .venv && .venv/bin/pip ")
