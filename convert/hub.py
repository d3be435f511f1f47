"""From a path or a Hugging Face hub id to a local directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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


def local_directory(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The directory or GGUF file itself, or where the hub's files of that id lie after downloading what is missing.

    Of several processes, which all must call this, the first one downloads, and the others find the files where that
    put them, or download them to a disk of their own. On a cluster it is better done before: compute nodes often do not
    reach the hub.

    Args:
        path_or_hub_id: A directory, a GGUF file or a hub id.
        revision: A branch, tag or commit of the hub id; None: the newest.

    Raises:
        InputError: No such directory, or not for all processes; no such id or revision on the hub (or no way to ask); a
            revision of a directory.
    """
    path = Path(path_or_hub_id).expanduser()
    if processes.exists(path):
        if revision is not None:
            raise InputError(f"{path} is on this machine and has no revision {revision}: those are of hub ids.")
        if not path.is_dir() and path.suffix != ".gguf":
            raise InputError(
                f"{path} is a file; a checkpoint is a directory with config.json and its weights, or a .gguf file."
            )
        return path
    name = _hub_id(str(path_or_hub_id))
    first = processes.on_first(lambda: str(_downloaded(name, revision)))
    return processes.on_every(lambda: Path(first) if processes.index() == 0 else _downloaded(name, revision))


def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        wanted = [*_CONFIG_FILES, *TOKENIZER_FILES, "model*.safetensors", "model.safetensors.index.json"]
        directory = Path(snapshot_download(name, allow_patterns=wanted, **at))
        if not any(directory.glob("model*.safetensors*")):
            wanted = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
            directory = Path(snapshot_download(name, allow_patterns=wanted, **at))
    except Exception as error:  # its client's errors come from several libraries
        what = "no model of that id" if revision is None else f"no model of that id at revision {revision}"
        raise InputError(f"There is no directory {name}, and the hub gives {what} ({_reason(error)}).") from error
    return directory


def hub_config(name: str, revision: str | None = None) -> Path:
    """The `config.json` of that hub id (at a revision), downloaded unless it was before.

    Raises:
        InputError: No such id or revision on the hub (or no way to ask).
    """
    from huggingface_hub import hf_hub_download

    hub_id = _hub_id(name)
    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(hf_hub_download(hub_id, "config.json", **at))
    except Exception as error:  # its client's errors come from several libraries
        if revision is not None and type(error).__name__ == "RevisionNotFoundError":
            raise InputError(f"The hub has no revision {revision} of {name}: name a branch, tag or commit.") from error
        what = "no config.json of that id" if revision is None else f"no config.json of that id at revision {revision}"
        raise InputError(
            f"There is no file or directory {name}, and the hub gives {what} ({_reason(error)})."
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _hub_id(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise InputError(f"There is no directory {name}.")
    return name
