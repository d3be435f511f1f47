"""Axis layouts of checkpoint tensors as data, read in both directions.

A layout such as `"(heads 0/3 head_dim) embed"` names the axes of a tensor in a file: axes in parentheses are merged
into one dimension, slowest first, and `0/3` says that the tensor holds three parameters along that place, of which this
is number 0. `still_dim+value_dim@1` says that two axes follow one another there, of which this parameter has number 1,
`value_dim`. The other side is the tuple of logical axis names that every parameter of the decoder carries
(`jaxhess.models.logical_axes`); between them they fix the reshape, the transpose and the slice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of one file tensor.

    Attributes:
        dims: For each dimension of the file tensor the axes merged in it, slowest first. A part is `"0/3"`, one of
            several axes `"a+b@1"`.
    """

    dims: tuple[tuple[str, ...], ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes, slowest first, parts included."""
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def named(self) -> list[str]:
        """The axes of the parameter, in the file's order."""
        return [_own(axis) for axis in self.axes if "/" not in axis]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the file tensor for these axis sizes."""
        return tuple(math.prod(_size(axis, sizes) for axis in dim) for dim in self.dims)

    def read(
        self,
        fetch: Callable[[Slices], np.ndarray],
        axes: Sequence[str],
        index: Sequence[slice],
        sizes: Mapping[str, int],
    ) -> np.ndarray:
        """The part `index` of a parameter with logical `axes`, [*lengths of the slices], read through `fetch`.

        Args:
            fetch: Gives a slice of the file tensor. It is asked for the smallest block that is contiguous along each
                dimension and covers `index`.
            axes: Logical axes of the parameter, in its own order.
            index: One slice with explicit bounds for each of `axes`.
            sizes: Full size of every axis.
        """
        wanted = dict(zip(axes, index, strict=True))
        blocks: list[slice] = []
        block_shape: list[int] = []
        inner: list[slice | int] = []
        for dim in self.dims:
            bounds = [_bounds(axis, wanted, sizes) for axis in dim]
            lengths = [_size(axis, sizes) for axis in dim]
            # Only the slowest axis of a merged dimension can be cut by one contiguous block; the rest is cut after.
            stride = math.prod(lengths[1:])
            blocks.append(slice(bounds[0].start * stride, bounds[0].stop * stride))
            block_shape += [bounds[0].stop - bounds[0].start, *lengths[1:]]
            inner += [slice(None), *bounds[1:]]
        block = fetch(tuple(blocks)).reshape(block_shape)[tuple(inner)]
        parts = tuple(i for i, axis in enumerate(self.axes) if "/" in axis)
        named = self.named
        return np.squeeze(block, parts).transpose([named.index(axis) for axis in axes])

    def write(self, tensor: np.ndarray, parameter: np.ndarray, axes: Sequence[str], sizes: Mapping[str, int]) -> None:
        """Copies a whole parameter with logical `axes` to its place in the file tensor (modified in place)."""
        expanded = tensor.reshape([_size(axis, sizes) for axis in self.axes])  # a view: `tensor` is contiguous
        whole = {axis: slice(0, sizes[axis]) for axis in axes}
        bounds = [_bounds(axis, whole, sizes) for axis in self.axes]
        place = tuple(b.start if "/" in axis else b for axis, b in zip(self.axes, bounds, strict=True))
        named = self.named
        expanded[place] = parameter.transpose([tuple(axes).index(axis) for axis in named])


@functools.cache
def parse_layout(text: str) -> Layout:
    """The layout that `text` describes, such as `"(heads head_dim) embed"`."""
    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
        elif token == ")":
            dims.append(tuple(group or ()))
            group = None
        elif group is None:
            dims.append((token,))
        else:
            group.append(token)
    return Layout(tuple(dims))


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    if "/" in axis:
        return int(axis.split("/")[1])
    return sum(sizes[name] for name in axis.split("@")[0].split("+"))


def _own(axis: str) -> str:
    """The parameter's axis, of several that follow one another."""
    names, _, number = axis.partition("@")
    return names.split("+")[int(number or 0)]


def _bounds(axis: str, wanted: Mapping[str, slice], sizes: Mapping[str, int]) -> slice:
    if "/" in axis:
        part = int(axis.split("/")[0])
        return slice(part, part + 1)
    names, _, number = axis.partition("@")
    before = sum(sizes[name] for name in names.split("+")[: int(number or 0)])
    own = wanted[_own(axis)]
    return slice(before + own.start, before + own.stop)
