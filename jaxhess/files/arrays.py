"""NumPy files that others wrote: numbers only, nothing is unpickled, and no header is believed beyond its file."""

from __future__ import annotations

import contextlib
import math
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np

from jaxhess.errors import InputError


def check_regular(file: Path) -> None:
    """Raises InputError for what is no regular file nor a link to one: pipes are waited for, devices have no end."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}).") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{file} is a pipe, device, socket or folder; only regular files are read.")


def read_npy(path: Path) -> np.ndarray:
    """The array of a `.npy`, mapped: of a stream of many gigabytes only what is used is read.

    Raises:
        InputError: The file is damaged, of another kind, or does not hold numbers.
    """
    check_regular(path)
    with _naming(path), path.open("rb") as stream:
        if stream.read(4) == b"PK\3\4":
            raise InputError("it is an archive of arrays: name it .npz")
        stream.seek(0)
        shape, order, dtype = _header(stream, path.stat().st_size)
        return np.memmap(path, dtype, "r", stream.tell(), shape, order)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` by name; errors as for `read_npy`."""
    check_regular(path)
    with _naming(path), path.open("rb") as stream:
        if stream.read(6) == np.lib.format.MAGIC_PREFIX:
            raise InputError("it is a single array: name it .npy")
        arrays = {}
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                with archive.open(member) as inner:
                    shape, order, dtype = _header(inner, member.file_size)
                    array = np.frombuffer(inner.read(), dtype, math.prod(shape)).reshape(shape, order=order)
                arrays[member.filename.removesuffix(".npy")] = array
        return arrays


def _header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    """Shape, order and dtype of the `.npy` in a stream of `size` bytes, which is left where the numbers begin.

    Raises:
        InputError: The header is damaged, does not describe numbers, or promises more of them than there are.
    """
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, columns, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, columns, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise InputError(f"its format is version {version[0]}.{version[1]}, for structures")
    if dtype.kind not in "biufcmM":  # complex numbers and dates have sentences of their own
        raise InputError(f"it holds {dtype}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size - stream.tell():
        raise InputError(f"its header promises shape {list(shape)}, and the file has not that many numbers")
    return shape, "F" if columns else "C", dtype


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib, tokenize and NumPy each have errors of their own
        reason = " ".join(str(error).split())[:200].rstrip(" .") or type(error).__name__
        raise InputError(f"{path} cannot be read as a NumPy file of numbers: {reason}.") from error
