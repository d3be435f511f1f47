"""K-FAC's factors are exact where its assumptions hold, and sums over Jacobians where they do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhess import GaussNewton
from jaxhess.errors import InputError
from scripts.studies.approximations import models
from scripts.studies.approximations.kronecker import kfac, linear_maps, logits_and_inputs

SHAPE = models.Shape(width=4, layers=1, heads=2)


@pytest.fixture(scope="module")
def model():
    """With weights large enough for an attention that is far from uniform."""
    with jax.enable_x64(True):
        found = models.trained(SHAPE, np.zeros(9, np.int32), 4, 0, 0)

        def larger(path, x):
            return jnp.asarray(x * (20 if path[-1].key == "kernel" else 1), "float64")

        params = jax.tree.map_with_path(larger, found.params)
        return dataclasses.replace(found, params=params, config=dataclasses.replace(found.config, dtype="float64"))


def test_one_token_has_the_gauss_newton_blocks_themselves(model):
    """One token shares no map, and the mean of a single product is the product of the means."""
    rows = np.array([[3, 7]], np.int32)
    with jax.enable_x64(True):
        operator = GaussNewton(model.loss(), model.params, [models.batch_of(rows)], accumulation_dtype="float64")
        dense = np.asarray(operator.to_matrix(batch_size=64))
        found = kfac(model, rows)
    maps = linear_maps(model.params)
    assert {one.name for one in maps} == set(found)
    assert len(maps) == 2 + 7
    sizes = []
    for name, places in maps:
        a, g = found[name]
        block = dense[np.ix_(places.ravel(), places.ravel())]
        np.testing.assert_allclose(
            np.kron(np.diag(a) if a.ndim == 1 else a, g), block, atol=1e-12 * np.abs(dense).max()
        )
        sizes.append(np.abs(block).max())
    assert sum(size > 1e-6 for size in sizes) == 2 + 5  # queries and keys of a single token do nothing


@pytest.mark.slow
def test_factors_of_a_sequence_are_sums_over_its_jacobians(model):
    rows = np.array([[3, 7, 1, 7, 20]], np.int32)
    tokens, name = jnp.asarray(rows[0, :-1]), "layers/0/attention/key/kernel"
    with jax.enable_x64(True):
        found = kfac(model, rows)
        zeros = {one: jnp.zeros((1, 4, *shape)) for one, shape in shapes().items()}

        def logits(shift):
            return logits_and_inputs(model.config, model.params, tokens, zeros | {name: shift})[0]

        z, inputs = logits_and_inputs(model.config, model.params, tokens, zeros)
        np.testing.assert_allclose(z, model.logits(tokens[None])[0], rtol=1e-12)
        jacobian = np.asarray(jax.jacfwd(logits)(zeros[name])).reshape(4, 27, 4, 4)
        p = np.asarray(jax.nn.softmax(z))
        a = np.asarray(inputs[name])[0]
    curvature = p[:, :, None] * np.eye(27) - p[:, :, None] * p[:, None]
    expected = np.einsum("tvsd,tvw,twse->de", jacobian, curvature, jacobian) / 4
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(found[name].outputs, expected, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_allclose(found[name].inputs, a.T @ a / 4, rtol=1e-12)
    np.testing.assert_allclose(found["head/kernel"].outputs, curvature.mean(0), atol=1e-14)
    np.testing.assert_allclose(found["embed/kernel"].inputs, np.bincount(rows[0, :-1], minlength=27) / 4)


def shapes() -> dict[str, tuple[int, ...]]:
    heads = dict.fromkeys(("attention/query", "attention/key", "attention/value"), (2, 2))
    widths = {"attention/out": (4,), "mlp/gate": (8,), "mlp/up": (8,), "mlp/down": (4,)}
    return {"embed/kernel": (4,)} | {f"layers/0/{name}/kernel": shape for name, shape in (heads | widths).items()}


def test_other_decoders_are_refused(model):
    tied = dataclasses.replace(model, config=dataclasses.replace(model.config, tied_embeddings=True))
    with pytest.raises(InputError, match="K-FAC is written for a Llama"):
        kfac(tied, np.zeros((1, 3), np.int32))
