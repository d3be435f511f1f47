"""Block-sparse approximations: which blocks of a matrix are kept, and which are set to zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxhess.operators.block_names import layer_number_in, layer_of


def block_diagonal(groups: Sequence[str]) -> npt.NDArray[np.bool_]:
    """[B, B] which blocks lie within a group: block-diagonal at the granularity of the groups.

    Examples:
        >>> from jaxhess.structure.approximations import block_diagonal
        >>> block_diagonal(["a", "a", "b"]).astype(int)
        array([[1, 1, 0],
               [1, 1, 0],
               [0, 0, 1]])
    """
    names = np.asarray(groups)
    return names[:, None] == names


def band(places: Sequence[float], width: float) -> npt.NDArray[np.bool_]:
    """[B, B] which blocks are at most `width` apart, by the place of each (a layer's number; NaN: next to none but its
    own)."""
    numbers = np.asarray(places, float)
    with np.errstate(invalid="ignore"):
        near = np.abs(numbers[:, None] - numbers) <= width
    return near | np.eye(len(numbers), dtype=bool)


def arrow(heads: Sequence[bool], body: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """[B, B] the kept blocks of `body`, and all rows and columns of the blocks marked in `heads`."""
    marked = np.asarray(heads, bool)
    return body | marked[:, None] | marked


def approximations(names: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
    """Block-sparse approximations by name, each as the kept blocks [B, B], for blocks with these names.

    Block-diagonal in these blocks; where names have layers, also in whole layers and in bands of them; and with all
    rows and columns of embedding and head (an arrow), where there are such.

    Examples:
        >>> from jaxhess.structure.approximations import approximations
        >>> list(approximations(["embed", "layers/0", "layers/1", "layers/2", "head"]))
        ['block-diagonal', 'band of 1 layer to each side', 'arrow: embedding and head, and block-diagonal']
    """
    layers = [layer_of(name) for name in names]
    numbers = [math.nan if (number := layer_number_in(name)) is None else float(number) for name in names]
    found = {"block-diagonal": block_diagonal(names)}
    count = len({number for number in numbers if not math.isnan(number)})
    by_layer = block_diagonal(layers)
    if len(set(layers)) < len(names) and count:
        found["block-diagonal, whole layers"] = by_layer
    for width in (1, 2, 4, 8):
        if width < count - 1:
            sides = f"{width} layer{'s' * (width > 1)} to each side"
            found[f"band of {sides}"] = band(numbers, width) | by_layer
    ends = [layer in ("embed", "embedding", "head") for layer in layers]
    if any(ends) and not all(ends):
        found["arrow: embedding and head, and block-diagonal"] = arrow(ends, block_diagonal(names))
        if len(set(layers)) < len(names) and count:
            found["arrow: embedding and head, and whole layers"] = arrow(ends, by_layer)
    return found
