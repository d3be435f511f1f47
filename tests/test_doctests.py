"""Every public class and function has an example in its docstring, and the example gives what it says."""

import doctest
import pkgutil
import re
from pathlib import Path

import pytest

import convert
import jaxhess

ROOT = Path(__file__).parents[1]
DATA = {"convert.FAMILIES", "jaxhess.plan.EFFICIENCY", "jaxhess.plan.USABLE"}
"""Public names that are no class or function: they have no docstring."""

FINDER = doctest.DocTestFinder()
RUNNER = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)


def public_names() -> list[str]:
    """What the modules export, and what else is on the API page."""
    exported = {f"{module.__name__}.{name}" for module in (jaxhess, jaxhess.plan, convert) for name in module.__all__}
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: ([\w.]+)\n(?:.*\n)*?(?:      members: \[(.*)\]\n)?\n", page + "\n", flags=re.MULTILINE)
    for name, members in listed:
        exported |= {f"{name}.{member}" for member in members.split(", ")} if members else {name}
    return sorted(exported - DATA)


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_has_an_example_that_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # the examples load scripts/tiny
    public = pkgutil.resolve_name(":".join(name.rsplit(".", 1)))
    found = [test for test in FINDER.find(public, name, globs={}) if test.examples]
    assert name in {test.name for test in found}, f"The docstring of {name} has no example."
    for test in found:
        printed: list[str] = []
        assert RUNNER.run(test, out=printed.append).failed == 0, re.sub("\n+", "\n", "".join(printed))
