"""What is better than block-diagonal curvature: structures of a Hessian and a Gauss-Newton matrix at equal storage.

    python -m scripts.studies.structures

Small decoders are trained for a moment on the letters of a text, so that their matrices can be formed whole, in
float64. Structures are diagonal, blocks of five granularities, bands of layers, an arrow, Kronecker factors, leading
eigenpairs, and these with a diagonal or blocks of what they leave. A structure S is judged by S v beside C v for random
vectors and gradients that it was not made with, and by the steps of conjugate gradients that it saves as a
preconditioner. Each claim has the range that would refute it. Some minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

import convert
import jaxhess
from convert.text import load_blocks
from jaxhess.command import compile_quickly
from jaxhess.errors import InputError
from jaxhess.results.study import Study
from scripts.studies.approximations import models
from scripts.studies.approximations.compared import (
    RANDOM,
    Structures,
    StructureScore,
    Vectors,
    best,
    layer_patterns,
    mean_error,
    measured,
    partitions,
    rank_of,
    shift_of,
    steps_with,
)
from scripts.studies.approximations.drawn import figure
from scripts.studies.approximations.found import Prediction, Result, claims, tables
from scripts.studies.harness import TINY, StudyOptions, command, picture

NAME = "structures"
CAPTION = """Mean relative error of products, against what is stored. Lines: as many leading eigenpairs as fit, alone or
with a diagonal or blocks of what they leave. Marks: structures of a fixed size. A structure below the lines at its
storage is better than eigenpairs."""
NORMS = "attention_norm"
"""Free parameters of the trained model: its norms before attention. Their matrix can be formed whole."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """The models, what is stored, and what it is tried on."""

    sizes: tuple[tuple[int, int, int], ...] = ((6, 2, 3), (8, 2, 2), (8, 3, 2))
    """Width, layers and heads of each decoder; the first is the smallest."""
    text: Path = TINY / "sample.txt"
    """Text, read as letters."""
    train_steps: int = 300
    """Steps of Adam; with 0 the models stay as they were initialised."""
    length: int = 16
    """Predicted tokens of a sequence."""
    sequences: int = 16
    """That the curvature is of."""
    held_out: int = 32
    """Sequences for gradients, others than these."""
    random: int = 192
    """Random vectors."""
    budgets: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Storage, in vectors: floats over the number of parameters."""
    damping: float = 1e-3
    """Smallest eigenvalue of the shifted matrix that conjugate gradients solve with, in that of largest magnitude."""
    tolerance: float = 1e-6
    """Relative residual at which they end."""
    max_steps: int = 1000
    """Of conjugate gradients."""
    right_sides: int = 2
    """Gradients of sequences to solve for, beside the mean gradient."""
    probes: int = 64
    """Of the coupling map that predicts the errors of blocks, bands and the arrow."""
    mapped: int = 1
    """Models of which such a map is made, the first ones: it takes longer to compile than to run."""
    trained_tokens: int = 32
    """Tokens of the curvature of the trained model in scripts/tiny, in its norms before attention; 0: leave it out."""
    seed: int = 0
    """Of weights, training and random vectors."""

    def check(self) -> None:
        """Raises InputError for what cannot be studied."""
        least = {"sequences": 1, "held_out": 2, "random": 2, "length": 1, "probes": 2, "right_sides": 1, "max_steps": 1}
        for name, least_value in least.items():
            if getattr(self, name) < least_value:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {least_value} is needed."
                )
        if min(self.train_steps, self.trained_tokens) < 0 or self.right_sides > self.held_out:
            raise InputError("--train-steps and --trained-tokens are not negative; --right-sides are of the held out.")
        if not self.sizes or not self.budgets or min(self.budgets) < 1:
            raise InputError("At least one of --sizes and one of --budgets is needed, and a budget is at least 1.")
        if not (0 < self.damping < 1 and 0 < self.tolerance < 1):
            raise InputError(f"--damping {self.damping} and --tolerance {self.tolerance} are between 0 and 1.")


SMALL = Options(
    sizes=((4, 1, 1), (4, 2, 1), (6, 1, 1)),
    train_steps=60,
    length=8,
    sequences=8,
    held_out=16,
    random=32,
    budgets=(1, 8, 64),
    right_sides=1,
    probes=16,
    trained_tokens=0,
)


def study(options: Options) -> Study:
    """All models and both matrices."""
    options.check()
    ids = models.letters(options.text)
    rows = models.sequences(ids, options.sequences, options.length, 0)
    held_out = models.sequences(ids, options.held_out, options.length, options.sequences)
    shapes = [models.Shape(*size) for size in options.sizes]
    for shape in shapes:
        shape.config(options.length)
    results, losses = [], {}
    with jax.enable_x64(True):
        for shape in shapes:
            model = models.trained(shape, ids, options.length, options.train_steps, options.seed)
            name = f"width {shape.width}, {shape.layers} layers, {model.num_params:,} parameters"
            problem = models.problem(name, model, rows, held_out)
            losses[name] = problem.loss
            maps = len(losses) <= options.mapped
            results += [result(options, problem, kind, rows, maps) for kind in problem.matrices]
        if options.trained_tokens:
            problem = trained_norms(options)
            losses[problem.name] = problem.loss
            results += [result(options, problem, kind, None, False) for kind in problem.matrices]
    return Study(
        "Structures of curvature at equal storage",
        tuple(claims(results)),
        tuple(tables(results)),
        (picture(NAME, figure(results), CAPTION),),
        {
            "losses": losses,
            "letters": int(ids.size),
            "results": [dataclasses.asdict(one) for one in results],
        },
    )


def trained_norms(options: Options) -> models.DenseProblem:
    """The curvature of the trained model in scripts/tiny, in its norms before attention."""
    model = convert.load(str(TINY), dtype="float32").configured(remat=False)
    blocks = load_blocks(
        str(TINY / "sample.txt"),
        str(TINY),
        seq_len=options.trained_tokens,
        vocab_size=model.config.vocab_size,
        sequences=1 + options.held_out,
    )
    tokens = np.asarray(blocks.tokens, np.int32)
    return models.problem("trained model, norms before attention", model, tokens[:1], tokens[1:], NORMS)


def result(options: Options, problem: models.DenseProblem, kind: str, rows: np.ndarray | None, mapped: bool) -> Result:
    """Everything about one matrix; K-FAC where there are `rows`, the coupling map where it is asked for."""
    found = Structures.of(problem, kind, rows)
    vectors = Vectors.of(problem, found.matrix, options.random, options.seed + 1)
    by_budget = {multiple: found.at(multiple * problem.dim) for multiple in options.budgets}
    # Each is a structure of its own for every number of eigenpairs.
    tried = {(name, 0): one for name, one in found.fixed.items()}
    tried |= {(name, rank_of(one)): one for structures in by_budget.values() for name, one in structures.items()}
    sides = np.column_stack([problem.gradient, problem.sequence_gradients[: options.right_sides].T])
    shift = shift_of(found.values, options.damping)
    steps, plain = steps_with(tried, found.matrix, shift, sides, options.tolerance, options.max_steps)
    all_found = {key: dataclasses.replace(measured(one, vectors), steps=steps[key]) for key, one in tried.items()}
    equal = {name: found.with_eigenpairs(one.storage(), "diagonal") for name, one in found.fixed.items()}
    by_triangles = {}
    for multiple in options.budgets:
        halves = found.at(multiple * problem.dim, triangles=True)
        by_triangles[multiple] = best(
            {name: measured(one, vectors) for name, one in halves.items()}, mean_error(RANDOM)
        )
    fixed = {name: all_found[name, 0] for name in found.fixed}
    return Result(
        problem.name,
        kind,
        problem.dim,
        fixed,
        {name: None if one is None else measured(one, vectors) for name, one in equal.items()},
        {
            multiple: {name: all_found[name, rank_of(one)] for name, one in structures.items()}
            for multiple, structures in by_budget.items()
        },
        by_triangles,
        plain,
        predictions(options, problem, kind, fixed) if mapped else {},
    )


def predictions(
    options: Options, problem: models.DenseProblem, kind: str, fixed: Mapping[str, StructureScore]
) -> dict[str, Prediction]:
    """What the coupling map of the finest blocks but rows says of the errors of coarser blocks, bands and the arrow."""
    cuts = {name: cut for name, cut in partitions(problem).items() if name != "rows"}
    fine, layers = next(iter(cuts.values())), cuts["layers"]
    kept = {}
    for name, cut in cuts.items():
        parents = fine.parents(cut)
        kept[f"blocks: {name}"] = parents[:, None] == parents
    parents = fine.parents(layers)
    kept |= {name: mask[parents[:, None], parents] for name, mask in layer_patterns(layers.blocks).items()}
    mapped = jaxhess.coupling_map(problem.operators[kind], fine.blocks, probes=options.probes, seed=options.seed)
    member = np.eye(len(fine.blocks))[fine.labels]
    norms = member.T @ problem.matrices[kind] ** 2 @ member
    found = {}
    for name, mask in kept.items():
        ours = mapped.relative_error(mask)
        exact = math.sqrt(norms[~mask].sum() / norms.sum())
        found[name] = Prediction((ours.value, ours.standard_error), fixed[name].squares, exact)
    return found


def main() -> None:
    """Reads the options and runs."""
    compile_quickly()  # every program is run once or twice
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
