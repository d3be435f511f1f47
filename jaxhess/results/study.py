"""A study: what a paper claims beside what was measured, as data, and as a page."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxhess.errors import InputError
from jaxhess.files.run_folder import dotted, json_ready
from jaxhess.results.page import Link, Picture, Section, Table, facts, page

RECORD, PAGE = "study.json", "study.html"
Verdict = Literal["holds", "does not hold", "cannot tell"]
Range = tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of a paper, and the measurement that tests it. The verdict is computed, never given.

    Attributes:
        source: The paper.
        place: Table, figure or section; where the copy at hand is a summary, its heading.
        statement: What is claimed.
        paper: The paper's figure, as it is given there.
        quantity: What was measured here.
        holds: The least and the largest value of the quantity with which the statement holds; None: no limit.
        ours: The measured value; None: it was not measured.
        error: Of `ours`, in both directions: 95%, or a bound.
        model: What it was measured on.
        obstacle: Why this measurement cannot decide, whatever its value.

    Raises:
        InputError: The range is empty, or the error negative or not finite.

    >>> paper = ("a paper", "Table 6", "Blocks are far from the whole.", "0.94 ± 0.06")
    >>> claim = Claim(*paper, "relative error", holds=(0.88, 1), ours=0.9, error=0.01)
    >>> claim.verdict
    'holds'
    >>> dataclasses.replace(claim, error=0.1).verdict
    'cannot tell'
    """

    source: str
    place: str
    statement: str
    paper: str
    quantity: str
    holds: Range
    ours: float | None
    error: float = 0.0
    model: str = ""
    obstacle: str = ""

    def __post_init__(self) -> None:
        low, high = self._range
        if not low <= high:
            raise InputError(f"No value lies in the range {self.holds} of the claim: {self.statement}")
        if not 0 <= self.error < math.inf:
            raise InputError(f"The error {self.error} of the claim is not a finite number: {self.statement}")
        object.__setattr__(self, "holds", tuple(self.holds))
        if self.ours is not None and not math.isfinite(self.ours):
            object.__setattr__(self, "ours", None)

    @property
    def _range(self) -> tuple[float, float]:
        low, high = self.holds
        return (-math.inf if low is None else low), (math.inf if high is None else high)

    @property
    def verdict(self) -> Verdict:
        """Whether all values within the error of ours lie in the range, none do, or only some."""
        if self.obstacle or self.ours is None:
            return "cannot tell"
        low, high = self._range
        if low <= self.ours - self.error and self.ours + self.error <= high:
            return "holds"
        if self.ours + self.error < low or high < self.ours - self.error:
            return "does not hold"
        return "cannot tell"

    @property
    def reason(self) -> str:
        """Why the verdict is what it is."""
        if self.obstacle:
            return self.obstacle
        if self.ours is None:
            return "not measured"
        where = {"holds": "within", "does not hold": "outside", "cannot tell": "too uncertain for"}
        return f"{where[self.verdict]} {self.range_text}"

    @property
    def range_text(self) -> str:
        """The range in words."""
        low, high = self.holds
        if low is None or high is None:
            return "any value" if low == high else f"at most {high:.3g}" if low is None else f"at least {low:.3g}"
        return f"{low:.3g} to {high:.3g}"

    @property
    def value_text(self) -> str:
        """Ours with its error."""
        if self.ours is None:
            return "not measured"
        return f"{self.ours:.3g}" + (f" ± {self.error:.1g}" if self.error else "")


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        title: In a few words.
        claims: What was tested.
        tables: For the page.
        figures: For the page, and as PNG files by their names.
        record: Options and everything measured; goes to JSON, and its single numbers to the page.
    """

    title: str
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...] = ()
    figures: tuple[Picture, ...] = ()
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Study:
        """Reads back a folder that `study_files` were written into.

        Raises:
            InputError: It holds none.
        """
        path = Path(folder) / RECORD
        fields = [field.name for field in dataclasses.fields(Claim)]
        try:
            data = json.loads(path.read_text())
            return cls(
                data["title"],
                tuple(Claim(**{name: claim[name] for name in fields}) for claim in data["claims"]),
                tuple(Table(tuple(t["head"]), tuple(map(tuple, t["rows"])), t["title"]) for t in data["tables"]),
                tuple(
                    Picture(name, (path.parent / f"{name}.png").read_bytes(), caption)
                    for name, caption in data["figures"].items()
                ),
                data["record"],
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not the record of a study, or a figure of it is missing ({error}).") from None


def study_files(study: Study) -> dict[str, bytes]:
    """The contents of the files of a study: its record, its page and its figures."""
    data = {
        "title": study.title,
        "claims": [
            dataclasses.asdict(claim) | {"verdict": claim.verdict, "reason": claim.reason} for claim in study.claims
        ],
        "tables": [dataclasses.asdict(table) for table in study.tables],
        "figures": {figure.name: figure.caption for figure in study.figures},
        "record": study.record,
    }
    text = json.dumps(json_ready(data), indent=1, allow_nan=False) + "\n"
    pictures = {f"{figure.name}.png": figure.png for figure in study.figures}
    return {**pictures, PAGE: _page(study).encode(), RECORD: text.encode()}


def index_page(studies: Mapping[str, Study]) -> str:
    """The page of all claims, by paper; studies by the address of the folder that each is in."""
    by_source: dict[str, list[tuple[Claim, str]]] = {}
    for folder, study in studies.items():
        for claim in study.claims:
            by_source.setdefault(claim.source, []).append((claim, folder))
    sections = [
        Section(source, [Table((*CLAIM_HEAD, "study"), [(*claim_cells(c), Link(f, f"{f}/{PAGE}")) for c, f in found])])
        for source, found in by_source.items()
    ]
    claims = [claim for study in studies.values() for claim in study.claims]
    return page("What the papers claim, and what was measured", sections, [verdict_count(claims), HOW_TO_READ])


CLAIM_HEAD = ("claim", "where", "paper", "measured here", "ours", "verdict", "on")
HOW_TO_READ = """A statement holds if every value within the error of ours lies in the range that the statement allows,
and does not hold if none does. Otherwise this measurement cannot tell."""


def claim_cells(claim: Claim) -> tuple[str, ...]:
    """The row of a claim under `CLAIM_HEAD`."""
    verdict = f"{claim.verdict}: {claim.reason}"
    return claim.statement, claim.place, claim.paper, claim.quantity, claim.value_text, verdict, claim.model


def verdict_count(claims: Sequence[Claim]) -> str:
    """How many claims have which verdict, as a sentence."""
    count = collections.Counter(claim.verdict for claim in claims)
    return (
        f"Of {len(claims)} claims {count['holds']} hold, {count['does not hold']} do not hold, and "
        f"{count['cannot tell']} cannot be decided by these measurements."
    )


def _page(study: Study) -> str:
    sections: list[Section] = []
    for source in dict.fromkeys(claim.source for claim in study.claims):
        rows = [claim_cells(claim) for claim in study.claims if claim.source == source]
        sections.append(Section(f"Claims of {source}", [Table(CLAIM_HEAD, rows)]))
    if study.figures:
        sections.append(Section("Figures", study.figures))
    if study.tables:
        sections.append(Section("Tables", study.tables))
    sections.append(Section("How it was made", [facts(_short(study.record))]))
    return page(study.title, sections, [verdict_count(study.claims), HOW_TO_READ])


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record fits on a page: single values, and short lists of them."""

    def fits(value: Any) -> bool:
        return not isinstance(value, list) or (len(value) <= 10 and not any(isinstance(x, dict | list) for x in value))

    return {name: value for name, value in dotted(json_ready(dict(record))) if fits(value)}
