"""The README's Python examples run as they stand, one after the other."""

import re
from pathlib import Path

import numpy as np

import jaxhess

ROOT = Path(__file__).parent.parent


def test_python_examples_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    code = [block.replace('"scripts/tiny', f'"{ROOT}/scripts/tiny') for block in blocks]
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(code[0], space)
    assert isinstance(space["same"], jaxhess.Spectrum)
    np.testing.assert_array_equal(space["same"].ritz_values, space["result"].ritz_values)
    assert len(space["figure"].axes) >= 1
    exec(code[1], space)
    assert space["first_mlp"].dim == 2 * 128 * 512 + 128 + 512
    exec(code[2], space)
    assert (space["pairs"].residuals < 0.1 * abs(space["pairs"].values[0])).all()
    assert space["influence"].history[-1] < 1
    assert (space["lower"] <= space["upper"]).all()
    exec(code[3], space)
    # The softmax is blind to a shift of all logits: of 15 parameters' directions, 5 are flat.
    result = jaxhess.spectrum(space["H"], steps=15, probes=1)
    assert np.sum(result.ritz_values[0] > 1e-4) == 10
