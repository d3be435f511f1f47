"""What a run folder holds, by name, and how its JSON and arrays are read."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxhess.errors import InputError

FORMATS = OLD_FORMAT, FORMAT = "jaxhess-spectrum-1", "jaxhess-spectrum-2"
ARRAYS, RECORD = "spectrum.npz", "spectrum.json"
REPORT_FILES = ("density.png", "distribution.png", "stem.png", "report.html")
RUN_FILES = (ARRAYS, RECORD, *REPORT_FILES)
BLOCK_ARRAYS, BLOCK_RECORD, BLOCK_FORMAT = "blocks.npz", "blocks.json", "jaxhess-blocks-1"
BLOCK_PICTURES = ("coupling.png", "relative.png", "fidelity.png", "spectra.png", "distance.png")
BLOCK_FILES = (BLOCK_ARRAYS, BLOCK_RECORD, *BLOCK_PICTURES, "report.html")
"""What a folder of `scripts/blocks.py` can hold."""

LARGEST = 2**30
"""Bytes of arrays that are read from one file: a small file can unpack to more than the memory."""

EIGENVECTORS = "eigenvectors"
EXPORTED_VECTORS = "eigenvectors.safetensors"
EXPORTS = ("spectrum.csv", "quadrature.json", EXPORTED_VECTORS)
"""What a run folder can hold: of the run, its figures and page, a folder of vectors, and files for other tools."""


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: It cannot be read, is not JSON, not UTF-8 text, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError("it is nested too deeply") from None
    except OSError as error:
        raise InputError(f"it cannot be read ({error.strerror})") from error


def read_arrays(path: Path, kinds: str = "biuf") -> dict[str, np.ndarray]:
    """The arrays of an `.npz`, all of these kinds (by default numeric; U is text); nothing in it is unpickled.

    Raises:
        InputError: It is damaged, no `.npz`, or holds objects.
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
        raise InputError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    for name, array in found.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds:
            raise InputError(f"{name} is no array of real numbers{' or text' * ('U' in kinds)}")
    return found


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested dictionaries, with names joined by dots.

    Examples:
        >>> list(dotted({"a": 1, "b": {"c": [2], "d": {}}}))
        [('a', 1), ('b.c', [2])]
    """
    for key, value in values.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
