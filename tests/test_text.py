"""What a user calls the data: hub data sets (a local folder stands for the hub) and the model's own tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.text import hub_documents, load_blocks

TINY = Path(__file__).parent.parent / "scripts" / "tiny"
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
        ("{}:test", "cannot be opened"),
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
