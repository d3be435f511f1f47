"""What the statistics of a spectrum rest on about the run that made it: typed, apart from what a caller notes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

from jaxhess.errors import InputError
from jaxhess.vectors import Distribution


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """How the probes were drawn and Lanczos was run, as far as statistics depend on it.

    The defaults are for a spectrum from elsewhere: normal probes, and Lanczos vectors that may be dependent.

    Attributes:
        distribution: Of the probes' entries: "normal" or "rademacher".
        reorthogonalize: As in `jaxhess.spectrum`; None: not known.
        orthogonality: The largest entry of |Q'Q - I| of every probe's kept vectors, None for a probe where it was not
            measured. None: measured for no probe.

    Raises:
        ValueError: A field has another type or value (says which).
    """

    distribution: Distribution = "normal"
    reorthogonalize: str | int | None = None
    orthogonality: tuple[float | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.distribution not in get_args(Distribution):
            raise InputError(f"distribution of the probes is 'normal' or 'rademacher', got {self.distribution!r}")
        if isinstance(self.reorthogonalize, bool) or not isinstance(self.reorthogonalize, str | int | None):
            raise InputError(f"reorthogonalize must be a word or a number of vectors, got {self.reorthogonalize!r}")
        if self.orthogonality is None:
            return
        if not isinstance(self.orthogonality, list | tuple) or not all(map(_measured, self.orthogonality)):
            raise InputError(f"orthogonality must be a number >= 0 or None for every probe, got {self.orthogonality!r}")
        values = tuple(None if x is None or math.isnan(x) else float(x) for x in self.orthogonality)
        object.__setattr__(self, "orthogonality", None if set(values) == {None} else values)

    @classmethod
    def read(cls, data: Any) -> RunRecord:
        """From the JSON of `dataclasses.asdict`.

        Raises:
            ValueError: It is none, or has a field that is not known.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or not set(data) <= names:
            raise InputError(f"the record of the run must hold {', '.join(sorted(names))}, got {data!r:.200}")
        return cls(**data)

    @classmethod
    def of_old_info(cls, info: Any) -> RunRecord:
        """From the `info` of a folder that was written before the record had a place of its own."""
        places = {"distribution": "probes", "reorthogonalize": "lanczos", "orthogonality": "lanczos"}
        found = {}
        for name, place in places.items():
            notes = info.get(place) if isinstance(info, dict) else None
            if isinstance(notes, dict) and notes.get(name) is not None:
                found[name] = notes[name]
        return cls(**found)


def _measured(x: Any) -> bool:
    return x is None or (isinstance(x, int | float) and not isinstance(x, bool) and not x < 0)
