"""One learning rate per block: verdicts from given losses, how many second moments there are, a tiny run."""

import numpy as np
import pytest
from small_models import run_command

from jaxhess.results.study import Study
from scripts.studies import block_learning_rates as script
from scripts.training.short_runs import Sweep

ENTRIES = {script.ADAMW: 1000, script.HESSIAN: 50, script.AUTHORS: 800, script.ARRAYS: 10}
INITIAL = np.array([5.0, 5.0])


def losses(**best: float) -> dict[str, Sweep]:
    """AdamW is best at the second of three rates, where the others end at these losses."""
    ends = {script.ADAMW: 1.0, script.HESSIAN: best["hessian"], script.AUTHORS: 1.0, script.ARRAYS: best["arrays"]}
    return {name: Sweep((1, 2, 3), np.array([[4, 4], [x, x], [4, 4]]), []) for name, x in ends.items()}


def test_verdicts_at_the_learning_rate_of_adamw():
    good = [c.verdict for c in script.claims(losses(hessian=1.04, arrays=2.0), INITIAL, ENTRIES, "")]
    assert good == ["holds", "holds", "holds", "holds", "cannot tell"]
    bad = [c.verdict for c in script.claims(losses(hessian=1.2, arrays=1.1), INITIAL, ENTRIES, "")]
    assert bad == ["does not hold", "holds", "does not hold", "holds", "cannot tell"]


@pytest.mark.study
def test_a_tiny_run(tmp_path):
    small = "--width 8 --heads 1 --layers 1 --seq-len 4 --sequences 8 --seeds 2 --train-steps 10 --rates 0.01"
    run_command(script, *small.split(), "--out", str(tmp_path / "out"))
    found = Study.load(tmp_path / "out")
    assert "is the last of those tried" in found.claims[0].reason
    assert found.record["second_moments"][script.ADAMW] == found.record["parameters"]
    assert len(found.figures[0].png) > 10_000
    assert found.tables[0].rows[0][0] == "parameter (AdamW)"
    assert np.array(found.record["losses"][script.HESSIAN]).shape == (1, 2)
