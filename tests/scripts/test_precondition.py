"""`--precondition` of the main command: a diagonal whose effect is known, and what is refused."""

from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import run_command

import convert
from jaxhess import Spectrum
from jaxhess.operators.restriction import leaf_name
from scripts import spectrum as script

TINY = Path(script.Options().model)
QUICK = ["--seq-len", "16", "--sequences", "4", "--steps", "3", "--probes", "2", "--mesh", "fsdp=8"]


def constant_diagonal(folder: Path, value: float) -> str:
    shapes = convert.load(TINY).params
    arrays = {leaf_name(path): np.full(x.shape, value, "float32") for path, x in jax.tree.leaves_with_path(shapes)}
    np.savez(folder / "diagonal.npz", **arrays)
    return str(folder / "diagonal.npz")


@pytest.mark.slow
def test_a_constant_preconditioner_divides_the_spectrum(tmp_path):
    """By 4, whose root is a power of two: exact in float32. Of linearised products, which are rounded otherwise."""
    runs = []
    block = [*QUICK, "--restrict", "attention", "--layers", "1,2", "--no-audit"]
    divided = ["--hvp", "linearized", "--precondition", constant_diagonal(tmp_path, 4.0)]
    for name, more in (("plain", []), ("divided", divided)):
        run_command(script, *block, *more, "--out", str(tmp_path / name))
        runs.append(Spectrum.load(tmp_path / name))
    np.testing.assert_allclose(runs[1].alphas, runs[0].alphas / 4, rtol=1e-4)
    assert runs[1].matrix_name == "preconditioned loss Hessian, block attention in layers 1,2"
    assert runs[1].run.inputs.details["preconditioner"] == [4.0, 4.0]


def test_a_preconditioner_that_cannot_be_used_is_refused(tmp_path, capsys):
    bad = constant_diagonal(tmp_path, -1.0)
    for path, sentence in ((bad, "has an entry -1; all must be positive"), ("none.pt", "there is no such file")):
        with pytest.raises(SystemExit):
            run_command(script, *QUICK, "--precondition", path, "--out", str(tmp_path / "out"))
        assert sentence in capsys.readouterr().err
