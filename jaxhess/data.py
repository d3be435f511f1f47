"""Text or token arrays -> blocks of `seq_len + 1` tokens -> microbatches on the mesh.

A tokenizer comes in as a callable `encode(text) -> list of int`; nothing here knows where it is from. Blocks are
consecutive and do not overlap (stride `seq_len + 1`), so the first token of a block is context only and every other
token is predicted once. What is left over at the end of a text, less than one block, is dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhess.distributed.mesh import batch_sharding, data_shards
from jaxhess.errors import InputError
from jaxhess.files.arrays import check_regular, read_npy, read_npz
from jaxhess.vectors import check_seed

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

IGNORED_LABEL = -100
"""Label of a token that does not count, as in PyTorch's `ignore_index`."""


class TokenBatch(NamedTuple):
    """Sequences to predict: position t of `tokens` predicts position t + 1.

    Attributes:
        tokens: [B, T + 1] int32.
        weights: [B, T] float32: 1 where the target `tokens[:, t + 1]` counts, 0 where it is padding.
    """

    tokens: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Sequences on the host, ready to be cut into microbatches.

    Attributes:
        tokens: [N, T + 1] int32; other integer types are converted.
        weights: [N, T] float32, not negative: `weights[n, t]` is the weight of predicting `tokens[n, t + 1]`, 1 where
            it counts and 0 where it is padding.

    Raises:
        ValueError: Tokens that are not integers or negative, shapes that do not fit, weights that are no real numbers,
            negative, not finite, or all zero.
    """

    tokens: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        tokens, weights = np.asarray(self.tokens), np.asarray(self.weights)
        if tokens.ndim != 2 or 0 in tokens.shape or tokens.shape[1] < 2:
            raise InputError(f"tokens have shape {list(tokens.shape)}; they must be [sequences, seq_len + 1].")
        check_tokens(tokens, None, "tokens")
        expected = (tokens.shape[0], tokens.shape[1] - 1)
        if weights.shape != expected:
            raise InputError(
                f"weights have shape {list(weights.shape)}; tokens {list(tokens.shape)} need {list(expected)}, "
                "one weight per predicted token."
            )
        if weights.dtype.kind not in "biuf":
            raise InputError(f"weights are {weights.dtype}; they must be real numbers.")
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
            weights = weights.astype(np.float32)
        if not np.all(np.isfinite(weights)) or np.any(weights < 0):
            raise InputError("weights must be finite and not negative: 1 where a token counts, 0 where it is padding.")
        if not np.any(weights):
            raise InputError("All weights are zero: no token counts, so the mean loss is not defined.")
        object.__setattr__(self, "tokens", tokens.astype(np.int32))
        object.__setattr__(self, "weights", weights)

    @property
    def num_sequences(self) -> int:
        """Blocks, N."""
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        """Predicted tokens of a block, T."""
        return self.weights.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 (64 hexadecimal digits) of what the loss depends on.

        Sequences without any weight are left out and tokens behind the last one that counts are taken as 0, so
        neither padding nor what stands in it matters. It is a function of host data alone: the same on every mesh and
        for every microbatch.
        """
        counts = self.weights != 0
        used = counts.any(axis=1)
        last = self.seq_len - np.argmax(counts[:, ::-1], axis=1)  # index in `tokens` of the last target that counts
        seen = np.arange(self.seq_len + 1) <= last[:, None]
        digest = hashlib.sha256()
        digest.update(np.asarray((used.sum(), self.seq_len), "<i8").tobytes())
        digest.update(np.where(seen, self.tokens, 0)[used].astype("<i4").tobytes())
        digest.update(self.weights[used].astype("<f4").tobytes())
        return digest.hexdigest()

    def microbatches(self, microbatch: int, mesh: Mesh | None = None) -> TokenBatch:
        """All blocks as stacked microbatches: `tokens` [M, B, T + 1] and `weights` [M, B, T], on the devices.

        B is `microbatch` (or N if that is smaller), rounded up to a multiple of the mesh's data shards; the last
        microbatch is filled with sequences of weight 0, so sums and counts are exact. With a mesh, B is cut over its
        batch axes; every process passes the same blocks and places only its own part.

        Raises:
            ValueError: `microbatch` below 1.
        """
        if microbatch < 1:
            raise InputError(f"microbatch is {microbatch}; it must be at least 1.")
        shards = data_shards(mesh)
        size = -(-min(microbatch, self.num_sequences) // shards) * shards
        count = -(-self.num_sequences // size)
        fill = ((0, count * size - self.num_sequences), (0, 0))

        def place(x: np.ndarray) -> jax.Array:
            stacked = np.pad(x, fill).reshape(count, size, -1)
            if mesh is None:
                return jnp.asarray(stacked)
            return jax.make_array_from_callback(stacked.shape, batch_sharding(mesh, axis=1), lambda i: stacked[i])

        return TokenBatch(place(self.tokens), place(self.weights))


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
        ValueError: One sentence that names the file and what would be right: a missing, unreadable or empty file,
            text shorter than one block, fewer blocks than asked for, an array of another type or width, a token
            outside the vocabulary.
    """
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder.")
    _check_sizes(seq_len, sequences)
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
        ValueError: A folder without text files, or a file that is not UTF-8, or no regular file: a pipe would be waited
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
            raise InputError(f"{file} is not UTF-8 text (byte {error.start}: {error.reason}).") from None
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}).") from None


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
        ValueError: As in `read_blocks`.
    """
    _check_sizes(seq_len, sequences)
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


def random_blocks(*, seq_len: int, vocab_size: int, sequences: int, seed: int = 0) -> TokenBlocks:
    """`sequences` blocks of independent tokens, uniform over the vocabulary; the seed decides them."""
    _check_sizes(seq_len, sequences)
    check_seed(seed)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (sequences, seq_len + 1))
    return _full(tokens)


def pad_ragged(lists: Sequence[Sequence[int]], seq_len: int, vocab_size: int | None = None) -> TokenBlocks:
    """One block per list of tokens; what is missing up to `seq_len + 1` is filled with token 0 of weight 0.

    Raises:
        ValueError: No lists, a list with fewer than 2 or more than `seq_len + 1` tokens, or a bad token.
    """
    _check_sizes(seq_len, None)
    tokens = np.zeros((len(lists), seq_len + 1), np.int64)
    weights = np.zeros((len(lists), seq_len), np.float32)
    if not len(lists):
        raise InputError("There are no token lists to pad.")
    for i, ids in enumerate(lists):
        if not 2 <= len(ids) <= seq_len + 1:
            raise InputError(
                f"Token list {i} has {len(ids)} tokens; with seq_len={seq_len} it must have 2 to {seq_len + 1}."
            )
        tokens[i, : len(ids)] = check_tokens(np.asarray(ids), vocab_size, f"token list {i}")
        weights[i, : len(ids) - 1] = 1
    return TokenBlocks(tokens, weights)


def label_weights(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights [N, T] of labels [N, T + 1] in the PyTorch convention: `labels[n, t]` is `tokens[n, t]` or -100.

    The first label of a sequence is never predicted and may be either.

    Raises:
        ValueError: Another shape or no integers, or a label that is neither its token nor -100.
    """
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels are {labels.dtype}; they must be integers.")
    if labels.shape != tokens.shape:
        raise InputError(f"labels have shape {list(labels.shape)}; they must have the tokens' {list(tokens.shape)}.")
    counts = labels != IGNORED_LABEL
    wrong = np.argwhere(counts & (labels != tokens))
    if wrong.size:
        n, t = wrong[0]
        raise InputError(
            f"labels[{n}, {t}] is {labels[n, t]} but the token there is {tokens[n, t]}: "
            f"a label is its own token, or {IGNORED_LABEL} where it does not count."
        )
    return counts[:, 1:].astype(np.float32)


def check_tokens(tokens: np.ndarray, vocab_size: int | None, name: str) -> np.ndarray:
    """`tokens` themselves, if they are integers in [0, vocab_size) (None: in [0, 2^31)); a ValueError otherwise."""
    if tokens.dtype.kind not in "iu":  # timedelta64 is a subtype of np.integer
        raise InputError(f"{name}: the tokens are {tokens.dtype}; they must be integers.")
    limit = 2**31 if vocab_size is None else vocab_size
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= limit:
        bad = low if low < 0 else high
        raise InputError(f"{name}: token {bad} is outside the vocabulary, 0 to {limit - 1}.")
    return tokens


def _check_sizes(seq_len: int, sequences: int | None) -> None:
    if seq_len < 1:
        raise InputError(f"seq_len is {seq_len}; it must be at least 1.")
    if sequences is not None and sequences < 1:
        raise InputError(f"sequences is {sequences}; it must be at least 1.")


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
        return TokenBlocks(tokens, arrays["weights"]) if "weights" in arrays else _full(tokens)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _cut(tokens: np.ndarray, seq_len: int, vocab_size: int, sequences: int | None, name: str) -> TokenBlocks:
    blocks = tokens.size // (seq_len + 1)
    _check_enough(blocks, sequences, tokens.size, seq_len, name)
    taken = blocks if sequences is None else sequences
    return _full(check_tokens(tokens[: taken * (seq_len + 1)], vocab_size, name).reshape(taken, seq_len + 1))


def _check_enough(blocks: int, sequences: int | None, tokens: int, seq_len: int, name: str) -> None:
    if blocks < 1:
        raise InputError(f"{name} has {tokens} tokens; one block of seq_len={seq_len} needs {seq_len + 1}.")
    if sequences is not None and blocks < sequences:
        raise InputError(
            f"{name} has {tokens} tokens, which make {blocks} blocks of seq_len + 1 = {seq_len + 1}; "
            f"{sequences} sequences were asked for: take fewer, or shorter ones."
        )


def _full(tokens: np.ndarray) -> TokenBlocks:
    return TokenBlocks(tokens, np.ones((tokens.shape[0], tokens.shape[1] - 1), np.float32))
