"""The folder of a finished run: an array file and a JSON record, each whole or absent."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "jaxhess-spectrum-1"
ARRAYS, RECORD = "spectrum.npz", "spectrum.json"


def refuse_unusable(folder: str | os.PathLike[str], overwrite: bool = False, marker: str = RECORD) -> None:
    """Raises when a run could not be saved in this folder; to be called before the long work. Leaves no trace.

    `marker` is the file whose presence says that there is a finished run.

    Raises:
        FileExistsError: It holds a finished run and `overwrite` is False.
        NotADirectoryError: It, or what should contain it, is a file.
        PermissionError: Nothing can be written there.
    """
    folder = Path(folder)
    if not overwrite and (folder / marker).exists():
        raise FileExistsError(
            f"{folder} already holds a finished run ({marker}); choose another folder, or pass "
            "--overwrite (overwrite=True) to replace it"
        )
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"The run folder {folder} cannot be made: {existing} is a file.")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise PermissionError(f"The run folder {folder} cannot be written ({error.strerror}).") from None


def write_run(folder: str | os.PathLike[str], arrays: dict[str, Any], record: dict[str, Any]) -> None:
    """Writes both files into the folder, created if missing; the JSON last. `record` is JSON-ready.

    Each file appears whole or not at all, and a folder with `spectrum.json` is a finished run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **record}, indent=2, allow_nan=False) + "\n"
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    _publish(folder, {ARRAYS: buffer.getvalue(), RECORD: text.encode()})


def read_run(folder: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the record that `write_run` wrote.

    Raises:
        FileNotFoundError: The folder or one of its two files is missing.
        ValueError: A file is corrupt or of another format.
    """
    folder = Path(folder)
    for path in (folder, folder / RECORD, folder / ARRAYS):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: a finished run folder holds {RECORD} and {ARRAYS}")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found = record.get("format") if isinstance(record, dict) else None
        if found != FORMAT:
            raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is not a spectrum record: {error}") from error
    try:
        # From memory: numpy leaves a corrupt file open.
        with np.load(io.BytesIO((folder / ARRAYS).read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays), record
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder / ARRAYS} is corrupt or not a spectrum: {error}") from error


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


def _publish(folder: Path, files: dict[str, bytes]) -> None:
    """Replaces the files in this order, all of them or (when writing fails) none."""
    temporaries = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, content in files.items():
            temporaries[name].write_bytes(content)
        (folder / RECORD).unlink(missing_ok=True)  # Never an old record beside new arrays.
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
