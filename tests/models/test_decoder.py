"""Layers are scanned, or written out one after the other: the same products, and when which."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxhess import Hessian, Storage, make_mesh, start_lanczos
from jaxhess.krylov import compile_segment
from jaxhess.models import decoder
from jaxhess.plan.hlo import matmul_flops, read_program
from tests.small_models import SMALL, batch_of, language_operator, random_model, random_vector, relative, tokens


def product(operator, v):
    return jax.jit(lambda v: operator.mv(v))(v)  # a new function: traced again


@pytest.mark.usefixtures("float64")
def test_written_out_layers_give_the_product_of_scanned_ones(monkeypatch):
    operator = language_operator("float64", remat=False, sliding_window=3, sliding_layers=(True, False))
    v = random_vector(operator.shape_dtype, 1)
    written_out = product(operator, v)
    monkeypatch.setattr(decoder, "WRITTEN_OUT", 0)
    assert relative(written_out, product(operator, v)) < 1e-13


def test_states_of_written_out_layers_are_those_of_scanned_ones(monkeypatch):
    config = dataclasses.replace(SMALL, remat=False)
    ids = tokens(2, 12, 101)
    states = []
    for most in (decoder.WRITTEN_OUT, 0):
        monkeypatch.setattr(decoder, "WRITTEN_OUT", most)
        model = decoder.Decoder(config, decoder.nnx.Rngs(0))
        states.append(np.asarray(model.states(ids)))
    assert states[0].shape == (3, 2, 13, 32)
    np.testing.assert_allclose(*states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "devices", "scans"),
    [
        ({"remat": False}, 1, 0),
        ({"remat": True}, 1, 1),
        ({"remat": False, "num_layers": decoder.WRITTEN_OUT + 1}, 1, 1),
        ({"remat": False}, 8, 1),  # simulated devices: programs as those of the devices they stand for
    ],
)
def test_few_layers_on_one_cpu_are_written_out(change, devices, scans):
    mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
    model = random_model(dataclasses.replace(SMALL, **change), mesh, factor=1)
    program = jax.make_jaxpr(model.loss())(model.params, batch_of(tokens(8, 12, 101)))
    assert str(program).count("scan[") == scans


@pytest.mark.slow
def test_a_lanczos_run_over_written_out_layers_makes_the_primal_pass_once():
    """8 products of matrices in a step, in units of a forward pass, are then 6, and 2 of them once."""
    config = dataclasses.replace(SMALL, remat=False)
    model = random_model(config, factor=1)
    operator = Hessian(model.loss(), model.params, [batch_of(tokens(8, 12, 101))])
    v = random_vector(operator.shape_dtype, 1)
    one = matmul_flops(read_program(jax.jit(lambda op, v: op.mv(v)).lower(operator, v).compile()))
    run = compile_segment(operator, start_lanczos([v], 20, Storage("none")))
    assert matmul_flops(read_program(run), unknown_trips=20) <= (6 + 2 / 20 + 0.2) / 8 * 20 * one
