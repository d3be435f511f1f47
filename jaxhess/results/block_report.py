"""A self-contained HTML report of a run over blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxhess.files.run_folder import json_ready
from jaxhess.results.block_figures import (
    coupling_figure,
    distance_figure,
    fidelity_figure,
    relative_figure,
    spectra_figure,
)
from jaxhess.results.block_files import BlockRun
from jaxhess.results.figures import png
from jaxhess.results.page import Picture, Section, Table, facts, page
from jaxhess.results.words import estimate_words
from jaxhess.slq.extremes import Extreme
from jaxhess.structure.approximations import approximations
from jaxhess.structure.coupling import CouplingMap
from jaxhess.structure.distances import BINS_PER_DECADE, DECADES, RANK, SMOOTHING, jensen_shannon, noise_floor
from jaxhess.structure.spectra import BlockSpectra

COUPLING_CAPTION = """How to read it: the colour at row a and column b is the Frobenius norm of the block H_ab of the
matrix: how much a random step in block b changes the gradient in block a. The diagonal is each block's own curvature.
It is an estimate from random probes; blocks.npz has the standard error of each."""

RELATIVE_CAPTION = """The same, divided by the geometric mean of the norms of the two diagonal blocks. 1 means that two
blocks are coupled as strongly as each is with itself; where all colours off the diagonal are dark, a block-diagonal
approximation is good."""

FIDELITY_CAPTION = """For a random vector v: how far the product of the diagonal block alone, H_aa v_a, is from the rows
of the whole product, (Hv)_a. An error of 0 and a cosine of 1 would be a block-diagonal matrix. For many independent
directions the squares of the two add up to nearly 1."""

SPECTRA_CAPTION = """Each row is a diagonal block; the colour is the share of its eigenvalues in a bin, on one
logarithmic axis for all blocks. Red marks are the smallest and the largest Ritz value."""

DISTANCE_CAPTION = f"""The square root of the Jensen-Shannon divergence in bits between the blocks' distributions of
eigenvalues: masses in bins, {BINS_PER_DECADE} per decade over the {DECADES} decades below the largest magnitude of all
blocks, for either sign, and one bin around zero; smoothed by a Gaussian of {SMOOTHING} decades. Grey: no farther apart
than the two halves of one of the blocks' own probes, and so not told apart. blocks.npz also has the
distances after each block's eigenvalues are divided by its {RANK}th largest (normalised_distance)."""


def report_files(run: BlockRun) -> dict[str, bytes]:
    """The pictures and the page, by name."""
    images: dict[str, bytes] = {}
    sections = [Section("In short", [Table(("quantity", "value", "how sure"), list(_headline(run)))])]
    if run.coupling is not None:
        images["coupling"] = png(coupling_figure(run.coupling))
        images["relative"] = png(relative_figure(run.coupling))
        images["fidelity"] = png(fidelity_figure(run.coupling))
        sections += _map_sections(run.coupling, images)
    if run.spectra is not None:
        images["spectra"] = png(spectra_figure(run.spectra))
        found = run.spectra.spectra
        images["distance"] = png(distance_figure(jensen_shannon(found), noise_floor(found), run.spectra.names))
        sections += _spectra_sections(run.spectra, images)
    sections.append(Section("How it was made", [facts(json_ready(_record(run)))]))
    name = run.record.matrix_name
    notes = [f"{len(run.names)} blocks of {int(run.sizes.sum()):,} parameters."]
    html = page(f"Blocks of the {name}", sections, notes)
    return {f"{name}.png": image for name, image in images.items()} | {"report.html": html.encode()}


def _record(run: BlockRun) -> dict[str, object]:
    return {name: value for name, value in dataclasses.asdict(run.record).items() if value is not None}


def _headline(run: BlockRun) -> Iterator[Sequence[str]]:
    if (loss := run.record.inputs.loss) is not None:
        yield "loss", f"{loss:.6g}", "as recorded with the run"
    if (found := run.coupling) is not None:
        yield "Frobenius norm", *estimate_words(found.frobenius_norm())
        error = found.relative_error(np.eye(len(found.names), dtype=bool))
        yield "what block-diagonal misses, |H − S| / |H|", *estimate_words(error)
        yield (
            "the same of a product, median over probes",
            f"{np.median(found.whole_error):.3g}",
            _range(found.whole_error),
        )
        yield "cosine of the two products, median", f"{np.median(found.whole_cosine):.3g}", _range(found.whole_cosine)
    if run.spectra is not None:
        largest = [float(np.nanmax(s.ritz_values)) for s in run.spectra.spectra]
        b = int(np.argmax(largest))
        yield "largest Ritz value of a block", f"{largest[b]:.6g}", f"of {run.spectra.names[b]}"


def _map_sections(found: CouplingMap, images: dict[str, bytes]) -> Iterator[Section]:
    yield Section(
        "Coupling",
        [
            Picture("Coupling of blocks", images["coupling"], COUPLING_CAPTION),
            Picture("Relative coupling of blocks", images["relative"], RELATIVE_CAPTION),
        ],
    )
    sizes = found.sizes.astype(float)
    kinds = [
        (name, f"{sizes @ kept @ sizes:.3g}", *estimate_words(found.relative_error(kept)))
        for name, kept in approximations(found.names).items()
    ]
    head: tuple[str, ...] = ("approximation", "entries kept", "|H − S| / |H|", "how sure")
    yield Section("What block-sparse approximations miss, in Frobenius norm", [Table(head, kinds)])
    yield Section(
        "What the block-diagonal part misses of a product", [Picture("Fidelity", images["fidelity"], FIDELITY_CAPTION)]
    )
    own = np.diag(found.coupling)
    errors, traces = found.row_error(np.eye(len(own), dtype=bool)), found.trace()
    rows = [
        (name, f"{size:,}", f"{own[b]:.4g}", *estimate_words(traces[b]), f"{errors[b].value:.3g}", *_fidelity(found, b))
        for b, (name, size) in enumerate(zip(found.names, found.sizes, strict=True))
    ]
    head = ("block", "parameters", "|H_aa|", "trace", "how sure", "rows missed", "error of a product", "cosine")
    yield Section("Every block", [Table(head, rows)])


def _spectra_sections(found: BlockSpectra, images: dict[str, bytes]) -> Iterator[Section]:
    rows = []
    for name, spectrum in zip(found.names, found.spectra, strict=True):
        ends = [_end(extreme) for extreme in spectrum.extreme()]
        rows.append((name, f"{spectrum.dim:,}", *ends, *estimate_words(spectrum.trace())))
    head = ("block", "parameters", "smallest Ritz value", "largest Ritz value", "trace", "how sure")
    yield Section(
        "Spectra of the diagonal blocks",
        [Picture("Spectra of blocks", images["spectra"], SPECTRA_CAPTION), Table(head, rows)],
    )
    yield Section("Distances between spectra", [Picture("Distances", images["distance"], DISTANCE_CAPTION)])


def _end(extreme: Extreme) -> str:
    known = not np.isnan(extreme.residual_bound)
    return f"{extreme.value:.5g} ± {extreme.residual_bound:.1g}" if known else f"{extreme.value:.5g}"


def _fidelity(found: CouplingMap, b: int) -> list[str]:
    pairs = found.fidelity_error[b], found.fidelity_cosine[b]
    return ["–" if np.isnan(x).all() else f"{np.nanmedian(x):.3g} ({_range(x)})" for x in pairs]


def _range(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known.min():.3g} to {known.max():.3g} over probes" if known.size > 1 else "one probe"
