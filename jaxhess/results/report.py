"""A self-contained HTML report of a spectrum, for readers who have not met one before."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxhess.files.output import Output
from jaxhess.files.run_folder import REPORT_FILES, json_ready
from jaxhess.krylov.ghosts import relative_tolerance
from jaxhess.operators.audit import Noise
from jaxhess.results.data_section import data_section
from jaxhess.results.figures import CENTRAL_MASS, density_figure, distribution_figure, png, stem_figure
from jaxhess.results.page import Picture, Section, Table, facts, page
from jaxhess.results.ritz_table import ritz_tables
from jaxhess.results.summary import checks
from jaxhess.results.words import estimate_words, number
from jaxhess.slq.extremes import Extreme
from jaxhess.slq.record import EigenpairRecord, RunRecord
from jaxhess.slq.spectrum import Spectrum

DISTRIBUTION_CAPTION = """How to read it: the curve is the share of all eigenvalues of the {matrix} at or below a
value, as the random probes see it; where it is steep there are many eigenvalues, where it is flat few or none. Each
eigenvalue is the curvature of the loss along one direction in parameter space: large positive ones are steep walls,
values near zero flat directions, negative ones directions in which the loss curves down. The vertical axis is stretched
towards 0 and 1, so that a share of a few eigenvalues shows at either end: at 0.999 one eigenvalue in a thousand is
larger. The horizontal axis is linear near zero and logarithmic in both directions away from it. The inner band holds
what these same probes would show after any number of further Lanczos steps, for a matrix that differs from the operator
by no more than the rounding of the run; more steps narrow it. The outer band also covers the sampling error: at
each place it holds the share of the operator's own eigenvalues with 95%; more probes narrow it. Where a band is narrow,
the share is known; where it spans the figure, nothing is known about how eigenvalues are spread in there."""

DENSITY_CAPTION = """How to read it: the curve is the weights of the Ritz values (estimates of eigenvalues), smoothed by
a Gaussian whose standard deviation is {width} of the axis' length. With few Lanczos steps its bumps are the shape of
that Gaussian around single Ritz values, and the dips between them are gaps of the method rather than of the spectrum.
The band holds with 95% what the operator's own eigenvalues would give, equally smoothed: both what the steps taken
leave open and the sampling error. Where it reaches the bottom, the curve's shape there says nothing; the
distribution above says how many eigenvalues there are. {zero} Red ticks mark the Ritz values outside the central 99% of
the mass."""

REFLECTED = (
    """No Ritz value is negative beyond rounding, so the Gaussian is reflected at zero: nothing is drawn below."""
)

NOT_REFLECTED = """Smoothing keeps the total mass and moves it to both sides: what lies at zero is drawn half above and
half below it, so mass near zero does not say how many eigenvalues are negative."""

STEM_CAPTION = """How to read it: each dot is one Ritz value of one probe; its height estimates the share of all
eigenvalues near it. The dashed line is the share of a single eigenvalue, 1/dim. A dot near the line, at the same
place for every probe, is a single isolated eigenvalue: its height scatters by the chance overlap of the probe with
its direction. Dots far above the line stand for many eigenvalues; dots far below it carry less than one eigenvalue's
share and deserve no interpretation, except as a probe that happened to miss an eigenvalue other probes see. Hollow
dots are ghosts: copies of an eigenvalue that has its dot already, or values that belong to no eigenvalue."""

GHOSTS_NOTE = """Rounding makes Lanczos without re-orthogonalisation find the same eigenvalue again (a copy), on the way
to which a value can appear where no eigenvalue is (spurious). Copies count once: of values within {tolerance} of their
neighbour, or within what storage may have moved them, the one of largest weight is left. Eigenvalues that close to each
other cannot be told from copies; a bulk can be closer. The weights of copies add up, so that densities and traces are
not touched by any of this."""

LOST_WARNING = """the Lanczos vectors of probe {probes} did not stay orthogonal, although they were orthogonalised. Its
Ritz values, weights and bounds may be wrong. Take full re-orthogonalisation, or wider vectors."""

NO_GHOSTS_NOTE = """No Ritz value is taken for a copy of another or for spurious."""

NOISE_NOTE = """The floor is in units of eigenvalues. The error of the products acts like a matrix added to the true
one; the random floor estimates the root mean square of its singular values, so Ritz values nearer to zero than it
cannot be told from noise. The other floor is the error where curvature is large."""

ROUTING_NOTE = """The margin is the gap between the scores of the last chosen expert and of the first not chosen. The
Hessian is that of the choice as it stands; where the margin is within rounding, another machine may choose otherwise.
The load is an expert's share of the choices in its layer, times the number of experts: 1 where it is even."""

CHECKS_NOTE = (
    """Identities that hold exactly without rounding; violations far above 1e-6 mean that something is broken."""
)

PROBE_HEAD = ("probe", "steps", "smallest", "residual bound", "largest", "residual bound", "trace")

MOST_OUTLIERS = 40
"""Rows of the table of outliers."""

FIGURES: dict[str, Callable[[Spectrum], Figure]] = {
    "distribution": distribution_figure,
    "density": density_figure,
    "stem": stem_figure,
}


def write_report(folder: str | os.PathLike[str], spectrum: Spectrum, overwrite: bool = False) -> None:
    """Writes `report.html` (nothing external: plots are embedded) and the three figures as PNG into the folder.

    Raises:
        InputError: There is a report and `overwrite` is False, or a file that the library did not write; the folder
            cannot be written. What could be saved elsewhere is, and the message says where.
    """
    with Output(folder, REPORT_FILES, overwrite) as output:
        output.write(report_files(spectrum))


def report_files(spectrum: Spectrum) -> dict[str, bytes]:
    """The contents of the files that `write_report` writes."""
    images = {name: png(draw(spectrum)) for name, draw in FIGURES.items()}
    return {f"{name}.png": image for name, image in images.items()} | {"report.html": _page(spectrum, images).encode()}


def _page(spectrum: Spectrum, images: dict[str, bytes]) -> str:
    distribution = DISTRIBUTION_CAPTION.format(matrix=spectrum.matrix_name)
    sections = [
        Section("In short", [Table(("quantity", "value", "how sure"), list(_headline(spectrum)))]),
        Section(
            "Distribution of eigenvalues",
            [Picture("Distribution of eigenvalues", images["distribution"], distribution)],
        ),
        Section(
            "Density of eigenvalues, smoothed",
            [Picture("Density of eigenvalues", images["density"], _density_caption(spectrum))],
        ),
        Section(
            "Ritz values and weights",
            [Picture("Ritz values and their weights", images["stem"], STEM_CAPTION), *ritz_tables(spectrum)],
        ),
        Section("Every probe", [Table(PROBE_HEAD, list(_probes(spectrum)))]),
        Section("Ghosts", list(_ghosts(spectrum))),
        *_eigenpairs(spectrum.run.eigenpairs),
        data_section(spectrum),
        Section("Checks", [Table(("identity", "largest violation over probes"), list(_checks(spectrum))), CHECKS_NOTE]),
        *_noise(spectrum.run.noise),
        *_routing(spectrum.run.inputs.details),
        Section("How it was made", list(_record(spectrum.run, spectrum.info))),
    ]
    return page(f"Spectrum of the {spectrum.matrix_name}", sections, [_subtitle(spectrum)], _warnings(spectrum))


def _warnings(spectrum: Spectrum) -> Iterator[str]:
    if spectrum.orthogonality_lost.any():
        lost = ", ".join(str(probe + 1) for probe in np.flatnonzero(spectrum.orthogonality_lost))
        yield f"Not reliable: {LOST_WARNING.format(probes=lost)}"


def _subtitle(spectrum: Spectrum) -> str:
    text = (
        f"{spectrum.num_probes} random probe{'s' * (spectrum.num_probes > 1)}, {spectrum.num_steps} Lanczos "
        f"step{'s' * (spectrum.num_steps > 1)} each, {spectrum.dim:,} parameters."
    )
    broken = int(spectrum.broke_down.sum())
    if broken:
        text += (
            f" {broken} broke down: the Krylov space was exhausted, and the spectrum is known up to the rounding of "
            "the run. Eigenvalues closer together than that were not told apart."
        )
    return text


def _headline(spectrum: Spectrum) -> Iterator[Sequence[str]]:
    if (loss := spectrum.run.inputs.loss) is not None:
        yield "loss", number(loss, 6), "as recorded with the run"
    smallest, largest = spectrum.extreme()
    yield "largest Ritz value", number(largest.value, 6), _extreme_words(largest)
    yield "smallest Ritz value", number(smallest.value, 6), _extreme_words(smallest)
    yield "trace", *estimate_words(spectrum.trace())
    mean = spectrum.moment(1)
    yield "mean eigenvalue (trace / dim)", *estimate_words(mean)
    yield "Frobenius norm", *estimate_words(spectrum.frobenius_norm())


def _extreme_words(extreme: Extreme) -> str:
    bound = f"residual bound {number(extreme.residual_bound, 2)}: an eigenvalue lies that close, or within rounding"
    if math.isnan(extreme.residual_bound):
        bound = "residual bound unknown: the norm after the last step is not there"
    if math.isnan(extreme.spread):
        return bound + "; one probe, so no spread to judge rounding by"
    return bound + f"; the probes' own values scatter by {number(extreme.spread, 2)} (standard deviation)"


def _density_caption(spectrum: Spectrum) -> str:
    density = spectrum.density()
    low, high = density.along(2) if density.linthresh is None else np.arcsinh(density.along(2) / density.linthresh)
    zero = REFLECTED if density.reflected else NOT_REFLECTED
    return DENSITY_CAPTION.format(width=f"{density.width / (high - low):.1%}", zero=zero)


def _probes(spectrum: Spectrum) -> Iterator[Sequence[str]]:
    rows = zip(
        spectrum.ritz_values,
        spectrum.residual_bounds,
        spectrum.sizes,
        spectrum.broke_down,
        spectrum.alphas,
        strict=True,
    )
    for probe, (theta, bounds, size, broke, alphas) in enumerate(rows):
        steps = f"{size} (broke down)" if broke else str(size)
        smallest, largest = ((number(theta[i], 6), number(bounds[i], 2)) for i in (0, size - 1))
        yield str(probe + 1), steps, *smallest, *largest, number(spectrum.dim * alphas[0], 4)


def _ghosts(spectrum: Spectrum) -> Iterator[str | Table]:
    found = spectrum.ghosts.any()
    measured = spectrum.run.lanczos.orthogonality or ()
    lost = [number(np.nan if x is None else x, 2).replace("unknown", "not measured") for x in measured]
    lost = lost if len(lost) == spectrum.num_probes else []
    head = ["probe", "Ritz values", "copies", "spurious", "left"]
    yield Table(
        head + ["loss of orthogonality, largest |Q'Q − I|"] * bool(lost),
        [row + lost[i : i + 1] for i, row in enumerate(_ghost_counts(spectrum))],
    )
    theta = spectrum.ritz_values[np.isfinite(spectrum.ritz_values)]
    tolerance = 2 * relative_tolerance(spectrum.num_steps, spectrum.run.rounding) * float(np.abs(theta).max())
    yield GHOSTS_NOTE.format(tolerance=number(tolerance, 2)) if found else NO_GHOSTS_NOTE
    if found:
        rows = sorted(_outliers(spectrum), key=lambda row: (-float(f"{abs(row[1]):.4g}"), row[0]))
        yield Table(
            ("probe", "value", "Ritz values merged", "residual bound", "weight × parameters"),
            [(str(p), number(v, 6), str(n), number(b, 2), number(w, 2)) for p, v, n, b, w in rows[:MOST_OUTLIERS]],
            "Outliers with their copies merged",
        )
        left = len(rows) - MOST_OUTLIERS
        yield (
            f"Outside the central {CENTRAL_MASS:.0%} of a probe's mass{_more(left)}. The last column is of order one "
            "for a lone eigenvalue: chi-squared with one degree of freedom."
        )


def _ghost_counts(spectrum: Spectrum) -> Iterator[list[str]]:
    for probe, size in enumerate(spectrum.sizes):
        flagged, spurious = int(spectrum.ghosts[probe].sum()), int(spectrum.clusters(probe).spurious.sum())
        yield [str(n) for n in (probe + 1, size, flagged - spurious, spurious, size - flagged)]


def _outliers(spectrum: Spectrum) -> Iterator[tuple[int, float, int, float, float]]:
    """Probe, value, copies, residual bound and dim times weight of every cluster that is an outlier of its probe."""
    for probe in range(spectrum.num_probes):
        clusters = spectrum.clusters(probe)
        upto = np.cumsum(clusters.weights)
        tail = (1 - CENTRAL_MASS) / 2
        outside = ((upto < tail) | (upto - clusters.weights > 1 - tail)) & ~clusters.spurious
        for i in np.flatnonzero(outside):
            value, weight, copies, bound, _ = (field[i] for field in clusters)
            yield probe + 1, float(value), int(copies), float(bound), float(spectrum.dim * weight)


def _more(left: int) -> str:
    return f"; the {MOST_OUTLIERS} farthest from zero, {left} more are not shown" if left > 0 else ""


def _eigenpairs(pairs: EigenpairRecord | None) -> Iterator[Section]:
    """Values and residuals of eigenvectors that the run computed, if it did."""
    if pairs is None:
        return
    rows = [
        (str(i), *("–" if x is None else number(x, d) for x, d in zip(row, (6, 2), strict=True)))
        for i, row in enumerate(zip(pairs.values, pairs.residuals, strict=False), 1)
    ]
    table = Table(("", "eigenvalue", "residual |Hv − value v| / |v|"), rows)
    yield Section("Eigenvectors", [table, "An eigenvalue lies within the residual of each value."])


def _checks(spectrum: Spectrum) -> Iterator[Sequence[str]]:
    names = {
        "sum_weights": "the weights sum to one",
        "first_moment": "the mean Ritz value is alpha₁ (relative to the root mean square)",
        "second_moment": "the mean squared Ritz value is alpha₁² + beta₁² (relative)",
    }
    for name, violation in checks(spectrum).items():
        yield names[name], f"{violation:.1e}"


def _noise(noise: Noise | None) -> Iterator[Section]:
    """The noise audit, if the run has one."""
    if noise is None:
        return
    numbers = [("asymmetry, |u'Hv − v'Hu| / |Hv|", noise.asymmetry), ("non-linearity, relative", noise.nonlinearity)]
    for text, found in (("relative error, {}", noise.relative_error), ("floor, |error of Hx| / |x|, {}", noise.floor)):
        if found is not None:
            numbers += [(text.format("random direction"), found.random)]
            numbers += [(text.format("direction of large curvature"), found.leading)]
    rows = [("reference", noise.reference), *((text, number(x, 2)) for text, x in numbers if x is not None)]
    yield Section("Noise of the products", [Table(("measured on the operator of this run", "value"), rows), NOISE_NOTE])


def _routing(details: Mapping[str, Any]) -> Iterator[Section]:
    """The margins of the choice of experts, and what finite differences do to it; of a model with experts."""
    found = details.get("routing")
    if not isinstance(found, Mapping):
        return
    rows = [("choices, one for each token and layer", f"{found['choices']:,}")]
    rows += [
        ("smallest margin" if q == "0" else f"margin, {float(q):.1%} quantile", number(value, 2))
        for q, value in found.get("margin", {}).items()
    ]
    rows += [(f"{name} load of an expert", number(value, 3)) for name, value in found.get("load", {}).items()]
    shift = details.get("shift_of_a_random_vector")
    if isinstance(shift, Mapping) and "changed_experts" in shift:
        rows += [
            ("choices that differ between the two shifts", f"{shift['changed_experts']:.3%}"),
            ("what they change in a product, relative", number(shift["jumped"], 2)),
        ]
    yield Section("Choice of experts", [Table(("measured at these parameters", "value"), rows), ROUTING_NOTE])


def _record(run: RunRecord, info: dict[str, Any]) -> Iterator[Table]:
    """A table for each part of the record that is known, and one of what a caller noted."""
    record = json_ready(dataclasses.asdict(run))
    parts = {**(record.pop("job") or {}), **record, "notes": info}
    del parts["noise"], parts["eigenpairs"]  # they have sections of their own
    plain = {name: value for name, value in parts.items() if not isinstance(value, dict)}
    for title, values in ({"run": plain} | {n: v for n, v in parts.items() if isinstance(v, dict)}).items():
        if (table := facts(values, title)).rows:
            yield table
