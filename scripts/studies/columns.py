"""Columns of the Hessian and the sizes of their entries, beside HessFormer's tables; which small entries are zeros.

    python -m scripts.studies.columns

Columns are exact: products with unit vectors. Each is made in float32 and in float64, and in float64 at weights that
differ in their last bit, so that every entry is exactly zero, zero within the rounding of float64, below the noise of
float32, or none of these. Parts H[S, S] are ordered by reverse Cuthill-McKee.

A larger model, in float32 alone:

    python -m scripts.studies.columns --model models/smollm2 --reference none --seq-len 16 --sequences 2 \\
        --microbatch 2 --columns 3 --per-kind 0 --sample 0 --sample-kind 0 --subsamples 2 --batch-size 1
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

import jaxhess
from jaxhess.data import TokenBlocks
from jaxhess.errors import InputError
from jaxhess.operators.facts import validate
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from jaxhess.structure.columns import columns, random_entries, submatrix
from jaxhess.vectors import check_seed, norm
from scripts.studies.column_entries.bands import (
    Bandwidths,
    above,
    asymmetry,
    bandwidths,
    largest,
    without_zero_rows,
)
from scripts.studies.column_entries.figure import figure
from scripts.studies.column_entries.measured import (
    CLASSES,
    EPSILON,
    THRESHOLDS,
    ColumnEntries,
    ColumnOperators,
    measured,
    nudged,
)
from scripts.studies.harness import HESSFORMER, ModelOptions, command, make_mesh, picture
from scripts.studies.theory.sampling import Measured, mean

NAME = "columns"
PLACE = "Section 5"
UNKNOWN = Measured(np.nan, 0)
PAPER = {
    "first table, 32.8e9 entries": (0.0343, 0.0823, 0.2880, 0.8751, 0.9978, 0.9999),
    "second table, 11.8e9 entries": (0.0059, 0.0121, 0.0585, 0.3738, 0.9427, 1.0),
    "third table, five seeds": (0.0079, 0.0238, 0.1428, 0.6821, 0.9951, 0.9999),
}
"""Shares of entries below 1e-12 to 1e-7; of all larger thresholds 1.0000. The third is the mean of F1 to F5. The copy
at hand does not say which model each is of; the section is on a DeepSeek model and on Pythia."""
SHOWN = 5
"""Random columns that the table has singly, as the paper's third one."""
KEPT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of the largest entries that parts are ordered with."""
CAPTION = """Above left: sizes of the entries of random columns, in steps of half a factor of ten; dashed, the threshold
1e-7 of the paper's tables. Above right: what the entries of columns are, by the kind of the column's parameter. Below
left: the same entries relative to the norm of their column, and to the root mean square of float32's noise in it. Below
right: half bandwidth of parts H[S, S] after reverse Cuthill-McKee, over the largest possible, if only the largest
entries are kept: of the matrix, and of the same entries at random places (two standard deviations)."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """Which columns, and how large parts of the matrix."""

    sequences: int = 8
    """Sequences taken from the start of the data."""
    microbatch: int = 8
    """Sequences whose activations exist at once."""
    columns: int = 20
    """Random columns, of entries that are drawn alike from all parameters."""
    per_kind: int = 2
    """Further columns for each kind of parameter."""
    reference: Literal["float64", "none"] = "float64"
    """What tells zeros from noise. `none`: columns in float32 at weights that differ in their last bit; zeros of
    float64 are then not known."""
    subsamples: tuple[int, ...] = (2, 4)
    """Factors by which the sequences are reduced, to see columns broaden."""
    sample: int = 120
    """Entries S of a random part H[S, S]; 0 for none."""
    sample_kind: int = 30
    """Entries of a part within each kind; 0 for none."""
    repeats: int = 3
    """Random parts."""
    permutations: int = 20
    """Of the entries of each part."""
    batch_size: int = 8
    """Products at once."""

    def check(self) -> None:
        """Raises InputError where the options make no study."""
        check_seed(self.seed)
        if self.columns < 2 or self.per_kind < 0:
            raise InputError(f"--columns {self.columns} must be at least 2, and --per-kind {self.per_kind} at least 0.")
        if any(0 < k < 3 or k < 0 for k in (self.sample, self.sample_kind)) or self.repeats < 2:
            raise InputError("--sample and --sample-kind must be 0 or at least 3, and --repeats at least 2.")
        if self.permutations < 2 or self.batch_size < 1:
            raise InputError("--permutations must be at least 2, and --batch-size at least 1.")
        if any(not 2 <= factor <= self.sequences for factor in self.subsamples):
            raise InputError(f"--subsamples are factors from 2 to the {self.sequences} sequences.")


SMALL = Options(
    seq_len=16,
    sequences=4,
    microbatch=4,
    mesh="fsdp=1",
    columns=7,
    per_kind=1,
    sample=24,
    sample_kind=0,
    repeats=3,
    permutations=6,
    subsamples=(4,),
)


def study(options: Options) -> Study:
    """All columns, then all parts."""
    options.check()
    data = options.blocks()
    with jax.enable_x64(options.reference == "float64"):
        plain = options.hessian(data, "float32")
        validate(plain)
        wide = options.hessian(data, "float64") if options.reference == "float64" else None
        products = ColumnOperators(plain, wide, nudged(wide or plain, options.seed))
        kinds = jaxhess.Blocks.by(plain, "kinds")
        everything = kinds.merged(lambda name: "all")
        drawn = random_entries(everything, options.columns, options.seed)[0]
        of_kinds = random_entries(kinds, options.per_kind, options.seed + 1).ravel()
        found = list(measured(products, [*drawn, *of_kinds], kinds, options.batch_size))
        chosen, by_kind = found[: options.columns], found[options.columns :]
        broadened = mean_squares(options, data, plain, drawn)
        parts = {"random": [random_entries(everything, options.sample, options.seed + 2 + r)[0]
                            for r in range(options.repeats)] if options.sample else []}  # fmt: skip
        if options.sample_kind:
            drawn_by_kind = random_entries(kinds, options.sample_kind, options.seed)
            parts |= {name: [s] for name, s in zip(kinds.names, drawn_by_kind, strict=True)}
        matrices = {
            name: [submatrix(products.widest, np.unique(s), options.batch_size) for s in several]
            for name, several in parts.items()
        }
    rng = np.random.default_rng(options.seed)
    bands = {
        name: [of_part for matrix in several if (of_part := ordered(matrix, options, rng))]
        for name, several in matrices.items()
    }
    return Study(
        "Columns of the Hessian",
        tuple(claims(options, chosen, broadened, bands["random"], options.described(plain))),
        tuple(tables(chosen, by_kind or chosen, kinds, bands)),
        (picture(NAME, figure(chosen, by_kind or chosen, bands), CAPTION),),
        {
            "parameters": plain.dim,
            "data_fingerprint": data.fingerprint(),
            "entries": len(chosen) * plain.dim,
            "columns": [recorded(column, kinds) for column in found],
            "mean_squares": broadened,
            "bands": bands,
            "pairs_that_differ_by_their_size": {n: [asymmetry(m) for m in several] for n, several in matrices.items()},
        },
    )


def mean_squares(
    options: Options, data: TokenBlocks, operator: jaxhess.Hessian, drawn: Any
) -> dict[int, list[list[float]]]:
    """[parts, columns] mean squares of the entries of the random columns, by the number of parts of the sequences."""
    found: dict[int, list[list[float]]] = {}
    mesh = make_mesh(options.mesh)
    for factor in (1, *options.subsamples):
        kept = data.num_sequences // factor
        found[factor] = []
        for first in range(0, factor * kept, kept):
            part = TokenBlocks(data.tokens[first : first + kept], data.weights[first : first + kept])
            batches = jaxhess.Microbatches(part.microbatches(min(options.microbatch, kept), mesh))
            subsampled = jaxhess.Hessian(operator.loss, operator.params, batches)
            stream = columns(subsampled, drawn, options.batch_size)
            found[factor].append([float(norm(column)) ** 2 / operator.dim for column in stream])
    return found


def growth(parts: Any, whole: Any) -> tuple[Measured, int]:
    """How much larger the mean squares of columns are in parts of the data than in all of it, log10; its error is over
    parts. Also how many columns this is of: those that are zero in no part.

    The mean of the squares themselves, over parts, is never below that of the whole: squares are convex. Their mean
    logarithm may be.
    """
    parts, whole = np.asarray(parts), np.asarray(whole)
    some = (parts > 0).all(axis=0) & (whole > 0)
    if not some.any():
        return UNKNOWN, 0
    return mean(np.log10(parts[:, some] / whole[some]).mean(axis=1)), int(some.sum())


def ordered(matrix: Any, options: Options, rng: np.random.Generator) -> list[Bandwidths]:
    """Bandwidths where entries at or below `EPSILON` count as zeros, and of the largest shares."""
    matrix = without_zero_rows(matrix)
    if len(matrix) < 2:
        return []
    patterns = [above(matrix, EPSILON), *largest(matrix, KEPT)]
    return [bandwidths(pattern, options.permutations, rng) for pattern in patterns]


def claims(
    options: Options,
    chosen: list[ColumnEntries],
    broadened: dict[int, list[list[float]]],
    bands: list[list[Bandwidths]],
    model: str,
) -> Iterator[Claim]:
    """What the paper says of columns."""
    reference = options.reference == "float64"
    none = "" if reference else "--reference none: zeros of float64 are not known"
    totals = [int(column.classes.sum()) for column in chosen]

    def share(count: Any) -> Measured:
        return mean([count(column) / total for column, total in zip(chosen, totals, strict=True)])

    at = int(np.argmin(abs(THRESHOLDS - EPSILON)))
    small = [int(column.small.sum()) for column in chosen]
    zeros = mean([column.small[:2].sum() / max(n, 1) for column, n in zip(chosen, small, strict=True)])
    sparse, tables_of = (
        "the Hessian is sparse to within machine precision",
        f"{PLACE}, tables of entries below thresholds",
    )
    many: Range = (0.9, None)
    # fmt: off
    rows: list[tuple[str, str, str, str, Range, Measured, str]] = [
        (tables_of, "Nearly all entries of a column are smaller than machine epsilon.", "0.9998 to 1.0000 below 1e-7",
         "share of the entries of random columns at or below 1e-7, float32", (0.999, None),
         share(lambda c: c.below["float32"][at]), ""),
        (tables_of, "They are that small also beside the column's largest entry.", "not said",
         "share of the entries of random columns at or below 1.2e-7 of the column's largest", (0.999, None),
         share(lambda c: c.negligible), ""),
        (PLACE, "The Hessian is sparse to within the machine precision of float32.", sparse,
         "share of the entries of random columns that are zero within the noise of float32", many,
         share(lambda c: c.classes[:, :3].sum()), ""),
        (PLACE, "The Hessian is sparse to within the machine precision of float64.", sparse,
         "share of the entries of random columns that are zero within the rounding of float64", many,
         share(lambda c: c.classes[:, :2].sum()) if reference else UNKNOWN, none),
        (PLACE, "Entries smaller than machine epsilon are zeros.", sparse,
         "of the entries at or below 1e-7 the share that is zero within the rounding of float64", many,
         zeros if reference else UNKNOWN,
         none or ("" if min(small) else "a column has no entry at or below 1e-7")),
        (f"{PLACE}, Figure 8", "Histograms of the entries' magnitudes have a large peak at zero.", "a large peak",
         "share of the entries of random columns at or below 1% of the column's largest", many,
         share(lambda c: c.near_zero), ""),
    ]
    # fmt: on
    if options.subsamples:
        factor = max(options.subsamples)
        grown, of = growth(broadened[factor], broadened[1][0])
        quantity = (
            f"log10 of the mean square of a column's entries in each of {factor} parts of the sequences, over that in "
            f"all of them: mean over the {of} random columns that are zero in no part"
        )
        paper, obstacle = "mean square value increases", "" if of else "every random column is zero in a part"
        rows.append((PLACE, "Entries broaden if the data is subsampled.", paper, quantity, (0, None), grown, obstacle))
    rows += [(PLACE, *row) for row in banded(options, bands)]
    for place, statement, paper, quantity, holds, ours, obstacle in rows:
        finite = bool(np.isfinite([ours.value, ours.error]).all())
        value, error = (ours.value, ours.error) if finite else (None, 0.0)
        yield Claim(HESSFORMER, place, statement, paper, quantity, holds, value, error, model, obstacle)


def banded(options: Options, bands: list[list[Bandwidths]]) -> Iterator[tuple[str, str, str, Range, Measured, str]]:
    """Whether random parts fit into a band; it cannot be told where parts of a band would not.

    That is where few entries are left. Where more than half are, the matrix is no band narrower than 0.29 of its size.
    """
    quantity = "half bandwidth of H[S, S] after reverse Cuthill-McKee, over that of its entries permuted"
    holds: Range = (None, 0.5)
    two = int(np.argmin(np.abs(np.array(KEPT) - 0.02))) + 1
    for number, which in ((0, "entries at or below 1e-7 are taken for zero"), (two, "the largest 2% are kept")):
        statement = f"The Hessian is banded where {which}, as far as sampled parts tell."
        ratio, obstacle = UNKNOWN, ""
        if not options.sample:
            obstacle = "--sample 0: there are no random parts"
        elif len(bands) < 2:
            obstacle = f"{len(bands)} of {options.repeats} random parts have entries that are not zero"
        else:
            ratio = mean([of_part[number].ratio for of_part in bands])
            planted = mean([of_part[number].planted_ratio for of_part in bands])
            kept = np.mean([of_part[number].kept for of_part in bands])
            if kept < 0.5 < planted.value + planted.error:
                obstacle = f"parts of a band with as many entries have {planted.value:.2f} ± {planted.error:.1g}"
        yield statement, "could be banded", quantity, holds, ratio, obstacle


def tables(
    chosen: list[ColumnEntries],
    by_kind: list[ColumnEntries],
    kinds: jaxhess.Blocks,
    bands: dict[str, list[list[Bandwidths]]],
) -> Iterator[Table]:
    """As the paper has them, with its own beside ours; what small entries are; parts."""
    total = int(chosen[0].classes.sum())
    for dtype in chosen[0].below:
        shares = np.array([column.below[dtype] for column in chosen]) / total
        of_thresholds: list[tuple[str, ...]] = []
        for i, threshold in enumerate(THRESHOLDS):
            ours = [shares[:, i].mean(), *shares[:SHOWN, i]]
            theirs = [table[i] if i < len(table) else 1.0 for table in PAPER.values()]
            of_thresholds.append((f"{threshold:.0e}", *(f"{x:.4f}" for x in (*ours, *theirs))))
        names = (*(f"F{k + 1}" for k in range(min(SHOWN, len(chosen)))), *PAPER)
        title = f"Fraction of entries at or below, {dtype}: all random columns, the first ones, the paper's tables"
        yield Table(("threshold", "all", *names), of_thresholds, title)
    head: tuple[str, ...] = ("", "columns", *CLASSES, "norm", "float32's noise, root mean square")
    rows: list[tuple[str, ...]] = []
    for name in kinds.names:
        of_kind = [column for column in by_kind if column.kind == name]
        if of_kind:
            rows.append(_row(name, len(of_kind), np.sum([c.classes for c in of_kind], axis=(0, 1)), of_kind))
    rows.append(_row("random columns", len(chosen), np.sum([c.classes for c in chosen], axis=(0, 1)), chosen))
    yield Table(head, rows, "What entries are, by the kind of the column's parameter")
    known = "float64" in chosen[0].below
    by_row = np.sum([column.classes for column in chosen], axis=0)
    yield Table(
        ("", "rows", *CLASSES),
        [(name, f"{size:,}", *_shares(counts, known))
         for name, size, counts in zip(kinds.names, kinds.sizes, by_row, strict=True)],
        "What entries of the random columns are, by the kind of the row's parameter",
    )  # fmt: skip
    head = ("part", "kept", "half bandwidth", "of its entries permuted, ± 2 standard deviations", "ratio", "of a band")
    rows = []
    for name, several in bands.items():
        for found in itertools.chain.from_iterable(several):
            spread = f"{np.mean(found.permuted):.3f} ± {2 * np.std(found.permuted, ddof=1):.3f}"
            ratios = (f"{ratio:.3f}" for ratio in (found.ratio, found.planted_ratio))
            rows.append((name, f"{found.kept:.4f}", f"{found.own:.3f}", spread, *ratios))
    if rows:
        yield Table(head, rows, "Parts after reverse Cuthill-McKee: entries above 1e-7, then the largest shares")


def _row(name: str, count: int, classes: Any, of: list[ColumnEntries]) -> tuple[str, ...]:
    scales = (f"{np.mean([getattr(c, scale) for c in of]):.2g}" for scale in ("length", "floor"))
    return name, str(count), *_shares(classes, "float64" in of[0].below), *scales


def _shares(classes: Any, known: bool) -> list[str]:
    """Of each class; what is zero within the rounding of float64 is known only with a reference in it."""
    found = [f"{x:.4f}" for x in classes / classes.sum()]
    return found if known else [found[0], "not known", *found[2:]]


def recorded(column: ColumnEntries, kinds: jaxhess.Blocks) -> dict[str, Any]:
    """For JSON."""
    return {
        **column._asdict(),
        "below": {dtype: counts.tolist() for dtype, counts in column.below.items()},
        "histogram": {dtype: counts.tolist() for dtype, counts in column.histogram.items()},
        **{name: getattr(column, name).tolist() for name in ("relative", "to_floor", "small")},
        "classes": dict(zip(kinds.names, column.classes.tolist(), strict=True)),
    }


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
