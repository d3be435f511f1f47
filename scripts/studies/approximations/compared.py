"""What each structure keeps of a matrix, and what that is worth: errors of products, steps of conjugate gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

import jaxhess
from jaxhess.structure.approximations import arrow, band, block_diagonal
from scripts.studies.approximations.kronecker import kfac, linear_maps, nearest
from scripts.studies.approximations.matrices import (
    Approximation,
    Array,
    BlockMatrix,
    KroneckerMatrix,
    MaskedMatrix,
    PlusEigenpairs,
)
from scripts.studies.approximations.models import DenseProblem
from scripts.studies.approximations.solve import iterations

Labels = npt.NDArray[np.int64]
Key = TypeVar("Key")
BASES = ("rows", "heads", "matrices", "kinds", "layers")
"""Granularities of blocks, from fine to coarse as a rule."""
LEADING = "eigenpairs"
PLUS_DIAGONAL = "eigenpairs + diagonal"
RANDOM, SEQUENCES, MEAN = "random vectors", "gradients of sequences", "mean gradient"


@dataclasses.dataclass(frozen=True)
class Partition:
    """The rows of a matrix cut into blocks.

    Attributes:
        blocks: Of the parameters.
        labels: [n] the number of each row's block.
    """

    blocks: jaxhess.Blocks
    labels: Labels

    @classmethod
    def of(cls, blocks: jaxhess.Blocks) -> Partition:
        """In the order of `ravel_pytree`."""
        flat = [np.broadcast_to(x, shape).ravel() for x, shape in zip(blocks.labels, blocks.shapes, strict=True)]
        return cls(blocks, np.concatenate(flat).astype(np.int64))

    def equals(self, other: Partition) -> bool:
        """Whether both cut the rows alike, whatever the names and the order of the blocks."""
        pairs = np.unique(np.stack([self.labels, other.labels]), axis=1).shape[1]
        return pairs == len(self.blocks) == len(other.blocks)

    def parents(self, coarse: Partition) -> Labels:
        """[B] the number of the coarser partition's block that each block is in."""
        found = np.zeros(len(self.blocks), np.int64)
        found[self.labels] = coarse.labels
        return found


def partitions(problem: DenseProblem) -> dict[str, Partition]:
    """By rows (the weights of one output, or of one token), heads, matrices, kinds and layers; equal ones once."""
    like = problem.operators["Hessian"].shape_dtype
    stacks = getattr(problem.operators["Hessian"].loss, "stacks", None)
    found = {name: jaxhess.Blocks.by(like, name, stacks=stacks) for name in BASES[1:]}
    rows = found["matrices"]
    for name in rows.leaf_names:
        first, last = name.split("/")[0], name.split("/")[-1]
        if last != "kernel":
            continue
        rows = rows.split(name, 0 if first in ("embed", "head") else -1)
        if name.split("/")[-2] in ("query", "key", "value"):
            rows = rows.split(name, -2)
    cuts = {name: Partition.of(rows if name == "rows" else found[name]) for name in BASES}
    kept: list[str] = []
    for name in ("matrices", "layers", "kinds", "heads", "rows"):  # of equal ones the first
        if len(cuts[name].blocks) > 1 and not any(cuts[name].equals(cuts[other]) for other in kept):
            kept.append(name)
    return {name: cuts[name] for name in BASES if name in kept}


def layer_patterns(layers: jaxhess.Blocks) -> dict[str, npt.NDArray[np.bool_]]:
    """Which pairs of layers bands and an arrow keep: the embedding is before the first layer, the head after the last.

    The widest band, which is the whole matrix, is left out.
    """
    numbers = [int(name.split("/")[1]) for name in layers.names if name.startswith("layers/")]
    ends = {"embed": min(numbers, default=0) - 1, "final_norm": max(numbers, default=0) + 1}
    ends["head"] = ends["final_norm"]
    places = [ends[name] if name in ends else int(name.split("/")[1]) for name in layers.names]
    found = {f"band {width}": band(places, width) for width in range(1, max(places) - min(places))}
    outer = [name in ("embed", "head") for name in layers.names]
    if any(outer):
        found["arrow"] = arrow(outer, block_diagonal(layers.names))
    return found


@dataclasses.dataclass(frozen=True)
class Structures:
    """All structures of one matrix.

    Attributes:
        matrix: C, [n, n].
        values, vectors: [n] and [n, n] its eigenpairs, the largest magnitude first.
        cuts: The partitions of its rows.
        fixed: Structures without a parameter, by name.
    """

    matrix: Array
    values: Array
    vectors: Array
    cuts: Mapping[str, Partition]
    fixed: Mapping[str, Approximation]

    @classmethod
    def of(cls, problem: DenseProblem, kind: str, rows: npt.NDArray[np.int32] | None) -> Structures:
        """Those of the problem's matrix of this kind; with the sequences [B, T + 1], K-FAC for Gauss-Newton too."""
        matrix = problem.matrices[kind]
        values, vectors = np.linalg.eigh(matrix)
        order = np.argsort(-np.abs(values), kind="stable")
        cuts = partitions(problem)
        fixed: dict[str, Approximation] = {"diagonal": BlockMatrix.of(matrix, np.arange(len(matrix)))}
        fixed |= {f"blocks: {name}": BlockMatrix.of(matrix, cut.labels) for name, cut in cuts.items()}
        for name, kept in layer_patterns(cuts["layers"].blocks).items():
            fixed[name] = MaskedMatrix.of(matrix, cuts["layers"].labels, kept)
        if problem.model is not None:
            maps = linear_maps(problem.model.params)
            if kind == "Gauss-Newton" and rows is not None:
                fixed["K-FAC"] = KroneckerMatrix.of(matrix, maps, kfac(problem.model, rows))
            fixed["nearest Kronecker"] = KroneckerMatrix.of(matrix, maps, nearest(matrix, maps))
        return cls(matrix, values[order], vectors[:, order], cuts, fixed)

    def with_eigenpairs(self, budget: int, base: str | None, triangles: bool = False) -> PlusEigenpairs | None:
        """As many leading eigenpairs as fit beside the base's blocks of what they leave; None where not one fits.

        Args:
            budget: In floats.
            base: "diagonal", a partition's name, or None.
            triangles: See `Approximation.storage`.
        """
        size = 0
        if base is not None:
            name = base if base == "diagonal" else f"blocks: {base}"
            size = self.fixed[name].storage(triangles)
        rank = min((budget - size) // (len(self.matrix) + 1), len(self.matrix))
        if rank < 1:
            return None
        values, vectors = self.values[:rank], self.vectors[:, :rank]
        if base is None:
            return PlusEigenpairs(values, vectors)
        labels = np.arange(len(self.matrix)) if base == "diagonal" else self.cuts[base].labels
        return PlusEigenpairs(values, vectors, BlockMatrix.of(self.matrix, labels, (values, vectors)))

    def at(self, budget: int, triangles: bool = False) -> dict[str, Approximation]:
        """All that fit into a budget of floats, by name."""
        found = {name: one for name, one in self.fixed.items() if one.storage(triangles) <= budget}
        for base in (None, "diagonal", *self.cuts):
            one = self.with_eigenpairs(budget, base, triangles)
            if one is not None:
                found[LEADING if base is None else f"{LEADING} + {base}"] = one
        return found


@dataclasses.dataclass(frozen=True)
class Vectors:
    """What a matrix C is applied to.

    Attributes:
        groups: Vectors [n, m] by the name of their kind.
        products: C times each.
    """

    groups: Mapping[str, Array]
    products: Mapping[str, Array]

    @classmethod
    def of(cls, problem: DenseProblem, matrix: Array, random: int, seed: int) -> Vectors:
        """Normal random vectors that no structure was made with, and the problem's gradients."""
        numbers = np.random.default_rng(seed)
        groups = {
            RANDOM: numbers.normal(size=(problem.dim, random)),
            SEQUENCES: problem.sequence_gradients.T,
            MEAN: problem.gradient[:, None],
        }
        return cls(groups, {name: matrix @ v for name, v in groups.items()})


@dataclasses.dataclass(frozen=True)
class StructureScore:
    """How good a structure S is in place of C.

    Attributes:
        storage: Floats.
        rank: Of its eigenpairs; 0: it has none.
        errors: |Cv - Sv| / |Cv| of every vector, by the name of their kind.
        cosines: Of the angle between Cv and Sv, likewise; 0 where Sv is zero.
        squares: sqrt of the mean |Cv - Sv|^2 over the mean |Cv|^2 of random vectors, which estimates
            |C - S|_F / |C|_F; with its standard error.
        steps: Of conjugate gradients on C + shift, preconditioned with (S + shift)^-1, for every right side; -1: more
            than allowed. None: S + shift is not positive definite, or it was not tried.
    """

    storage: int
    rank: int
    errors: dict[str, Array]
    cosines: dict[str, Array]
    squares: tuple[float, float]
    steps: list[int] | None = None

    @property
    def mean_steps(self) -> float:
        """NaN where a run did not end or none was made."""
        return math.nan if self.steps is None or min(self.steps) < 0 else float(np.mean(self.steps))


def measured(structure: Approximation, vectors: Vectors) -> StructureScore:
    """Without conjugate gradients."""
    errors, cosines = {}, {}
    squares = math.nan, math.nan
    for name, v in vectors.groups.items():
        exact, ours = vectors.products[name], structure.product(v)
        lengths, apart = np.linalg.norm(exact, axis=0), np.linalg.norm(exact - ours, axis=0)
        own = np.linalg.norm(ours, axis=0)
        errors[name] = apart / lengths
        cosines[name] = (exact * ours).sum(0) / lengths / np.where(own > 0, own, 1)
        if name == RANDOM:
            squares = root_of_ratio(apart**2, lengths**2)
    return StructureScore(structure.storage(), rank_of(structure), errors, cosines, squares)


def rank_of(structure: Approximation) -> int:
    """How many eigenpairs it has."""
    return len(structure.values) if isinstance(structure, PlusEigenpairs) else 0


def shift_of(values: Array, damping: float) -> float:
    """The shift that makes the smallest of these eigenvalues `damping` times the largest magnitude, or more.

    It is that much, and for a Hessian as much more as its most negative eigenvalue is below zero.
    """
    return damping * float(np.abs(values).max()) + max(0.0, -float(values.min()))


def steps_with(
    structures: Mapping[Key, Approximation], matrix: Array, shift: float, sides: Array, tolerance: float, max_steps: int
) -> tuple[dict[Key, list[int] | None], list[int]]:
    """Steps of conjugate gradients with each structure as preconditioner (`StructureScore.steps`), and with none."""
    inverses = {name: inverse for name, one in structures.items() if (inverse := one.inverse(shift)) is not None}
    shifted = matrix + shift * np.eye(len(matrix))
    plain: Callable[[Array], Array] = np.array
    steps = iterations(shifted, sides, [plain, *inverses.values()], tolerance, max_steps).tolist()
    by_name = dict(zip(inverses, steps[1:], strict=True))
    return {name: by_name.get(name) for name in structures}, steps[0]


def root_of_ratio(part: Array, whole: Array) -> tuple[float, float]:
    """sqrt(mean of part / mean of whole) with its standard error, by the delete-one jackknife."""
    return jackknife(lambda kept: math.sqrt(part[kept].mean() / whole[kept].mean()), len(part))


def ratio(above: Array, below: Array) -> tuple[float, float]:
    """The ratio of the means of paired values, infinite over zero, with its standard error by the jackknife."""
    if not below.any():
        return math.inf, math.nan
    return jackknife(lambda kept: float(above[kept].mean() / below[kept].mean()), len(above))


def jackknife(statistic: Callable[[npt.NDArray[np.bool_]], float], count: int) -> tuple[float, float]:
    """A statistic of all values and its standard error; NaN for one value."""
    everything = np.ones(count, bool)
    if count < 2:
        return statistic(everything), math.nan
    left = np.array([statistic(np.arange(count) != k) for k in range(count)])
    return statistic(everything), float(math.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum()))


def best(found: Mapping[str, StructureScore], score: Callable[[StructureScore], float]) -> str | None:
    """The name of the least score; NaN is none."""
    scored = {name: score(one) for name, one in found.items() if not math.isnan(score(one))}
    return min(scored, key=lambda name: scored[name]) if scored else None


def mean_error(group: str) -> Callable[[StructureScore], float]:
    """The score by which a structure wins on vectors of a kind."""
    return lambda one: float(one.errors[group].mean())
