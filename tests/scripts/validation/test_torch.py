"""Both frameworks say the same, and where they do not the command says which parameter."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DEFAULTS, torch, write_checkpoint
from small_models import TINY

import convert
from jaxhess.data import TokenBlocks
from jaxhess.errors import InputError
from jaxhess.files.manifest import write_manifest
from jaxhess.models import RopeConfig
from scripts.validation import torch as script
from scripts.validation import torch_reference

ROOT = Path(__file__).parents[3]
SHAPES = {
    "llama": {"num_hidden_layers": 3, "num_key_value_heads": 1, "vocab_size": 37},
    "mistral": {"sliding_window": 5, "hidden_size": 24},
    "qwen2": {"num_hidden_layers": 1, "intermediate_size": 40},
    "qwen3": {"num_attention_heads": 2, "head_dim": 10},
    "gpt_neox": {"rotary_pct": 1.0, "use_parallel_residual": False},
    "gpt2": {"n_layer": 1, "n_head": 2, "n_inner": 40},
}
SMALL = {"data": "random", "seq_len": 12, "sequences": 3, "microbatch": 2, "steps": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, "llama")
    return folder


def validated(folder, out, **options):
    agrees = script.run(script.Options(model=str(folder), out=out, **{**SMALL, **options}))
    return agrees, json.loads((out / "agreement.json").read_text())


@pytest.mark.slow
def test_everything_agrees_and_says_for_how_many_steps(checkpoint, tmp_path, capsys):
    agrees, record = validated(checkpoint, tmp_path / "out")
    assert agrees
    assert record["first_difference"] is None
    assert [line["quantity"] for line in record["lines"]][:4] == [
        "weights",
        "activations before the layers",
        "activations after layer 0",
        "activations after layer 1",
    ]
    for line in record["lines"][1:]:
        if line["own"]:
            assert line["wider"] <= 1e-10, line
            assert max(line["own"]) < 1e-3, line
            # In float32, and not in float64 in its place.
            assert min(line["own"]) > 1e-9 or "product" not in line["quantity"], line
    assert record["lanczos"]["none"]["compared"] == 4
    page = (tmp_path / "out" / "agreement.html").read_text()
    assert "exact Hessian product" in page
    assert "All agree within rounding" in page
    assert "4 of 4 steps" in " ".join(capsys.readouterr().out.split())


@pytest.mark.study
def test_a_gguf_file_is_compared_with_what_transformers_reads_from_it(tmp_path):
    pytest.importorskip("accelerate")  # transformers loads GGUF with it
    pytest.importorskip("gguf_checkpoints").write_gguf(tmp_path / "x.gguf", "llama", "Q4_0", num_hidden_layers=1)
    agrees, record = validated(tmp_path / "x.gguf", tmp_path / "out", steps=2, data="random")
    assert agrees
    assert record["lines"][0]["kind"] == "bits"


def test_padding_idx_is_cleared_and_the_command_says_what_it_would_do(tmp_path, capsys):
    write_checkpoint(tmp_path / "model", "llama", pad_token_id=0, num_hidden_layers=1)
    tokens = np.random.default_rng(0).integers(0, 6, (3, 13))
    np.save(tmp_path / "tokens.npy", tokens)
    count = np.sum(tokens[:, :-1] == 0)
    options = {"data": str(tmp_path / "tokens.npy"), "steps": 0, "wider": "none"}
    agrees, record = validated(tmp_path / "model", tmp_path / "out", **options)
    assert agrees, record["first_difference"]
    (sentence,) = record["padding"]
    assert "PyTorch takes token 0 for padding (padding_idx)" in sentence
    assert f"The token is read {count} times" in sentence
    assert "in row 0 of model.embed_tokens.weight and nowhere else" in sentence
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert "padding_idx" in (tmp_path / "out" / "agreement.html").read_text()

    # As transformers loads it: the same loss, another gradient, and a product that is not that of its Hessian.
    network = torch_reference.load(tmp_path / "model")
    blocks = TokenBlocks(tokens, np.ones((3, 12), np.float32))
    batches = [torch_reference.Batch(torch.from_numpy(tokens), torch.ones(3, 12))]
    loss, gradient = torch_reference.gradient(network, batches)
    network.model.embed_tokens.padding_idx = 0
    dropped_loss, dropped = torch_reference.gradient(network, batches)
    assert dropped_loss == loss
    assert not dropped["model.embed_tokens.weight"][0].any()
    assert gradient["model.embed_tokens.weight"][0].all()
    rng = np.random.default_rng(1)
    probe = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in network.named_parameters()}
    (error,) = torch_reference.padding_errors(network, blocks, probe, 3)
    assert error[:3] == ("model.embed_tokens.weight", 0, count)
    assert error.elsewhere == 0
    assert error.gradient > 0.1
    assert error.product > 0.1

    # A token that is not read changes nothing.
    assert not list(torch_reference.padding_errors(network, TokenBlocks(tokens + 1, blocks.weights), probe, 3))


def broken_theirs(change):
    """`torch_reference.load` of a model with one tensor changed."""
    load = torch_reference.load

    def changed(*arguments):
        model = load(*arguments)
        with torch.no_grad():
            change(model)
        return model

    return changed


def transpose(model):
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.copy_(weight.T.clone())


def one_value(model):
    model.model.layers[0].mlp.down_proj.weight[3, 5] *= 1.01


@pytest.mark.parametrize(
    ("change", "name", "how", "quantity"),
    [
        pytest.param(
            *(transpose, "model.layers.1.self_attn.o_proj.weight", "transpose", "activations after layer 1"),
            marks=pytest.mark.slow,
        ),
        (one_value, "model.layers.0.mlp.down_proj.weight", "values, first at [3, 5], by", "activations after layer 0"),
    ],
    ids=["transposed", "one value"],
)  # fmt: skip
def test_a_broken_weight_of_theirs_is_named_and_its_layer_too(
    checkpoint, tmp_path, monkeypatch, change, name, how, quantity
):
    monkeypatch.setattr(torch_reference, "load", broken_theirs(change))
    agrees, record = validated(checkpoint, tmp_path / "out", steps=0)
    assert not agrees
    assert record["first_difference"].startswith(f"The weights differ, first {name}: ")
    assert how in record["first_difference"]
    assert f"departs at: {quantity}" in record["first_difference"]


def test_a_broken_weight_of_ours_is_named_and_its_layer_too(checkpoint, tmp_path, monkeypatch):
    load = convert.load

    def changed(*arguments):
        model = load(*arguments)
        kernel = model.params["layers"]["attention"]["query"]["kernel"]
        model.params["layers"]["attention"]["query"]["kernel"] = kernel.at[1, 2, 0, 1].multiply(1.01)
        return model

    monkeypatch.setattr(convert, "load", changed)
    monkeypatch.setattr(sys, "argv", ["validate", "--model", str(checkpoint), "--out", str(tmp_path / "out")])
    for name, value in {**SMALL, "steps": 0}.items():
        sys.argv += [f"--{name.replace('_', '-')}", str(value)]
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    where = json.loads((tmp_path / "out" / "agreement.json").read_text())["first_difference"]
    assert "first model.layers.1.self_attn.q_proj.weight: 1 of 256 values" in where
    assert "departs at: activations after layer 1" in where


def test_without_anything_wider_bounds_are_used_and_called_so(checkpoint, tmp_path, capsys):
    agrees, record = validated(checkpoint, tmp_path / "out", steps=0, wider="none")
    assert agrees
    assert {line["kind"] for line in record["lines"]} == {"bits", "bound"}
    assert "(bound)" in capsys.readouterr().out


@pytest.mark.study
def test_bfloat16_without_anything_wider_is_not_decided(checkpoint, tmp_path, capsys):
    agrees, _ = validated(checkpoint, tmp_path / "out", steps=0, wider="none", dtype="bfloat16")
    assert agrees is None
    assert script.STATUS[agrees] == 3
    assert "Not decided, without a run in a wider dtype: activations" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("change", [{"steps": -1}, {"step": 0.0}, {"seq_len": 0}])
def test_numbers_out_of_range_are_refused(checkpoint, tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change)).replace("_", "-")):
        validated(checkpoint, tmp_path / "out", **change)


def test_a_result_is_replaced_only_where_asked(checkpoint, tmp_path):
    (tmp_path / "agreement.json").write_text("{}")
    write_manifest(tmp_path)
    with pytest.raises(InputError, match="--overwrite"):
        validated(checkpoint, tmp_path)
    with pytest.raises(InputError, match="nowhere"):  # after the check of the folder
        validated(tmp_path / "nowhere", tmp_path, overwrite=True)


def test_another_model_is_refused_in_one_sentence(checkpoint, tmp_path):
    write_checkpoint(tmp_path / "other", "llama", intermediate_size=40)
    with pytest.raises(ValueError, match=r"not the same: model.layers.0.mlp.\w+.weight is .* in ours and .* in theirs"):
        validated(checkpoint, tmp_path / "out", reference=str(tmp_path / "other"))


def test_what_torch_cannot_compute_ends_in_one_sentence(checkpoint, tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(torch_reference, "measure", exhausted)
    with pytest.raises(ValueError, match="PyTorch cannot compute this: no more"):
        validated(checkpoint, tmp_path / "out", steps=0, wider="none")


@pytest.mark.slow
def test_float64_is_float64_on_both_sides(checkpoint, tmp_path):
    agrees, record = validated(checkpoint, tmp_path / "out", dtype="float64")
    assert agrees
    assert record["wider"] is None
    assert record["lanczos"]["none"]["compared"] == 4


@pytest.mark.study
def test_dynamic_positions_beyond_the_trained_length(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    write_checkpoint(tmp_path / "model", "llama", max_position_embeddings=8, rope_parameters=rope, num_hidden_layers=1)
    agrees, record = validated(tmp_path / "model", tmp_path / "out", steps=0)
    assert agrees, record["first_difference"]
    assert record["not_exercised"] == []


def test_it_says_what_short_sequences_do_not_exercise():
    rope = RopeConfig(kind="dynamic", factor=2.0, original_max_positions=8)
    config = dataclasses.replace(TINY, sliding_window=10, rope=rope)
    assert list(script.not_exercised(config, 11)) == []
    assert [text.split(" (")[0] for text in script.not_exercised(config, 8)] == [
        "Not exercised: sliding window 10",
        "Not exercised: RoPE scaling beyond 8 positions",
    ]


def test_lanczos_alone_is_left_out_where_only_its_vectors_do_not_fit(checkpoint, monkeypatch):
    model = convert.load(str(checkpoint))
    per_vector = 2 * 8 * model.num_params
    monkeypatch.setattr(script, "available_bytes", lambda _: 10 * per_vector)
    assert script.wider_run(script.Options(steps=20), model) == ("float64", 0)
    assert script.wider_run(script.Options(steps=0), model) == ("float64", 0)
    monkeypatch.setattr(script, "available_bytes", lambda _: 7 * per_vector)
    assert script.wider_run(script.Options(steps=0), model) == (None, 0)


@pytest.mark.study
@pytest.mark.parametrize(("family", "dtype"), itertools.product(DEFAULTS, ("float32", "bfloat16")))
def test_every_family_agrees(family, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MODES", ("none",))  # the harder one; both are in the test of everything
    write_checkpoint(tmp_path / "model", family, **SHAPES.get(family, {}))
    agrees, record = validated(tmp_path / "model", tmp_path / dtype, dtype=dtype, microbatch=3)
    assert agrees, record["first_difference"]
    assert record["lanczos"]["none"]["compared"] == 4


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=pytest.mark.study) for family in ("deepseek_v3", "gpt_oss", "mixtral")],
)
def test_mixtures_of_experts_agree_in_float32(family, tmp_path, monkeypatch):
    """Also the bias by which experts are chosen, which in torch is no parameter."""
    monkeypatch.setattr(script, "MODES", ("none",))
    write_checkpoint(tmp_path / "model", family)
    agrees, record = validated(tmp_path / "model", tmp_path / "out", microbatch=3, steps=2)
    assert agrees, record["first_difference"]


@pytest.mark.study
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_finds_agreement_on_the_tiny_model(dtype, tmp_path):
    command = [sys.executable, "-m", script.__name__, "--dtype", dtype, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert record["lanczos"]["full"]["compared"] == 8
