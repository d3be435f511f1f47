"""How narrow a band a part of a matrix fits into, by reverse Cuthill-McKee, beside the same entries permuted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import reverse_cuthill_mckee

Matrix = npt.NDArray[np.floating]
Pattern = npt.NDArray[np.bool_]


class Bandwidths(NamedTuple):
    """Half bandwidths over the largest possible one, of one part of a matrix.

    Attributes:
        kept: Share of entries off the diagonal that are not taken for zero.
        own: Of the matrix, after reverse Cuthill-McKee.
        permuted: Of the same entries at random places, symmetric, the diagonal left where it is: one for each draw.
        planted: As many entries at random rows of a matrix that is a band: one for each draw.
    """

    kept: float
    own: float
    permuted: tuple[float, ...]
    planted: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Own over the mean of the permuted ones; 1: its zeros are where chance would put them. 0/0 is 1."""
        return self._relative(self.own)

    @property
    def planted_ratio(self) -> float:
        """The ratio that the part of a band has; near 1: so few or so many entries do not tell a band from chance."""
        return self._relative(float(np.mean(self.planted)))

    def _relative(self, width: float) -> float:
        mean = float(np.mean(self.permuted))
        return width / mean if mean else 1.0


def bandwidths(pattern: Pattern, permutations: int, rng: np.random.Generator) -> Bandwidths:
    """Of a symmetric pattern of nonzeros [k, k], k at least 2."""
    off = ~np.eye(len(pattern), dtype=bool)
    moved = tuple(band(permuted(pattern, rng)) for _ in range(permutations))
    count = int(np.triu(pattern, 1).sum())
    made = tuple(band(part_of_band(len(pattern), count, rng)) for _ in range(permutations))
    return Bandwidths(float(pattern[off].mean()), band(pattern), moved, made)


def band(pattern: Pattern) -> float:
    """The half bandwidth after reverse Cuthill-McKee, 0 for a diagonal matrix, 1 where corners cannot be avoided."""
    order = reverse_cuthill_mckee(csr_array(pattern | np.eye(len(pattern), dtype=bool)), symmetric_mode=True)
    rows, columns = np.nonzero(pattern[np.ix_(order, order)])
    return float(abs(rows - columns).max(initial=0)) / (len(pattern) - 1)


def permuted(matrix: npt.NDArray, rng: np.random.Generator) -> npt.NDArray:
    """The same matrix with its entries off the diagonal at random places, symmetric."""
    rows, columns = np.triu_indices(len(matrix), 1)
    found = matrix.copy()
    found[rows, columns] = found[columns, rows] = rng.permutation(matrix[rows, columns])
    return found


def part_of_band(size: int, count: int, rng: np.random.Generator) -> Pattern:
    """Random rows, out of order, of a large matrix that is a band so wide that `count` pairs of them are in it."""
    places = rng.random(size)
    return largest(1 - abs(places[:, None] - places), [count / (size * (size - 1) // 2)])[0]


def without_zero_rows(matrix: Matrix) -> Matrix:
    """The rows and columns that have a nonzero entry; others would fit into any band."""
    kept = ((matrix != 0) | (matrix.T != 0)).any(axis=0)
    return matrix[np.ix_(kept, kept)]


def above(matrix: Matrix, threshold: float) -> Pattern:
    """Where entries are larger than this, in either triangle of a matrix that is symmetric up to rounding."""
    large = abs(matrix) > threshold
    return large | large.T


def largest(matrix: Matrix, shares: Sequence[float]) -> list[Pattern]:
    """For every share the pattern of so many of the largest entries off the diagonal, and the diagonal."""
    symmetric = abs(matrix + matrix.T) / 2
    rows, columns = np.triu_indices(len(matrix), 1)
    in_order = np.argsort(-symmetric[rows, columns], kind="stable")
    found = []
    for share in shares:
        pattern = np.eye(len(matrix), dtype=bool)
        chosen = in_order[: round(share * len(rows))]
        chosen = chosen[symmetric[rows[chosen], columns[chosen]] > 0]
        pattern[rows[chosen], columns[chosen]] = pattern[columns[chosen], rows[chosen]] = True
        found.append(pattern)
    return found


def asymmetry(matrix: Matrix) -> float:
    """Share of pairs of nonzero entries of which the difference of the two is as large as the smaller."""
    rows, columns = np.triu_indices(len(matrix), 1)
    a, b = matrix[rows, columns], matrix[columns, rows]
    some = (a != 0) | (b != 0)
    return float(np.mean((abs(a - b) >= np.minimum(abs(a), abs(b)))[some])) if some.any() else 0.0
