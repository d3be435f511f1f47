"""The linearised Hessian is the exact one, keeps what it says, and refuses what does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL, language_operator, network, random_model, random_vector, relative, tokens

from jaxhess import Hessian, Microbatches, linearize, make_mesh, spectrum
from jaxhess.data import TokenBatch
from jaxhess.distributed.mesh import batch_sharding
from jaxhess.operators import residual_bytes

# In float64: the two take the same derivatives in another order, and only there is that far from any error of ours.
NO_REMAT = {"dtype": "float64", "remat": False, "num_layers": 1}


@pytest.mark.usefixtures("float64")
def test_products_are_those_of_the_exact_operator():
    exact = network("float64", sizes=(2, 2, 1))  # two groups, one of them of two
    linearized = linearize(exact)
    for k in range(2):
        v = random_vector(exact.shape_dtype, k)
        assert relative(linearized @ v, exact @ v) < 1e-12
    result = spectrum(linearized, steps=1, probes=1)
    assert result.run.operator.kind == "LinearizedHessian"
    assert result.run.operator.details["residual_bytes_per_device"] == linearized.residual_bytes


@pytest.mark.usefixtures("float64")
def test_rematerialisation_and_chunks_change_nothing():
    operator = language_operator("float64", num_layers=1, query_chunk=5, logit_chunk=1000)
    v = random_vector(operator.shape_dtype, 1)
    assert relative(linearize(operator) @ v, operator @ v) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("axes", [pytest.param("fsdp=8", marks=pytest.mark.study), "data=2,fsdp=2,tensor=2"])
def test_on_a_mesh_residuals_are_cut_and_announced_to_the_byte(axes):
    mesh = make_mesh(axes)
    model = random_model(dataclasses.replace(SMALL, **NO_REMAT), mesh)
    batch = TokenBatch(jnp.asarray(tokens(16, 12, 101).reshape(2, 8, 13)), jnp.ones((2, 8, 12)))
    batch = jax.device_put(batch, batch_sharding(mesh, axis=1))
    exact = Hessian(model.loss(), model.params, Microbatches(batch))
    linearized = linearize(exact)
    announced = residual_bytes(exact)
    assert 0 < linearized.residual_bytes <= announced < 1.01 * linearized.residual_bytes
    whole = sum(x.nbytes for x in jax.tree.leaves(linearized.residuals))
    assert linearized.residual_bytes < whole / 4  # tensor parallelism repeats the residual stream on its two devices
    v = random_vector(exact.shape_dtype, 1)
    assert relative(linearized @ v, exact @ v) < 1e-12


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_weights_are_not_kept_once_for_each_microbatch(compute_dtype):
    """A network of one sample a batch, whose weights dwarf its activations; in float64 they are also cast copies."""

    def loss(params, x):
        def layer(h, w):
            return jnp.tanh(h @ w.astype(compute_dtype)), None

        h, _ = jax.lax.scan(layer, x.astype(compute_dtype), params)
        return jnp.sum(h**2)

    with jax.enable_x64(True):
        params = jnp.asarray(np.random.default_rng(0).normal(size=(3, 256, 256)), jnp.float32)
        batches = [jnp.asarray(np.random.default_rng(k).normal(size=(1, 256))) for k in range(4)]
        exact = Hessian(loss, params, batches)
        linearized = linearize(exact)
        assert linearized.residual_bytes < 0.5 * params.nbytes
        v = random_vector(exact.shape_dtype, 1)
        assert (
            relative(linearized @ v, exact @ v) < 256 * np.finfo(compute_dtype).eps
        )  # sums of 256 terms, in any order


@pytest.mark.usefixtures("float64")
def test_what_does_not_fit_the_budget_is_refused_with_the_numbers():
    operator = network("float64")
    needed = residual_bytes(operator)
    with pytest.raises(ValueError, match=rf"2 microbatches needs {needed / 1e9:.3g} GB.*1e-06 GB are allowed"):
        linearize(operator, budget=1e3)
    announced = []
    assert linearize(operator, budget=needed, announce=announced.append).residual_bytes <= needed
    assert announced == [needed]
    with pytest.raises(ValueError, match="budget is nan"):
        linearize(operator, budget=float("nan"))
