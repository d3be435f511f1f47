"""What a user calls the data: hub data sets (a local folder stands for the hub) and the model's own tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.text import hub_documents, load_blocks
from jaxhess.data import pack
from jaxhess.data.reading import ENCODED_AT_ONCE

TINY = Path(__file__).parents[2] / "scripts" / "tiny"
TEXTS = ["def f(x):\n    return x\n", "import os\n", "class A:\n    pass\n"]


@pytest.fixture
def data_set(tmp_path) -> Path:
    rows = [json.dumps({"text": text, "code": text.upper()}) for text in TEXTS]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_a_data_set_streams_its_texts(data_set):
    assert list(hub_documents(str(data_set))) == TEXTS
    assert list(hub_documents(f"{data_set}:train:code")) == [text.upper() for text in TEXTS]


def test_documents_are_tokenised_whole_and_joined_by_end_of_text(data_set):
    tokenizer = convert.load_tokenizer(TINY)
    blocks = load_blocks(f"hub:{data_set}", TINY, seq_len=7, vocab_size=2000)
    expected = []
    for text in TEXTS:
        expected += ([tokenizer.eos_token_id] if expected else []) + tokenizer(text)["input_ids"]
    kept = len(expected) // 8 * 8
    np.testing.assert_array_equal(blocks.tokens.ravel(), expected[:kept])


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("{}:test", "cannot be read"),
        ("{}:train:body", "no column 'body'; its columns are text, code"),
        ("{}:train:text:more", "write hub:NAME"),
    ],
)
def test_a_bad_address_is_refused_in_a_sentence(data_set, address, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(hub_documents(address.format(data_set)))


def test_a_tokenizer_of_another_model_is_named():
    with pytest.raises(ValueError, match="they do not belong together"):
        load_blocks(str(TINY / "sample.txt"), TINY, seq_len=8, vocab_size=100, sequences=2)


# Whitespace as code and prose have it; every second word is followed by something that a cut must not change.
PROSE = (TINY / "sample.txt").read_text()[:20_000] + "\n".join(
    [
        "It's 12345 o'clock;",
        "",
        "  x = [1,2]  # done.",
        "\tif (a&&b) {}...",
        "naïve Größe 東京 مرحبا",
        "a  b   c",
        "end.  \r",
        "A",
    ]
    * 20
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "GPT-2, GPT-NeoX": None,
    "Llama 3": _WORDS.replace("DIGITS", r"\p{N}{1,3}"),
    "Qwen 2": _WORDS.replace("DIGITS", r"\p{N}"),
}
"""How published tokenizers split text into words, within which alone they merge bytes; None: GPT-2's rule."""


@pytest.mark.parametrize("name", SPLITS)
def test_cutting_a_long_text_does_not_change_its_tokens(name, monkeypatch):
    import tokenizers
    from tokenizers import Regex, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    if SPLITS[name] is None:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), "isolated")
        words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.pre_tokenizer = words
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [PROSE], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    parts = []

    def encode(text):
        parts.append(text)
        return tokenizer.encode(text).ids

    whole = tokenizer.encode(PROSE).ids
    for size in (200, 277, 1000):
        monkeypatch.setattr("jaxhess.data.reading.ENCODED_AT_ONCE", size)
        cut = pack([PROSE], encode, seq_len=1, vocab_size=900).tokens.ravel()
        np.testing.assert_array_equal(cut, whole[: cut.size])
        assert len(whole) - cut.size < 2
    assert len(parts) > 200


def test_a_column_that_holds_no_text_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": i}) for i in range(3)))
    with pytest.raises(ValueError, match=r"cannot be read .*row 0 holds 0 in column 'text'; it must be text"):
        list(hub_documents(str(tmp_path)))


LINE = """
import resource, sys
from tokenizers import Tokenizer
from jaxhess.data import read_blocks
tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.encode("warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_blocks(sys.argv[2], seq_len=100, vocab_size=2000, encode=lambda text: tokenizer.encode(text).ids)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
def test_a_text_of_one_line_takes_memory_for_a_part_at_a_time(tmp_path):
    """Tokenised whole it took 170 times its size."""
    line = " ".join((TINY / "sample.txt").read_text().split())
    size = 4 * 2**20
    (tmp_path / "line.txt").write_text((line * (size // len(line) + 1))[:size])
    command = [sys.executable, "-c", LINE, TINY / "tokenizer.json", tmp_path / "line.txt"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=TINY.parent.parent)
    assert int(done.stdout) < 400 * ENCODED_AT_ONCE + 10 * size  # a part in the tokenizer; text, its bytes and tokens
