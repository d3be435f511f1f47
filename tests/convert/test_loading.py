"""`convert.load`: which files it reads, where weights go, and one sentence for everything that is wrong with them."""

from __future__ import annotations

import json
import os
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
from checkpoints import DEFAULTS, torch, torch_model, write_checkpoint
from safetensors.torch import load_file, save_file

import convert
from convert import loading
from convert.layout import parse_layout
from convert.source import Source
from jaxhess.distributed.mesh import make_mesh
from jaxhess.errors import InputError
from jaxhess.models import model_shardings

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    write_checkpoint(directory, "llama")
    return directory


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal structure, dtypes and bits."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), ours, theirs)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the tensors of `model.safetensors`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def reconfigure(directory: Path, **options: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def in_two_files(directory: Path) -> dict[str, Any]:
    """Cuts `model.safetensors` in two with an index, which is returned."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for i, part in enumerate((names[:7], names[7:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_layouts_read_any_slice_and_write_back() -> None:
    """Against numpy's own reshape and transpose, for parts in the middle and in front."""
    sizes = {"heads": 3, "head_dim": 4, "embed": 5}
    file = np.arange(3 * 3 * 4 * 5).reshape(36, 5)
    for text, split, part in (
        ("(heads 1/3 head_dim) embed", (3, 3, 4, 5), np.s_[:, 1]),
        ("(1/3 heads head_dim) embed", (3, 3, 4, 5), np.s_[1]),
    ):
        layout = parse_layout(text)
        assert layout.shape(sizes) == file.shape
        expected = file.reshape(split)[part].transpose(2, 0, 1)  # embed, heads, head_dim
        index = (slice(1, 4), slice(0, 2), slice(2, 4))
        axes = ("embed", "heads", "head_dim")
        np.testing.assert_array_equal(layout.read(lambda s: file[s], axes, index, sizes), expected[index])
        again = np.zeros_like(file)
        layout.write(again, expected, axes, sizes)
        np.testing.assert_array_equal(again.reshape(split)[part], file.reshape(split)[part])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_every_mesh_holds_the_same_weights_in_its_shardings(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family)
    one = convert.load(tmp_path)
    for axes in ("fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=4"):
        mesh = make_mesh(axes)
        sharded = convert.load(tmp_path, mesh)
        assert_same(sharded.params, one.params)
        assert jax.tree.map(lambda x: x.sharding, sharded.params) == model_shardings(sharded.config, mesh)


def test_layers_read_in_several_blocks_are_the_same(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert.load(llama)
    monkeypatch.setattr(loading, "BLOCK_BYTES", 1)
    assert_same(convert.load(llama, make_mesh("fsdp=4,tensor=2")).params, whole.params)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_names_of_the_base_model_are_read_like_the_full_ones(family: str, tmp_path: Path) -> None:
    model = torch_model(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "full")
    model.base_model.save_pretrained(tmp_path / "base")
    names = [set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("full", "base")]
    assert not names[0] & names[1]
    assert_same(convert.load(tmp_path / "base").params, convert.load(tmp_path / "full").params)


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt_neox", ["gpt_neox.layers.1.attention.bias", "gpt_neox.layers.1.attention.masked_bias",
                      "gpt_neox.layers.1.attention.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
    ],
)  # fmt: skip
def test_buffers_of_old_checkpoints_are_no_parameters(family: str, buffers: list[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family)
    expected = convert.load(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(3, dtype=torch.uint8) for name in buffers}))
    assert_same(convert.load(tmp_path).params, expected.params)


def test_several_files_and_pickles_hold_the_same_model(copy: Path) -> None:
    expected = convert.load(copy).params
    tensors = load_file(copy / "model.safetensors")
    in_two_files(copy)
    assert_same(convert.load(copy).params, expected)

    for file in copy.glob("model*"):
        file.unlink()
    for new_format in (True, False):  # what torch wrote before 1.6 cannot be mapped
        torch.save(tensors, copy / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
        assert_same(convert.load(copy).params, expected)
    (copy / "pytorch_model.bin").rename(copy / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(convert.load(copy).params, expected)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_bfloat16_is_kept_and_any_dtype_can_be_asked_for(kind: str, copy: Path) -> None:
    tensors = {k: t.to(torch.bfloat16) for k, t in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors")
    if kind == "pickle":
        (copy / "model.safetensors").unlink()
        torch.save(tensors, copy / "pytorch_model.bin")
    kept = convert.load(copy)
    assert kept.config.dtype == "bfloat16"
    assert {x.dtype for x in jax.tree.leaves(kept.params)} == {jnp.dtype("bfloat16")}
    scale = np.asarray(kept.params["final_norm"]["scale"]).view(np.int16)
    np.testing.assert_array_equal(scale, tensors["model.norm.weight"].view(torch.int16).numpy())
    wide = convert.load(copy, dtype="float32")
    assert wide.config.dtype == "float32"
    assert_same(wide.params, jax.tree.map(lambda x: x.astype(jnp.float32), kept.params))
    assert convert.load_config(copy) == kept.config
    assert convert.load_config(copy, "float32") == wide.config


def test_files_of_mixed_dtypes_follow_the_config_or_the_widest(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({GATE: tensors[GATE].half()}))
    reconfigure(copy, dtype="bfloat16")
    assert convert.load(copy).config.dtype == "bfloat16"
    reconfigure(copy, dtype=None)
    assert convert.load(copy).config.dtype == "float32"


def test_a_tied_model_may_hold_its_output_matrix_if_it_is_the_embedding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    expected = convert.load(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert_same(convert.load(tmp_path).params, expected.params)
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"][3, 4].add_(1e-3))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        convert.load(tmp_path)


def _spoil_missing_shard(directory: Path) -> None:
    in_two_files(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def _spoil_index(directory: Path) -> None:
    index = in_two_files(directory)
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_value(value: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        index = in_two_files(directory)
        index["weight_map"][GATE] = value
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def _as_bin(change: Callable[[dict[Any, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """The checkpoint as a pickle, with its tensors changed."""

    def spoil(directory: Path) -> None:
        tensors: dict[Any, torch.Tensor] = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        change(tensors)
        torch.save(tensors, directory / "pytorch_model.bin")

    return spoil


def _spoil_duplicate(directory: Path) -> None:
    in_two_files(directory)
    second = directory / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), "lm_head.weight": torch.zeros(53, 16)}, second)


def _truncate(directory: Path, keep: float) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def _set(value: float) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, lambda tensors: tensors[GATE][2, 3].fill_(value))


SPOILED: list[tuple[Callable[[Path], Any], str]] = [
    (lambda d: (d / "config.json").unlink(), "copy has no config.json."),
    (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    (lambda d: (d / "config.json").write_text("[]"), "config.json does not hold a JSON object."),
    (lambda d: reconfigure(d, model_type="mamba"), "model_type 'mamba', which is unsupported"),
    (lambda d: (d / "model.safetensors").unlink(), "copy has no weights: no model.safetensors or pytorch_model.bin"),
    (_spoil_missing_shard, "model-00002-of-00002.safetensors is missing from"),
    (_spoil_index, "says that model-00001-of-00002.safetensors holds tensor model.layers.9.mlp.up_proj.weight"),
    (_spoil_duplicate, "Tensor lm_head.weight is in two files of"),
    (lambda d: _truncate(d, 0.9), "model.safetensors is truncated or damaged"),
    (lambda d: _truncate(d, 0.001), "model.safetensors is truncated or damaged"),
    (lambda d: _truncate(d, 0), "model.safetensors is truncated or damaged"),
    (lambda d: rewrite(d, lambda t: t.pop(GATE)), f"Tensor {GATE} is missing from"),
    (lambda d: rewrite(d, lambda t: t.update(extra=torch.zeros(2))), "Tensor extra in model.safetensors has no place"),
    (lambda d: rewrite(d, lambda t: t.update({GATE: t[GATE].T.contiguous()})),
     f"Tensor {GATE} in model.safetensors has shape [16, 24]; expected [24, 16]."),
    (lambda d: rewrite(d, lambda t: t.update({GATE: t[GATE].int()})), f"Tensor {GATE} in model.safetensors is I32"),
    (lambda d: reconfigure(d, num_hidden_layers=3), "Tensor model.layers.2.input_layernorm.weight is missing"),
    (lambda d: reconfigure(d, num_hidden_layers=1), "Tensor model.layers.1.input_layernorm.weight in"),
    (lambda d: reconfigure(d, attention_bias=True), "Tensor model.layers.0.self_attn.k_proj.bias is missing"),
    (_index_value(5), f"model.safetensors.index.json has 5 for tensor '{GATE}'; it must be the name of a file"),
    (_index_value(None), f"model.safetensors.index.json has None for tensor '{GATE}'"),
    (_index_value("../copy/model-00001-of-00002.safetensors"), "has '../copy/model-00001-of-00002.safetensors' for"),
    (_index_value("nul\0"), "has 'nul\\x00' for tensor"),
    (_as_bin(lambda t: t.update({GATE: t[GATE].to_sparse()})), f"Tensor {GATE} in "),
    (_as_bin(lambda t: t.update({GATE: t[GATE].to_sparse()})), "is sparse_coo; weights must be dense"),
    (_as_bin(lambda t: t.update({GATE: t[GATE].to_sparse_csr()})), "pytorch_model.bin is sparse_csr; weights must be"),
    (_as_bin(lambda t: t.update({GATE: t[GATE].to("meta")})), "is on the device meta; weights must"),
    (_as_bin(lambda t: t.update({GATE: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})), "is nested;"),
    (_as_bin(lambda t: t.update({GATE: torch.quantize_per_tensor(t[GATE], 0.1, 0, torch.qint8)})), "is quantized;"),
    (_as_bin(lambda t: t.update({5: torch.zeros(2)})), "holds a tensor under the key 5; it must be a name"),
    (_as_bin(lambda t: t.update({GATE + "\n": torch.zeros(2)})), "a name is printable text"),
    (_as_bin(lambda t: t.update({GATE: t[GATE].to(torch.complex64)})), "is complex64; weights must be float64"),
    (_set(float("nan")), f"Tensor {GATE} in"),
    (_set(float("-inf")), f"Tensor {GATE} in"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "sentence"), SPOILED, ids=[repr(sentence) for _, sentence in SPOILED])
def test_what_is_wrong_is_said_in_one_sentence(spoil: Callable[[Path], Any], sentence: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        convert.load(copy)
    assert "\n" not in str(caught.value)


def test_names_and_shapes_are_checked_before_any_weight_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(copy, lambda tensors: tensors.update(extra=torch.zeros(2)))
    monkeypatch.setattr("convert.source.Source.read", lambda *_: pytest.fail("read a weight"))
    with pytest.raises(ValueError, match="Tensor extra"):
        convert.load(copy)


def test_a_damaged_pickle_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is truncated, damaged, or no plain state dictionary"):
        convert.load(copy)


def test_a_pickle_that_would_run_code_is_refused_and_nobody_is_told_to_let_it(copy: Path) -> None:
    class RunsCode:
        def __reduce__(self) -> Any:
            return Path.touch, (copy / "ran",)

    tensors: dict[str, Any] = {**load_file(copy / "model.safetensors"), "x": RunsCode()}
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no plain state dictionary: other things than tensors\.$"):
        convert.load(copy)
    assert not (copy / "ran").exists()


def test_pickles_without_torch_ask_for_the_extra(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"install the extra: pip install -e '\.\[torch\]'"):
        Source(copy)


def test_float16_overflow_is_named(copy: Path) -> None:
    _set(1e6)(copy)
    convert.load(copy)
    with pytest.raises(ValueError, match=rf"Tensor {re.escape(GATE)} in .* once it is float16"):
        convert.load(copy, dtype="float16")


def test_unknown_dtypes_and_float64_without_x64_are_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown dtype 'int8'; choose from float32"):
        convert.load(llama, dtype="int8")
    with pytest.raises(ValueError, match="float64 needs JAX in 64-bit mode"):
        convert.load(llama, dtype="float64")


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "a/b/c"])
def test_a_path_that_is_none_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="There is no directory"):
        convert.load(name)


def test_a_hub_id_is_downloaded_without_files_that_are_not_needed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(convert.load("someone/llama").params, convert.load(llama).params)
    ((name, patterns),) = asked
    assert name == "someone/llama"
    assert "model*.safetensors" in patterns
    assert not any("bin" in pattern for pattern in patterns)


def test_a_hub_id_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("offline\nwith details")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match="no directory someone/model, and the hub gives no model") as caught:
        convert.load("someone/model")
    assert "\n" not in str(caught.value)


def test_tokenizers_are_read_or_missed(llama: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    with pytest.raises(InputError, match="has no tokenizer files"):
        convert.load_tokenizer(llama)
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert convert.load_tokenizer(tmp_path)("b a b")["input_ids"] == [1, 0, 1]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        convert.load_tokenizer(tmp_path)


def test_a_tokenizer_that_brings_its_own_code_is_refused_without_a_question(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    with pytest.raises(ValueError, match="cannot be read"):
        convert.load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_pipe_among_the_files_of_a_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pipe, device, socket or folder"):
        convert.load_tokenizer(tmp_path)


def test_defaults_cover_every_family() -> None:
    assert set(DEFAULTS) == set(convert.FAMILIES)
