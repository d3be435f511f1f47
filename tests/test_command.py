"""What commands share."""

import os

import pytest

from jaxhess.command import compile_quickly


@pytest.mark.parametrize("before", ["", "--xla_cpu_max_isa=AVX2"])
def test_quick_compilation_keeps_flags_and_adds_its_own_once(before, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    compile_quickly()
    once = os.environ["XLA_FLAGS"]
    assert once.startswith(before)
    assert once.split().count("--xla_backend_optimization_level=0") == 1
    compile_quickly()
    assert os.environ["XLA_FLAGS"] == once


def test_quick_compilation_leaves_a_level_that_is_set_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    compile_quickly()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=3"
