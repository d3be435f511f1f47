"""From a path or a Hugging Face hub id to a local directory."""

from __future__ import annotations

import re
from pathlib import Path

from jaxhess.distributed import processes
from jaxhess.errors import InputError

_CONFIG_FILES = ["config.json", "generation_config.json"]

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]
"""Files that make a tokenizer, as far as a checkpoint has them."""


def local_directory(path_or_hub_id: str | Path) -> Path:
    """The directory or GGUF file itself, or where the hub's files of that id lie after downloading what is missing.

    Of several processes, which all must call this, the first one downloads, and the others find the files where that
    put them, or download them to a disk of their own. On a cluster it is better done before: compute nodes often do not
    reach the hub.

    Raises:
        InputError: No such directory, or not for all processes; no such id on the hub (or no way to ask).
    """
    path = Path(path_or_hub_id).expanduser()
    if processes.exists(path):
        if not path.is_dir() and path.suffix != ".gguf":
            raise InputError(
                f"{path} is a file; a checkpoint is a directory with config.json and its weights, or a .gguf file."
            )
        return path
    name = _hub_id(str(path_or_hub_id))
    first = processes.on_first(lambda: str(_downloaded(name)))
    return processes.on_every(lambda: Path(first) if processes.index() == 0 else _downloaded(name))


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = [*_CONFIG_FILES, *TOKENIZER_FILES, "model*.safetensors", "model.safetensors.index.json"]
        directory = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(directory.glob("model*.safetensors*")):
            wanted = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
            directory = Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # its client's errors come from several libraries
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"There is no directory {name}, and the hub gives no model of that id ({type(error).__name__}: {reason})."
        ) from error
    return directory


def hub_config(name: str) -> Path:
    """The `config.json` of that hub id, downloaded unless it was before.

    Raises:
        InputError: No such id on the hub (or no way to ask).
    """
    from huggingface_hub import hf_hub_download

    hub_id = _hub_id(name)
    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # its client's errors come from several libraries
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"There is no file or directory {name}, and the hub gives no config.json of that id "
            f"({type(error).__name__}: {reason})."
        ) from error


def _hub_id(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise InputError(f"There is no directory {name}.")
    return name
