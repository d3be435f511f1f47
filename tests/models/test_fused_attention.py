"""Fused attention and its derivatives are those of the plain one, and it compiles for the cards that it is made for."""

import dataclasses
import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL, batch_of, language_operator, random_model, random_vector, relative, tokens

from jaxhess import DecoderConfig, FiniteDifferenceHessian, GaussNewton, Hessian, make_mesh, plan
from jaxhess.distributed.mesh import batch_sharding
from jaxhess.models.attention import causal_attention
from jaxhess.models.attention_tiles import Tiles
from jaxhess.models.fused_attention import fused_attention, tile_table
from jaxhess.operators.base import parts
from jaxhess.operators.precision import exact_operator
from jaxhess.plan import gpu


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences, positions, key heads, query heads to each and their width; window; tiles."""

    shape: tuple[int, int, int, int, int]
    window: int | None = None
    tiles: tuple[int, int] = (4, 4)

    def arrays(self, seed: int, dtype: str = "float64") -> tuple[jax.Array, ...]:
        batch, length, heads, _, width = self.shape
        numbers = np.random.default_rng(seed)
        keys = (batch, length, heads, width)
        return tuple(jnp.asarray(numbers.normal(size=s), dtype) for s in (self.shape, keys, keys))

    def fused(self, query, key, value):
        window = None if self.window is None else jnp.int32(self.window)
        return fused_attention(query, key, value, window, tiles=Tiles(*self.tiles, 4, 1))

    def plain(self, query, key, value):
        window = None if self.window is None else jnp.int32(self.window)
        query, key, value = jnp.moveaxis(query, 1, 3), jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        return jnp.moveaxis(causal_attention(query, key, value, window=window, chunk=64), 3, 1)


CASES = {
    "grouped": Case((2, 8, 2, 3, 16), tiles=(4, 8)),
    "windowed": Case((1, 12, 1, 2, 16), window=5),
    "window of one": Case((1, 8, 1, 1, 16), window=1, tiles=(8, 4)),
    "ragged": Case((1, 11, 1, 2, 16), tiles=(8, 4)),
    "ragged, windowed, width 12": Case((1, 11, 2, 2, 12), window=3, tiles=(4, 8)),
    "width 24, one tile": Case((1, 5, 1, 1, 24), tiles=(8, 8)),
}


def derivatives(attention, arrays, tangents):
    """Value, gradient, and product of the Hessian of a loss that is not linear in what attention returns."""

    def loss(arrays):
        attended = attention(*arrays)
        return jnp.sum(jnp.sin(attended) * jnp.cos(jnp.arange(attended.size).reshape(attended.shape)))

    gradient, product = jax.jvp(jax.grad(loss), (arrays,), (tangents,))
    return attention(*arrays), gradient, product


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_gradient_and_exact_product_are_those_of_the_plain_attention(case):
    arguments = case.arrays(0), case.arrays(1)
    fused = jax.jit(functools.partial(derivatives, case.fused))(*arguments)
    plain = jax.jit(functools.partial(derivatives, case.plain))(*arguments)
    for ours, theirs in zip(fused, plain, strict=True):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.usefixtures("float64")
def test_layers_scanned_and_recomputed_several_vectors_at_once_and_linearised():
    case = Case((1, 8, 1, 2, 16))
    params = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 4, 16))) / 4
    windows = jnp.array([3, 8], jnp.int32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 32)))

    def loss(fused, params):
        def layer(x, item):
            kernel, window = item
            q, k, v = jnp.split(jnp.einsum("btd,dhe->bthe", x, kernel), (2, 3), axis=2)
            q = q[:, :, None]
            here = dataclasses.replace(case, window=window)
            return x + (here.fused if fused else here.plain)(q, k, v).reshape(x.shape), None

        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, (params, windows))[0]))

    vs = jnp.asarray(np.random.default_rng(2).normal(size=(2, *params.shape)))

    @functools.partial(jax.jit, static_argnums=0)
    def products(fused, params, vs):
        gradient = jax.grad(functools.partial(loss, fused))
        return jax.vmap(lambda v: jax.jvp(gradient, (params,), (v,))[1])(vs)

    @jax.jit
    def linearized(params, vs):
        return jax.vmap(jax.linearize(jax.grad(functools.partial(loss, True)), params)[1])(vs)

    expected = products(False, params, vs)
    assert relative(products(True, params, vs), expected) < 1e-12
    assert relative(linearized(params, vs), expected) < 1e-12


def test_in_bfloat16_products_are_as_close_to_the_truth_as_those_of_the_plain_attention():
    case = Case((1, 32, 1, 2, 16), tiles=(16, 16))
    errors = {}
    narrow = [case.arrays(k, "bfloat16") for k in (0, 1)]
    with jax.enable_x64(True):
        wide = [tuple(x.astype("float64") for x in arrays) for arrays in narrow]
        truth = jax.jit(functools.partial(derivatives, case.plain))(*wide)[2]
        for name in ("fused", "plain"):
            product = jax.jit(functools.partial(derivatives, getattr(case, name)))(*narrow)[2]
            errors[name] = relative(jax.tree.map(lambda x: x.astype("float64"), product), truth)
    # Half a unit in the last place of bfloat16 is 2e-3 of a number; a product has been rounded a few times.
    assert errors["fused"] < 1.2 * errors["plain"] < 0.02


def test_what_changes_all_scores_of_a_query_alike_is_not_rounded_with_them():
    """A change of all keys by one vector changes no output, however large: it must not leave its rounding there."""
    case = Case((1, 32, 1, 1, 16), tiles=(16, 8))
    arrays = case.arrays(0, "bfloat16")
    alike = jnp.broadcast_to(100 * case.arrays(1, "bfloat16")[1][:, :1], arrays[1].shape)
    still = jax.tree.map(jnp.zeros_like, arrays)
    _, moved = jax.jit(lambda *tangents: jax.jvp(case.fused, arrays, tangents))(still[0], alike, still[2])
    # Scores change by up to 100 |q| |k| / 4, a few hundred; their difference by float32's rounding of that, some 1e-4.
    assert float(jnp.max(jnp.abs(moved.astype("float32")))) < 1e-2


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_hessian_and_gauss_newton_of_a_model_are_those_with_plain_attention():
    plain = language_operator("float64", attention="plain", sliding_window=5, sliding_layers=(True, False))
    v = random_vector(plain.shape_dtype, 1)
    config = dataclasses.replace(plain.loss.config, attention="fused")
    loss = dataclasses.replace(plain.loss, config=config)
    for exact in (plain, GaussNewton(plain.loss, plain.params, plain.batches)):
        assert relative(dataclasses.replace(exact, loss=loss) @ v, exact @ v) < 1e-11


@pytest.mark.slow
def test_on_a_mesh_every_device_attends_to_its_own_sequences_and_heads():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    config = dataclasses.replace(SMALL, num_heads=4, num_kv_heads=2, qk_norm=False)
    traffic = {}
    for attention in ("plain", "fused"):
        job = plan.Job(
            dataclasses.replace(config, attention=attention), axes=dict(mesh.shape), seq_len=16, microbatch=8
        )
        job = dataclasses.replace(job, sequences=8, steps=2)
        traffic[attention] = plan.compiled(job, mesh).traffic
    assert traffic["fused"] == traffic["plain"]


@pytest.mark.parametrize(
    "sequences", [pytest.param(8, marks=pytest.mark.study), pytest.param(3, marks=pytest.mark.slow)]
)
def test_on_a_mesh_products_are_those_of_the_plain_attention(sequences):
    """Eight sequences are cut over the devices, three lie whole on all of them."""
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    config = dataclasses.replace(SMALL, num_heads=4, num_kv_heads=2, num_layers=1, attention="plain")
    model = random_model(config, mesh)
    batch = batch_of(tokens(sequences, 18, 101))
    if sequences == 8:
        batch = jax.device_put(batch, batch_sharding(mesh))
    plain = Hessian(model.loss(), model.params, [batch])
    fused = Hessian(model.configured(attention="fused").loss(), model.params, [batch])
    vs = jax.tree.map(lambda *x: jnp.stack(x), *(random_vector(plain.shape_dtype, k) for k in (1, 2)))
    expected, found = (jax.jit(jax.vmap(lambda v, H=H: H.mv(v)))(vs) for H in (plain, fused))
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("capability", "change", "table"),
    [
        ("8.0", {}, "sm80"),
        ("8.9", {}, "sm80"),
        ("9.0", {}, "sm90"),
        ("10.0", {}, "sm100"),
        ("12.0", {}, "sm80"),
        ("7.5", {}, None),
        ("gfx90a", {}, None),
        (None, {}, None),
        ("9.0", {"dtype": "float32"}, None),
        ("9.0", {"dtype": "float32", "attention": "fused"}, "sm90"),
        (None, {"attention": "fused"}, "sm80"),
        ("9.0", {"attention": "plain"}, None),
        ("9.0", {"head_dim": 320}, None),
    ],
)
def test_attention_is_fused_where_there_are_kernels_for_it(monkeypatch, capability, change, table):
    device = SimpleNamespace() if capability is None else SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert tile_table(dataclasses.replace(SMALL, **{"dtype": "bfloat16", **change}), None) == table


def test_kernels_are_traced_later_in_the_precision_that_attention_was_called_in():
    operator = language_operator(attention="fused", num_layers=1)
    v = random_vector(operator.shape_dtype, 1)
    program = str(jax.make_jaxpr(operator.mv)(v))
    assert program.count("precision='highest'") == program.count("setting=Setting(") > 0


def test_what_cannot_be_fused_is_said():
    with pytest.raises(ValueError, match="no fused attention for heads of width 320, only up to 256: use plain"):
        dataclasses.replace(SMALL, head_dim=320, attention="fused")
    with pytest.raises(ValueError, match="attention is 'flash'; it must be auto, plain or fused"):
        dataclasses.replace(SMALL, attention="flash")
    assert DecoderConfig.from_dict({k: v for k, v in SMALL.to_dict().items() if k != "attention"}) == SMALL


def test_the_reference_of_an_audit_has_plain_attention():
    operator = language_operator(attention="fused")
    difference = FiniteDifferenceHessian(operator.loss, operator.params, operator.batches, step=1e-2)
    for approximate in (operator, difference, 2 * operator):
        reference = jax.eval_shape(lambda op: exact_operator(op, "bfloat16"), approximate)
        loss = (parts(reference) or [reference])[0].loss
        assert (loss.config.attention, loss.config.dtype) == ("plain", "bfloat16")


COMPILE = """
import functools, jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxhess import plan
from jaxhess.models import attention_kernels as kernels

for card, table in (("A100-80GB", "sm80"), ("H100", "sm90"), ("B200", "sm100")):
    (device,) = plan.gpu_devices(card, 1)
    place = SingleDeviceSharding(device)
    for dtype, width in (("bfloat16", 64), ("bfloat16", 80), ("bfloat16", 128), ("bfloat16", 256), ("float32", 64)):
        def struct(*shape, dtype=dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        shapes = {
            "q": struct(1, 300, 2, 4, width),
            "k": struct(1, 300, 2, width),
            "s": struct(1, 2, 4, 300, dtype=jnp.float32),
            "w": struct(1, dtype=jnp.int32),
        }
        for kernel, roles in (
            (kernels.forward, "qkkw"),
            (kernels.forward_tangent, "qkkqsqkkw"),
            (kernels.backward, "qkksqsw"),
            (kernels.backward_tangent, "qkksqsqkksqsw"),
        ):
            run = functools.partial(kernel, tiles=table, precision="highest")
            with jax.default_device(device):  # JAX 0.12 asks it what to lower for
                jax.jit(run).lower(*[shapes[r] for r in roles]).compile()
            print(card, dtype, width, kernel.__name__, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not gpu.available(), reason="needs the extra gpu-plan")
def test_every_kernel_compiles_for_every_card_and_fits_into_its_shared_memory():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
