"""Packing keeps every token but the tail, padding weighs nothing, bad input is refused with a sentence."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest

from jaxhess.data import (
    TokenBlocks,
    label_weights,
    pack,
    pad_ragged,
    random_blocks,
    read_blocks,
    read_documents,
)
from jaxhess.data.reading import ENCODED_AT_ONCE
from jaxhess.distributed.mesh import make_mesh


def encode(text: str) -> list[int]:
    return list(text.encode())


def blocks_of(sequences: int = 5, seq_len: int = 7, seed: int = 0) -> TokenBlocks:
    """Random tokens with random weights of 0 and 1."""
    blocks = random_blocks(seq_len=seq_len, vocab_size=50, sequences=sequences, seed=seed)
    return TokenBlocks(blocks.tokens, np.random.default_rng(seed).integers(0, 2, blocks.weights.shape))


# Packing


def test_packing_loses_nothing_but_the_tail() -> None:
    texts = ["hello world", "", "a", "more text than fits"]
    blocks = pack(texts, encode, seq_len=4, vocab_size=256, end_of_text=0)
    stream = list(b"hello world\0a\0more text than fits")
    assert blocks.tokens.ravel().tolist() == stream[: len(stream) // 5 * 5]
    assert blocks.tokens.dtype == np.int32
    assert blocks.weights.dtype == np.float32
    assert np.all(blocks.weights == 1)


def test_documents_are_joined_without_separator_if_there_is_none() -> None:
    blocks = pack(["abc", "def"], encode, seq_len=2, vocab_size=256)
    assert blocks.tokens.tolist() == [list(b"abc"), list(b"def")]


def test_no_document_is_read_beyond_the_sequences_asked_for() -> None:
    def documents():
        yield "abcdefgh"
        raise AssertionError("read on")

    assert pack(documents(), encode, seq_len=3, vocab_size=256, sequences=2).num_sequences == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short", ["short"]),
        ("one two three", ["one two", " three"]),  # before a space
        ("one\ntwo\nthree", ["one\n", "two\n", "three"]),  # after a line end
        ("one two\nthree", ["one two", "\nthree"]),  # a line end that is not behind the middle is none
        ("a\n\n\tb    c", ["a\n\n\tb", "    c"]),  # any other whitespace
        ("abcdefghijklm", ["abcdefgh", "ijklm"]),  # none at all
        ("a\u2003bcdefghi", ["a\u2003bcdefg", "hi"]),  # none behind the middle
    ],
)
def test_long_documents_are_tokenised_in_parts_cut_where_it_harms_least(monkeypatch, text, expected) -> None:
    monkeypatch.setattr("jaxhess.data.reading.ENCODED_AT_ONCE", 8)
    parts: list[str] = []

    def recording(part: str) -> list[int]:
        parts.append(part)
        return encode(part)

    blocks = pack(["x", text, "y"], recording, seq_len=1, vocab_size=256, end_of_text=0)
    assert parts == ["x", *expected, "y"]
    stream = f"x\0{text}\0y".encode()
    assert bytes(blocks.tokens.ravel().tolist()) == stream[: len(stream) // 2 * 2]


def test_one_long_line_takes_memory_for_its_parts_only() -> None:
    """What a tokenizer needs is some hundred bytes for each character of a part; here it is exactly 100."""
    sizes = []

    def costly(part: str) -> list[int]:
        sizes.append(len(part))
        assert bytearray(100 * len(part))
        return [1] * (len(part) // 8)

    text = "seven b " * 2**19  # four megabytes in one line
    tracemalloc.start()
    blocks = pack([text], costly, seq_len=127, vocab_size=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == len(text)
    assert max(sizes) <= ENCODED_AT_ONCE
    assert blocks.tokens.size > len(text) // 9
    # A part's cost, and tokens four times over: parts and whole as int64, blocks as int32, weights
    assert peak < 101 * ENCODED_AT_ONCE + 24 * len(text) // 8 + 2**21


def test_folders_are_read_recursively_in_the_order_of_their_paths(tmp_path) -> None:
    for name in ("b.txt", "a/z.py", "a/b/c.md", ".hidden/x.txt", "a/.x.txt", "image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [text for _, text in read_documents(tmp_path)] == ["a/b/c.md", "a/z.py", "b.txt"]


def test_a_file_named_directly_is_read_whatever_its_suffix_and_keeps_its_line_ends(tmp_path) -> None:
    (tmp_path / "log.xyz").write_bytes("\ufeffone\r\ntwo é".encode())
    assert [text for _, text in read_documents(tmp_path / "log.xyz")] == ["one\r\ntwo é"]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, ">i4"])
def test_token_arrays_are_used_as_they_are_and_streams_are_cut(tmp_path, dtype) -> None:
    stream = np.arange(23).astype(dtype)
    np.save(tmp_path / "stream.npy", stream)
    np.save(tmp_path / "rows.npy", stream[:20].reshape(4, 5))
    cut = read_blocks(tmp_path / "stream.npy", seq_len=4, vocab_size=23)
    rows = read_blocks(tmp_path / "rows.npy", seq_len=4, vocab_size=23)
    np.testing.assert_array_equal(cut.tokens, np.arange(20).reshape(4, 5))
    np.testing.assert_array_equal(rows.tokens, cut.tokens)
    two = read_blocks(tmp_path / "stream.npy", seq_len=4, vocab_size=10, sequences=2)  # what is not taken is not judged
    np.testing.assert_array_equal(two.tokens, cut.tokens[:2])


def test_weights_and_labels_are_read_beside_the_tokens(tmp_path) -> None:
    tokens = np.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    labels = np.asarray([[-100, 2, -100, 4], [5, 6, 7, -100]])
    weights = np.asarray([[1, 0, 1], [1, 1, 0]])
    np.savez(tmp_path / "labels.npz", tokens=tokens, labels=labels)
    np.savez(tmp_path / "weights.npz", tokens=tokens, weights=weights)
    for name in ("labels.npz", "weights.npz"):
        np.testing.assert_array_equal(read_blocks(tmp_path / name, seq_len=3, vocab_size=9).weights, weights)


def test_ragged_lists_are_padded_with_weight_zero() -> None:
    blocks = pad_ragged([[3, 4], [5, 6, 7, 8]], seq_len=3)
    assert blocks.tokens.tolist() == [[3, 4, 0, 0], [5, 6, 7, 8]]
    assert blocks.weights.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_random_tokens_follow_the_seed_and_cover_the_vocabulary() -> None:
    one, again, other = (random_blocks(seq_len=99, vocab_size=7, sequences=3, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.tokens, again.tokens)
    assert np.any(one.tokens != other.tokens)
    assert set(one.tokens.ravel()) == set(range(7))


# Microbatches


@pytest.mark.parametrize("axes", [None, "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=4"])
@pytest.mark.parametrize("microbatch", [1, 2, 3, 8, 100])
def test_microbatches_hold_every_sequence_once_and_padding_weighs_nothing(axes, microbatch) -> None:
    blocks = blocks_of(sequences=21)
    mesh = None if axes is None else make_mesh(axes)
    batches = blocks.microbatches(microbatch, mesh)
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    assert batches.tokens.shape[1] == -(-min(microbatch, 21) // shards) * shards
    tokens = np.asarray(batches.tokens).reshape(-1, 8)
    weights = np.asarray(batches.weights).reshape(-1, 7)
    assert tokens.shape[0] - 21 < batches.tokens.shape[1]
    np.testing.assert_array_equal(tokens[:21], blocks.tokens)
    np.testing.assert_array_equal(weights[:21], blocks.weights)
    assert not tokens[21:].any()
    assert not weights[21:].any()


@pytest.mark.parametrize(("axes", "shards"), [("fsdp=8", 8), ("fsdp=4,tensor=2", 4), ("data=2,fsdp=4", 8)])
def test_each_device_holds_its_part_of_every_microbatch(axes, shards) -> None:
    batches = blocks_of(sequences=16).microbatches(8, make_mesh(axes))
    assert batches.tokens.shape == (2, 8, 8)
    for array in batches:
        parts = {str(shard.index) for shard in array.addressable_shards}
        assert len(parts) == shards
        assert {s.data.shape for s in array.addressable_shards} == {(2, 8 // shards, array.shape[2])}


# Fingerprint


def test_fingerprint_ignores_padding_rows_and_what_stands_in_padding() -> None:
    blocks = blocks_of()
    batches = blocks.microbatches(4, make_mesh("fsdp=4", jax.devices()[:4]))
    placed = TokenBlocks(np.asarray(batches.tokens).reshape(-1, 8), np.asarray(batches.weights).reshape(-1, 7))
    assert placed.num_sequences == 8
    assert placed.fingerprint() == blocks.fingerprint()
    one, other = (TokenBlocks(np.asarray([[1, 2, 3, pad]]), np.asarray([[0, 1, 0]])) for pad in (0, 9))
    assert one.fingerprint() == other.fingerprint()


def test_fingerprint_sees_every_token_that_matters_and_every_weight() -> None:
    tokens, weights = np.asarray([[1, 2, 3, 4], [5, 6, 7, 8]]), np.asarray([[1, 0, 1], [1, 1, 1]])
    prints = {TokenBlocks(tokens, weights).fingerprint(), TokenBlocks(tokens[:1], weights[:1]).fingerprint()}
    for n, t in np.ndindex(tokens.shape):
        changed = tokens.copy()
        changed[n, t] += 10
        prints.add(TokenBlocks(changed, weights).fingerprint())
    for n, t in np.ndindex(weights.shape):
        changed = weights.copy()
        changed[n, t] = 1 - changed[n, t]
        prints.add(TokenBlocks(tokens, changed).fingerprint())
    assert len(prints) == 2 + 8 + 6


def test_fingerprint_is_of_little_endian_integers_and_floats_whatever_the_arrays_are() -> None:
    tokens = np.arange(8).reshape(2, 4)
    prints = {TokenBlocks(tokens.astype(t), np.ones((2, 3), "f8")).fingerprint() for t in ("i8", ">i4", "u2")}
    assert prints == {hashlib.sha256(struct.pack("<2q8i6f", 2, 3, *range(8), *[1.0] * 6)).hexdigest()}


# Bad input


def npy(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    return tmp_path / "x.npy"


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    return tmp_path / "x.npz"


def renamed(path, name: str):
    return path.rename(path.parent / name)


def headed(tmp_path, header: dict, name: str = "x.npy"):
    """A `.npy` with this header before a hundred bytes, alone or in an archive."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i4", "fortran_order": False, "shape": (3, 4)} | header)
    content = stream.getvalue() + bytes(100)
    if name.endswith(".npy"):
        return text(tmp_path, content, name)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("tokens.npy", content)
    return tmp_path / name


def with_bytes(path, place: bytes, offset: int, value: bytes):
    """Some bytes behind the first occurrence of others replaced."""
    content = bytearray(path.read_bytes())
    at = content.index(place) + offset
    content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


def deflated(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", tokens=GOOD)
    return tmp_path / "x.npz"


def special(tmp_path, make, name: str = "x.txt"):
    make(tmp_path / name)
    return tmp_path / name


def listening(path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def text(tmp_path, content: bytes, name: str = "x.txt"):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


GOOD = np.arange(12).reshape(3, 4)
BAD_SOURCES = {
    "missing": (lambda t: t / "none.txt", "none.txt: no such file"),
    "empty file": (lambda t: text(t, b""), "x.txt is empty"),
    "empty folder": (lambda t: t, "no text files under this folder"),
    "short text": (lambda t: text(t, b"abc"), "x.txt has 3 tokens; one block of seq_len=3 needs 4"),
    "too few blocks": (
        lambda t: text(t, b"abcdefghij"),
        "10 tokens, which make 2 blocks .* 3 sequences were asked for",
    ),
    "not utf-8": (lambda t: text(t, b"ab\xff"), r"x.txt is not UTF-8 text \(byte 2"),
    "folder with a bad file": (lambda t: text(t, b"ab\xff").parent, "x.txt is not UTF-8"),
    "token outside the vocabulary": (lambda t: text(t, "é".encode() * 9), "x.txt: token 195 is outside .* 0 to 127"),
    "other width": (lambda t: npy(t, np.arange(15).reshape(3, 5)), r"shape \[3, 5\]; with seq_len=3 .* 4\]"),
    "three axes": (lambda t: npy(t, np.zeros((2, 4, 4), int)), r"shape \[2, 4, 4\]"),
    "float tokens": (lambda t: npy(t, GOOD * 1.0), "x.npy: tokens: the tokens are float64; they must be integers"),
    "float stream": (lambda t: npy(t, np.ones(50)), "the tokens are float64"),
    "booleans": (lambda t: npy(t, GOOD > 3), "the tokens are bool"),
    "objects": (lambda t: npy(t, np.asarray([[1], [2, 3]], object)), "x.npy cannot be read"),
    "negative": (lambda t: npy(t, GOOD - 1), "token -1 is outside"),
    "too large": (lambda t: npy(t, GOOD + 200), "token 211 is outside the vocabulary, 0 to 127"),
    "few rows": (lambda t: npy(t, GOOD[:2]), "make 2 blocks"),
    "no rows": (lambda t: npy(t, GOOD[:0]), "has 0 tokens"),
    "empty stream": (lambda t: npy(t, np.zeros(0, int)), "has 0 tokens"),
    "not an array file": (lambda t: text(t, b"hello", "x.npy"), "x.npy cannot be read"),
    "empty array file": (lambda t: text(t, b"", "x.npy"), "x.npy cannot be read"),
    "not an archive": (lambda t: text(t, b"hello", "x.npz"), "x.npz cannot be read"),
    "no tokens": (lambda t: npz(t, data=GOOD), "x.npz holds data; it must hold tokens"),
    "both": (lambda t: npz(t, tokens=GOOD, labels=GOOD, weights=GOOD[:, 1:]), "weights or labels"),
    "weights of other shape": (lambda t: npz(t, tokens=GOOD, weights=GOOD), r"shape \[3, 4\]; .* need \[3, 3\]"),
    "negative weights": (lambda t: npz(t, tokens=GOOD, weights=-GOOD[:, 1:]), "not negative"),
    "nan weights": (lambda t: npz(t, tokens=GOOD, weights=GOOD[:, 1:] * np.nan), "finite"),
    "zero weights": (lambda t: npz(t, tokens=GOOD, weights=GOOD[:, 1:] * 0), "All weights are zero"),
    "all labels ignored": (lambda t: npz(t, tokens=GOOD, labels=GOOD * 0 - 100), "All weights are zero"),
    "foreign labels": (lambda t: npz(t, tokens=GOOD, labels=GOOD + 1), r"labels\[0, 0\] is 1 but the token there is 0"),
    "more rows of weights": (
        lambda t: npz(t, tokens=GOOD, weights=np.ones((5, 3))),
        r"x.npz: weights have shape \[5, 3\], tokens \[3, 4\]",
    ),
    "more rows of labels": (lambda t: npz(t, tokens=GOOD, labels=np.ones((5, 4), int)), r"x.npz: labels have shape"),
    "weights without axes": (lambda t: npz(t, tokens=GOOD, weights=np.float32(1)), r"x.npz: weights have shape \[\]"),
    "complex weights": (lambda t: npz(t, tokens=GOOD, weights=GOOD[:, 1:] * 1j), "weights are complex128; they must"),
    "dates as weights": (lambda t: npz(t, tokens=GOOD, weights=GOOD[:, 1:].astype("M8[s]")), "weights are datetime64"),
    "text as weights": (lambda t: npz(t, tokens=GOOD, weights=GOOD[:, 1:].astype(str)), "x.npz cannot be read .* <U21"),
    "infinite as float32": (lambda t: npz(t, tokens=GOOD, weights=GOOD[:, 1:] * 1e300), "weights must be finite"),
    "float labels": (lambda t: npz(t, tokens=GOOD, labels=GOOD * 1.0), "labels are float64; they must be integers"),
    "time differences": (lambda t: npy(t, GOOD.astype("m8[s]")), "the tokens are timedelta64.*must be integers"),
    "archive named npy": (lambda t: renamed(npz(t, tokens=GOOD), "x.npy"), "is an archive of arrays: name it .npz"),
    "array named npz": (lambda t: renamed(npy(t, GOOD), "x.npz"), "is a single array: name it .npy"),
    "negative shape": (lambda t: headed(t, {"shape": (-3, 4)}), r"its header promises shape \[-3, 4\]"),
    "more than the file": (lambda t: headed(t, {"shape": (3, 2**40)}), "its header promises shape"),
    "overflowing shape": (lambda t: headed(t, {"shape": (2**62, 2**62)}), "its header promises shape"),
    "more than the member": (lambda t: headed(t, {"shape": (3, 2**40)}, "x.npz"), "its header promises shape"),
    "negative in an archive": (lambda t: headed(t, {"shape": (-3, -4)}, "x.npz"), "its header promises shape"),
    "structure": (lambda t: headed(t, {"descr": [("a", "<i4")]}), "x.npy cannot be read .* it holds"),
    "bad zlib": (
        lambda t: with_bytes(deflated(t), b"tokens.npy", 30, b"\xff" * 9),
        "x.npz cannot be read .*decompress",
    ),
    "encrypted": (
        lambda t: with_bytes(with_bytes(npz(t, tokens=GOOD), b"PK\1\2", 8, b"\1"), b"PK\3\4", 6, b"\1"),
        "x.npz cannot be read .*encrypted",
    ),
    "not a member of numpy": (
        lambda t: with_bytes(npz(t, tokens=GOOD), b"\x93NUMPY", 0, b"hello!"),
        "x.npz cannot be read",
    ),
    "pipe": (lambda t: special(t, os.mkfifo), "x.txt is a pipe, device, socket or folder; only regular files"),
    "pipe in a folder": (lambda t: special(t, os.mkfifo).parent, "x.txt is a pipe"),
    "pipe of tokens": (lambda t: special(t, os.mkfifo, "x.npy"), "x.npy is a pipe"),
    "socket": (lambda t: special(t, listening), "x.txt is a pipe"),
    "link to a device": (lambda t: special(t, lambda p: p.symlink_to("/dev/zero")), "x.txt is a pipe"),
    "link to a device in a folder": (
        lambda t: special(t, lambda p: p.symlink_to("/dev/zero")).parent,
        "x.txt is a pipe",
    ),
    "device": (lambda t: "/dev/zero", "/dev/zero is a pipe"),
    "link to nothing in a folder": (
        lambda t: special(t, lambda p: p.symlink_to("no")).parent,
        "cannot be read .No such",
    ),
    "link to itself": (lambda t: special(t, lambda p: p.symlink_to(p)).parent, "x.txt cannot be read"),
    "labels of other shape": (lambda t: npz(t, tokens=GOOD, labels=GOOD[:, 1:]), r"labels have shape \[3, 3\]"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_sources_are_refused_with_a_sentence(name, tmp_path) -> None:
    make, sentence = BAD_SOURCES[name]
    with pytest.raises(ValueError, match=sentence):
        read_blocks(make(tmp_path), seq_len=3, vocab_size=128, sequences=3, encode=encode)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: random_blocks(seq_len=3, vocab_size=9, sequences=0), "sequences is 0; it must be at least 1"),
        (lambda: random_blocks(seq_len=0, vocab_size=9, sequences=1), "seq_len is 0; it must be at least 1"),
        (lambda: pack(["", ""], encode, seq_len=3, vocab_size=256), "text is empty"),
        (lambda: pad_ragged([], 3), "no token lists"),
        (lambda: pad_ragged([[1, 2], [1]], 3), "Token list 1 has 1 tokens; with seq_len=3 it must have 2 to 4"),
        (lambda: pad_ragged([[1] * 5], 3), "Token list 0 has 5 tokens"),
        (lambda: pad_ragged([[1, 9]], 3, vocab_size=9), "token list 0: token 9 is outside the vocabulary, 0 to 8"),
        (lambda: pad_ragged([[1.0, 2.0]], 3), "must be integers"),
        (lambda: blocks_of().microbatches(0), "microbatch is 0; it must be at least 1"),
        (lambda: TokenBlocks(np.arange(4), np.ones(3)), r"tokens have shape \[4\]"),
        (lambda: TokenBlocks(np.full((1, 2), 2**40), np.ones((1, 1))), "outside the vocabulary"),
        (lambda: label_weights(GOOD, GOOD[:2]), "labels have shape"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(call, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_text_without_a_tokenizer_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        read_blocks(text(tmp_path, b"hello"), seq_len=3, vocab_size=128)
