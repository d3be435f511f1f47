"""Sharpness by kind of parameters: embedding, queries and keys, feed-forward, values and output, norms.

    python -m scripts.studies.kind_sharpness

With no options: the trained model in scripts/tiny on its text, and the same model with random weights.
Average sharpness is the trace of a kind's diagonal block over its number of parameters, of the Hessian and of the
Gauss-Newton matrix (the paper's is of "a Hessian approximation", which the copy at hand does not name). What would
refute the claims: a pair of kinds in the other order; for "≪", less than ten times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxhess
from jaxhess.errors import InputError
from jaxhess.krylov.errors import student_factor
from jaxhess.models import initialize
from jaxhess.operators.facts import validate
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Study
from jaxhess.vectors import random_key
from scripts.studies.harness import SHARPNESS, ModelOptions, command, make_mesh, picture

NAME = "kind_sharpness"
MEMBERS = {
    "embedding": ("embedding",),
    "query-key": ("query", "key"),
    "feed-forward": ("gate", "up", "down"),
    "value-output": ("value", "attention out"),
    "norms": ("norms",),
    "head": ("head",),
}
"""Of every kind the kinds of `Blocks.by`; the first five in the order that the paper claims, least sharp first."""
MUCH = 10.0
"""The factor that "≪" is taken for. Set before the first measurement; the paper gives none in the copy at hand."""
MATRICES = {"Gauss-Newton": jaxhess.GaussNewton, "Hessian": jaxhess.Hessian}
TRAINED, RANDOM = "trained", "random weights"
NOTE = """Left: trace of each kind's block over its number of parameters, with its 95% interval; hollow markers are
negative, drawn at their magnitude. Right: its largest eigenvalue. Kinds in the order that the paper claims, and the
head, of which it says nothing; crosses are random weights of each seed."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """The model, its text, and how precisely."""

    steps: int = 6
    """Lanczos steps."""
    probes: int = 8
    """Probes per kind."""
    random_seeds: int = 1
    """Models with random weights."""


SMALL = Options(seq_len=16, mesh="fsdp=1", steps=4, probes=3)


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """Of one kind: its parameters, the trace per parameter with its 95% error, the largest eigenvalue with the bound of
    its residual."""

    parameters: int
    average: float
    error: float
    largest: float
    residual: float


Found = dict[str, Sharpness]


def study(options: Options) -> Study:
    """The trained model, and models with random weights."""
    if options.probes < 2 or options.steps < 2 or options.random_seeds < 0:
        raise InputError("--probes and --steps must be at least 2, and --random-seeds not negative.")
    data = options.blocks()
    trained = options.hessian(data, "float32")
    validate(trained)
    config = trained.loss.config  # type: ignore[attr-defined]
    mesh = make_mesh(options.mesh)
    kinds = kinds_of(trained.shape_dtype)
    models = [trained.params, *(initialize(config, random_key(k), mesh).params for k in range(options.random_seeds))]
    found = {
        name: [sharpness(make(trained.loss, params, trained.batches), kinds, options) for params in models]
        for name, make in MATRICES.items()
    }
    return Study(
        "Sharpness by kind of parameters",
        tuple(claim for name in found for claim in claims(found[name], name, options.described(trained))),
        tuple(
            table(kinds, f"{name}, {at}")
            for name in found
            for kinds, at in zip(found[name], (TRAINED, RANDOM), strict=False)
        ),
        (picture(NAME, figure(found), NOTE),),
        {
            "parameters": trained.dim,
            "data_fingerprint": data.fingerprint(),
            "trained, then random weights": {
                name: [{kind: dataclasses.asdict(s) for kind, s in kinds.items()} for kinds in rows]
                for name, rows in found.items()
            },
        },
    )


def kinds_of(like: object) -> jaxhess.Blocks:
    """The partition into `MEMBERS`.

    Raises:
        InputError: The model has other kinds of parameters, or lacks one.
    """
    blocks = jaxhess.Blocks.by(like, "kinds")
    coarse = {member: kind for kind, members in MEMBERS.items() for member in members}
    unknown = [name for name in blocks.names if name not in coarse]
    missing = [kind for kind, members in MEMBERS.items() if kind != "head" and not set(members) & set(blocks.names)]
    if unknown or missing:
        raise InputError(
            f"This study knows {', '.join(MEMBERS)}; the model has {', '.join(unknown) or 'nothing'} besides, and "
            f"lacks {', '.join(missing) or 'nothing'}."
        )
    return blocks.merged(lambda name: coarse[name])


def sharpness(operator: jaxhess.LossOperator, kinds: jaxhess.Blocks, options: Options) -> Found:
    """Of every kind."""
    spectra = jaxhess.block_spectra(
        operator,
        kinds,
        steps=options.steps,
        probes=options.probes,
        seed=options.seed,
        distribution="rademacher",
        together=len(kinds),
    )
    found = {}
    for name, spectrum in zip(spectra.names, spectra.spectra, strict=True):
        forms = spectrum.alphas[:, 0]  # of unit probes: their mean is the trace over the dimension
        error = student_factor(len(forms) - 1, 0.95) * float(forms.std(ddof=1)) / math.sqrt(len(forms))
        largest = spectrum.extreme().largest
        found[name] = Sharpness(spectrum.dim, float(forms.mean()), error, largest.value, largest.residual_bound)
    return {kind: found[kind] for kind in MEMBERS if kind in found}


def log_ratio(sharper: Sharpness, flatter: Sharpness) -> tuple[float | None, float, str]:
    """log10 of the ratio of averages, its 95% error, and why there is none."""
    for s in (sharper, flatter):
        if s.average - s.error <= 0:
            return None, 0.0, f"a trace per parameter of {s.average:.2g} ± {s.error:.1g} may be zero or negative"
    error = math.hypot(sharper.error / sharper.average, flatter.error / flatter.average) / math.log(10)
    return math.log10(sharper.average / flatter.average), error, ""


def claims(found: list[Found], matrix: str, model: str) -> Iterator[Claim]:
    """The order of the kinds, and that the disparity comes with training; of the trained model, then random weights."""
    trained, *random = found
    place, traces = "README, The Sharpness Disparity Principle", f"traces per parameter of the {matrix} matrix"
    for flatter, sharper in pairwise(list(MEMBERS)[:5]):
        much = {flatter, sharper} & {"embedding", "norms"}
        sign = "≪" if much else "<"
        value, error, obstacle = log_ratio(trained[sharper], trained[flatter])
        yield Claim(SHARPNESS, place, f"S({flatter}) {sign} S({sharper}).",
                    "Emb ≪ QK < FFN < VO ≪ Norm", f"log10 of S({sharper}) / S({flatter}), {traces}",
                    (math.log10(MUCH) if much else 0, None), value, error, model, obstacle)  # fmt: skip
    value, error, obstacle = log_ratio(trained["norms"], trained["embedding"])
    yield Claim(SHARPNESS, "Abstract", "There is a clear disparity of sharpness across kinds.", "clear",
                f"log10 of S(norms) / S(embedding), {traces}", (math.log10(MUCH), None), value, error, model,
                obstacle)  # fmt: skip
    if random and value is not None:
        before, before_error, obstacle = log_ratio(random[0]["norms"], random[0]["embedding"])
        grown = None if before is None else value - before
        yield Claim(SHARPNESS, "Abstract", "The disparity emerges in training.", "emerges early in training",
                    f"log10 of S(norms) / S(embedding), {traces}, trained less random weights of seed 0", (0, None),
                    grown, math.hypot(error, before_error), model, obstacle)  # fmt: skip


def table(found: Found, at: str) -> Table:
    """Kinds, sharpest first."""
    rows = [
        (kind, f"{s.parameters:,}", f"{s.average:.3g} ± {s.error:.1g}", f"{s.largest:.3g}", f"{s.residual:.1g}")
        for kind, s in sorted(found.items(), key=lambda item: -item[1].average)
    ]
    head = ("kind", "parameters", "trace per parameter, ± 95%", "largest eigenvalue", "its residual bound")
    return Table(head, rows, f"Sharpness by kind, {at}")


def figure(found: dict[str, list[Found]]) -> Figure:
    """Average sharpness and largest eigenvalues by kind; a row for each matrix."""
    drawn = Figure(figsize=(12, 4.2 * len(found)), dpi=110, layout="constrained", facecolor="white")
    panels = drawn.subplots(len(found), 2, squeeze=False)
    for row, (matrix, models) in zip(panels, found.items(), strict=True):
        for number, kinds in enumerate(models):
            color, marker, at = ("#D55E00", "X", RANDOM) if number else ("#0072B2", "o", TRAINED)
            draw_averages(row[0], kinds, color, marker, at)
            row[1].plot([s.largest for s in kinds.values()], marker, ms=8, color=color, label=at)
        row[0].set_ylabel("|trace| per parameter (nats)")
        row[1].set_ylabel("largest eigenvalue (nats)")
        for panel in row:
            panel.set_title(f"{matrix} matrix", fontsize=11)
            panel.set_yscale("log")
            panel.set_xticks(range(len(models[0])), list(models[0]), rotation=15)
            panel.grid(alpha=0.25, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            handles, labels = panel.get_legend_handles_labels()
            unique = dict(zip(labels, handles, strict=True))
            panel.legend(unique.values(), unique.keys(), fontsize=9, frameon=False)
    return drawn


def draw_averages(panel: Axes, kinds: Found, color: str, marker: str, at: str) -> None:
    """Magnitudes of the traces per parameter with their errors; negative ones hollow."""
    values = np.array([s.average for s in kinds.values()])
    errors = np.array([s.error for s in kinds.values()])
    lower = np.minimum(errors, 0.9 * np.abs(values))  # a bar that would reach zero ends a decade below its value
    places = np.arange(len(values))
    panel.errorbar(places, np.abs(values), (lower, errors), fmt="none", ecolor=color, capsize=3, linewidth=1)
    for face, some in ((color, values > 0), ("white", values < 0)):
        label = at if face == color else None
        panel.plot(places[some], np.abs(values[some]), marker, ms=8, mec=color, mfc=face, label=label)


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
