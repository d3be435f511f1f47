"""The part of a report that says how sure its numbers are about more than the sequences at hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jaxhess.krylov.errors import Estimate
from jaxhess.results.page import Section, Table
from jaxhess.results.words import estimate_words, number
from jaxhess.slq.spectrum import Spectrum

NO_DATA_ERROR = (
    "No error over the data is known: it takes exact products over two microbatches or more, which a smaller "
    "--microbatch gives, and the same ones throughout a run that is resumed."
)
HEAD = ("quantity", "of all the data", "95%", "error over probes", "error over data", "bias removed", "halved by")
NOTE = """Two errors, each a standard error: the random probes scatter, and so would other sequences, as single
microbatches ({microbatches}) do. The spectrum above is that of the sequences at hand; the second column is about
{whole}. A norm of few sequences is too large on average, because their own scatter adds to it, and so is a largest
eigenvalue: that bias is removed from the second column. That of an eigenvalue comes from one split into halves, and is
taken to be as uncertain as it is large. The last column is for the larger of the two errors."""


def data_section(spectrum: Spectrum) -> Section:
    """A table of both errors of trace, norm and eigenvalues; or why there is no error over data."""
    title = "Beyond these sequences"
    if spectrum.trace().data is None:
        return Section(title, [NO_DATA_ERROR])
    return Section(title, [Table(HEAD, list(_rows(spectrum))), NOTE.format(**_words(spectrum))])


def _words(spectrum: Spectrum) -> dict[str, str]:
    sampling = spectrum.run.sampling
    whole = "any text like theirs, as if microbatches were independent of each other"
    if sampling is not None and sampling.clusters is not None:
        whole = "any text like theirs; microbatches of one document count as one"
    if sampling is not None and sampling.population is not None:
        whole = f"all {sampling.population:,} sequences that they were drawn from"
    return {"microbatches": f"{spectrum.microbatch_forms.shape[2]} of them", "whole": whole}


def _rows(spectrum: Spectrum) -> Iterator[tuple[str, ...]]:
    yield "trace", *_cells(spectrum, spectrum.trace())
    yield "Frobenius norm", *_cells(spectrum, spectrum.frobenius_norm())
    pairs = spectrum.run.eigenpairs
    if pairs is not None:
        for k, (value, data) in enumerate(zip(pairs.values, pairs.data, strict=False), 1):
            if value is not None and data is not None:
                yield f"eigenvalue {k}", *_cells(spectrum, data.of(value))


def _cells(spectrum: Spectrum, estimate: Estimate) -> tuple[str, ...]:
    data = estimate.data
    assert data is not None
    whole = estimate.for_population()
    if math.isnan(data.error):
        why = "all is one document" if math.isnan(data.freedom) else "the scatter of these sequences is all there is"
    else:
        why = "bias not known"
    words = estimate_words(whole) if math.isfinite(whole.value) else (number(math.nan, 4), why)
    own = "within that over probes" if data.error == 0 < estimate.standard_error else number(data.error, 2)
    return *words, number(estimate.standard_error, 2), own, number(data.bias, 2), halved_by(spectrum, estimate)


def halved_by(spectrum: Spectrum, estimate: Estimate) -> str:
    """How many more probes, or sequences, halve the larger of an estimate's two errors."""
    data, sampling = estimate.data, spectrum.run.sampling
    if data is None or math.isnan(data.error):
        return "–"
    if not data.error > estimate.standard_error:
        return f"{3 * spectrum.num_probes} more probes" if estimate.standard_error > 0 else "–"
    more = None if sampling is None else sampling.more_to_halve()
    return "four times as many sequences" if more is None else f"{more:,} more sequences"
