"""The tensors of a Hugging Face checkpoint directory, by name, read slice by slice.

Names, shapes and dtypes come from the files' headers; no weight is read before somebody asks for a slice of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from convert.json_files import one_line, parse_json, read_json, shown
from convert.layout import Slices
from jaxhess.errors import InputError

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: Its file.
        shape: Its shape.
        dtype: A numpy name, or the file's own name for other kinds.
        offset: First byte of its values, in a file where they lie one after the other.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0


class TensorSource(Protocol):
    """The tensors of a checkpoint in whatever format: what a loader needs of it.

    Attributes:
        directory: What errors call the checkpoint.
        tensors: Every tensor by name, with the shape and dtype that `read` gives.
    """

    directory: Path
    tensors: Mapping[str, StoredTensor]

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """A copy of one slice of a tensor; nothing else of it is read."""
        ...


class Source:
    """The tensors of one checkpoint directory.

    Reads, in this order of preference, `model.safetensors`, the files of `model.safetensors.index.json`,
    `pytorch_model.bin`, the files of `pytorch_model.bin.index.json`.

    Attributes:
        tensors: Every tensor by name.

    Raises:
        InputError: No weights, or a file that the index names is missing; a damaged file, an index that disagrees with
            its files, or a tensor in two files; only `.bin` files, and torch is not installed.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._pickles: dict[Path, Any] = {}
        files, index = _weight_files(directory)
        tensors: dict[str, StoredTensor] = {}
        self.tensors: Mapping[str, StoredTensor] = tensors
        for file in files:
            headers = _safetensors_header(file) if file.suffix == ".safetensors" else self._pickle_header(file)
            for name, tensor in headers.items():
                if not name.isprintable():  # it would be printed
                    raise InputError(f"{file} holds a tensor with the name {shown(name)}; a name is printable text.")
                if name in tensors:
                    other = tensors[name].file.name
                    raise InputError(f"Tensor {name} is in two files of {directory}: {other} and {file.name}.")
                tensors[name] = tensor
        for name, file_name in (index or {}).items():
            if name not in self.tensors or self.tensors[name].file.name != file_name:
                raise InputError(
                    f"The index of {directory} says that {file_name} holds tensor {name}, but it does not."
                )

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """A copy of one slice of a tensor, in the file's dtype."""
        tensor = self.tensors[name]
        if tensor.file.suffix != ".safetensors":
            return as_numpy(self._pickles[tensor.file][name][slices])
        # Opened for each slice: what a closed file had mapped no longer counts as this process's memory.
        with _open_safetensors(tensor.file) as file:
            return file.get_slice(name)[slices]

    def read_bytes(self, name: str, slices: Slices) -> np.ndarray:
        """A copy of one slice of a tensor of one-byte values, as uint8: also of those that NumPy has no dtype for."""
        tensor = self.tensors[name]
        stored = np.memmap(tensor.file, np.uint8, "r", offset=tensor.offset, shape=tensor.shape)
        return np.array(stored[slices])

    def _pickle_header(self, file: Path) -> dict[str, StoredTensor]:
        self._pickles[file] = tensors = _load_pickle(file)
        for name, tensor in tensors.items():
            check_plain(name, tensor, file)
        return {
            name: StoredTensor(file, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()
        }


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a checkpoint, and its index (tensor name -> file name) if it has one."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).is_file():
            return [directory / single], None
        index_file = directory / f"{single}.index.json"
        if index_file.is_file():
            index = read_json(index_file).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise InputError(f"{index_file} has no weight_map.")
            for name, file_name in index.items():
                if not isinstance(file_name, str) or file_name != Path(file_name).name or not file_name.isprintable():
                    raise InputError(
                        f"{index_file} has {shown(file_name)} for tensor {shown(name)}; it must be the name of a file "
                        "in the same folder."
                    )
            files = [directory / name for name in sorted(set(index.values()))]
            for file in files:
                if not file.is_file():
                    raise InputError(f"{file.name} is missing from {directory}, but {index_file.name} names it.")
            return files, index
    raise InputError(
        f"{directory} has no weights: no model.safetensors or pytorch_model.bin, nor an index of several such files."
    )


def _safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file, from its header, which is also checked against the file's length."""
    with _open_safetensors(file):  # its own validation: offsets, overlaps, shapes against bytes, file length
        pass
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entries = parse_json(stream.read(length), f"The header of {file}")
    return {
        name: StoredTensor(
            file,
            tuple(entry["shape"]),
            _SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]),
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


@contextlib.contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}).") from error
    except SafetensorError as error:
        size = file.stat().st_size
        raise InputError(f"{file} is truncated or damaged ({size} bytes): {one_line(error)}.") from error


def _load_pickle(file: Path) -> dict[str, Any]:
    """Tensors of a `.bin` file."""
    loaded = load_torch(file, "no plain state dictionary")
    import torch

    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise InputError(f"{file} is no state dictionary of tensors.")
    return loaded


def load_torch(file: Path, otherwise: str) -> Any:
    """What `torch.save` wrote, if it is of tensors and plain values; no code of the file is run.

    Tensors are mapped from the file rather than read where its format allows.

    Args:
        file: Its path.
        otherwise: What it may be if it cannot be read, for the message: "no plain state dictionary".

    Raises:
        InputError: torch is not installed, or the file cannot be read.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{file.name} is a PyTorch file and reading it needs torch; "
            "install the extra: pip install -e '.[torch]' in the repository."
        ) from None
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # written before torch 1.6
    except Exception as error:  # pickle, zip and torch each have errors of their own
        # torch's own words on a foreign class advise to let the file run code.
        reason = "other things than tensors" if isinstance(error, pickle.UnpicklingError) else one_line(error)
        raise InputError(f"{file} is truncated, damaged, or {otherwise}: {reason}.") from error


def check_plain(name: Any, tensor: Any, file: Path) -> None:
    """Refuses what a state dictionary of weights has not, but torch can store: all but dense tensors under names."""
    import torch

    if not isinstance(name, str):
        raise InputError(f"{file} holds a tensor under the key {shown(name)}; it must be a name.")
    kind = (
        "nested" if tensor.is_nested
        else "quantized" if tensor.is_quantized
        else str(tensor.layout).removeprefix("torch.") if tensor.layout != torch.strided
        else f"on the device {tensor.device.type}" if tensor.device.type != "cpu"
        else ""
    )  # fmt: skip
    if kind:
        raise InputError(f"Tensor {shown(name)[1:-1]} in {file} is {kind}; weights must be dense, with their values.")


def as_numpy(tensor: Any) -> np.ndarray:
    """A copy, in the same dtype."""
    import torch

    tensor = tensor.detach().clone()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16 of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
