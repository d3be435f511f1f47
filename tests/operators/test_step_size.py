"""The automatic finite-difference step in hard cases: zeros, jumps, unequal scales, leaves of rounding alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL, batch_of, random_model, relative

from jaxhess import FiniteDifferenceHessian, Hessian, random_probe
from jaxhess.operators.facts import validate
from jaxhess.operators.precision import exact_operator
from jaxhess.vectors import cast


def in_float32(like):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), like)


def lora_loss(params, batch):
    """A layer with a low-rank correction to fixed weights; follows params' dtypes."""
    x, y = (e.astype(params["b"].dtype) for e in batch)
    fixed = jnp.asarray(np.random.default_rng(3).normal(size=(8, 12)) / 3, x.dtype)
    return jnp.sum((jnp.tanh(x @ fixed + (x @ params["a"]) @ params["b"]) - y) ** 2), 1.0 * len(x)


def network_loss(activation, scales=(1.0, 1.0)):
    """Two or three layers; the first and the last see their weights divided by `scales`."""

    def loss(params, batch):
        x, y = (e.astype(params["out"].dtype) for e in batch)
        hidden = activation(x @ (params["in"] / scales[0]))
        hidden = activation(hidden @ params["middle"]) if "middle" in params else hidden
        return jnp.sum((hidden @ (params["out"] / scales[1]) - y) ** 2), 1.0 * len(x)

    return loss


def hard_case(name: str, dtype: str = "float32") -> FiniteDifferenceHessian:
    rng = np.random.default_rng(0)
    batches = [(jnp.asarray(rng.normal(size=(16, 8)), "float32"), jnp.asarray(rng.normal(size=(16, 12)), "float32"))]
    if name.startswith("LoRA"):
        params = {"a": rng.normal(size=(8, 2)) / 3, "b": np.zeros((2, 12))}
        whole = FiniteDifferenceHessian(lora_loss, cast(jax.tree.map(jnp.asarray, params), dtype), batches)
        return whole.restrict("b") if name == "LoRA, B alone" else whole
    scales = (1e-3, 1e4) if name == "unequal scales" else (1.0, 1.0)
    params = {"in": scales[0] * rng.normal(size=(8, 64)), "out": scales[1] * rng.normal(size=(64, 12)) / 8}
    if name == "ReLU":
        params["middle"] = rng.normal(size=(64, 64)) / 6
    loss = network_loss(jax.nn.relu if name == "ReLU" else jnp.tanh, scales)
    return FiniteDifferenceHessian(loss, cast(jax.tree.map(jnp.asarray, params), dtype), batches)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        # The balance in float32 leaves (2^-24)^(2/3) = 1.5e-5 times a factor of the loss; in bfloat16 2.5e-2.
        ("LoRA", "float32", 3e-4),
        ("LoRA, B alone", "float32", 3e-4),
        ("LoRA, B alone", "bfloat16", 0.3),
        ("unequal scales", "float32", 3e-4),
        # Jumps of the gradient leave room for shorter steps only, which show more of the rounding.
        ("ReLU", "float32", 3e-3),
    ],
)
@pytest.mark.parametrize("localised", [False, True])
def test_the_automatic_step_serves_zeros_jumps_and_unequal_scales(name, dtype, tolerance, localised):
    operator = hard_case(name, dtype)
    v = random_probe(jax.random.key(1), in_float32(operator.shape_dtype))
    if localised:
        v = jax.tree.map(lambda x: jnp.zeros_like(x).at[1, 1].set(x[1, 1]), v)
    with jax.enable_x64(True):
        product = exact_operator(operator, "float64") @ cast(v, "float64")
    found = operator @ v
    with jax.enable_x64(True):
        assert relative(found, product) < tolerance


@pytest.mark.parametrize(
    ("leaf", "factor"), [("key/bias", 0.0), ("key/bias", 1e-12), ("key/bias", 1e-6), ("key/kernel", 1e-4)]
)
def test_a_leaf_of_tiny_entries_does_not_mislead_the_automatic_step(leaf, factor):
    """Softmax ignores key biases, which may be nothing but rounding; keys are normalised, whatever their scale."""
    model = random_model(dataclasses.replace(SMALL, dtype="float32", qkv_bias=True))
    kind, name = leaf.split("/")
    entries = model.params["layers"]["attention"][kind]
    entries[name] = factor * jax.random.normal(jax.random.key(2), entries[name].shape) / 4
    batch = [batch_of(np.random.default_rng(0).integers(0, SMALL.vocab_size, (3, 8)))]
    operator = FiniteDifferenceHessian(model.loss(), model.params, batch)
    v = random_probe(jax.random.key(1), operator.shape_dtype)
    assert relative(operator @ v, Hessian(operator.loss, operator.params, batch) @ v) < 3e-4


@pytest.mark.parametrize(("scale", "constant"), [(1e-9, 0.0), (1.0, -1e9)])
@pytest.mark.parametrize("patterns", [(), ("in", "out")], ids=["all", "restricted"])
def test_neither_tiny_weights_that_matter_nor_a_large_constant_mislead_the_automatic_step(scale, constant, patterns):
    case, loss = hard_case("tanh"), network_loss(jnp.tanh, (scale, 1.0))
    params = case.params | {"in": scale * case.params["in"], "mask": jnp.full((), constant)}
    found, expected = FiniteDifferenceHessian(loss, params, case.batches), Hessian(loss, params, case.batches)
    if patterns:
        found, expected = found.restrict(*patterns), expected.restrict(*patterns)
    v = random_probe(jax.random.key(1), found.shape_dtype)
    assert relative(found @ v, expected @ v) < 3e-4


def test_where_no_step_serves_the_automatic_one_is_refused():
    operator = hard_case("ReLU", "bfloat16")
    with pytest.raises(
        ValueError, match=r"No finite-difference step is accurate in bfloat16: the best one .* an error of \d+%"
    ):
        validate(operator)
    assert "error" not in validate(dataclasses.replace(operator, step=1e-3))["shift_of_a_random_vector"]
    assert validate(dataclasses.replace(operator, shift="float32"))["shift_of_a_random_vector"]["error"] < 0.01


def test_leaves_that_do_not_move_are_named_in_a_warning():
    with pytest.warns(UserWarning, match=r"miss the curvature of parameters that a shift .* out \(1?\d\d% *\)"):
        validate(hard_case("unequal scales"))


def test_several_automatic_steps_at_once_are_those_of_one_after_the_other():
    operator = hard_case("LoRA")
    probes = [random_probe(jax.random.key(k), operator.shape_dtype) for k in range(2)]
    probes[1] = probes[1] | {"a": jnp.zeros_like(probes[1]["a"])}
    together = jax.jit(jax.vmap(operator.shift_length))(jax.tree.map(lambda *x: jnp.stack(x), *probes))
    alone = [float(operator.calibrated(probe).step) for probe in probes]
    np.testing.assert_allclose(together, alone, rtol=0.5)  # cube roots of roundings, which differ


def test_a_quadratic_at_its_minimum_gets_a_step():
    loss = lambda p, b: 0.5 * jnp.sum(jnp.asarray([1.0, 2.0, 5.0]) * p * p) * b  # noqa: E731
    operator = FiniteDifferenceHessian(loss, jnp.zeros(3), [jnp.ones(())], "auto")
    np.testing.assert_allclose(operator @ jnp.ones(3), jnp.array([1.0, 2.0, 5.0]), rtol=1e-5)
