"""Run folders and files that earlier versions wrote, whose record was spread over an untyped `info`."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxhess.errors import InputError
from jaxhess.files.typed import read_as
from jaxhess.krylov.ghosts import FLOAT32_ROUNDING
from jaxhess.operators.audit import Noise
from jaxhess.slq.job import CommandRecord, Data, Devices, Model
from jaxhess.slq.record import (
    CompiledRecord,
    EigenpairRecord,
    Inputs,
    Lanczos,
    Probes,
    RunRecord,
    Selection,
    inputs_record,
    operator_record,
)

S = TypeVar("S")
T = TypeVar("T")
INPUTS = ("loss", "count", "shift_of_a_random_vector")


def record_of_old_run(run: Any, info: Mapping[str, Any]) -> tuple[RunRecord, dict[str, Any]]:
    """The record of a run of format 1, and what is left of its `info`.

    What statistics depend on (`run`, or before there was one `info`) must be right. All else is taken from `info` where
    it reads, and stays there as a note where it does not.

    Raises:
        InputError: `run` has another type or value.
    """
    left = dict(info)
    notes = {name: dict(info[name]) for name in ("probes", "lanczos") if isinstance(info.get(name), dict)}
    names = {"distribution": "probes", "reorthogonalize": "lanczos", "orthogonality": "lanczos"}
    if run is None:
        run = {name: notes.get(place, {}).get(name) for name, place in names.items()}
    if not isinstance(run, dict) or not set(run) <= set(names):
        raise InputError(f"the record of the run must hold {', '.join(names)}, got {run!r:.200}")
    kept = run.get("reorthogonalize")
    storage = None if kept in (None, "selective") else {"reorthogonalize": kept}
    distribution = {} if run.get("distribution") is None else {"distribution": run["distribution"]}
    measured = {"orthogonality": run.get("orthogonality")}
    probes, lanczos = read_as(Probes, distribution), read_as(Lanczos, {**measured, "storage": storage})

    def part(kind: type[S]) -> Callable[[Any], S]:
        return functools.partial(read_as, kind)

    def moved(name: str, read: Callable[[Any], T]) -> T | None:
        """The entry of this name as a part of the record, taken out of `info`; None: it stays there."""
        with contextlib.suppress(InputError):
            found = read(notes.get(name, info.get(name)))
            left.pop(name, None)
            return found
        return None

    if "probes" in notes:
        notes["probes"] |= distribution
        probes = moved("probes", part(Probes)) or probes
    if "lanczos" in notes:
        whole = {name: value for name, value in notes["lanczos"].items() if name in ("steps", "batch_size")}
        storage = storage and storage | _storage(notes["lanczos"])
        notes["lanczos"] = {**whole, **measured, "storage": storage}
        lanczos = moved("lanczos", part(Lanczos)) or lanczos
    inputs = Inputs()
    with contextlib.suppress(InputError):
        inputs = inputs_record({name: info[name] for name in INPUTS if name in info})
        left = {name: value for name, value in left.items() if name not in INPUTS}
    job = CommandRecord(
        options=moved("options", part(dict[str, Any])) or {},
        model=moved("model", part(Model)),
        data=moved("data", part(Data)),
        mesh=moved("mesh", part(Devices)),
        versions=moved("versions", part(dict[str, str])) or {},
        timings=moved("timings", part(dict[str, float])) or {},
    )
    return RunRecord(
        probes=probes,
        lanczos=lanczos,
        operator=moved("operator", operator_record),
        inputs=inputs,
        noise=moved("noise", part(Noise)),
        eigenpairs=moved("eigenpairs", part(EigenpairRecord)),
        program=moved("program", part(CompiledRecord)),
        seconds=moved("seconds", part(float)),
        job=None if job == CommandRecord() else job,
    ), left


def rounding_of_old_run(arrays: Mapping[str, np.ndarray]) -> float:
    """That of a format 1: among the arrays; before it was kept, that of float32."""
    return float(arrays.get("rounding", FLOAT32_ROUNDING))


def warn_of_narrow_vectors(folder: Path, info: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Warns where a run of format 1 kept vectors of 16 bits, and did not measure how they were rounded."""
    notes = info["lanczos"] if isinstance(info.get("lanczos"), dict) else {}
    narrow = any("16" in str(notes.get(name)) for name in ("vector_dtype", "basis_dtype"))
    if narrow and not arrays.get("step_errors", np.zeros(0)).size:
        warnings.warn(
            f"{folder} is of an earlier version, which did not measure the rounding of 16-bit vectors: its residual "
            "bounds may be too small. Run it again for bounds that hold.",
            stacklevel=4,
        )


def block_of_old_text(text: str) -> Selection:
    """The restriction that a run of an earlier version has in words: its patterns, `in layers`, its layers.

    Examples:
        >>> from jaxhess.results.old_runs import block_of_old_text
        >>> block_of_old_text("attention norm in layers 0,3")
        Selection(patterns=('attention', 'norm'), layers=(0, 3))

    Raises:
        InputError: The text is none of these.
    """
    patterns, _, layers = text.partition(" in layers ")
    try:
        numbers = tuple(int(number) for number in layers.split(",")) if layers else None
    except ValueError:
        raise InputError(f"The restriction {text!r:.100} names no layers.") from None
    return Selection(tuple(patterns.split()), numbers)


def _storage(notes: dict[str, Any]) -> dict[str, Any]:
    """The dtypes and place of the basis, of a `Storage`; the dtype of vectors is None where leaves had several."""
    dtypes = {
        name: None if "," in str(notes.get(name)) else notes.get(name) for name in ("vector_dtype", "basis_dtype")
    }
    place, scalars = notes.get("basis_memory") or "device", notes.get("accumulation_dtype") or "float32"
    return {**dtypes, "basis_memory": place, "scalar_dtype": scalars}
