"""Microbatches as data, and exact sums over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.errors import InputError
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import own_zeros


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Microbatches:
    """Batches of one shape, stacked: every leaf of `stacked` has a leading axis that runs over them.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> len(jaxhess.Microbatches({"inputs": jnp.zeros((3, 8, 2)), "targets": jnp.zeros((3, 8))}))
        3
    """

    stacked: Any

    def __len__(self) -> int:
        return jax.tree.leaves(self.stacked)[0].shape[0]


def as_groups(batches: Any) -> tuple[Microbatches, ...]:
    """`batches` as groups of equal shapes, each stacked.

    Args:
        batches: A list of batches (any pytrees the loss takes, shapes may differ), or `Microbatches`, or groups.

    Raises:
        TypeError: Anything else: a bare batch cannot be told from a stack of them.
        InputError: No batch at all, or `Microbatches` without a common leading axis.
    """
    if isinstance(batches, Microbatches):
        batches = (batches,)
    if isinstance(batches, tuple) and batches and all(isinstance(group, Microbatches) for group in batches):
        for group in batches:
            shapes = [np.shape(x) for x in jax.tree.leaves(group.stacked)]
            lengths = {shape[:1] for shape in shapes}
            if len(lengths) != 1 or lengths <= {(), (0,)}:
                raise InputError(
                    f"Microbatches are of shapes {', '.join(map(str, shapes)) or 'none at all'}: every array needs a "
                    "leading axis that runs over the microbatches, as long as that of the others and at least 1."
                )
        return batches
    if not isinstance(batches, list):
        raise TypeError(
            f"batches is a {type(batches).__name__}; pass a list of batches, [batch] for a single one, "
            "or Microbatches(stacked) for arrays with a leading microbatch axis."
        )
    if not batches:
        raise InputError("batches is empty: the loss needs at least one batch.")
    groups: dict[Any, list] = {}
    for k, batch in enumerate(batches):
        leaves, treedef = jax.tree.flatten(batch)
        if not leaves:
            raise InputError(f"Batch {k} is {batch!r}: there are no arrays in it.")
        groups.setdefault((treedef, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)), []).append(batch)
    return tuple(Microbatches(jax.tree.map(lambda *x: jnp.stack(x), *group)) for group in groups.values())


def sum_over_microbatches(f: Callable[[Any], Any], groups: tuple[Microbatches, ...], dtype: str = "float32") -> Any:
    """The sum of the pytrees f(batch) over all batches, accumulated in at least `dtype`.

    One batch is evaluated directly: no accumulator beside its result. Several run one after the other in a scan.
    """
    return sum_and_each(f, lambda _: (), groups, dtype)[0]


def sum_and_each(
    f: Callable[[Any], Any],
    each: Callable[[Any], Any],
    groups: tuple[Microbatches, ...],
    dtype: str = "float32",
    along: Any = None,
) -> tuple[Any, Any]:
    """That sum, and each(f(batch)) of every batch: a pytree of arrays [batches, ...].

    Where f(batch) is a tuple that begins with a product, `along` is the vector: its sum then takes less memory
    (`vectors.own_zeros`).
    """
    total: Any = None
    rows = []
    for group in groups:
        if len(group) == 1:
            own = f(jax.tree.map(lambda x: x[0], group.stacked))
            part = _widen(own, dtype)
            total = part if total is None else _add(total, part)
            rows.append(jax.tree.map(lambda x: x[None], each(own)))
            continue
        if total is None:
            abstract = jax.eval_shape(lambda g: f(jax.tree.map(lambda x: x[0], g)), group.stacked)
            total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, dtype)), abstract)
            if along is not None:
                total = (own_zeros(along, total[0]), *total[1:])

        def step(acc: Any, batch: Any) -> tuple[Any, Any]:
            own = f(batch)
            return _add(acc, own), each(own)

        total, found = jax.lax.scan(step, total, group.stacked)
        rows.append(found)
    return total, jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, part)


def _widen(x: Any, dtype: str) -> Any:
    return jax.tree.map(lambda e: e.astype(jnp.promote_types(e.dtype, dtype)), x)
