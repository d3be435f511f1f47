"""Symmetric matrices of less storage than n^2: blocks, masked matrices, Kronecker factors, and eigenpairs."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError

from scripts.studies.approximations.kronecker import Factors, LinearMap

Array = npt.NDArray[np.float64]
Product = Callable[[Array], Array]
"""From vectors [n, m] to their products."""


class Approximation(abc.ABC):
    """A symmetric matrix [n, n] that stands for another one."""

    @abc.abstractmethod
    def storage(self, triangles: bool = False) -> int:
        """Floats that are stored; with `triangles`, of symmetric blocks only one triangle with its diagonal."""

    @abc.abstractmethod
    def product(self, v: Array) -> Array:
        """Its products with vectors [n, m]."""

    @abc.abstractmethod
    def inverse(self, shift: float) -> Product | None:
        """Products with the inverse of the matrix plus `shift` I; None where that is not positive definite."""


def square(size: int, triangles: bool) -> int:
    """Floats of a symmetric matrix of so many rows."""
    return size * (size + 1) // 2 if triangles else size**2


@dataclasses.dataclass(frozen=True)
class BlockMatrix(Approximation):
    """Blocks on disjoint places, zero elsewhere.

    Attributes:
        stacks: Of blocks of equal size: their places [k, s], and the blocks [k, s, s].
    """

    stacks: tuple[tuple[npt.NDArray[np.int64], Array], ...]

    @classmethod
    def of(cls, matrix: Array, labels: npt.NDArray[np.int64], less: tuple[Array, Array] | None = None) -> BlockMatrix:
        """The diagonal blocks of a matrix, by the number of each row's block.

        `less` are values [k] and vectors [n, k] of eigenpairs that are subtracted first.
        """
        order = np.argsort(labels, kind="stable")
        places = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        stacks: list[tuple[npt.NDArray[np.int64], Array]] = []
        for size in sorted({len(place) for place in places}):
            own = np.array([place for place in places if len(place) == size])
            blocks = matrix[own[:, :, None], own[:, None, :]]
            if less is not None:
                values, vectors = less
                rows = vectors[own]
                blocks = blocks - (rows * values) @ rows.transpose(0, 2, 1)
            stacks.append((own, blocks))
        return cls(tuple(stacks))

    def storage(self, triangles: bool = False) -> int:
        return sum(len(places) * square(places.shape[1], triangles) for places, _ in self.stacks)

    def product(self, v: Array) -> Array:
        found = np.zeros_like(v)
        for places, blocks in self.stacks:
            found[places] = blocks @ v[places]
        return found

    def inverse(self, shift: float) -> Product | None:
        stacks: list[tuple[npt.NDArray[np.int64], Array]] = []
        for places, blocks in self.stacks:
            shifted = blocks + shift * np.eye(blocks.shape[1])
            try:
                np.linalg.cholesky(shifted)
            except LinAlgError:
                return None
            stacks.append((places, np.asarray(np.linalg.inv(shifted), np.float64)))
        return BlockMatrix(tuple(stacks)).product


@dataclasses.dataclass(frozen=True)
class MaskedMatrix(Approximation):
    """Some blocks of a matrix, not only diagonal ones: bands and arrows. Kept dense here; only `count` are not zero."""

    matrix: Array
    count: int

    @classmethod
    def of(cls, matrix: Array, labels: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_]) -> MaskedMatrix:
        """The blocks for which `kept` [B, B] is true."""
        mask = kept[labels[:, None], labels]
        return cls(np.where(mask, matrix, 0), int(mask.sum()))

    def storage(self, triangles: bool = False) -> int:
        return (self.count + len(self.matrix)) // 2 if triangles else self.count

    def product(self, v: Array) -> Array:
        return self.matrix @ v

    def inverse(self, shift: float) -> Product | None:
        return BlockMatrix(((np.arange(len(self.matrix))[None], self.matrix[None]),)).inverse(shift)


@dataclasses.dataclass(frozen=True)
class KroneckerMatrix(Approximation):
    """Kronecker factors on the places of linear maps, a diagonal on the others."""

    maps: tuple[LinearMap, ...]
    factors: Mapping[str, Factors]
    rest: BlockMatrix

    @classmethod
    def of(cls, matrix: Array, maps: Sequence[LinearMap], factors: Mapping[str, Factors]) -> KroneckerMatrix:
        """With the matrix's own diagonal where there is no linear map."""
        places = [one.places.ravel() for one in maps]
        others = np.setdiff1d(np.arange(len(matrix)), np.concatenate(places))[:, None]
        return cls(tuple(maps), factors, BlockMatrix(((others, matrix[others, others][:, :, None]),)))

    def storage(self, triangles: bool = False) -> int:
        factors = [one for pair in self.factors.values() for one in pair]
        return self.rest.storage() + sum(one.size if one.ndim == 1 else square(len(one), triangles) for one in factors)

    def product(self, v: Array) -> Array:
        found = self.rest.product(v)
        for name, places in self.maps:
            a, g = self.factors[name]
            x = v[places]
            x = a[:, None, None] * x if a.ndim == 1 else np.tensordot(a, x, 1)
            found[places] = g @ x
        return found

    def inverse(self, shift: float) -> Product | None:
        rest = self.rest.inverse(shift)
        roots = {}
        for name, (a, g) in self.factors.items():
            (x, u), (y, w) = ((a, np.eye(a.size)) if a.ndim == 1 else np.linalg.eigh(a)), np.linalg.eigh(g)
            roots[name] = np.outer(x, y) + shift, u, w
        if rest is None or any((values <= 0).any() for values, _, _ in roots.values()):
            return None

        def product(v: Array) -> Array:
            found = rest(v)
            for name, places in self.maps:
                values, u, w = roots[name]
                x = w.T @ np.tensordot(u.T, v[places], 1) / values[:, :, None]
                found[places] = w @ np.tensordot(u, x, 1)
            return found

        return product


@dataclasses.dataclass(frozen=True)
class PlusEigenpairs(Approximation):
    """A matrix plus `vectors diag(values) vectors'`; alone, with no matrix."""

    values: Array
    vectors: Array
    base: BlockMatrix | None = None

    def storage(self, triangles: bool = False) -> int:
        pairs = len(self.values) * (len(self.vectors) + 1)
        return pairs + (0 if self.base is None else self.base.storage(triangles))

    def product(self, v: Array) -> Array:
        found = self.vectors @ (self.values[:, None] * (self.vectors.T @ v))
        return found if self.base is None else found + self.base.product(v)

    def inverse(self, shift: float) -> Product | None:
        """By Woodbury's formula.

        Positive definite if the base is, and if diag(1/values) + V' base^-1 V has as many positive eigenvalues as there
        are positive values: both complete the same matrix of n + k rows (Sylvester's law of inertia).
        """
        base: Product | None = (lambda v: v / shift) if self.base is None else self.base.inverse(shift)
        if base is None or shift <= 0:
            return None
        used = self.values != 0
        vectors, values = self.vectors[:, used], self.values[used]
        solved = base(vectors)
        small = np.diag(1 / values) + vectors.T @ solved
        small = (small + small.T) / 2
        if (np.linalg.eigvalsh(small) > 0).sum() != (values > 0).sum():
            return None
        correction = solved @ np.linalg.inv(small)
        return lambda v: base(v) - correction @ (solved.T @ v)
