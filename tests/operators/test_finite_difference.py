"""Laws of the finite-difference Hessian: its error is the one predicted, and the automatic step is near the best."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_model, random_vector, relative

import convert
from convert.text import load_blocks
from jaxhess import (
    DecoderConfig,
    FiniteDifferenceHessian,
    Hessian,
    Microbatches,
    Storage,
    lanczos_segment,
    make_mesh,
    random_probe,
    start_lanczos,
)
from jaxhess.data import TokenBatch
from jaxhess.distributed.memory import temporary_bytes
from jaxhess.distributed.mesh import batch_sharding
from jaxhess.krylov import compile_segment
from jaxhess.models import initialize
from jaxhess.operators.facts import describe, explain_non_finite, validate
from jaxhess.operators.microbatches import sum_over_microbatches
from jaxhess.plan.hlo import matmul_flops
from jaxhess.vectors import cast, norm
from scripts.run_options import TINY

SMALL = DecoderConfig(
    vocab_size=101,
    embed_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=64,
    max_positions=16,
    query_chunk=64,
)


def bigram_loss(params, batch):
    """A model of the next token from the last one: embedding, norm gain, one hidden layer. Follows params' dtypes."""
    tokens, weights = batch
    x = params["embed"][tokens[:, :-1]]
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True)) * params["gain"]
    logits = jnp.tanh(x @ params["up"]) @ params["head"]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights), jnp.sum(weights)


def bigram(dtype: str = "float32", **options) -> FiniteDifferenceHessian:
    """Two microbatches of one shape and a smaller one, a third of the labels left out."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (50, 16), "up": (16, 48), "head": (48, 50)}
    params = {name: jnp.asarray(0.5 * rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    params["gain"] = jnp.ones(16, dtype)
    tokens = np.minimum(rng.geometric(0.1, (5, 13)), 49)
    weights = (rng.random((5, 12)) < 0.7).astype(np.float32)
    cuts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    batches = [(jnp.asarray(tokens[c]), jnp.asarray(weights[c])) for c in cuts]
    return FiniteDifferenceHessian(bigram_loss, params, batches, **options)


def decoder(mesh=None, step="auto", **change) -> FiniteDifferenceHessian:
    model = random_model(dataclasses.replace(SMALL, num_layers=8, **change), mesh, factor=1)
    ids = np.random.default_rng(1).integers(0, 101, (2, 8, 13)).astype(np.int32)
    batch = TokenBatch(jnp.asarray(ids), jnp.ones((2, 8, 12)))
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(mesh, axis=1))
    return FiniteDifferenceHessian(model.loss(4096), model.params, Microbatches(batch), step)


def exact(operator: FiniteDifferenceHessian) -> Hessian:
    return Hessian(operator.loss, operator.params, operator.batches)


def gradient_sum(operator: FiniteDifferenceHessian, params=None):
    params = operator.params if params is None else params
    with jax.default_matmul_precision("highest"):
        return sum_over_microbatches(
            lambda b: jax.grad(operator.sum_and_count, has_aux=True)(params, b), operator.groups
        )


def in_float32(like):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), like)


@pytest.mark.usefixtures("float64")
def test_the_error_is_the_step_squared_over_six_times_the_third_derivative_of_the_gradient():
    operator = bigram("float64", per="unit", step=1.0)
    v = random_probe(jax.random.key(1), operator.shape_dtype)
    v = jax.tree.map(lambda x: x / norm(v), v)

    def derivative(t):
        total, count = gradient_sum(operator, jax.tree.map(lambda x, d: x + t * d, operator.params, v))
        return jax.tree.map(lambda x: x / count, total)

    for _ in range(3):
        derivative = (lambda f: lambda t: jax.jvp(f, (t,), (1.0,))[1])(derivative)
    predicted = norm(jax.jit(derivative)(0.0)) / 6
    product = exact(operator) @ v
    scale = float(norm(product) / predicted) ** 0.5  # the shift at which truncation would be 100%
    for e, tolerance in ((1e-2 * scale, 1e-2), (1e-3 * scale, 1e-4)):  # the next term is smaller by about e^2 / scale^2
        error = relative(dataclasses.replace(operator, step=e) @ v, product) * norm(product)
        np.testing.assert_allclose(error, e**2 * predicted, rtol=tolerance)


@pytest.mark.usefixtures("float64")
def test_ragged_microbatches_blocks_and_batched_products_are_those_of_the_exact_operator():
    operator = bigram("float64", step=1e-6)
    probes = [random_probe(jax.random.key(k), operator.shape_dtype) for k in range(2)]
    batched = jax.jit(jax.vmap(operator.mv))(jax.tree.map(lambda *x: jnp.stack(x), *probes))
    for k, probe in enumerate(probes):  # e is 6e-5, truncation 0.03 e^2; rounding 1e-16 / e
        assert relative(jax.tree.map(lambda x, k=k: x[k], batched), exact(operator) @ probe) < 1e-8
    block, whole = operator.restrict("up", "gain"), exact(operator).restrict("up", "gain")
    v = random_probe(jax.random.key(3), whole.shape_dtype)
    assert relative(block @ v, whole @ v) < 1e-8


def test_conventions_differ_by_the_square_root_of_the_dimension():
    operator = bigram(step=1e-3, per="coordinate")
    v = random_probe(jax.random.key(1), operator.shape_dtype)
    other = dataclasses.replace(operator, step=1e-3 * operator.dim**0.5, per="unit")
    np.testing.assert_allclose(other.shift_length(v), operator.shift_length(v), rtol=1e-6)
    assert relative(other @ v, operator @ v) < 1e-3  # shifts differ in the last bit, gradients by their rounding
    entries = float(operator.shift_length(v)) * np.asarray(v["up"]) / float(norm(v))
    np.testing.assert_allclose(np.sqrt(np.mean(entries**2)), 1e-3, rtol=0.1)  # 768 of them: 1 / sqrt(2 * 768) = 0.03


@pytest.mark.parametrize("step", [1e-3, "auto"])
def test_products_are_homogeneous_and_of_zero_are_zero(step):
    operator = bigram(step=step)
    v = random_probe(jax.random.key(1), operator.shape_dtype)
    for factor in (2.0**-80, 2.0**80):  # powers of two: the same bits, unless a square under- or overflows
        scaled = operator @ jax.tree.map(lambda x, f=factor: jnp.float32(f) * x, v)
        assert relative(jax.tree.map(lambda x, f=factor: x / f, scaled), operator @ v) < 1e-3
    zero = operator @ jax.tree.map(jnp.zeros_like, v)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(zero))


@pytest.mark.parametrize("step", [1e-3, pytest.param("auto", marks=pytest.mark.slow)])
def test_products_do_not_depend_on_the_mesh_and_gather_no_parameters(step):
    products = []
    for mesh in (None, make_mesh("fsdp=4,tensor=2")):
        operator = decoder(mesh, step, embed_dim=64, vocab_size=128, mlp_dim=192)
        v = random_vector(operator.shape_dtype)
        compiled = jax.jit(lambda op, x: op.mv(x)).lower(operator, v).compile()
        products.append(jax.tree.map(np.asarray, compiled(operator, v)))
    # Automatic steps are cube roots of a rounding, of which meshes have their own; errors at such steps are 1e-4.
    assert relative(products[1], products[0]) < 1e-3
    gathered = [
        np.prod([int(n) for n in shape.split(",")])
        for line in compiled.as_text().splitlines()
        if "all-gather(" in line
        for shape in re.findall(r"f32\[([\d,]+)\]", line.split("all-gather(")[0])
    ]
    assert gathered
    assert max(gathered) <= 64 * 192  # one layer's feed-forward matrix; the stack of them is eight times that


def test_in_bfloat16_norm_gains_do_not_move():
    operator = bigram("bfloat16", step=1e-3)
    v = random_probe(jax.random.key(1), in_float32(operator.shape_dtype))
    gains = jax.tree.map(jnp.zeros_like, v) | {"gain": jnp.linspace(-4, 4, 16)}
    shares = operator.vanished(jax.tree.map(lambda x, d: x + d, v, gains))
    assert set(shares) == {"embed", "gain", "head", "up"}
    # Half a rounding unit at 0.5 is 2^-9 = 0.002, twice the shift's typical entry; at 0.1 it is a quarter of it.
    assert 0.1 < shares["up"] < 0.9
    # A gain of exactly 1 moves down from 2^-9 and up from 2^-8: below both, nothing. Of these shifts, entry by entry:
    length = float(norm(gains))
    shift = np.abs(float(operator.shift_length(gains)) * np.asarray(gains["gain"]) / length)
    assert operator.vanished(gains)["gain"] == np.mean(shift < 2.0**-9)
    normal = random_probe(jax.random.key(2), jax.ShapeDtypeStruct((20000,), "float32"))
    many = FiniteDifferenceHessian(lambda p, b: jnp.sum(p) * b, jnp.ones(20000, "bfloat16"), [jnp.ones(())], 1e-3)
    # |v| <= 2^-9 / 1e-3 = 1.95 standard deviations: 94.9%, give or take 0.16%.
    np.testing.assert_allclose(many.vanished(normal)[""], 0.949, atol=0.008)
    assert set(dataclasses.replace(operator, shift="float32").vanished(v).values()) == {0.0}


def test_the_realised_shift_is_divided_by_not_the_one_asked_for():
    # Gradients 4 p without rounding. From 1 a shift of 0.003 goes down by 2^-8 and up by nothing.
    loss = lambda p, b: 2 * jnp.sum(p * p) * b  # noqa: E731
    operator = FiniteDifferenceHessian(loss, jnp.ones(8, "bfloat16"), [jnp.ones((), "bfloat16")], 0.003, "unit")
    one = jnp.zeros(8).at[2].set(1.0)
    np.testing.assert_allclose(operator @ one, 4 * one, rtol=1e-6)  # over the nominal shift: 4 * 2^-8 / 0.006 = 2.6
    # Where only some entries move, the Rayleigh quotient is right nevertheless.
    some = jnp.asarray([1.0, 1.0, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(some @ (operator @ some) / (some @ some), 4, rtol=1e-6)
    wide = dataclasses.replace(operator, shift="float32", step=0.1)
    np.testing.assert_allclose(wide @ some, 4 * some, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_automatic_step_errs_at_most_three_times_as_much_as_the_best(dtype):
    # Token 1 is predicted from in the last microbatch only: the first knows nothing of its embedding.
    check_the_automatic_step(bigram(dtype), {"gain": (3,), "embed": (1, 5), "up": "largest"}, lanczos=(5,))


@pytest.mark.study
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_automatic_step_of_a_language_model_errs_at_most_three_times_as_much_as_the_best(dtype, trained):
    config = convert.load_config(str(TINY), dtype)
    text = load_blocks(str(TINY / "sample.txt"), str(TINY), seq_len=64, vocab_size=config.vocab_size, sequences=4)
    model = convert.load(str(TINY), dtype=dtype) if trained else initialize(config, jax.random.key(0))
    operator = FiniteDifferenceHessian(model.loss(), model.params, Microbatches(text.microbatches(2, model.mesh)))
    frequent = np.bincount(np.asarray(operator.batches[0].stacked.tokens).ravel()).argmax()
    check_the_automatic_step(
        operator,
        {
            "final_norm/scale": (3,),
            "layers/attention_norm/scale": (1, 3),
            "embed/kernel": (frequent, 5),
            "layers/mlp/up/kernel": "largest",
        },
        lanczos=(5, 20),
        exact_below={"float32": 1e-5, "bfloat16": 3e-2}[dtype],
    )


def check_the_automatic_step(operator, coordinates, lanczos=(2, 5), exact_below=None) -> None:
    """For a random vector, Lanczos vectors that have found the outliers, and single coordinates.

    With `exact_below` also that the exact product in the same dtype errs less than that, and half as much as any step.
    """
    with jax.enable_x64(True):
        reference = exact(operator).in_dtype("float64")
    for name, v in directions(operator, coordinates, lanczos).items():
        with jax.enable_x64(True):
            product = reference @ cast(v, "float64")

        def error(step, v=v, product=product):
            found = dataclasses.replace(operator, step=step, per="unit") @ v
            with jax.enable_x64(True):
                return relative(found, product)

        if exact_below is not None:
            narrow = exact(operator) @ v
            with jax.enable_x64(True):
                own = relative(narrow, product)
            assert own < exact_below, name
        length = operator.calibrated(v).step
        best = np.nanmin([error(length * 2.0**k) for k in range(-5, 6)])
        assert error(length) < 3 * best, name
        assert exact_below is None or 2 * own < best, name


def directions(operator, coordinates, lanczos) -> dict:
    like = in_float32(operator.shape_dtype)
    found = {"random": random_probe(jax.random.key(1), operator.shape_dtype)}
    found["random"] = cast(found["random"], "float32")
    state = start_lanczos([found["random"]], max(lanczos), Storage("none"))
    for k in sorted(lanczos):
        state = lanczos_segment(exact(operator).in_dtype("float32"), state, k - 1)
        found[f"Lanczos vector {k}"] = jax.tree.map(lambda x: x[0], state.current)
    for name, where in coordinates.items():
        unit = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), like)
        for (path, leaf), x in zip(jax.tree.leaves_with_path(unit), jax.tree.leaves(operator.params), strict=True):
            if jax.tree_util.keystr(path, simple=True, separator="/") == name:
                sizes = np.abs(np.asarray(x, np.float32))
                leaf[np.unravel_index(sizes.argmax(), leaf.shape) if where == "largest" else where] = 1
        found[f"one entry of {name}"] = jax.tree.map(jnp.asarray, unit)
    return found


def test_a_calibrated_step_is_the_automatic_one_of_that_vector():
    operator = bigram(step="auto")
    v = random_probe(jax.random.key(1), operator.shape_dtype)
    fixed = operator.calibrated(v)
    assert fixed.per == "unit"
    np.testing.assert_allclose(fixed.step, operator.shift_length(v), rtol=0.1)  # the cube root of a rounding
    assert describe(operator)["step"] == "auto"
    facts = validate(operator)["shift_of_a_random_vector"]
    assert facts["length"] > 0
    assert set(facts["vanished"].values()) == {0.0}


def test_two_gradients_one_after_the_other_beside_two_buffers():
    operator = decoder(None, step=1e-3, embed_dim=128, mlp_dim=512, head_dim=64)
    held = sum(x.nbytes for x in jax.tree.leaves(operator.params))
    v = random_vector(operator.shape_dtype)
    product = jax.jit(lambda op, x: op.mv(x)).lower(operator, v).compile()
    gradient = jax.jit(gradient_sum).lower(operator).compile()
    assert matmul_flops(product) <= 2.02 * matmul_flops(gradient)
    assert temporary_bytes(product) <= temporary_bytes(gradient) + 2.02 * held
    # Inside a Lanczos step the product itself is one more.
    segment = compile_segment(operator, start_lanczos([v], 4, Storage("none")))
    assert temporary_bytes(segment) <= temporary_bytes(gradient) + 3.02 * held


def test_a_step_that_moves_nothing_is_named_as_the_reason():
    operator = bigram("bfloat16", step=1e-12)
    v = random_probe(jax.random.key(1), operator.shape_dtype)
    assert "no parameter moved: a shift of length" in explain_non_finite(operator, v)
    assert np.isnan(np.asarray((operator @ v)["gain"], np.float32)).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"step": 0.0}, "step is 0.0; it is a positive number, or 'auto'"),
        ({"step": -1e-3}, "step is -0.001"),
        ({"step": float("nan")}, "step is nan"),
        ({"step": float("inf")}, "step is inf"),
        ({"step": "best"}, "step is best"),
        ({"per": "entry"}, "per 'entry'; it is per 'coordinate' or per 'unit'"),
        ({"shift": "exact"}, "Unknown shift 'exact'"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        FiniteDifferenceHessian(sum, {"w": jnp.ones(2)}, [jnp.ones(2)], **options)
