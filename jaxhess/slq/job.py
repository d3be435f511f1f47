"""What the command that made a run was asked to do, with which model and data, and where."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field, JsonValue

from jaxhess.files.run_folder import json_ready

Count = Annotated[int, Field(ge=0, le=2**63)]


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model: where it came from, its number of parameters, and the fields of its `DecoderConfig`."""

    source: str
    parameters: Count
    config: dict[str, JsonValue]

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", json_ready(self.config))


@dataclasses.dataclass(frozen=True)
class Data:
    """Sequences of tokens: where they came from, how they were cut, and a fingerprint of the tokens themselves."""

    source: str
    sequences: Count
    seq_len: Count
    microbatches: Count
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Devices:
    """The device mesh: the size of each axis, how many devices of which kind, in how many processes."""

    axes: dict[str, Count]
    devices: Count
    kind: str
    processes: Count


@dataclasses.dataclass(frozen=True)
class CommandRecord:
    """What was asked for and where it ran.

    Attributes:
        options: Of the command, JSON-ready; nothing is read back from these.
        versions: Of Python and the packages.
        timings: Seconds of each stage before the spectrum.
    """

    options: dict[str, JsonValue] = dataclasses.field(default_factory=dict)
    model: Model | None = None
    data: Data | None = None
    mesh: Devices | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    timings: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", json_ready(self.options))
