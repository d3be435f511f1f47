"""Every public class and function has an example in its docstring, and the example gives what it says."""

import doctest
import re
from pathlib import Path

import pytest

import convert
import jaxhess

ROOT = Path(__file__).parents[1]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name) for module in (jaxhess, convert) for name in module.__all__
}
DATA = {"convert.FAMILIES"}
"""Public names that are tables, which have no docstring."""

FINDER = doctest.DocTestFinder()
RUNNER = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - DATA))
def test_every_public_name_has_an_example_that_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # the examples load scripts/tiny
    found = [test for test in FINDER.find(PUBLIC[name], name) if test.examples]
    assert name in {test.name for test in found}, f"The docstring of {name} has no example."
    for test in found:
        printed: list[str] = []
        assert RUNNER.run(test, out=printed.append, clear_globs=True).failed == 0, re.sub("\n+", "\n", "".join(printed))
