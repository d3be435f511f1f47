"""Every public class and function has an example in its docstring, and the example gives what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import convert
import jaxhess

ROOT = Path(__file__).parents[1]
DATA = {"convert.FAMILIES", "jaxhess.plan.EFFICIENCY", "jaxhess.plan.USABLE"}
"""Public names that are no class or function: they have no docstring."""

FINDER = doctest.DocTestFinder()
RUNNER = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)


def public(name: str) -> Any:
    return pkgutil.resolve_name(":".join(name.rsplit(".", 1)))


def public_names() -> list[str]:
    """What the modules export, and what else is on the API page."""
    exported = {f"{module.__name__}.{name}" for module in (jaxhess, jaxhess.plan, convert) for name in module.__all__}
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: ([\w.]+)\n(?:.*\n)*?(?:      members: \[(.*)\]\n)?\n", page + "\n", flags=re.MULTILINE)
    for name, members in listed:
        exported |= {f"{name}.{member}" for member in members.split(", ")} if members else {name}
    return sorted(exported - DATA)


def run(test: doctest.DocTest) -> None:
    printed: list[str] = []
    assert RUNNER.run(test, out=printed.append).failed == 0, re.sub("\n+", "\n", "".join(printed))


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_has_an_example_that_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # the examples load scripts/tiny
    found = [test for test in FINDER.find(public(name), name, globs={}) if test.examples]
    assert name in {test.name for test in found}, f"The docstring of {name} has no example."
    for test in found:
        run(test)


def test_the_other_examples_run():
    known = {public(name).__doc__ for name in public_names()}
    packages = [pkgutil.walk_packages(package.__path__, f"{package.__name__}.") for package in (jaxhess, convert)]
    names = [module.name for modules in packages for module in modules if not module.name.endswith("__main__")]
    for module in map(importlib.import_module, names):
        for test in FINDER.find(module):
            if test.docstring not in known:
                run(test)
