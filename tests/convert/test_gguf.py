"""GGUF files: to the bit what `transformers` and `gguf` read, in any slice, and errors that name the cause."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import torch
from gguf_checkpoints import add_tensor, gguf, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

import convert
from convert.__main__ import main
from convert.gguf_file import GgufFile
from convert.named_parameters import tensors_by_name
from convert.verify import verify
from jaxhess.distributed.mesh import make_mesh
from jaxhess.errors import InputError

pytest.importorskip("accelerate")  # transformers loads GGUF with it


def assert_same_bits(ours: dict[str, np.ndarray], theirs: Any) -> None:
    expected = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(ours[name].view(np.uint32), values.view(np.uint32), err_msg=name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    write_gguf(file, "llama", "Q8_0")
    return file


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("llama", "F32", {"tie_word_embeddings": True}),
        ("llama", "Q4_1", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("qwen2", "Q4_0", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ("qwen3", "BF16", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("qwen3", "F16", {"head_dim": 128, "tie_word_embeddings": True}),
    ],
)
def test_weights_and_sizes_are_those_that_transformers_reads(
    family: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    written = write_gguf(tmp_path / "x.gguf", family, kind, **options)
    model = convert.load(tmp_path)  # the only GGUF file there
    assert model.config.dtype == "float32"
    ours = tensors_by_name(model.params, model.config)
    source = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "x.gguf"}
    assert_same_bits(ours, AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32))
    if kind == "F32":  # and what was written, with no other reader between
        assert_same_bits(ours, written)
    theirs = convert.read_config(_saved(AutoConfig.from_pretrained(**source), tmp_path / "config.json"))
    assert theirs == convert.read_config(tmp_path / "x.gguf") == model.config


def _saved(config: Any, file: Path) -> Path:
    file.write_text(json.dumps({key: x for key, x in config.to_dict().items() if key != "unk_token_id"}))
    return file


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"head_dim": 32, "attention_bias": True})],
)
def test_biases_and_head_sizes_that_transformers_leaves_out_are_read(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "x.gguf"
    written = write_gguf(file, family, **options)
    model = convert.load(file)
    assert_same_bits(tensors_by_name(model.params, model.config), written)
    assert verify(file, file, dtype="float32").within_rounding  # its tensors by transformers, the configuration ours


def test_every_type_is_read_in_any_slice_as_gguf_dequantizes_the_whole(tmp_path: Path) -> None:
    """Random bytes, infinite and NaN scales among them."""
    rng = np.random.default_rng(0)
    kinds = [kind for kind in gguf.quants._type_traits if kind.name != "BF16"]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for kind in kinds:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor(kind.name, rng.integers(0, 256, (5, 512 // block * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert len(kinds) > 20
    for kind, tensor in zip(kinds, gguf.GGUFReader(tmp_path / "x.gguf").tensors, strict=True):
        assert file.tensors[kind.name].shape == (5, 512)
        with np.errstate(all="ignore"):
            whole = gguf.dequantize(np.array(tensor.data), kind)
        for rows, columns in ((slice(0, 5), slice(0, 512)), (slice(2, 4), slice(37, 291)), (slice(4, 5), slice(0, 1))):
            read = file.read(kind.name, (rows, columns))
            np.testing.assert_array_equal(read.view(np.uint32), whole[rows, columns].view(np.uint32), err_msg=kind.name)


def test_every_mesh_holds_the_same_weights(llama: Path) -> None:
    one = convert.load(llama)
    sharded = convert.load(llama, make_mesh("fsdp=4,tensor=2"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), sharded.params, one.params)
    narrow = convert.load(llama, dtype="bfloat16")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b.astype(jnp.bfloat16))),
        narrow.params,
        one.params,
    )


def test_the_header_is_what_gguf_reads(llama: Path) -> None:
    file, reader = GgufFile(llama), gguf.GGUFReader(llama)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            expected = field.contents()
            texts = isinstance(expected, list) and isinstance(expected[0], str)
            assert file.fields[key] == (len(expected) if texts else expected), key
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        own = file.tensors[tensor.name]
        assert (own.offset, own.kind) == (tensor.data_offset, tensor.tensor_type.name)
        assert list(own.shape) == list(reversed(tensor.shape.tolist()))


def test_the_tokenizer_is_in_the_file(llama: Path) -> None:
    tokenizer = convert.load_tokenizer(llama)
    assert tokenizer.convert_ids_to_tokens(tokenizer("AB A").input_ids) == ["AB", "Ġ", "A"]
    assert tokenizer.eos_token_id == 1


def test_it_converts_to_both_formats_with_its_tokenizer(llama: Path, tmp_path: Path) -> None:
    expected = convert.load(llama)
    main([str(llama), str(tmp_path / "orbax"), "--verify"])
    main([str(llama), str(tmp_path / "hf"), "--export", "--verify"])
    for folder in (tmp_path / "orbax", tmp_path / "hf"):
        again = convert.load(folder)
        assert again.config == expected.config
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), again.params, expected.params)
        assert convert.load_tokenizer(folder)("AB A").input_ids == convert.load_tokenizer(llama)("AB A").input_ids


def _llama3(head_dim: int, theta: float, factor: float, low: float = 1, high: float = 4, length: int = 8192) -> Any:
    """`rope_freqs` as llama.cpp's convert_hf_to_gguf.py computes them."""
    found = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim):
        wavelength = 2 * np.pi / frequency
        smooth = (length / wavelength - low) / (high - low)
        inside = 1 / ((1 - smooth) / factor + smooth)
        found.append(1 if wavelength < length / high else factor if wavelength > length / low else inside)
    return np.array(found)


def test_rope_scaling_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    options = {"head_dim": 64, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    write_gguf(file, "llama", **options)
    add_tensor(file, "rope_freqs.weight", _llama3(64, 5e5, 32))
    rope = convert.load_config(file).rope
    assert rope is not None
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("llama3", 32, 8192)
    write_gguf(file, "llama", **options)
    add_tensor(file, "rope_freqs.weight", _llama3(64, 5e5, 32, high=5))
    with pytest.raises(InputError, match=r"rope_freqs.weight in .* by other factors than those of Llama 3\.1"):
        convert.load_config(file)

    scaling = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    write_gguf(file, "qwen2", fields={**scaling, "qwen2.rope.scaling.original_context_length": 16})
    rope = convert.read_config(file).rope
    assert rope is not None
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("yarn", 4.0, 16)


def _fields(**fields: Any) -> Callable[[Path], Any]:
    return lambda file: write_gguf(file, "llama", fields={key.replace("__", "."): x for key, x in fields.items()})


def _keep(share: float) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def _replace(old: bytes, new: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(file.read_bytes().replace(old, new))


def _architecture(name: str) -> Callable[[Path], Any]:
    def write(file: Path) -> None:
        writer = gguf.GGUFWriter(file, name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


SPOILED: list[tuple[Callable[[Path], Any], str]] = [
    (_keep(0.99), "x.gguf is truncated or damaged"),
    (_keep(0.1), "x.gguf is truncated or damaged"),
    (_keep(0), "x.gguf is truncated or damaged (0 bytes): its header is not complete."),
    (lambda f: f.write_bytes(b"GGML" + f.read_bytes()[4:]), "is no GGUF file"),
    (lambda f: f.write_bytes(b"GGUF\1" + f.read_bytes()[5:]), "is GGUF version 1; versions 2 and 3"),
    (lambda f: f.write_bytes(f.read_bytes()[:8] + b"\xff" * 8 + f.read_bytes()[16:]), "truncated or damaged"),
    (_replace(b"llama.block_count", b"llama.block_cuont"), "has llama.block_cuont 2, which is not understood"),
    (_replace(b"blk.1.ffn_up.", b"blk.1.ffn_uq."), "Tensor model.layers.1.mlp.up_proj.weight is missing from"),
    (_replace(b"token_embd.weight", b"token_emde.weight"), "Tensor model.embed_tokens.weight is missing from"),
    (_architecture("mamba"), "has general.architecture 'mamba', which is not read from GGUF; llama, qwen2, qwen3 are."),
    (_architecture("llama"), "has no llama.embedding_length"),
    (_fields(llama__expert_count=8), "has llama.expert_count 8, which is not understood for llama"),
    (_fields(llama__attention__sliding_window=8), "has llama.attention.sliding_window 8, which is not understood"),
    (_fields(llama__attention__value_length=8), "has attention.value_length 8; only 16"),
    (_fields(llama__rope__scaling__type="longrope"), "has rope.scaling.type 'longrope'; none, linear and yarn"),
    (_fields(split__count=3), "is one of 3 parts of a model; join them"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "sentence"), SPOILED, ids=[repr(sentence) for _, sentence in SPOILED])
def test_what_is_wrong_is_said_in_one_sentence(
    spoil: Callable[[Path], Any], sentence: str, llama: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copyfile(llama, tmp_path / "x.gguf"))
    spoil(file)
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        convert.load(file)
    assert "\n" not in str(caught.value)


def test_a_count_that_would_never_end_is_refused(llama: Path, tmp_path: Path) -> None:
    """An array of 2^62 bytes: a reader that walks it does not come back."""
    content = llama.read_bytes()
    place = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4
    (tmp_path / "x.gguf").write_bytes(content[: place + 4] + (2**62).to_bytes(8, "little") + content[place + 12 :])
    with pytest.raises(InputError, match=r"an array at byte .* goes beyond its end"):
        convert.load(tmp_path / "x.gguf")


def test_of_several_files_one_must_be_named(llama: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copyfile(llama, tmp_path / name)
    with pytest.raises(InputError, match=r"has 2 GGUF files, such as a\.gguf: give the path of one"):
        convert.load(tmp_path)
    assert convert.load_config(tmp_path / "b.gguf").num_layers == 2


def test_without_the_extras_the_sentence_says_which(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torch", None)
        assert convert.load(llama).num_params > 0
        with pytest.raises(InputError, match=r"reads the tokenizer in .* with torch; install the extra"):
            convert.load_tokenizer(llama)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"needs the package gguf; install the extra: pip install -e '\.\[gguf\]'"):
        convert.load(llama)
