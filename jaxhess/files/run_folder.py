"""The folder of a finished run: an array file and a JSON record, each whole or absent."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxhess.errors import InputError

FORMAT = "jaxhess-spectrum-1"
ARRAYS, RECORD = "spectrum.npz", "spectrum.json"
REPORT_FILES = ("density.png", "distribution.png", "stem.png", "report.html")
RUN_FILES = (ARRAYS, RECORD, *REPORT_FILES)
LARGEST = 2**30
"""Bytes of arrays that are read from one file: a small file can unpack to more than the memory."""

EIGENVECTORS = "eigenvectors"
EXPORTED_VECTORS = "eigenvectors.safetensors"
EXPORTS = ("spectrum.csv", "quadrature.json", EXPORTED_VECTORS)
"""What a run folder can hold: of the run, its figures and page, a folder of vectors, and files for other tools."""


def run_files(arrays: dict[str, Any], record: dict[str, Any]) -> dict[str, bytes]:
    """The contents of the two files of a run; `record` is JSON-ready."""
    text = json.dumps({"format": FORMAT, **record}, indent=2, allow_nan=False) + "\n"
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return {ARRAYS: buffer.getvalue(), RECORD: text.encode()}


def read_run(folder: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the record of a run; the record has the types that the library reads from it.

    Raises:
        FileNotFoundError: The folder or one of its two files is missing.
        ValueError: A file is corrupt or of another format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: a finished run folder holds {RECORD} and {ARRAYS}")
    for path in (folder / RECORD, folder / ARRAYS):
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {what}: a finished run folder holds {RECORD} and {ARRAYS}")
    try:
        record = read_json(folder / RECORD)
        found = record.get("format") if isinstance(record, dict) else None
        if found != FORMAT:
            raise InputError(f"its format is {found!r}, not {FORMAT!r}")
        check_info(record.get("info", {}))
    except ValueError as error:
        raise InputError(f"{folder / RECORD} is not a spectrum record: {error}") from None
    try:
        return read_arrays(folder / ARRAYS), record
    except ValueError as error:
        raise InputError(f"{folder / ARRAYS} is corrupt or not a spectrum: {error}") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: It is no JSON, no text, or nested without end.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError("it is nested too deeply") from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The numeric arrays of an `.npz`; nothing in it is unpickled.

    Raises:
        ValueError: It is damaged, no `.npz`, or holds objects.
    """
    try:
        content = io.BytesIO(path.read_bytes())  # numpy leaves a corrupt file open
        with zipfile.ZipFile(content) as members:
            if sum(member.file_size for member in members.infolist()) > LARGEST:
                raise MemoryError
        with np.load(content, allow_pickle=False) as arrays:
            found = dict(arrays)
    except MemoryError:
        raise InputError(f"its arrays are larger than {LARGEST / 1e9:.1f} GB, which no spectrum is") from None
    except Exception as error:  # zipfile, zlib, struct, tokenize and numpy each have errors of their own
        raise InputError(" ".join(str(error).split())[:200] or type(error).__name__) from None
    for name, array in found.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise InputError(f"{name} is no array of real numbers")
    return found


NUMBER = (int, float)
PAIRS = ("values", "residuals")
NOISE = ("asymmetry", "nonlinearity", "relative_error", "floor")
TYPES: dict[str, type | tuple[type, ...]] = {
    "operator": dict,
    "operator.kind": str,
    "operator.restriction": (dict, str),
    "operator.restriction.patterns": list,
    "operator.restriction.layers": list,
    "noise": dict,
    "model": dict,
    "model.config": dict,
    "loss": NUMBER,
    "eigenpairs": dict,
    "eigenpairs.values": list,
    "eigenpairs.residuals": list,
    "eigenpairs.converged": list,
    "eigenpairs.vectors": str,
}
"""Of what the library itself reads from `info`."""


def check_info(info: Any) -> None:
    """Raises ValueError where an `info` that was read is no dictionary, or what the library reads from it of no use."""
    if not isinstance(info, dict):
        raise InputError(f"its info is {_quoted(info)}; it is an object")
    for name, kind in TYPES.items():
        value: Any = info
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and (not isinstance(value, kind) or (kind is NUMBER and isinstance(value, bool))):
            raise InputError(f"its info has {_quoted(value)} as {name}")
    pairs, noise = (info.get(name) or {} for name in ("eigenpairs", "noise"))
    numbers = {f"eigenpairs.{name}": [x for x in pairs.get(name) or [] if x is not None] for name in PAIRS}
    numbers["loss"] = [] if info.get("loss") is None else [info["loss"]]
    for name in NOISE:
        value = noise.get(name)
        numbers[f"noise.{name}"] = list(value.values()) if isinstance(value, dict) else [0 if value is None else value]
    for name, values in numbers.items():
        if not all(type(x) in NUMBER and abs(x) < 1e300 for x in values):
            raise InputError(f"its info has no numbers as {name}")


def _quoted(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def json_ready(value: Any) -> Any:
    """The value as JSON has it: arrays as lists, numbers it has no name for as None, anything unknown as text."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return json_ready(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [json_ready(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
