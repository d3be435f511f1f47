"""What a checkpoint says of itself, and its tensors, in whatever format it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.gguf_file import GgufFile
from convert.gguf_model import GgufSource, gguf_config, gguf_file
from convert.json_files import read_json
from convert.quantized import dequantized
from convert.source import Source, TensorSource


def configuration(path: Path) -> tuple[dict[str, Any], Path]:
    """The `config.json` of a checkpoint, and the file that says it: of a GGUF file, one made from its metadata.

    Args:
        path: A Hugging Face directory, one with a single GGUF file, such a file, or a `config.json` under any name.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    gguf = gguf_file(path)
    if gguf is not None:
        return gguf_config(GgufFile(gguf)), gguf
    file = path / "config.json" if path.is_dir() else path
    return read_json(file), file


def tensor_source(path: Path, hf_config: dict[str, Any]) -> TensorSource:
    """The tensors of a checkpoint as plain weights under the names of `transformers`; none is read yet.

    Args:
        path: As for `configuration`, but with weights.
        hf_config: What `configuration` gave.

    Raises:
        InputError: No weights, or damaged or incomplete ones; quantized ones of a kind that is not read.
    """
    gguf = gguf_file(path)
    if gguf is not None:
        return GgufSource(GgufFile(gguf))
    return dequantized(Source(path), hf_config, path / "config.json")
