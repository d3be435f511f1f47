"""Attention whose scores never leave the chip, and whose `jvp` of `grad` is exact.

JAX cannot differentiate through a kernel, so a fused attention is usually a `custom_vjp`: it has a gradient, and no
more. Here attention is a JAX primitive with rules, each of them again a kernel of `jaxhess.models.attention_kernels`:

    attend(q, k, v) -> o, L                          jvp: attend_tangent
    attend_tangent(q, k, v, o, L; q., k., v.)        linear in the last three; transposed: attend_backward
    attend_backward(q, k, v, L, c, D) -> dq, dk, dv  jvp: attend_backward_tangent

(a dot for tangents). That is what `grad`, `jvp` of `grad`, its `linearize` and its `vmap` need, and what a Gauss-Newton
product needs: `jvp` and its transpose. Derivatives of higher order are not defined. Primitives, not `custom_vjp` and
`custom_jvp`: partial evaluation, which `scan` and `checkpoint` rely on, drops the rules of the latter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, PartitionSpec

from jaxhess.distributed.mesh import BATCH_AXES
from jaxhess.models import attention_kernels as kernels
from jaxhess.models.attention_tiles import Tiles
from jaxhess.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is static.

    Attributes:
        mesh: None on one device.
        tiles: Or the table that has them.
        precision: `jax.default_matmul_precision` where attention was called: kernels are traced later, outside of it.
    """

    mesh: Mesh | None
    tiles: Tiles | str
    precision: str | None


def tile_table(config: DecoderConfig, mesh: Mesh | None) -> str | None:
    """The table of tiles (`attention_tiles.TABLES`) for the devices of `mesh`; None for the plain attention.

    By itself (`auto`) it is fused on NVIDIA GPUs since the A100, in 16 bits, where `tensor` divides the key heads. In
    float32 the products of a kernel do not run on tensor cores, and are left to the library.
    """
    if config.attention == "plain" or not config.can_fuse:
        return None
    capability = _compute_capability(mesh)
    table = "sm100" if 10 <= capability < 11 else "sm90" if 9 <= capability < 10 else "sm80"
    if config.attention == "fused":
        return table
    narrow = jnp.dtype(config.dtype).itemsize == 2
    divided = mesh is None or config.num_kv_heads % mesh.shape["tensor"] == 0
    return table if capability >= 8 and narrow and divided else None


def _compute_capability(mesh: Mesh | None) -> float:
    """That of the GPUs that are computed on; 0 where there are none, or none of NVIDIA's."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    try:
        return float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD's are called gfx90a
        return 0.0


def fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: jax.Array | None,
    mesh: Mesh | None = None,
    tiles: Tiles | str = "sm80",
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal softmax attention [B, T, K, G, h'] of queries [B, T, K, G, h], keys [B, T, K, h], values [B, T, K, h'].

    `sinks` [K, G] are scores that share in the softmax and then fall away. That is a factor on the result, of L, the
    logarithm of the sum of exp(score).
    """
    width = value.shape[-1]
    if width < query.shape[-1]:  # one kernel for both: zeros add nothing to a product
        value = jnp.pad(value, (*((0, 0),) * (value.ndim - 1), (0, query.shape[-1] - width)))
    arrays = [query, key, value]
    if window is not None:
        arrays.append(jnp.minimum(window, query.shape[1]).astype(jnp.int32).reshape(1))
    setting = Setting(mesh, tiles, jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
    attended, log_sum = attend_p.bind(*arrays, setting=setting)
    attended = attended[..., :width]
    if sinks is None:
        return attended
    kept = jax.nn.sigmoid(log_sum - sinks.astype(log_sum.dtype)[..., None])  # [B, K, G, T]
    return attended * jnp.moveaxis(kept, -1, 1)[..., None].astype(attended.dtype)


def _primitive(name: str, kernel: Callable, inputs: str, outputs: str) -> Primitive:
    """`kernel` as a primitive of arrays and, where there is one, a window.

    `inputs` and `outputs` have a letter for each array: q like the queries, k like the keys, s like L.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def run(*arrays: jax.Array, setting: Setting) -> Sequence[jax.Array]:
        return _on_shards(setting, kernel, inputs, outputs, arrays)

    def batched(arrays: Sequence[jax.Array], axes: Sequence[Any], setting: Setting) -> tuple[Any, Any]:
        results = jax.vmap(functools.partial(run, setting=setting), in_axes=tuple(axes))(*arrays)
        return results, [0] * len(results)

    def abstract(*arrays: Any, setting: Setting) -> list[Any]:
        query, key = arrays[:2]
        batch, length, heads, groups, _ = query.shape
        wide = jnp.promote_types(query.dtype, jnp.float32)
        found = {
            "q": query.update(weak_type=False),
            "k": key.update(weak_type=False),
            "s": query.update(shape=(batch, heads, groups, length), dtype=wide, weak_type=False),
        }
        return [found[c] for c in outputs]

    primitive.def_impl(lambda *arrays, setting: jax.jit(functools.partial(run, setting=setting))(*arrays))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batched
    lower = mlir.lower_fun(run, multiple_results=True)

    def lowered(context: Any, *arrays: Any, setting: Setting) -> Any:
        with compiled_for(setting.mesh):
            return lower(context, *arrays, setting=setting)

    mlir.register_lowering(primitive, lowered)
    return primitive


def compiled_for(mesh: Mesh | None) -> Any:
    """For compiling for a GPU where there is none: since 0.12 JAX asks the default device what it is."""
    if mesh is None or mesh.devices.flat[0].platform == jax.devices()[0].platform:
        return contextlib.nullcontext()
    return jax.default_device(mesh.devices.flat[0])


def _on_shards(setting: Setting, kernel: Callable, inputs: str, outputs: str, arrays: Sequence[jax.Array]) -> Any:
    """The kernel on every device's own sequences and heads: it is opaque to GSPMD, which would gather them."""
    run = functools.partial(kernel, tiles=setting.tiles, precision=setting.precision)
    mesh = setting.mesh
    if mesh is None or mesh.size == 1:
        return run(*arrays)
    batch, _, heads = arrays[0].shape[:3]
    sequences = BATCH_AXES if batch % math.prod(mesh.shape[a] for a in BATCH_AXES) == 0 else None
    cut = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    specs = {
        "q": PartitionSpec(sequences, None, cut),
        "k": PartitionSpec(sequences, None, cut),
        "s": PartitionSpec(sequences, cut),
        "w": PartitionSpec(),
    }
    given = inputs + "w" * (len(arrays) - len(inputs))
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(specs[c] for c in given),
        out_specs=tuple(specs[c] for c in outputs),
        check_vma=False,
    )(*arrays)


attend_p = _primitive("attend", kernels.forward, "qkk", "qs")
attend_tangent_p = _primitive("attend_tangent", kernels.forward_tangent, "qkkqsqkk", "qs")
attend_backward_p = _primitive("attend_backward", kernels.backward, "qkksqs", "qkk")
attend_backward_tangent_p = _primitive("attend_backward_tangent", kernels.backward_tangent, 2 * "qkksqs", "qkk")


def _attend_jvp(arrays: Sequence[jax.Array], tangents: Sequence[Any], setting: Setting) -> tuple[Any, Any]:
    outputs = attend_p.bind(*arrays, setting=setting)
    changes = map(ad.instantiate_zeros, tangents[:3])
    return outputs, attend_tangent_p.bind(*arrays[:3], *outputs, *changes, *arrays[3:], setting=setting)


def _attend_tangent_transpose(cotangents: Sequence[Any], *arrays: Any, setting: Setting) -> list[Any]:
    """L's cotangent l adds l P to dS, as D subtracts D P."""
    query, key, value, attended, log_sum, *_ = arrays
    cotangent, of_log_sum = map(ad.instantiate_zeros, cotangents)
    wide = log_sum.dtype
    delta = jnp.moveaxis(jnp.sum(cotangent.astype(wide) * attended.astype(wide), axis=-1), 1, -1) - of_log_sum
    window = arrays[8:]
    pulled = attend_backward_p.bind(query, key, value, log_sum, cotangent, delta, *window, setting=setting)
    wanted = [x if ad.is_undefined_primal(a) else None for x, a in zip(pulled, arrays[5:8], strict=True)]
    return [None] * 5 + wanted + [None] * len(window)


def _attend_backward_jvp(arrays: Sequence[jax.Array], tangents: Sequence[Any], setting: Setting) -> tuple[Any, Any]:
    changes = map(ad.instantiate_zeros, tangents[:6])
    outputs = attend_backward_p.bind(*arrays, setting=setting)
    return outputs, attend_backward_tangent_p.bind(*arrays[:6], *changes, *arrays[6:], setting=setting)


ad.primitive_jvps[attend_p] = _attend_jvp
ad.primitive_transposes[attend_tangent_p] = _attend_tangent_transpose
ad.primitive_jvps[attend_backward_p] = _attend_backward_jvp
