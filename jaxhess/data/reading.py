"""Text or token files -> blocks of `seq_len + 1` tokens.

A tokenizer comes in as a callable `encode(text) -> list of int`; nothing here knows where it is from. Blocks are
consecutive and do not overlap (stride `seq_len + 1`), so the first token of a block is context only and every other
token is predicted once. What is left over at the end of a text, less than one block, is dropped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxhess.data.blocks import TokenBlocks, check_sizes, check_tokens, full_blocks, label_weights
from jaxhess.errors import InputError
from jaxhess.files.arrays import check_regular, read_npy, read_npz

Encode = Callable[[str], Sequence[int]]

TEXT_SUFFIXES = frozenset(
    (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".pyi")
    + (".c", ".h", ".cc", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".sh")
)
"""Files of a folder that are read as text. A file named directly is read whatever its suffix."""

ENCODED_AT_ONCE = 2**18
"""Characters that are tokenised together. Tokenizers need some 200 bytes of memory for each."""

_CUTS = tuple(re.compile(place) for place in (r"(?<=\S) (?=\S)", r"(?<=\S\n)(?=\S)", r"\s"))
"""Where a long text is cut, the best place first: before a single space, after a line end, at any whitespace."""


def read_blocks(
    source: str | Path,
    *,
    seq_len: int,
    vocab_size: int,
    sequences: int | None = None,
    encode: Encode | None = None,
    end_of_text: int | None = None,
) -> TokenBlocks:
    """Blocks from a file or folder.

    Args:
        source: A `.npy` of tokens: [sequences, seq_len + 1], used as it is, or one long stream [tokens]. A `.npz` with
            `tokens` [sequences, seq_len + 1] and optionally `weights` [sequences, seq_len] or `labels` [sequences,
            seq_len + 1] (see `label_weights`). Anything else is text: one file, or a folder (see `read_documents`).
        seq_len: Predicted tokens per block.
        vocab_size: Every token must be below it.
        sequences: Blocks taken, from the beginning; None: all.
        encode: The model's tokenizer; needed for text only.
        end_of_text: Token put between two documents.

    Raises:
        InputError: One sentence that names the file and what would be right: a missing, unreadable or empty file,
            text shorter than one block, fewer blocks than asked for, an array of another type or width, a token
            outside the vocabulary.
    """
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder.")
    check_sizes(seq_len, sequences)
    if path.suffix == ".npy":
        tokens = read_npy(path)
        if tokens.ndim == 1:
            return _cut(tokens, seq_len, vocab_size, sequences, str(path))
        return _array_blocks(path, {"tokens": tokens}, seq_len, vocab_size, sequences)
    if path.suffix == ".npz":
        return _array_blocks(path, read_npz(path), seq_len, vocab_size, sequences)
    if encode is None:
        raise InputError(f"{path} is text and needs the model's tokenizer; without one, give tokens as .npy or .npz.")
    return pack(
        (text for _, text in read_documents(path)),
        encode,
        seq_len=seq_len,
        vocab_size=vocab_size,
        sequences=sequences,
        end_of_text=end_of_text,
        name=str(path),
    )


def read_documents(path: str | Path) -> Iterator[tuple[Path, str]]:
    """Each text file with its text: `path` itself, or everything under it whose suffix is in `TEXT_SUFFIXES`.

    Folders are read recursively in the order of their relative paths, part by part; names that begin with a dot and
    links to folders are passed over. Text is UTF-8 (a byte-order mark is dropped, line ends are kept).

    Raises:
        InputError: A folder without text files, or a file that is not UTF-8, or no regular file: a pipe would be waited
            for, and a device has no end.
    """
    path = Path(path)
    files = _text_files(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no text files under this folder (looked for {' '.join(sorted(TEXT_SUFFIXES))}).")
    for file in files:
        check_regular(file)
        try:
            yield file, file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text (byte {error.start}: {error.reason}).") from error
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}).") from error


def pack(
    documents: Iterable[str],
    encode: Encode,
    *,
    seq_len: int,
    vocab_size: int,
    sequences: int | None = None,
    end_of_text: int | None = None,
    name: str = "text",
) -> TokenBlocks:
    """Blocks of the documents, tokenised one by one and joined.

    Reads no further once `sequences` blocks are full. Empty documents leave no trace.

    A document of more than `ENCODED_AT_ONCE` characters is tokenised in parts, so that the first blocks of a corpus in
    one file need neither its time nor its memory. It is cut between two words, before a space or after a line end.
    Tokenizers that split there too give the same tokens as for the whole: those of GPT-2, GPT-NeoX, Qwen and Llama 3.
    Those that put a space before every text (SentencePiece: Llama 2, Mistral) can give other tokens around a cut, and
    so can all where half of `ENCODED_AT_ONCE` characters have no such place: then it is any whitespace, or none.

    Args:
        documents: Texts, in order.
        encode: Tokens of a text, without the special tokens of its beginning and end.
        seq_len, vocab_size, sequences, end_of_text: As in `read_blocks`.
        name: What the documents are called in error messages.

    Raises:
        InputError: As in `read_blocks`.
    """
    check_sizes(seq_len, sequences)
    pieces: list[np.ndarray] = []
    found = 0
    for ids in _tokenised(documents, encode, end_of_text):
        pieces.append(ids)
        found += ids.size
        if sequences is not None and found >= sequences * (seq_len + 1):
            break
    if not pieces:
        raise InputError(f"{name} is empty: there are no tokens in it.")
    return _cut(np.concatenate(pieces), seq_len, vocab_size, sequences, name)


def _tokenised(documents: Iterable[str], encode: Encode, end_of_text: int | None) -> Iterator[np.ndarray]:
    separator: list[int] = []
    for text in documents:
        for number, part in enumerate(_parts(text)):
            ids = encode(part)
            if len(ids):
                yield np.asarray([*([] if number else separator), *ids], np.int64)
        if text and end_of_text is not None:
            separator = [end_of_text]


def _parts(text: str) -> Iterator[str]:
    """The text in parts of at most `ENCODED_AT_ONCE` characters, cut where it harms least."""
    start = 0
    while len(text) - start > ENCODED_AT_ONCE:
        middle, end = start + ENCODED_AT_ONCE // 2, start + ENCODED_AT_ONCE
        found = next((match for cut in _CUTS if (match := cut.search(text, middle, end))), None)
        stop = found.start() if found else end
        yield text[start:stop]
        start = stop
    yield text[start:]


def _text_files(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in TEXT_SUFFIXES]
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def _array_blocks(
    path: Path, arrays: dict[str, np.ndarray], seq_len: int, vocab_size: int, sequences: int | None
) -> TokenBlocks:
    if "tokens" not in arrays or not {"weights", "labels", "tokens"} >= set(arrays) or len(arrays) > 2:
        raise InputError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; it must hold tokens, and weights or labels if any."
        )
    tokens = arrays["tokens"]
    if tokens.ndim != 2 or tokens.shape[1] != seq_len + 1:
        raise InputError(
            f"{path}: tokens have shape {list(tokens.shape)}; with seq_len={seq_len} they must be "
            f"[sequences, {seq_len + 1}] (or, in a .npy file, one stream)."
        )
    _check_enough(tokens.shape[0], sequences, tokens.size, seq_len, str(path))
    for name, array in arrays.items():
        if array.shape[:1] != tokens.shape[:1]:
            raise InputError(
                f"{path}: {name} have shape {list(array.shape)}, tokens {list(tokens.shape)}: as many rows."
            )
    arrays = {name: array[:sequences] for name, array in arrays.items()}
    try:
        tokens = check_tokens(arrays["tokens"], vocab_size, "tokens")
        if "labels" in arrays:
            return TokenBlocks(tokens, label_weights(tokens, arrays["labels"]))
        return TokenBlocks(tokens, arrays["weights"]) if "weights" in arrays else full_blocks(tokens)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _cut(tokens: np.ndarray, seq_len: int, vocab_size: int, sequences: int | None, name: str) -> TokenBlocks:
    blocks = tokens.size // (seq_len + 1)
    _check_enough(blocks, sequences, tokens.size, seq_len, name)
    taken = blocks if sequences is None else sequences
    return full_blocks(check_tokens(tokens[: taken * (seq_len + 1)], vocab_size, name).reshape(taken, seq_len + 1))


def _check_enough(blocks: int, sequences: int | None, tokens: int, seq_len: int, name: str) -> None:
    if blocks < 1:
        raise InputError(f"{name} has {tokens} tokens; one block of seq_len={seq_len} needs {seq_len + 1}.")
    if sequences is not None and blocks < sequences:
        raise InputError(
            f"{name} has {tokens} tokens, which make {blocks} blocks of seq_len + 1 = {seq_len + 1}; "
            f"{sequences} sequences were asked for: take fewer, or shorter ones."
        )
