"""The header and the tensors of a GGUF file, read slice by slice.

The header is read here rather than by the package `gguf`, which takes seconds and several objects for each token of the
vocabulary, and does not end on some damaged counts. How blocks become values is from there.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.json_files import shown
from convert.layout import Slices
from jaxhess.errors import InputError
from jaxhess.files.arrays import check_regular

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_MOST_NUMBERS = 2**16
"""Of an array that is kept: one for each layer is, one for each token is not."""

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_INTEGERS = ("I8", "I16", "I32", "I64")

_CHUNK = 2**20
"""Values dequantized at a time: `gguf` makes several copies of them."""


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        shape: As in torch: the axis along which the values lie comes last.
        kind: Name of its type, such as Q4_0.
        offset: Its first byte in the file.
        block: Values of a block, along the last axis, and bytes of it.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int
    block: tuple[int, int]

    @property
    def dtype(self) -> str:
        """Of what `GgufFile.read` gives: quantized values in float32."""
        return self.kind if self.kind in _INTEGERS else _PLAIN.get(self.kind, "float32")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In bytes along the last axis."""
        values, size = self.block
        return (*self.shape[:-1], self.shape[-1] // values * size)


class GgufFile:
    """A GGUF file, its header read and checked against its length.

    Attributes:
        path: The file.
        fields: Its metadata by key; of an array of texts, or of many numbers, only the length.
        tensors: Every tensor by its name in the file.

    Raises:
        InputError: The extra is not installed; no regular file, or no GGUF of a version that is read; it is truncated
            or damaged; a tensor of a type that `gguf` cannot dequantize.
    """

    def __init__(self, path: Path):
        self.path = path
        kinds = _kinds()
        check_regular(path)
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, 2)
                if size < 24:
                    raise _Damaged("its header is not complete")
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self.fields, self.tensors = _header(data, size, kinds, path)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
        except _Damaged as error:
            raise InputError(f"{path} is truncated or damaged ({size} bytes): {error}.") from None

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """One slice of a tensor, in `GgufTensor.dtype`; only the rows, and of these the blocks, that cover it are read.

        Args:
            name: In the file.
            slices: One with bounds for each axis.
        """
        tensor = self.tensors[name]
        values, size = tensor.block
        *rows, columns = slices
        first, last = columns.start // values, -(-columns.stop // values)
        stored = np.memmap(self.path, np.uint8, "r", offset=tensor.offset, shape=tensor.stored_shape)
        blocks = stored[(*rows, slice(first * size, last * size))]
        shape = (*blocks.shape[:-1], (last - first) * values)
        if tensor.kind in _PLAIN:
            dtype = np.dtype(ml_dtypes.bfloat16 if tensor.kind == "BF16" else _PLAIN[tensor.kind])
            return np.array(blocks).view(dtype).reshape(shape)
        result = np.empty((math.prod(shape[:-1]), shape[-1]), np.float32)
        each = blocks.reshape(len(result), -1)
        step = max(1, _CHUNK // max(shape[-1], 1))
        for start in range(0, len(result), step):
            part = slice(start, start + step)
            result[part] = _dequantize(np.array(each[part]), tensor.kind)
        start = columns.start - first * values
        return result.reshape(shape)[..., start : start + columns.stop - columns.start]


class _Damaged(Exception):
    """What is wrong with the bytes of a header."""


def _kinds() -> dict[int, tuple[str, tuple[int, int]]]:
    """Number of a type in the file -> its name, and the values and bytes of a block."""
    try:
        import gguf
    except ImportError:
        raise InputError(
            "Reading a GGUF file needs the package gguf; install the extra: pip install -e '.[gguf]' in the repository."
        ) from None
    return {int(kind): (kind.name, sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def _dequantize(blocks: np.ndarray, kind: str) -> np.ndarray:
    import gguf

    # Damaged scales are infinite or NaN: what loads them says where.
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])


class _Cursor:
    """Walks through the bytes of a header."""

    def __init__(self, data: mmap.mmap, size: int):
        self._data, self._size = data, size
        self.position = 0

    def numbers(self, codes: str) -> tuple[Any, ...]:
        begin = self.advance(struct.calcsize("<" + codes), "a number")
        return struct.unpack_from("<" + codes, self._data, begin)

    def text(self) -> str:
        (length,) = self.numbers("Q")
        begin = self.advance(length, "a text")
        try:
            return self._data[begin : self.position].decode()
        except UnicodeDecodeError:
            raise _Damaged(f"the text at byte {begin} is not UTF-8") from None

    def advance(self, length: int, what: str) -> int:
        """Steps over so many bytes; where they begin."""
        begin = self.position
        if length > self._size - begin:
            raise _Damaged(f"{what} at byte {begin} goes beyond its end")
        self.position += length
        return begin

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _Damaged(f"the value at byte {self.position} is of the unknown kind {kind}")
        kind, count = self.numbers("IQ")
        if kind in _SCALARS:
            begin = self.advance(count * struct.calcsize("<" + _SCALARS[kind]), "an array")
            kept = count <= _MOST_NUMBERS
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._data, begin)) if kept else count
        if kind != _STRING:
            raise _Damaged(f"the array at byte {self.position} is of the unknown kind {kind}")
        for _ in range(count):  # each takes eight bytes at least, so this ends where the file does
            (length,) = self.numbers("Q")
            self.advance(length, "a text")
        return count


def _header(
    data: mmap.mmap, size: int, kinds: dict[int, tuple[str, tuple[int, int]]], path: Path
) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(data, size)
    if data[:4] != b"GGUF":
        raise InputError(f"{path} is no GGUF file: it does not begin with these letters.")
    cursor.advance(4, "")
    version, tensor_count, field_count = cursor.numbers("IQQ")
    if version not in _VERSIONS:
        big_endian = " in the byte order of other machines" if version & 0xFFFF == 0 else ""
        raise InputError(f"{path} is GGUF version {version}{big_endian}; versions 2 and 3, little-endian, are read.")

    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text()
        if key in fields or not key.isprintable():
            raise _Damaged(f"it names the key {shown(key)} {'twice' if key in fields else '(not printable)'}")
        fields[key] = cursor.value(cursor.numbers("I")[0])

    found: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name = cursor.text()
        (dimensions,) = cursor.numbers("I")
        if not name.isprintable() or not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _Damaged(f"it has a tensor {shown(name)} of {dimensions} dimensions")
        shape = tuple(reversed(cursor.numbers(f"{dimensions}Q")))
        found.append((name, shape, *cursor.numbers("IQ")))

    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise _Damaged(f"general.alignment is {shown(alignment)}")
    begin = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in found:
        if name in tensors:
            raise _Damaged(f"it has tensor {name} twice")
        if number not in kinds:
            raise InputError(f"Tensor {name} in {path} is of type {number}, which gguf does not know: update it.")
        kind, block = kinds[number]
        tensor = GgufTensor(shape, kind, begin + offset, block)
        if 0 in shape or shape[-1] % block[0]:
            raise _Damaged(f"tensor {name} of shape {list(shape)} cannot be {kind}")
        if begin + offset + math.prod(tensor.stored_shape) > size:
            raise _Damaged(f"tensor {name} goes beyond its end")
        tensors[name] = tensor
    _check_dequantizable(tensors, path)
    return fields, tensors


def _check_dequantizable(tensors: dict[str, GgufTensor], path: Path) -> None:
    for kind, (name, tensor) in {tensor.kind: (name, tensor) for name, tensor in tensors.items()}.items():
        if kind in _PLAIN or kind in _INTEGERS:
            continue
        try:
            _dequantize(np.zeros((1, tensor.block[1]), np.uint8), kind)
        except NotImplementedError:
            raise InputError(f"Tensor {name} in {path} is {kind}, which gguf cannot dequantize.") from None
