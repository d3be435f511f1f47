"""What re-orthogonalisation buys: ghosts, extreme eigenvalues and spectra without it, in part and in full, by steps.

    python -m scripts.studies.ghosts

With no options: the small GPT-NeoX model and the text in scripts/tiny, four minutes on two cores. Every variant starts
from the same probe. The reference is full re-orthogonalisation of float64 vectors, over the same products.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance

import jaxhess
from jaxhess.distributed.memory import bytes_per_device
from jaxhess.errors import InputError
from jaxhess.krylov import compile_segment, lanczos_segment, orthogonality_loss, start_lanczos
from jaxhess.krylov.ghosts import classify, independent, unflagged
from jaxhess.krylov.quadrature import Quadrature, quadrature
from jaxhess.krylov.storage import Reorthogonalize, Storage
from jaxhess.operators.facts import validate
from jaxhess.operators.precision import unit_roundoff
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from jaxhess.vectors import random_key
from scripts.studies.harness import FOUNDATION, HESSFORMER, ModelOptions, command, picture

NAME = "ghosts"
NOTE = """Errors of the extreme Ritz values are relative; W1 is the Wasserstein-1 distance in mean |eigenvalue|; both
against float64 vectors with full re-orthogonalisation. |Q'Q − I| is over the stored vectors. Dotted: how far the
reference is from itself with one step fewer."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """The model, its text, and how far."""

    steps: tuple[int, ...] = (10, 20, 40, 80)
    """Step counts to look at; the runs take the largest of them."""
    windows: tuple[int, ...] = (4, 16)
    """Sizes of the sliding window."""
    narrow: bool = True
    """Also with basis and vectors in bfloat16."""

    def variants(self) -> dict[str, Storage]:
        """What is compared, the reference first."""
        found = {
            "reference": Storage("full", vector_dtype="float64", scalar_dtype="float64"),
            "none": Storage("none"),
            **{f"window {r}": Storage(r) for r in self.windows},
            "full": Storage("full"),
        }
        if self.narrow:
            kinds: tuple[Reorthogonalize, ...] = ("none", *self.windows[-1:], "full")
            found |= {"full, bf16 basis": Storage("full", basis_dtype="bfloat16")}
            found |= {f"{kind}, bf16 vectors": Storage(kind, vector_dtype="bfloat16") for kind in kinds}
        return found


SMALL = Options(seq_len=16, mesh="fsdp=1", steps=(10, 40), windows=(8,), narrow=False)


class AfterSteps(NamedTuple):
    """What a run has after so many steps, beside the reference.

    Attributes:
        steps: How many.
        ghosts: Ritz values flagged as copies or spurious.
        largest, smallest: Errors of the extreme Ritz values, relative to the reference's after all steps.
        distance: Wasserstein-1 distance to the reference after the same steps, in mean |eigenvalue|.
        one_step_fewer: The same of the reference to itself without the last step: what the number of nodes does.
    """

    steps: int
    ghosts: int
    largest: float
    smallest: float
    distance: float
    one_step_fewer: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A Lanczos run: its tridiagonal, loss of orthogonality, time and memory (vectors held, in parameters' size)."""

    name: str
    storage: Storage
    alphas: np.ndarray
    betas: np.ndarray
    step_errors: np.ndarray
    orthogonality_loss: float
    rounding: float
    seconds_per_step: float
    stored_vectors: float
    temporary_bytes: int | None

    def quadrature(self, steps: int) -> Quadrature:
        """Ritz values and weights after so many steps."""
        return quadrature(self.alphas[:steps], self.betas[:steps], self.step_errors[:steps])

    def after(self, steps: int, reference: Run) -> AfterSteps:
        """Beside the reference, which has taken as many steps or more."""
        nodes, exact = self.quadrature(steps), reference.quadrature(steps)
        truth = reference.quadrature(reference.alphas.size).ritz_values
        measured = None if math.isnan(self.orthogonality_loss) else (self.orthogonality_loss,)
        orthogonal = bool(independent(self.storage.reorthogonalize, measured, np.array([steps]))[0])
        ghosts = (unflagged(nodes) if orthogonal else classify(nodes, self.rounding)).flags
        return AfterSteps(
            steps,
            int(ghosts.sum()),
            abs(nodes.ritz_values[-1] / truth[-1] - 1),
            abs(nodes.ritz_values[0] / truth[0] - 1),
            distance(nodes, exact),
            distance(reference.quadrature(steps - 1), exact),
        )


def study(options: Options) -> Study:
    """All variants."""
    if not options.steps or min(options.steps) < 2 or any(r < 2 for r in options.windows):
        raise InputError(f"--steps {options.steps} and --windows {options.windows}: each must be at least 2.")
    blocks = options.blocks()
    with jax.enable_x64(True):
        hessian = options.hessian(blocks, "float32")
        validate(hessian)
        runs = [
            lanczos(name, storage, hessian, max(options.steps), options.seed)
            for name, storage in options.variants().items()
        ]
    found = {run.name: [run.after(steps, runs[0]) for steps in sorted(options.steps)] for run in runs}
    return Study(
        "Lanczos with and without re-orthogonalisation",
        tuple(claims(found, options.described(hessian))),
        (table(runs, found),),
        (picture(NAME, figure(found), NOTE),),
        {
            "parameters": hessian.dim,
            "data_fingerprint": blocks.fingerprint(),
            "runs": [dataclasses.asdict(run) for run in runs],
            "after_steps": {name: [row._asdict() for row in rows] for name, rows in found.items()},
        },
    )


def claims(found: dict[str, list[AfterSteps]], model: str) -> Iterator[Claim]:
    """What the papers say of Lanczos without re-orthogonalisation, in part, and in bfloat16, after all steps.

    The error of an extreme value, and of a distance, is that of full re-orthogonalisation in float32.
    """
    none, full = (found[name][-1] for name in ("none", "full"))
    narrow = found["full, bf16 vectors"][-1] if "full, bf16 vectors" in found else None
    window = next((rows[-1] for name, rows in reversed(found.items()) if name.startswith("window")), None)
    figures, fewer = "Section 3.2, Figures 3(c) and 3(d)", none.one_step_fewer
    extremes = "larger relative error of the extreme Ritz values"
    # fmt: off
    rows: list[tuple[str, str, str, str, str, Range, float | None, float]] = [
        (HESSFORMER, figures, "Without orthogonalisation ghost eigenvalues appear.", "multiple ghosts",
         "ghosts without it, less those with full", (1, None), none.ghosts - full.ghosts, 0.0),
        (HESSFORMER, figures, "Without orthogonalisation the spectral support is kept.", "the same support",
         extremes, (None, 0.01), max(none[2:4]), max(full[2:4])),
        (HESSFORMER, figures, "Without orthogonalisation the shape of the bulk is kept.", "the same shape",
         "Wasserstein-1 distance from full, in that of one step fewer", (None, 1), none.distance / fewer,
         full.distance / fewer),
        (FOUNDATION, "Design tradeoffs, Reorthogonalization", "Re-orthogonalisation is essential for outliers.",
         "essential", "relative error of the largest Ritz value without it", (0.01, None), none.largest, full.largest),
        (FOUNDATION, "Method Summary; Mechanism 2, break condition", "A sliding window controls ghosts.", "control",
         "ghosts with the largest window over those without", (None, 0.1),
         window.ghosts / none.ghosts if window and none.ghosts else None, 0.0),
        (FOUNDATION, "Design tradeoffs, Precision", "Vectors in bfloat16 leave the spectrum nearly as it is.",
         "minimal spectral deviation", f"{extremes}, re-orthogonalised in full", (None, 0.01),
         max(narrow[2:4]) if narrow else None, max(full[2:4])),
    ]
    # fmt: on
    for *row, holds, ours, error in rows:
        source, place, statement, paper, quantity = row
        yield Claim(source, place, statement, paper, f"{quantity}, after {none.steps} steps", holds, ours, error, model)


def lanczos(name: str, storage: Storage, operator: jaxhess.LinearOperator, steps: int, seed: int) -> Run:
    """One run over the operator, from the probe of this seed."""
    state = start_lanczos([jaxhess.random_probe(random_key(seed), operator.shape_dtype)], steps, storage)
    memory = compile_segment(operator, state).memory_analysis()
    held = sum(bytes_per_device(jax.tree.leaves(x)) for x in ((state.previous, state.current), state.basis))
    state = jax.block_until_ready(lanczos_segment(operator, state, 1))  # compiles what is not yet
    began = time.perf_counter()
    state = jax.block_until_ready(lanczos_segment(operator, state, steps))
    seconds = (time.perf_counter() - began) / max(steps - 1, 1)
    alphas, betas, step_errors = state.tridiagonal()
    return Run(
        name,
        storage,
        alphas,
        betas,
        step_errors,
        float(orthogonality_loss(state)[0]),
        unit_roundoff(operator, state.current),
        seconds,
        held / bytes_per_device(jax.tree.leaves(operator.shape_dtype)),
        memory.temp_size_in_bytes if memory else None,
    )


def distance(a: Quadrature, b: Quadrature) -> float:
    """Wasserstein-1 distance of two spectra, in mean |eigenvalue| of the second."""
    apart = wasserstein_distance(a.ritz_values, b.ritz_values, a.weights, b.weights)
    return float(apart / (b.weights @ np.abs(b.ritz_values)))


def table(runs: list[Run], found: dict[str, list[AfterSteps]]) -> Table:
    """Every variant after the largest number of steps."""
    rows = []
    for run in runs:
        last = found[run.name][-1]
        loss, temporaries = run.orthogonality_loss, run.temporary_bytes
        rows.append(
            (
                run.name,
                str(last.ghosts),
                *(f"{x:.0e}" for x in (last.largest, last.smallest, last.distance)),
                "" if math.isnan(loss) else f"{loss:.0e}",
                f"{run.stored_vectors:.3g}",
                "" if temporaries is None else f"{temporaries / 1e6:.0f}",
                f"{run.seconds_per_step:.2f}",
            )
        )
    head = ("", "ghosts", "largest", "smallest", "W1", "|Q'Q − I|", "vectors held", "temporaries, MB", "s per step")
    return Table(
        head, rows, f"After {last.steps} steps (W1 of the reference with one fewer: {last.one_step_fewer:.0e})"
    )


COLORS = ("#1b2a41", "#c8553d", "#e09f3e", "#b08968", "#588157", "#2f6fb3", "#5fa8d3", "#8d5a97", "#6c757d", "#d4a5a5")


def figure(found: dict[str, list[AfterSteps]]) -> Figure:
    """Ghosts, errors of the extremes, distance, each against the number of steps."""
    drawn = Figure(figsize=(13, 9), dpi=130, layout="constrained", facecolor="white")
    panels = drawn.subplots(2, 2)
    titles = {
        "ghosts": "Ritz values flagged as ghosts",
        "distance": "Wasserstein-1 distance to the reference, in mean |eigenvalue|",
        "largest": "error of the largest Ritz value, relative to the reference's last",
        "smallest": "error of the smallest Ritz value, relative to the reference's last",
    }
    for panel, (key, title) in zip(panels.flat, titles.items(), strict=True):
        for color, (name, rows) in zip(COLORS, found.items(), strict=False):
            steps, values = [row.steps for row in rows], [getattr(row, key) for row in rows]
            dashes = "--" if "bf16" in name else "-"
            if (key, name) == ("distance", "reference"):
                panel.plot(steps, [row.one_step_fewer for row in rows], "k:", label="reference, one step fewer")
                continue
            floor = values if key == "ghosts" else np.maximum(values, 1e-16)
            panel.plot(steps, floor, "o", ls=dashes, ms=4, color=color, label=name)
        panel.set_yscale("symlog" if key == "ghosts" else "log")
        panel.set_ylim(bottom=-0.5 if key == "ghosts" else 1e-16)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("Lanczos steps")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    shown = {name: line for panel in panels.flat for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    drawn.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return drawn


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
