"""The tokenizer beside a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from convert.gguf_file import GgufFile
from convert.gguf_model import gguf_file
from convert.hub import TOKENIZER_FILES, local_directory
from convert.json_files import one_line
from jaxhess.errors import InputError
from jaxhess.files.arrays import check_regular


def load_tokenizer(path_or_hub_id: str | Path) -> Any:
    """The `transformers` tokenizer in a directory (converted or not), in a GGUF file, or of a hub id.

    `transformers` reads a GGUF file's tokenizer with torch and gguf. Where the path is that of its directory, tokenizer
    files beside it come first.

    Examples:
        >>> import convert
        >>> tokenizer = convert.load_tokenizer("scripts/tiny")
        >>> tokenizer.decode(tokenizer("Hello world").input_ids)
        'Hello world'

    Raises:
        InputError: No such directory or id, or no tokenizer files in it; the files cannot be read as a tokenizer, or
            only by code of their own, which is not run; a GGUF file's without torch or gguf.
    """
    directory = local_directory(path_or_hub_id)
    if not any(
        (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        gguf = gguf_file(directory)
        if gguf is not None:
            return _gguf_tokenizer(gguf)
        raise InputError(f"{directory} has no tokenizer files (tokenizer.json, tokenizer.model or vocab.json).")
    for name in ("config.json", *TOKENIZER_FILES):
        if (directory / name).exists():
            check_regular(directory / name)
    from transformers import AutoTokenizer

    try:
        # Left open, transformers asks on the terminal whether the checkpoint's own code shall run.
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # sentencepiece, tokenizers and transformers each have errors of their own
        raise InputError(f"The tokenizer in {directory} cannot be read: {one_line(error)}.") from error


def _gguf_tokenizer(file: Path) -> Any:
    GgufFile(file)  # says what is wrong with a damaged file, or that gguf is missing
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError(
            f"transformers reads the tokenizer in {file} with torch; install the extra: pip install -e '.[torch]' in "
            "the repository, or put a tokenizer.json beside the file and give the path of the directory."
        ) from None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # tokenizers and transformers each have errors of their own
        raise InputError(f"The tokenizer in {file} cannot be read: {one_line(error)}.") from error


def add_tokenizer(source: Any, directory: Path) -> None:
    """Adds a directory's tokenizer files, or a tokenizer with `save_pretrained`, to a checkpoint (None: nothing)."""
    if isinstance(source, str | Path):
        for name in TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, directory / name)
    elif source is not None:
        source.save_pretrained(directory)
