"""The kernels of fused attention, in Pallas for Triton: tiles of scores that never leave the chip (arXiv 2307.08691).

With scores S = scale q k', visible ones only, L = log sum exp S over keys, P = exp(S - L), o = P v, a cotangent c of o
and D = sum(c o), the gradient is

    dS = P (c v' - D),  dq = scale dS k,  dk = scale dS' q,  dv = P' c.

L is kept, so that P of a tile needs nothing but the tile, and the sums over tiles are sums of independent terms. A
tangent of such a sum is the sum of the terms' tangents, which `jax.jvp` takes of the term. Only the tangent of o is
written out, because it needs the tangent of L: `_forward_tangent`.

Shapes: q, o, c and dq [B, T, K, G, h]; k, v, dk and dv [B, T, K, h]; L and D [B, K, G, T] in at least float32: B
sequences of T positions, K key heads, G query heads to each, of width h. Last may come a window, int32 [1]: how many
keys a query sees, its own included. Tiles above the diagonal and outside the window are left out.

Products take operands in the arrays' dtype, to which P and dS are rounded, and accumulate in at least float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxhess.models.attention_tiles import Problem, Tiles, operations, tiles_of
from jaxhess.models.vocabulary import narrow_precision

LOWEST = -1e30
"""A score that is not seen. Finite, so that a row of which nothing has been seen yet is no infinity less another."""

TINY = 1e-30
"""Below any mass that counts: a row of which nothing has been seen is divided by it instead of by zero."""

Role = Literal["query", "key", "statistic", "window"]


def forward(*arrays: jax.Array, **how: Any) -> Any:
    """(o, L) of (q, k, v)."""
    query = arrays[0]
    outputs: list = [("query", query.dtype), ("statistic", _wide(query.dtype))]
    return _call("forward", _forward, _roles("qkk", arrays), outputs, **how)


def forward_tangent(*arrays: jax.Array, **how: Any) -> Any:
    """The tangents of (o, L), from (q, k, v, o, L) and the tangents of (q, k, v)."""
    query = arrays[0]
    outputs: list = [("query", query.dtype), ("statistic", _wide(query.dtype))]
    inputs = _roles("qkkqsqkk", arrays)
    return _call("forward_tangent", _forward_tangent, inputs[:3] + inputs[4:], outputs, **how)


def backward(*arrays: jax.Array, **how: Any) -> Any:
    """(dq, dk, dv), from (q, k, v, L, c, D)."""
    return _backward(("query", "key"), _roles("qkksqs", arrays), **how)


def backward_tangent(*arrays: jax.Array, **how: Any) -> Any:
    """The tangents of (dq, dk, dv), from (q, k, v, L, c, D) and their tangents."""
    return _backward(("query_tangent", "key_tangent"), _roles("qkksqsqkksqs", arrays), **how)


def _backward(names: tuple[str, str], inputs: list[tuple[Role, jax.Array]], **how: Any) -> Any:
    query: list = [("query", inputs[0][1].dtype)]
    key: list = [("key", inputs[0][1].dtype)]
    return *_call(names[0], _query, inputs, query, **how), *_call(names[1], _key, inputs, 2 * key, **how)


def _forward(q_ref: Any, k_ref: Any, v_ref: Any, w_ref: Any, o_ref: Any, log_sum_ref: Any, p: Problem) -> None:
    start, head = _query_block(p)
    query = _rows(q_ref, start, p.tiles.queries, p, head)

    def step(tile: jax.Array, carry: tuple) -> tuple:
        peak, mass, total = carry
        first = tile * p.tiles.keys
        key, value = (_rows(ref, first, p.tiles.keys, p) for ref in (k_ref, v_ref))
        scores = _dot(query, key, transposed=True) * p.scale
        scores = jnp.where(_visible(start, first, w_ref, p), scores, LOWEST)
        higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
        weights, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(peak - higher)
        attended = _dot(weights.astype(value.dtype), value)
        return higher, shrink * mass + jnp.sum(weights, axis=-1), shrink[:, None] * total + attended

    wide = _wide(query.dtype)
    rows = (p.tiles.queries,)
    carry = jnp.full(rows, LOWEST, wide), jnp.zeros(rows, wide), jnp.zeros((*rows, p.padded), wide)
    peak, mass, total = jax.lax.fori_loop(*_key_tiles(start, w_ref, p), step, carry)
    _store_rows(o_ref, total / mass[:, None], start, p)
    triton.store(log_sum_ref.at[:], peak + jnp.log(mass), mask=_row_mask(start, p.tiles.queries, p).get("mask"))


def _forward_tangent(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    log_sum_ref: Any,
    dq_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    w_ref: Any,
    do_ref: Any,
    d_log_sum_ref: Any,
    p: Problem,
) -> None:
    """With a dot for tangents: L. = sum(P S.) and o. = (P (S. - L.)) v + P v., sums over keys.

    L. is not known before all keys have been seen. It is the mean of S. under P: the mean over the keys seen so far is
    subtracted in its place, and the sum so far corrected whenever that moves. Without it a change that all scores of
    a query share would be subtracted only after P S. has been rounded.
    """
    start, head = _query_block(p)
    query, d_query = (_rows(ref, start, p.tiles.queries, p, head) for ref in (q_ref, dq_ref))
    log_sum = _statistic(log_sum_ref, start, p, head)[:, None]

    def step(tile: jax.Array, carry: tuple) -> tuple:
        mass, moment, attended, change = carry
        first = tile * p.tiles.keys
        key, value, d_key, d_value = (_rows(ref, first, p.tiles.keys, p) for ref in (k_ref, v_ref, dk_ref, dv_ref))
        scores, d_scores = jax.jvp(lambda q, k: _dot(q, k, transposed=True) * p.scale, (query, key), (d_query, d_key))
        weights = jnp.where(_visible(start, first, w_ref, p), jnp.exp(scores - log_sum), 0)
        before = moment / jnp.maximum(mass, TINY)
        mass, moment = mass + jnp.sum(weights, axis=-1), moment + jnp.sum(weights * d_scores, axis=-1)
        mean = moment / jnp.maximum(mass, TINY)
        d_weights = weights * (d_scores - mean[:, None])
        weights = weights.astype(value.dtype)
        change = change - (mean - before)[:, None] * attended
        change = change + _dot(d_weights.astype(value.dtype), value) + _dot(weights, d_value)
        return mass, moment, attended + _dot(weights, value), change

    wide = _wide(query.dtype)
    row, block = jnp.zeros((p.tiles.queries,), wide), jnp.zeros((p.tiles.queries, p.padded), wide)
    mass, moment, _, change = jax.lax.fori_loop(*_key_tiles(start, w_ref, p), step, (row, row, block, block))
    _store_rows(do_ref, change, start, p)
    triton.store(
        d_log_sum_ref.at[:], moment / jnp.maximum(mass, TINY), mask=_row_mask(start, p.tiles.queries, p).get("mask")
    )


def _query(*refs: Any, p: Problem) -> None:
    *inputs, w_ref, dq_ref = refs
    start, head = _query_block(p)

    def load(ref: Any, role: Role) -> jax.Array:
        if role == "statistic":
            return _statistic(ref, start, p, head)[:, None]
        return _rows(ref, start, p.tiles.queries, p, head)

    fixed = [[load(refs[k], role) for k, role in QUERY_SIDE] for refs in _halves(inputs)]

    def step(tile: jax.Array, total: jax.Array) -> jax.Array:
        first = tile * p.tiles.keys
        visible = _visible(start, first, w_ref, p)

        def contribution(query: Any, log_sum: Any, cotangent: Any, delta: Any, key: Any, value: Any) -> jax.Array:
            weights = jnp.where(visible, jnp.exp(_dot(query, key, transposed=True) * p.scale - log_sum), 0)
            d_scores = weights * (_dot(cotangent, value, transposed=True) - delta)
            return _dot(d_scores.astype(key.dtype), key)

        passing = [[_rows(refs[k], first, p.tiles.keys, p) for k in (1, 2)] for refs in _halves(inputs)]
        return total + _last_derivative(contribution, [[*a, *b] for a, b in zip(fixed, passing, strict=True)])

    total = jnp.zeros((p.tiles.queries, p.padded), _wide(dq_ref.dtype))
    total = jax.lax.fori_loop(*_key_tiles(start, w_ref, p), step, total)
    _store_rows(dq_ref, total * p.scale, start, p)


def _key(*refs: Any, p: Problem) -> None:
    *inputs, w_ref, dk_ref, dv_ref = refs
    start = pl.program_id(0) * p.tiles.keys
    fixed = [[_rows(refs[k], start, p.tiles.keys, p) for k in (1, 2)] for refs in _halves(inputs)]
    lowest, highest = _query_tiles(start, w_ref, p)
    count = highest - lowest

    def step(number: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        head = jax.lax.div(number, count)
        first = (lowest + jax.lax.rem(number, count)) * p.tiles.queries
        visible = _visible(first, start, w_ref, p, transposed=True)

        def load(ref: Any, role: Role) -> jax.Array:
            if role == "statistic":
                return _statistic(ref, first, p, head)[None, :]
            return _rows(ref, first, p.tiles.queries, p, head)

        def contributions(key: Any, value: Any, query: Any, log_sum: Any, cotangent: Any, delta: Any) -> tuple:
            weights = jnp.where(visible, jnp.exp(_dot(key, query, transposed=True) * p.scale - log_sum), 0)
            d_scores = weights * (_dot(value, cotangent, transposed=True) - delta)
            return _dot(d_scores.astype(query.dtype), query), _dot(weights.astype(cotangent.dtype), cotangent)

        passing = [[load(refs[k], role) for k, role in QUERY_SIDE] for refs in _halves(inputs)]
        new = _last_derivative(contributions, [[*a, *b] for a, b in zip(fixed, passing, strict=True)])
        return totals[0] + new[0], totals[1] + new[1]

    empty = jnp.zeros((p.tiles.keys, p.padded), _wide(dk_ref.dtype))
    d_key, d_value = jax.lax.fori_loop(np.int32(0), count * p.groups, step, (empty, empty))
    _store_rows(dk_ref, d_key * p.scale, start, p)
    _store_rows(dv_ref, d_value, start, p)


QUERY_SIDE: tuple[tuple[int, Role], ...] = ((0, "query"), (3, "statistic"), (4, "query"), (5, "statistic"))
"""Where the arrays with a row for each query are among (q, k, v, L, c, D)."""


def _with_window(kernel: Any, p: Problem, inputs: int, *refs: Any) -> None:
    """The kernel on its inputs, its window or None, and its outputs."""
    window = [] if p.windowed else [None]
    kernel(*refs[:inputs], *window, *refs[inputs:], p=p)


def _roles(letters: str, arrays: Sequence[jax.Array]) -> list[tuple[Role, jax.Array]]:
    roles: dict[str, Role] = {"q": "query", "k": "key", "s": "statistic", "w": "window"}
    letters += "w" * (len(arrays) - len(letters))
    return [(roles[letter], x) for letter, x in zip(letters, arrays, strict=True)]


def _halves(inputs: Sequence[Any]) -> list[Sequence[Any]]:
    """The primals, or the primals and the tangents."""
    return [inputs[k : k + 6] for k in range(0, len(inputs), 6)]


def _last_derivative(f: Callable[..., Any], arguments: Sequence[Sequence[jax.Array]]) -> Any:
    """f of the primals, or where tangents follow them its tangent."""
    if len(arguments) == 1:
        return f(*arguments[0])
    primals, tangents = map(tuple, arguments)
    return jax.jvp(f, primals, tangents)[1]


def _query_block(p: Problem) -> tuple[jax.Array, jax.Array]:
    """First row of this program's queries, and the place of its head in its group. The longest rows come first."""
    blocks = pl.cdiv(p.length, p.tiles.queries)
    return (blocks - 1 - pl.program_id(0)) * p.tiles.queries, _rem(pl.program_id(1), p.groups)


def _key_tiles(start: jax.Array, w_ref: Any, p: Problem) -> tuple[Any, Any]:
    """First and last + 1 of the tiles of keys that a block of queries sees."""
    size = p.tiles.keys
    end = jnp.minimum(_div(start + (p.tiles.queries + size - 1), size), np.int32(pl.cdiv(p.length, size)))
    if w_ref is None:
        return np.int32(0), end
    return _div(jnp.maximum(start - w_ref[0] + 1, 0), size), end


def _query_tiles(start: jax.Array, w_ref: Any, p: Problem) -> tuple[Any, Any]:
    """First and last + 1 of the tiles of queries that see a block of keys."""
    size = p.tiles.queries
    end: Any = np.int32(pl.cdiv(p.length, size))
    if w_ref is not None:
        end = jnp.minimum(end, _div(start + (p.tiles.keys - 1) + w_ref[0] + (size - 1), size))
    return _div(start, size), end


def _visible(first_query: Any, first_key: Any, w_ref: Any, p: Problem, transposed: bool = False) -> jax.Array:
    """Which keys a tile of queries sees, [queries, keys], or transposed."""
    queries, keys = first_query + _iota(p.tiles.queries), first_key + _iota(p.tiles.keys)
    distance = queries[None, :] - keys[:, None] if transposed else queries[:, None] - keys[None, :]
    return distance >= 0 if w_ref is None else (distance >= 0) & (distance < w_ref[0])


def _dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a b, or a b', accumulated in at least float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=narrow_precision(a.dtype),
        preferred_element_type=_wide(a.dtype),
    )


def _div(a: jax.Array, b: int) -> jax.Array:
    return jax.lax.div(a, np.int32(b))


def _rem(a: jax.Array, b: int) -> jax.Array:
    return jax.lax.rem(a, np.int32(b))


def _iota(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _rows(ref: Any, start: Any, size: int, p: Problem, head: Any = None) -> jax.Array:
    """Rows from `start` on, [size, padded]; zeros where there is no such row or column."""
    return triton.load(_row_ref(ref, start, size, head), **_mask(start, size, p))


def _store_rows(ref: Any, x: jax.Array, start: Any, p: Problem) -> None:
    triton.store(ref.at[:, :], x.astype(ref.dtype), mask=_mask(start, x.shape[0], p).get("mask"))


def _statistic(ref: Any, start: Any, p: Problem, head: Any) -> jax.Array:
    """L or D of a tile of queries; zeros beyond the last."""
    return triton.load(ref.at[head, pl.ds(start, p.tiles.queries)], **_row_mask(start, p.tiles.queries, p))


def _row_ref(ref: Any, start: Any, size: int, head: Any) -> Any:
    return ref.at[pl.ds(start, size), :] if head is None else ref.at[pl.ds(start, size), head, :]


def _row_mask(start: Any, size: int, p: Problem) -> dict[str, Any]:
    if p.length % size == 0:
        return {}
    return {"mask": start + _iota(size) < p.length, "other": 0.0}


def _mask(start: Any, size: int, p: Problem) -> dict[str, Any]:
    """Where a tile of rows lies inside the array; nothing where all of it does."""
    rows, columns = _row_mask(start, size, p).get("mask"), _iota(p.padded) < p.width
    if rows is None and p.width == p.padded:
        return {}
    if rows is None:
        mask = jnp.broadcast_to(columns[None, :], (size, p.padded))
    elif p.width == p.padded:
        mask = jnp.broadcast_to(rows[:, None], (size, p.padded))
    else:
        mask = rows[:, None] & columns[None, :]
    return {"mask": mask, "other": 0.0}


def _call(
    name: str,
    kernel: Callable[..., None],
    inputs: Sequence[tuple[Role, jax.Array]],
    outputs: Sequence[tuple[Role, Any]],
    *,
    tiles: Tiles | str,
    precision: str | None,
) -> Any:
    """One kernel over all blocks of queries, or of keys, of all heads and sequences.

    `tiles` may be the name of a table; `precision` is that of products of float32, on a GPU.
    """
    (_, query), (_, key) = inputs[:2]
    batch, length, heads, groups, width = query.shape
    if isinstance(tiles, str):
        tiles = tiles_of(name, tiles, query.dtype, width)
    p = Problem(length, groups, width, inputs[-1][0] == "window", tiles)
    by_queries = not name.startswith("key")
    block = tiles.queries if by_queries else tiles.keys
    grid = (pl.cdiv(length, block), heads * groups if by_queries else heads, batch)
    shapes = {"query": query.shape, "key": key.shape, "statistic": (batch, heads, groups, length)}

    def head(n: Any) -> Any:
        return _div(n, groups) if by_queries else n

    def whole(role: Role) -> pl.BlockSpec:
        """All rows of one key head and its group: the kernel reads them tile by tile."""
        if role == "window":
            return pl.BlockSpec((1,), lambda i, n, b: (0,))
        if role == "statistic":
            return pl.BlockSpec((None, None, groups, length), lambda i, n, b: (b, head(n), 0, 0))
        if role == "key":
            return pl.BlockSpec((None, length, None, p.padded), lambda i, n, b: (b, 0, head(n), 0))
        return pl.BlockSpec((None, length, None, groups, p.padded), lambda i, n, b: (b, 0, head(n), 0, 0))

    def own(role: Role) -> pl.BlockSpec:
        """The rows that a program writes."""
        if role == "key":
            return pl.BlockSpec((None, block, None, p.padded), lambda j, n, b: (b, j, n, 0))
        if role == "statistic":
            return pl.BlockSpec(
                (None, None, None, block), lambda i, n, b: (b, head(n), _rem(n, groups), grid[0] - 1 - i)
            )
        return pl.BlockSpec(
            (None, block, None, None, p.padded), lambda i, n, b: (b, grid[0] - 1 - i, head(n), _rem(n, groups), 0)
        )

    # For `jaxhess.plan`, in the compiled program's text. `jax.vmap` multiplies the grid's programs, and neither number.
    flops = batch * heads * groups * operations(name, tiles, length, p.padded)
    declared = {"flops": str(flops), "programs": str(math.prod(grid))}

    def run(interpret: bool, *arrays: Any) -> Any:
        call = pl.pallas_call(
            functools.partial(_with_window, kernel, p, len(inputs)),
            grid=grid,
            in_specs=[whole(role) for role, _ in inputs],
            out_specs=[own(role) for role, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct(shapes[role], dtype) for role, dtype in outputs],
            compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
            interpret=interpret,
            metadata=declared,
            name=f"attention_{name}",
        )
        with jax.default_matmul_precision("highest" if interpret else precision):
            return call(*arrays)

    return jax.lax.platform_dependent(
        *(x for _, x in inputs), cuda=functools.partial(run, False), default=functools.partial(run, True)
    )
