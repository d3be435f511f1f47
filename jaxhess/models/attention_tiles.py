"""How the kernels of fused attention cut their work on which GPU, and how many operations that is."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp


class Tiles(NamedTuple):
    """How a kernel cuts its work: rows of queries and of keys, warps of a program, tiles that are loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


TABLES: dict[str, dict[str, tuple[Tiles, Tiles, Tiles]]] = {
    "sm100": {
        "forward": (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
        "forward_tangent": (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 2)),
        "query": (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
        "query_tangent": (Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 2)),
        "key": (Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 2), Tiles(32, 64, 8, 2)),
        "key_tangent": (Tiles(32, 128, 8, 2), Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 1)),
    },
    "sm90": {
        "forward": (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
        "forward_tangent": (Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(32, 32, 4, 2)),
        "query": (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
        "query_tangent": (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 2)),
        "key": (Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 2), Tiles(32, 64, 8, 2)),
        "key_tangent": (Tiles(32, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(32, 32, 8, 1)),
    },
    "sm80": {
        "forward": (Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 1)),
        "forward_tangent": (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1)),
        "query": (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 1)),
        "query_tangent": (Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 16, 8, 1)),
        "key": (Tiles(32, 64, 4, 2), Tiles(32, 64, 8, 2), Tiles(16, 32, 8, 1)),
        "key_tangent": (Tiles(32, 64, 4, 2), Tiles(32, 32, 4, 2), Tiles(16, 16, 4, 1)),
    },
}
"""Tiles for heads up to 64, 128 and 256 wide in 16 bits, by what GPUs have: a B200's tensor memory, an H100's 227 KiB
of shared memory, or at least 99 KiB of it. They are the largest of those tried that compile with at most 50 bytes of
registers spilled. Which are fastest has to be measured on a card."""

WIDE = Tiles(16, 16, 4, 1)
"""For 32 and 64 bits; heads wider than 128 need more than 99 KiB in float32, and those of 128 as much in float64."""

PRODUCTS = {"forward": 2, "forward_tangent": 6, "query": 3, "query_tangent": 8, "key": 4, "key_tangent": 10}
"""Matrix products of a tile."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of one attention: T, G and h, whether there is a window, and the tiles."""

    length: int
    groups: int
    width: int
    windowed: bool
    tiles: Tiles

    @property
    def padded(self) -> int:
        """The width as the kernels have it: a power of two, the rest zero."""
        return max(16, 1 << (self.width - 1).bit_length())

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.width**-0.5


def tiles_of(kernel: str, table: str, dtype: Any, width: int) -> Tiles:
    """Those of a kernel for heads of this width in `dtype`, from one of `TABLES`."""
    if jnp.dtype(dtype).itemsize > 2:
        return WIDE
    return TABLES[table][kernel][0 if width <= 64 else 1 if width <= 128 else 2]


def operations(kernel: str, tiles: Tiles, length: int, width: int) -> int:
    """Of one query head's products over `length` positions; a sliding window is not taken into account."""
    queries, keys = tiles.queries, tiles.keys
    if kernel.startswith("key"):
        blocks = -(-length // queries)
        count = sum(blocks - start // queries for start in range(0, length, keys))
    else:
        count = sum(-(-min(start + queries, length) // keys) for start in range(0, length, queries))
    return 2 * PRODUCTS[kernel] * count * queries * keys * width
