"""The text that the embedded model is trained on: files, tokenizer, blocks, and the excerpt that is kept with it."""

from __future__ import annotations

import dataclasses
import platform
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxhess.data import TEXT_SUFFIXES, TokenBlocks, pack, read_documents

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_EVERY = 20  # every twentieth file is never trained on
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
"""Folders of the standard library that are other people's code, tests, or tables rather than program text."""

PIECE = 2000  # characters


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by name, whole files either trained on or held out."""

    train: dict[str, str]
    held_out: dict[str, str]


def read_corpus(folder: Path | None = None) -> Corpus:
    """The files of this Python's standard library, without `LEFT_OUT`, or the text files of `folder`; sorted by name.

    Raises:
        InputError: As `read_documents`.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    corpus = Corpus({}, {})
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root)
        if folder is None and (
            file.suffix != ".py" or LEFT_OUT & set(name.parts) or name.name.startswith("_sysconfig")
        ):
            continue  # the _sysconfigdata modules hold the build machine's paths
        if file.suffix not in TEXT_SUFFIXES or not file.is_file():
            continue
        text = next(read_documents(file))[1]
        if text:
            index = len(corpus.train) + len(corpus.held_out)
            (corpus.held_out if index % HELD_OUT_EVERY == 1 else corpus.train)[name.as_posix()] = text
    return corpus


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer in which the end-of-text token is 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenise(texts: dict[str, str], tokenizer: Tokenizer, seq_len: int, name: str) -> TokenBlocks:
    """Blocks of the texts with the end-of-text token between them; `name` is for error messages."""
    return pack(
        texts.values(),
        lambda text: tokenizer.encode(text).ids,
        seq_len=seq_len,
        vocab_size=tokenizer.get_vocab_size(),
        end_of_text=tokenizer.token_to_id(END_OF_TEXT),
        name=f"The text ({name})",
    )


def text_figures(corpus: Corpus, tokenizer: Tokenizer, blocks: dict[str, TokenBlocks]) -> dict[str, Any]:
    """Sizes of the text, and what a model without context would lose on the held-out files (nats per token)."""
    size = tokenizer.get_vocab_size()
    train, held_out = (np.bincount(blocks[k].tokens.ravel(), minlength=size) for k in ("train", "held_out"))
    seen = (train + 1) / (train + 1).sum()
    frequency = held_out / held_out.sum()
    present = frequency[frequency > 0]
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out.values())
    return {
        "python": platform.python_version(),
        "train_files": len(corpus.train),
        "held_out_files": len(corpus.held_out),
        "train_tokens": int(train.sum()),
        "held_out_tokens": int(held_out.sum()),
        "held_out_bytes_per_token": held_out_bytes / int(held_out.sum()),
        "held_out_unigram_entropy": float(-(present * np.log(present)).sum()),
        "held_out_loss_of_training_unigrams": float(-(frequency * np.log(seen)).sum()),
    }


def excerpt(corpus: Corpus, size: int, seed: int) -> tuple[str, dict[str, Any]]:
    """About `size` bytes of text in pieces, in turn from the training files and the held-out ones, and their names.

    Pieces are drawn without repetition, so that any stretch of the excerpt mixes many files of both kinds. Files with
    a copyright notice of their own are left out: the licence beside the excerpt then covers all of it.
    """
    rng = random.Random(seed)
    drawn: list[list[tuple[str, str]]] = []
    for texts in (corpus.train, corpus.held_out):
        plain = {name: text for name, text in texts.items() if "copyright" not in text.lower()}
        pieces = [(name, piece) for name, text in plain.items() for piece in pieces_of(text)]
        drawn.append(rng.sample(pieces, len(pieces)))
    kept = {"train_files": list[str](), "held_out_files": list[str]()}
    excerpts: list[str] = []
    for pair in zip(*drawn, strict=False):
        for names, (name, piece) in zip(kept.values(), pair, strict=True):
            names.append(name)
            excerpts.append(piece)
            size -= len(piece.encode())
        if size <= 0:
            break
    return "".join(excerpts), kept


def pieces_of(text: str) -> list[str]:
    """The text cut before lines without indentation into pieces of `PIECE` to twice that many characters."""
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) >= PIECE and line[0] not in " \t\n)]}":
            pieces.append("")
        pieces[-1] += line
    return [piece.rstrip("\n") + "\n\n\n" for piece in pieces if PIECE <= len(piece) <= 2 * PIECE]
