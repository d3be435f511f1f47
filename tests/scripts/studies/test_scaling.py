"""Laws are found where they hold, and the scaling study measures what it says."""

import dataclasses

import numpy as np
import pytest

from jaxhess.plan.law import power_law, runtime_law
from scripts.studies import scaling as script


def test_a_power_law_is_found():
    x = np.array([1.0, 3.0, 10.0])
    found = power_law(x, 5 * x**1.5)
    assert (found.exponent, found.factor) == pytest.approx((1.5, 5.0))
    assert found.residual < 1e-12


def test_a_constant_lowers_the_exponent():
    assert 0.5 < power_law([1, 2, 4], [2, 3, 5]).exponent < 1


def test_the_runtime_law_is_found():
    gradient = np.array([0.1, 0.2, 0.9])
    found = runtime_law(gradient, 2.5 * gradient + 0.03)
    assert (found.slope, found.constant) == pytest.approx((2.5, 0.03))


@pytest.mark.parametrize(("x", "y"), [([1, 1], [2, 3]), ([1, 2], [0, 3]), ([1], [1])])
def test_laws_need_positive_points_at_two_places(x, y):
    with pytest.raises(ValueError, match="A law is fitted to"):
        power_law(x, y)


def test_tokens_that_do_not_fill_sequences_are_refused():
    with pytest.raises(ValueError, match="64 tokens are not sequences of 48 for each of 2 devices"):
        script.problem("fsdp=2", script.Sizes(tokens=64, layers=1, width=16, length=48))


@pytest.mark.study
def test_time_is_linear_in_tokens_and_layers_and_compilation_constant_in_depth():
    """Processor time of the whole machine's work for this process, so that other work does not count."""
    for axis, values in (("tokens", (2048, 4096, 8192)), ("layers", (4, 8, 16))):
        sizes = [dataclasses.replace(script.Sizes(), **{axis: n}) for n in values]
        programs = [script.measured("fsdp=2", size, "exact", rounds=2) for size in sizes]
        exponent = power_law(values, [program.seconds for program in programs]).exponent
        assert 0.9 <= exponent <= 1.1, axis
        if axis == "layers":
            compilation = [program.compile_seconds for program in programs]
            assert abs(power_law(values, compilation).exponent) < 0.15
