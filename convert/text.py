"""From what a user calls the data to blocks of the model's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from convert.json_files import one_line, shown
from convert.tokenizer import load_tokenizer
from jaxhess.data import TokenBlocks, pack, random_blocks, read_blocks
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.vectors import check_seed

HUB = "hub:"
Sample = Literal["start", "random"]


def load_blocks(
    data: str,
    model: str | Path,
    *,
    seq_len: int,
    vocab_size: int,
    sequences: int | None = None,
    sample: Sample = "start",
    seed: int = 0,
) -> TokenBlocks:
    """Blocks of `data` in the tokens of `model`: text without special tokens, the end-of-text token between documents.

    Args:
        data: A text file, a folder of text files, a `.npy` or `.npz` of tokens (`jaxhess.data.read_blocks`), `random`
            for uniform random tokens, or `hub:NAME[@CONFIG][:SPLIT[:COLUMN]]` for a data set of the Hugging Face hub,
            or a local folder of one; SPLIT is `train` and COLUMN `text` unless given.
        model: Path or hub id whose tokenizer is used; only read when the data are text.
        seq_len: Predicted tokens per block.
        vocab_size: Of the model.
        sequences: Blocks taken; None: all (`random` needs a number).
        sample: Which blocks are taken: those at the start, or drawn at random from all of them, which are then read.
        seed: Of random tokens, and of which blocks are drawn.

    Raises:
        InputError: One sentence that names the source and what would be right.
    """
    check_seed(seed)
    if data == "random":
        if sequences is None:
            raise InputError("Random tokens have no end: give the number of sequences.")
        return random_blocks(seq_len=seq_len, vocab_size=vocab_size, sequences=sequences, seed=seed)
    if sample == "random":
        if data.startswith(HUB):
            raise InputError(
                f"{data} is streamed and has no known end, so that no sequences can be drawn from all of it: leave "
                "--sample out, or give a file."
            )
        every = load_blocks(data, model, seq_len=seq_len, vocab_size=vocab_size)
        return every.sampled(sequences or every.num_sequences, seed)
    if not data.startswith(HUB):
        path = Path(data).expanduser()
        there = processes.exists(path)
        if path.suffix in (".npy", ".npz") or not there:
            return read_blocks(path, seq_len=seq_len, vocab_size=vocab_size, sequences=sequences)
    tokenizer = load_tokenizer(model)

    def encode(text: str) -> list[int]:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        except Exception as error:  # a damaged tokenizer may load and not work
            raise InputError(f"The tokenizer of {model} does not tokenise: {one_line(error)}.") from error
        if ids and max(ids) >= vocab_size:
            raise InputError(
                f"The tokenizer of {model} gives token {max(ids)} ({tokenizer.convert_ids_to_tokens(max(ids))!r}), "
                f"but the model knows tokens 0 to {vocab_size - 1} only: they do not belong together."
            )
        return ids

    sizes: Any = {"seq_len": seq_len, "vocab_size": vocab_size, "sequences": sequences}
    sizes |= {"encode": encode, "end_of_text": tokenizer.eos_token_id}
    if data.startswith(HUB):
        blocks = pack(hub_documents(data.removeprefix(HUB)), name=data, **sizes)
    else:
        blocks = read_blocks(path, **sizes)
    return dataclasses.replace(blocks, separator=tokenizer.eos_token_id)


def hub_documents(address: str) -> Iterator[str]:
    """The texts of a data set, streamed: `NAME[@CONFIG][:SPLIT[:COLUMN]]`.

    Raises:
        InputError: The `hub` extra is not installed; the data set cannot be opened, or has no such column.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            "hub: data needs the `datasets` package; install the extra: pip install -e '.[hub]' in the repository."
        ) from None
    name, split, column, *rest = [*address.split(":"), *("", "", "")[: max(0, 3 - address.count(":") - 1)]]
    if rest or not name:
        raise InputError(f"hub:{address} cannot be read; write hub:NAME[@CONFIG][:SPLIT[:COLUMN]].")
    name, _, config = name.partition("@")
    split, column = split or "train", column or "text"
    try:
        for number, row in enumerate(datasets.load_dataset(name, config or None, split=split, streaming=True)):
            if column not in row:
                raise InputError(f"it has no column {column!r}; its columns are {', '.join(map(str, row))}")
            if not isinstance(row[column], str):
                raise InputError(f"row {number} holds {shown(row[column])} in column {column!r}; it must be text")
            yield row[column]
    except GeneratorExit:
        raise
    except Exception as error:  # its errors come from several libraries
        raise InputError(f"hub:{address} cannot be read ({type(error).__name__}: {one_line(error)}).") from error
