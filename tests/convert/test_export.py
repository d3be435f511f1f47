"""There and back: Hugging Face export bit for bit, Orbax onto other meshes, and the command line."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from checkpoints import DEFAULTS, VOCAB, torch, write_checkpoint
from safetensors.torch import load_file

import convert
from convert.__main__ import main
from convert.destination import appearing, check_destination
from convert.exporting import write_hugging_face
from jaxhess.distributed.mesh import make_mesh
from jaxhess.errors import InputError
from jaxhess.files.manifest import write_manifest
from jaxhess.models import DecoderConfig, LanguageModel, RopeConfig, abstract_params, model_shardings

FRESH = DecoderConfig(
    vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4, mlp_dim=24, max_positions=32,
    norm="layer", norm_eps=1e-5, activation="gelu", gated_mlp=False, parallel_residual=True, rope=RopeConfig(dims=2),
    qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip


def make_tokenizer() -> Any:
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3")
    write_checkpoint(directory, "qwen3", tie_word_embeddings=True)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def orbax(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("orbax") / "saved"
    convert.save(convert.load(qwen3), directory)
    return directory


def files_of(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", list(DEFAULTS))
def test_export_gives_the_file_back_byte_for_byte(family: str, dtype: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "original", family)
    for parameter in model.parameters():  # and not buffers, which DeepSeek-V3 keeps in float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(tmp_path / "original")
    mesh = make_mesh("fsdp=4,tensor=2") if dtype == "bfloat16" else None
    ours = convert.load(tmp_path / "original", mesh)
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    convert.export(ours, tmp_path / "back", hf_config=config)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    original, back = (tmp_path / d / "model.safetensors" for d in ("original", "back"))
    assert original.read_bytes() == back.read_bytes()
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    expected = model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in reloaded.state_dict().items())


def test_large_exports_are_cut_into_files_with_an_index(qwen3: Path, tmp_path: Path) -> None:
    config = json.loads((qwen3 / "config.json").read_text())
    convert.export(convert.load(qwen3), tmp_path / "cut", hf_config=config, shard_bytes=4000)
    assert len(list((tmp_path / "cut").glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "cut" / "model.safetensors.index.json").is_file()
    back, expected = weights_of(tmp_path / "cut"), weights_of(qwen3)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    assert_same(convert.load(tmp_path / "cut").params, convert.load(qwen3).params)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")


def test_a_fresh_model_is_exported_with_a_config_of_its_own_and_its_tokenizer(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), abstract_params(FRESH))
    model = LanguageModel(FRESH, params)
    convert.export(model, tmp_path / "fresh", tokenizer_source=make_tokenizer())
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fresh", attn_implementation="eager")
    assert type(reference).__name__ == "GPTNeoXForCausalLM"
    tokens = np.random.default_rng(0).integers(0, FRESH.vocab_size, (2, 9), dtype=np.int32)
    expected = reference(torch.from_numpy(tokens).long()).logits.detach().numpy()
    np.testing.assert_allclose(model.logits(jnp.asarray(tokens)), expected, atol=1e-5 * np.abs(expected).max())
    again = convert.load(tmp_path / "fresh")
    assert again.config == FRESH
    assert_same(again.params, model.params)
    assert convert.load_tokenizer(tmp_path / "fresh")("b a")["input_ids"] == [1, 0]


def test_export_refuses_a_config_of_another_model(qwen3: Path, tmp_path: Path) -> None:
    config = json.loads((qwen3 / "config.json").read_text())
    with pytest.raises(ValueError, match="hf_config does not describe this model"):
        convert.export(convert.load(qwen3), tmp_path / "x", hf_config={**config, "rms_norm_eps": 1e-3})
    assert files_of(tmp_path) == set()


def test_orbax_is_restored_on_another_mesh_and_in_another_dtype(qwen3: Path, tmp_path: Path) -> None:
    saved = convert.load(qwen3, make_mesh("fsdp=8"))
    convert.save(saved, tmp_path / "orbax")
    for mesh in (make_mesh("fsdp=4,tensor=2"), make_mesh("fsdp=2", jax.devices()[:2]), None):
        restored = convert.load(tmp_path / "orbax", mesh)
        assert restored.config == saved.config
        assert_same(restored.params, saved.params)
        if mesh is not None:
            assert jax.tree.map(lambda x: x.sharding, restored.params) == model_shardings(saved.config, mesh)
    half = convert.load(tmp_path / "orbax", make_mesh("fsdp=8"), "bfloat16")
    assert half.config == convert.load_config(tmp_path / "orbax", "bfloat16")
    assert half.config == dataclasses.replace(saved.config, dtype="bfloat16")
    assert_same(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), saved.params))


def _rewrite_model_json(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((directory / "model.json").read_text())
    change(record)
    (directory / "model.json").write_text(json.dumps(record))


def _configure(**fields: Any) -> Callable[[Path], None]:
    return lambda directory: _rewrite_model_json(directory, lambda record: record["config"].update(fields))


def _empty_weights(directory: Path) -> None:
    for file in (directory / "params").rglob("d/*"):
        file.write_bytes(b"")


NO_MODEL = "model.json does not describe a model of this version: "
SPOILED: list[tuple[Callable[[Path], Any], str]] = [
    (_empty_weights, "params is damaged: ValueError: "),
    (lambda d: (d / "params" / "manifest.ocdbt").unlink(), "params is damaged: ValueError: NOT_FOUND: "),
    (lambda d: (d / "params" / "_METADATA").write_text("{}"), "params is damaged: KeyError: 'tree_metadata'."),
    (lambda d: shutil.rmtree(d / "params"), "has no params, the directory of its weights."),
    (_configure(vocab_size=54),
     "params does not fit model.json: parameter embed/kernel has shape [53, 16]; expected [54, 16]."),
    (_configure(mlp_bias=True), "does not fit model.json: parameter layers/mlp/down/bias is missing."),
    (_configure(qk_norm=False), "parameter layers/attention/key_norm/scale has no place in the model."),
    (lambda d: (d / "model.json").write_text("{"), "model.json is not valid JSON"),
    (lambda d: _rewrite_model_json(d, lambda r: r.pop("config")), NO_MODEL + "config is missing."),
    (lambda d: _rewrite_model_json(d, lambda r: r["config"].pop("mlp_dim")), NO_MODEL + "mlp_dim is missing."),
    (lambda d: _rewrite_model_json(d, lambda r: r.update(config=[])), NO_MODEL + "config is []."),
    (_configure(towers=8), NO_MODEL + "unknown field towers."),
    (_configure(rope={"base": 2}), NO_MODEL + "unknown field base."),
    (_configure(rope={"kind": "spiral"}), NO_MODEL + 'kind is "spiral".'),
    (_configure(num_layers="2"), NO_MODEL + 'num_layers is "2".'),
    (_configure(sliding_layers=None), NO_MODEL + "sliding_layers is null."),
    (_configure(dtype="int8"), NO_MODEL + 'dtype is "int8".'),
    (_configure(num_heads=0), NO_MODEL + "num_heads is 0; it must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "sentence"), SPOILED, ids=[sentence for _, sentence in SPOILED])
def test_a_damaged_or_foreign_orbax_checkpoint_is_named(
    spoil: Callable[[Path], Any], sentence: str, orbax: Path, tmp_path: Path
) -> None:
    spoiled = Path(shutil.copytree(orbax, tmp_path / "orbax"))
    spoil(spoiled)
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        convert.load(spoiled)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).removeprefix(str(spoiled))) < 1000


def test_the_command_converts_verifies_and_exports(
    qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(qwen3), str(tmp_path / "orbax"), "--verify", "--mesh", "fsdp=8"])
    difference = float(capsys.readouterr().out.split("largest difference ")[1].split(",")[0])
    assert 0 < difference < 1e-4
    assert files_of(tmp_path / "orbax") == {
        *("config.json", "model.json", "params", "tokenizer.json", "tokenizer_config.json", "manifest.json")
    }
    main(["--export", str(tmp_path / "orbax"), str(tmp_path / "back"), "--verify"])
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (qwen3 / "model.safetensors").read_bytes()
    assert convert.load_tokenizer(tmp_path / "back")("b a")["input_ids"] == [1, 0]
    main(["--export", str(qwen3), str(tmp_path / "half"), "--dtype", "bfloat16", "--verify"])
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in weights_of(tmp_path / "half").values()} == {torch.bfloat16}


def test_the_command_refuses_in_one_line_and_writes_nothing(
    qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    target = tmp_path / "target"
    notes = full / "notes.txt"
    refused = {
        f"error: {notes} is a file": [str(qwen3), str(notes)],
        f"error: {notes / 'a' / 'b'} cannot be made: {notes} is a file.": [str(qwen3), str(notes / "a" / "b")],
        "cannot be written: File name too long.": [str(qwen3), str(tmp_path / ("x" * 300))],
        f"error: {full} is not empty": [str(qwen3), str(full)],
        f"error: {full} holds no checkpoint": [str(qwen3), str(full), "--overwrite"],
        "error: There is no directory": [str(tmp_path / "nowhere"), str(target)],
        "error: Mesh fsdp=3 needs 3 devices, but 8 are available": [str(qwen3), str(target), "--mesh", "fsdp=3"],
        "error: Mesh 'eight' cannot be read": [str(qwen3), str(target), "--mesh", "eight"],
        "has no manifest.json": [str(qwen3), str(qwen3), "--overwrite"],
    }
    for sentence, arguments in refused.items():
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert sentence in message
        assert message.count("\n") == 1
    assert files_of(tmp_path) == {"full"}
    assert files_of(full) == {"notes.txt"}
    assert files_of(qwen3) >= {"config.json", "model.safetensors"}


def test_a_place_that_cannot_be_written_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match=f"^{tmp_path}/a/b cannot be made: {tmp_path} cannot be written.$"):
        check_destination(tmp_path / "a" / "b", overwrite=False)


def test_verify_uses_the_mesh_and_no_second_copy(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = sum(array.size for array in jax.live_arrays())
    meshes, held = [], []

    def load(path: Path, mesh: Any, dtype: str) -> LanguageModel:
        gc.collect()
        held.append(sum(array.size for array in jax.live_arrays()) - before)
        meshes.append(mesh)
        return convert.load(path, mesh, dtype)

    monkeypatch.setattr("convert.verify.load", load)
    main([str(qwen3), str(tmp_path / "orbax"), "--verify", "--mesh", "fsdp=4,tensor=2", "--dtype", "bfloat16"])
    assert meshes == [make_mesh("fsdp=4,tensor=2")]
    assert held[0] < 100  # the model has thousands of parameters


def test_a_float64_checkpoint_needs_no_option(qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tmp_path / "wide"
    transformers.AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float64).save_pretrained(wide)
    with pytest.raises(ValueError, match=r"float64 needs JAX in 64-bit mode: .* --dtype float64"):
        convert.load(wide)
    try:
        main([str(wide), str(tmp_path / "orbax"), "--verify"])
        assert "parameters in float64 written" in capsys.readouterr().out
        main(["--export", str(tmp_path / "orbax"), str(tmp_path / "back")])
    finally:
        jax.config.update("jax_enable_x64", False)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (wide / "model.safetensors").read_bytes()


def test_overwrite_replaces_a_conversion_whole(qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(qwen3), str(tmp_path / "old")])
    assert "model.json" in files_of(tmp_path / "old")
    main(["--export", str(qwen3), str(tmp_path / "old"), "--overwrite"])
    assert "model.json" not in files_of(tmp_path / "old")
    assert files_of(tmp_path) == {"old"}
    with pytest.raises(SystemExit):
        main([str(tmp_path / "old"), str(tmp_path / "old"), "--overwrite"])
    assert "is or contains SRC" in capsys.readouterr().err


@pytest.mark.parametrize("mine", [".git/HEAD", "thesis.tex", "params/notes.txt", "config.json", "manifest.json"])
def test_overwrite_touches_nothing_that_no_conversion_wrote(
    qwen3: Path, tmp_path: Path, mine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    main([str(qwen3), str(old)])
    (old / mine).parent.mkdir(exist_ok=True)
    (old / mine).write_text("mine")
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        main([str(qwen3), str(old), "--overwrite"])
    message = capsys.readouterr().err
    assert mine.split("/")[0] in message
    assert message.count("\n") == 1
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    assert files_of(tmp_path) == {"old"}


def test_a_place_taken_during_the_work_costs_nothing(qwen3: Path, tmp_path: Path) -> None:
    model = convert.load(qwen3)

    def overtaken() -> None:
        with appearing(tmp_path / "new") as partial:
            write_hugging_face(model, partial, None)
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "notes.txt").write_text("mine")

    with pytest.raises(InputError, match=f"What was written is in {tmp_path}/new-1"):
        overtaken()
    assert files_of(tmp_path / "new") == {"notes.txt"}
    assert files_of(tmp_path / "new-1") == {"config.json", "model.safetensors", "manifest.json"}


def test_a_difference_beyond_rounding_fails_and_writes_nothing(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("convert.verify.TOLERANCE", 1e-12)
    with pytest.raises(SystemExit) as caught:
        main([str(qwen3), str(tmp_path / "orbax"), "--verify"])
    assert caught.value.code == 2
    assert "more than rounding" in capsys.readouterr().err
    assert files_of(tmp_path) == set()


def test_an_interrupted_conversion_leaves_what_was_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", "gpt2")
    write_manifest(tmp_path / "old")
    before = (tmp_path / "old" / "model.safetensors").read_bytes()

    def interrupted() -> None:
        with appearing(tmp_path / "old", overwrite=True) as partial:
            (partial / "config.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before
    assert files_of(tmp_path) == {"old"}


def test_python_m_convert_exits_with_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "vocab_size": VOCAB}))
    command = [sys.executable, "-m", "convert", str(tmp_path), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'config.json'} has model_type 'mamba'")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
