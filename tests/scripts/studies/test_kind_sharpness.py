"""Sharpness by kind: of a matrix whose blocks are known, the order of kinds, and models that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import TINY

import jaxhess
from jaxhess.errors import InputError
from jaxhess.models import abstract_params
from scripts.studies import kind_sharpness as script

AVERAGES = {"embedding": 1e-4, "query-key": 1e-2, "feed-forward": 2e-2, "value-output": 4e-2, "norms": 1.0}


def measured(averages: dict[str, float], error: float = 0.01) -> script.Found:
    return {kind: script.Sharpness(10, x, error * abs(x), 1.0, 0.0) for kind, x in averages.items()}


def test_the_claimed_order_holds_and_another_does_not():
    flat = measured(dict.fromkeys(AVERAGES, 1.0))
    verdicts = [c.verdict for c in script.claims([measured(AVERAGES), flat], "Hessian", "")]
    assert verdicts == ["holds"] * 6
    backwards = dict(zip(AVERAGES, reversed(AVERAGES.values()), strict=True))
    verdicts = [c.verdict for c in script.claims([measured(backwards), flat], "Hessian", "")]
    assert verdicts == ["does not hold"] * 6
    negative = list(script.claims([measured(AVERAGES | {"norms": -1.0})], "Hessian", ""))
    assert [c.verdict for c in negative] == ["holds"] * 3 + ["cannot tell"] * 2


def test_averages_are_traces_over_sizes_and_random_signs_are_exact_for_a_diagonal():
    entries = jnp.arange(1.0, 13.0)
    operator = jaxhess.MatrixOperator(jnp.diag(entries))
    kinds = list(script.MEMBERS)
    blocks = jaxhess.Blocks.by(operator.shape_dtype, "matrices").split("*", 0)
    blocks = blocks.merged(lambda name: kinds[int(name.strip("[]")) // 2])
    found = script.sharpness(operator, blocks, script.Options(steps=2, probes=3))
    assert list(found) == kinds
    for k, s in enumerate(found.values()):
        assert s.parameters == 2
        assert s.average == pytest.approx(float(entries[2 * k : 2 * k + 2].mean()), rel=1e-5)
        assert s.error < 1e-4  # no scatter but rounding
        assert s.largest == pytest.approx(float(entries[2 * k + 1]), rel=1e-5)


def test_kinds_of_a_decoder_cover_it_and_others_are_refused():
    like = abstract_params(TINY)
    blocks = script.kinds_of(like)
    assert set(blocks.names) <= set(script.MEMBERS)
    assert blocks.sizes.sum() == sum(int(np.prod(x.shape)) for x in jax.tree.leaves(like))
    with pytest.raises(InputError, match="the model has other besides, and lacks query-key"):
        script.kinds_of({"embed": jnp.ones(2), "norm": jnp.ones(2), "other": jnp.ones(2)})


def test_the_figure_has_both_matrices_and_marks_negative_traces():
    models = [measured(AVERAGES | {"norms": -1.0}), measured(AVERAGES)]
    panels = script.figure({"Gauss-Newton": models, "Hessian": models}).axes
    assert len(panels) == 4
    hollow = [line for line in panels[0].lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in hollow] == [[4]]
