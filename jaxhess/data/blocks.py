"""Sequences of tokens: blocks of `seq_len + 1` tokens on the host, cut into microbatches on the mesh."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhess.data.sampling import Sampling
from jaxhess.distributed.mesh import batch_sharding, data_shards
from jaxhess.errors import InputError
from jaxhess.vectors import check_seed

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

    Examples:
        >>> import jaxhess, numpy as np
        >>> blocks = jaxhess.TokenBlocks(tokens=np.arange(12).reshape(3, 4), weights=np.ones((3, 3)))
        >>> blocks.num_sequences, blocks.seq_len, blocks.microbatches(2).tokens.shape
        (3, 3, (2, 2, 4))

    Attributes:
        tokens: [N, T + 1] int32; other integer types are converted.
        weights: [N, T] float32, not negative: `weights[n, t]` is the weight of predicting `tokens[n, t + 1]`, 1 where
            it counts and 0 where it is padding.
        separator: Token between two documents; None: not known.
        population: Sequences from which these were drawn at random (`sampled`); None: they were not.

    Raises:
        InputError: Tokens that are not integers or negative, shapes that do not fit, weights that are no real numbers,
            negative, not finite, or all zero.
    """

    tokens: np.ndarray
    weights: np.ndarray
    separator: int | None = None
    population: int | None = None

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

    def sampled(self, count: int, seed: int = 0) -> TokenBlocks:
        """So many of the blocks, drawn at random without replacement; the seed decides which, and in which order.

        Raises:
            InputError: There are fewer blocks; the count is below 1.
        """
        check_sizes(self.seq_len, count)
        check_seed(seed)
        if count > self.num_sequences:
            raise InputError(
                f"{count} sequences cannot be drawn from {self.num_sequences}: take fewer, or shorter ones."
            )
        rows = np.random.default_rng(seed).permutation(self.num_sequences)[:count]
        return dataclasses.replace(
            self, tokens=self.tokens[rows], weights=self.weights[rows], population=self.num_sequences
        )

    def sampling(self, microbatch: int) -> Sampling:
        """What an error over the data of microbatches of so many of these blocks is about.

        Blocks that were `sampled` stand for all blocks they were drawn from. Others, taken in order, stand for any text
        like theirs. There a microbatch in which no document begins counts as one with the microbatch before; where no
        document begins at all it is not known where they do, and every microbatch counts for itself.
        """
        if self.population is not None:
            return Sampling(self.num_sequences, self.population)
        begins = (self.tokens == self.separator).any(1) if self.separator is not None else np.zeros(0, bool)
        if not begins.any():
            return Sampling(self.num_sequences)
        new = [bool(begins[k : k + microbatch].any()) for k in range(0, self.num_sequences, microbatch)]
        return Sampling(self.num_sequences, clusters=tuple(np.cumsum([True, *new[1:]]).tolist()))

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
            InputError: `microbatch` below 1.
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


def random_blocks(*, seq_len: int, vocab_size: int, sequences: int, seed: int = 0) -> TokenBlocks:
    """`sequences` blocks of independent tokens, uniform over the vocabulary; the seed decides them."""
    check_sizes(seq_len, sequences)
    check_seed(seed)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (sequences, seq_len + 1))
    return full_blocks(tokens)


def pad_ragged(lists: Sequence[Sequence[int]], seq_len: int, vocab_size: int | None = None) -> TokenBlocks:
    """One block per list of tokens; what is missing up to `seq_len + 1` is filled with token 0 of weight 0.

    Raises:
        InputError: No lists, a list with fewer than 2 or more than `seq_len + 1` tokens, or a bad token.
    """
    check_sizes(seq_len, None)
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
        InputError: Another shape or no integers, or a label that is neither its token nor -100.
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
    """`tokens` themselves, if they are integers in [0, vocab_size) (None: in [0, 2^31)), an InputError otherwise."""
    if tokens.dtype.kind not in "iu":  # timedelta64 is a subtype of np.integer
        raise InputError(f"{name}: the tokens are {tokens.dtype}; they must be integers.")
    limit = 2**31 if vocab_size is None else vocab_size
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= limit:
        bad = low if low < 0 else high
        raise InputError(f"{name}: token {bad} is outside the vocabulary, 0 to {limit - 1}.")
    return tokens


def check_sizes(seq_len: int, sequences: int | None) -> None:
    """Raises InputError where one of them is below 1."""
    if seq_len < 1:
        raise InputError(f"seq_len is {seq_len}; it must be at least 1.")
    if sequences is not None and sequences < 1:
        raise InputError(f"sequences is {sequences}; it must be at least 1.")


def full_blocks(tokens: np.ndarray) -> TokenBlocks:
    """Blocks [N, T + 1] of which every token counts."""
    return TokenBlocks(tokens, np.ones((tokens.shape[0], tokens.shape[1] - 1), np.float32))
