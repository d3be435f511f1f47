"""Gathers of what is cut over devices, whose gradients are reduced to the cut again."""

from __future__ import annotations

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec


def gathered(x: jax.Array, cut: NamedSharding, whole: NamedSharding) -> jax.Array:
    """x, which lies as `cut` says, pinned to `whole`: gathered once for all its uses.

    Linear, and not `jax.lax.with_sharding_constraint` because of its transpose: that would pin the gradient to `whole`
    too, and sum it on every device where a part of the sum is enough.
    """
    return pin_p.bind(x, sharding=whole, transposed=cut)


def _run(x: jax.Array, *, sharding: NamedSharding, transposed: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, sharding)


def _transpose(ct: jax.Array, _: jax.Array, *, sharding: NamedSharding, transposed: NamedSharding) -> tuple[jax.Array]:
    return (pin_p.bind(ct, sharding=transposed, transposed=sharding),)


def _batched(
    arrays: tuple[jax.Array], axes: tuple[int], *, sharding: NamedSharding, transposed: NamedSharding
) -> tuple[jax.Array, int]:
    (x,), (axis,) = arrays, axes

    def below(s: NamedSharding) -> NamedSharding:
        spec = (*s.spec, *(None,) * (x.ndim - 1 - len(s.spec)))
        return NamedSharding(s.mesh, PartitionSpec(*spec[:axis], None, *spec[axis:]))

    return pin_p.bind(x, sharding=below(sharding), transposed=below(transposed)), axis


pin_p = Primitive("pin")
pin_p.def_impl(_run)
pin_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(pin_p, _transpose)
batching.primitive_batchers[pin_p] = _batched
mlir.register_lowering(pin_p, mlir.lower_fun(_run, multiple_results=False))
