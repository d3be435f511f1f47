"""The output matrix in slices of the vocabulary, so that neither all logits nor the whole matrix exist at once.

A slice takes the same share of the rows that every device holds where the mesh cuts them (as a rule along `tensor`), so
none of them waits; along `fsdp` it is gathered when its logits are computed, and its gradient reduced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxhess.distributed.gather import gathered
from jaxhess.distributed.mesh import constrain, partition_spec
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import in_order

Carry = TypeVar("Carry")

GATHERED = 2**24
"""Entries of the output matrix that are gathered at once whatever the sizes: a small one is not sliced for it."""


class Slice(NamedTuple):
    """Some rows of the output matrix.

    Attributes:
        kernel: [v, D].
        ids: [v] int32, the tokens that the rows stand for.
        real: [v] bool, whether there is such a token (the id of others is -1); None where all are.
        softcap: That of logits (`DecoderConfig.logit_softcap`).
    """

    kernel: jax.Array
    ids: jax.Array
    real: jax.Array | None
    softcap: float | None = None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Slices:
    """The output matrix cut along the vocabulary.

    Attributes:
        kernels: [n, parts, rows, D]: of each slice, the rows from each of the `parts` that devices hold.
        vocab_size: V; rows beyond V / parts of a part are padding.
        rows_cut, columns_cut: Mesh axes that cut V and D.
        mesh: That of the matrix.
        softcap: That of logits.
    """

    kernels: jax.Array
    vocab_size: int = dataclasses.field(metadata={"static": True})
    rows_cut: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    columns_cut: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})

    def __len__(self) -> int:
        return self.kernels.shape[0]

    def merged(self, kernels: jax.Array) -> jax.Array:
        """Arrays like `kernels` as one like the output matrix, [V, D]."""
        n, parts, rows, width = kernels.shape
        by_part = jnp.moveaxis(kernels, 0, 1).reshape(parts, n * rows, width)
        return by_part[:, : self.vocab_size // parts].reshape(self.vocab_size, width)

    def slice(self, kernel: jax.Array, k: jax.Array | int) -> Slice:
        """Slice k, whose rows `kernel` [parts, rows, D] are."""
        n, parts, rows, width = self.kernels.shape
        kernel = self._gathered(kernel)
        held = self.vocab_size // parts
        place = jnp.broadcast_to(k * rows + jnp.arange(rows, dtype=jnp.int32), (parts, rows))
        ids = place + held * jnp.arange(parts, dtype=jnp.int32)[:, None]
        if n * rows == held:
            return Slice(kernel.reshape(-1, width), ids.reshape(-1), None, self.softcap)
        real = (place < held).reshape(-1)
        return Slice(kernel.reshape(-1, width), jnp.where(real, ids.reshape(-1), -1), real, self.softcap)

    def _gathered(self, kernel: jax.Array) -> jax.Array:
        """A slice's rows, whole on every device but for the cut along `tensor`: gathered once for all their uses."""
        if self.mesh is None or self.mesh.size == 1:
            return kernel
        cut = NamedSharding(self.mesh, PartitionSpec(self.rows_cut or None, None, self.columns_cut or None))
        kept = tuple(axis for axis in self.rows_cut if axis == "tensor")
        whole = NamedSharding(self.mesh, PartitionSpec(kept or None, None, None))
        return gathered(in_order(jax.lax.with_sharding_constraint(kernel, cut), [cut]), cut, whole)


def vocabulary_slices(
    table: jax.Array,
    tokens: int,
    logit_chunk: int,
    gathered: int,
    mesh: Mesh | None,
    softcap: float | None = None,
) -> Slices:
    """The output matrix `table` [V, D] in as few slices as keep to both limits, of equal size.

    A vocabulary with no divisor of about the right size is padded, which copies the matrix.

    Args:
        table: Cut as `jaxhess.distributed.mesh.partition_spec` says: over `tensor` along V and `fsdp` along D, where
            these divide.
        tokens: Whose logits are computed together, on each device.
        logit_chunk: Logits per device that may exist at once.
        gathered: Entries of the matrix that may be gathered at once on each device, where `fsdp` cuts it; at least
            `GATHERED`.
        mesh: That of the matrix; None on one device.
        softcap: That of logits.
    """
    vocab_size, width = table.shape
    rows_cut, columns_cut = _cuts(table.shape, mesh)
    sizes = {} if mesh is None else dict(mesh.shape)
    parts = math.prod(sizes[axis] for axis in rows_cut)
    joined = math.prod(sizes[axis] for axis in rows_cut if axis != "tensor")  # parts whose rows meet on one device
    most = logit_chunk // (tokens * joined)
    if sizes.get("fsdp", 1) * sizes.get("expert", 1) > 1:
        most = min(most, max(gathered, GATHERED) // (width * joined))
    held = vocab_size // parts
    n, rows = _cut(held, max(1, most))
    by_part = table.reshape(parts, held, width)
    if n * rows > held:
        by_part = jnp.pad(by_part, ((0, 0), (0, n * rows - held), (0, 0)))
    kernels = jnp.moveaxis(by_part.reshape(parts, n, rows, width), 1, 0)
    return Slices(_pinned(kernels, rows_cut, columns_cut, mesh), vocab_size, rows_cut, columns_cut, mesh, softcap)


def scan_slices(
    f: Callable[[Carry, Any], tuple[Carry, Any]], start: Carry, slices: Slices, others: jax.Array | None = None
) -> tuple[Carry, Any]:
    """`f(carry, Slice)` over all slices, one after the other; returns the last carry and the stacked second results.

    What f computes is recomputed in a backward pass, where there are several slices.

    Args:
        f: Takes (carry, slice), or (carry, (slice, other)) where there are `others`.
        start: The first carry.
        slices: Of the output matrix.
        others: Arrays like `slices.kernels`: tangents of it.
    """

    def step(carry: Carry, item: tuple) -> tuple[Carry, Any]:
        k, kernel, other = item
        part = slices.slice(kernel, k)
        return f(carry, part if other is None else (part, slices.slice(other, k).kernel))

    if len(slices) == 1:
        carry, out = step(start, (0, slices.kernels[0], None if others is None else others[0]))
        return carry, jax.tree.map(lambda x: x[None], out)
    items = (jnp.arange(len(slices), dtype=jnp.int32), slices.kernels, others)
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), start, items)


def logits_of(hidden: jax.Array, part: Slice) -> jax.Array:
    """Logits [..., v] of states [..., D] in a slice, accumulated and returned in at least float32; -inf for padding."""
    logits = softcapped(matmul_transposed(hidden, part.kernel), part.softcap)
    return logits if part.real is None else jnp.where(part.real, logits, -jnp.inf)


def softcapped(x: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(x / softcap), or x."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def matmul_transposed(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """hidden @ kernel' [..., v] of [..., D] and [v, D], accumulated and returned in at least float32."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    rows = hidden.reshape(-1, hidden.shape[-1])  # one axis of tokens: see `jaxhess.models.layers.Projection`
    product = jax.lax.dot_general(
        rows,
        kernel.astype(hidden.dtype),
        (((1,), (1,)), ((), ())),
        precision=narrow_precision(hidden.dtype),
        preferred_element_type=wide,
    )
    return product.reshape(*hidden.shape[:-1], kernel.shape[0])


def narrow_precision(dtype: Any) -> jax.lax.Precision | None:
    """Precision of a product of arrays of `dtype` with a wider result; None, the default, for float32 and wider.

    The cotangents of a wider result are float32. Beside operands in bfloat16 TF32 is exact enough, finer than the dtype
    that the product ends in, and several times as fast on a GPU as the full precision that float32 models are given.
    """
    return jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize < 4 else None


def _cut(size: int, most: int) -> tuple[int, int]:
    """(n, rows) with n * rows >= size and rows <= most: n as small as may be, exact where a divisor is near."""
    n = math.ceil(size / most)
    exact = next((k for k in range(n, min(2 * n, size) + 1) if size % k == 0), None)
    return (exact, size // exact) if exact else (n, math.ceil(size / n))


def _cuts(shape: tuple[int, ...], mesh: Mesh | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that cut the rows and the columns of the output matrix [V, D]."""
    if mesh is None:
        return (), ()
    spec = (*partition_spec(shape, ("vocab", "embed"), mesh), None, None)
    return _axes(spec[0]), _axes(spec[1])


def _axes(cut: Any) -> tuple[str, ...]:
    return () if cut is None else (cut,) if isinstance(cut, str) else tuple(cut)


def _pinned(kernels: jax.Array, rows_cut: tuple, columns_cut: tuple, mesh: Mesh | None) -> jax.Array:
    """Rows [..., parts, rows, D] pinned to where they lie: they are gathered slice by slice, not all at once."""
    return constrain(kernels, mesh, *(None,) * (kernels.ndim - 3), rows_cut or None, None, columns_cut or None)
