"""Checkpoints of mixtures of experts: what is left out by name, what is refused before long work, and dtypes."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import torch, torch_model, write_checkpoint
from safetensors.torch import load_file, save_file

import convert
from jaxhess.distributed.mesh import make_mesh
from tests.convert.test_loading import assert_same, reconfigure, rewrite

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", "deepseek_v3")
    return tmp_path / "model"


def further(tensors: dict[str, torch.Tensor], layer: int, head: bool = True) -> None:
    """A layer for the token after the next, as DeepSeek-V3 has it: a decoder layer and what connects it."""
    parts = {name: x for name, x in tensors.items() if name.startswith("model.layers.1.")}
    tensors |= {name.replace(".1.", f".{layer}.", 1): x.clone() for name, x in parts.items()}
    own = {
        "enorm.weight": (16,),
        "hnorm.weight": (16,),
        "embed_tokens.weight": (53, 16),
        "shared_head.norm.weight": (16,),
    }
    own |= {"eh_proj.weight": (16, 32), "shared_head.head.weight": (53, 16)} if head else {}
    tensors |= {f"model.layers.{layer}.{name}": torch.ones(shape) for name, shape in own.items()}


def test_layers_that_predict_further_tokens_are_left_out(deepseek: Path) -> None:
    model = convert.load(deepseek)
    rewrite(deepseek, lambda tensors: further(tensors, 2))
    reconfigure(deepseek, num_nextn_predict_layers=1)
    again = convert.load(deepseek)
    assert again.config == model.config
    assert_same(again.params, model.params)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda t: further(t, 2, head=False), "Tensor model.layers.2.embed_tokens.weight in model.safetensors has no"),
        (lambda t: t.update({"model.layers.1.eh_proj.weight": torch.ones(16, 32)}), "model.layers.1.eh_proj.weight in"),
        (lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.ones(10, 16)}), "experts.8.up_proj"),
        (lambda t: t.pop(BIAS), f"Tensor {BIAS} is missing from"),
    ],
    ids=["a layer more than config.json says", "a tensor of such a layer in another", "an expert more", "no bias"],
)
def test_other_tensors_without_a_place_are_refused(spoil: Any, sentence: str, deepseek: Path) -> None:
    rewrite(deepseek, spoil)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        convert.load_config(deepseek)


@pytest.mark.parametrize(
    ("family", "key", "sentence"),
    [
        ("mixtral", "num_local_experts", r"has \d+ tensors in all; config.json says 2 layers and 1000000000 experts\."),
        (
            "deepseek_v3",
            "n_routed_experts",
            r"has \d+ tensors in all; config.json says 2 layers and 1000000000 experts",
        ),
        ("gpt_oss", "num_local_experts", r"has shape \[4, 16\]; expected \[1000000000, 16\]"),
    ],
)
def test_a_thousand_million_experts_are_refused_before_anything_is_made_for_them(
    family: str, key: str, sentence: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, family)
    convert.load_config(tmp_path)  # imports
    reconfigure(tmp_path, **{key: 10**9})
    tracemalloc.start()
    with pytest.raises(ValueError, match=sentence):
        convert.load_config(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23  # the names alone of a thousand million experts take a hundred gigabytes


def test_experts_that_the_mesh_does_not_divide_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mixtral", num_local_experts=6)
    with pytest.raises(ValueError, match=r"^6 experts cannot be divided over expert=4 of the mesh\.$"):
        convert.load(tmp_path, make_mesh("fsdp=2,expert=4"))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("axes", ["fsdp=2,expert=4", "fsdp=2,expert=2,tensor=2"])
def test_every_mesh_holds_the_same_experts(family: str, axes: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, num_hidden_layers=3)
    assert_same(convert.load(tmp_path, make_mesh(axes)).params, convert.load(tmp_path).params)


def test_the_bias_of_a_choice_keeps_its_float32_in_bfloat16_and_is_written_so(tmp_path: Path) -> None:
    """A large bias with small differences, as published ones are: in bfloat16 all of them would be one."""
    torch_model("deepseek_v3").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors.update({BIAS: 7 + torch.arange(8) / 1000}))
    model = convert.load(tmp_path / "model")
    assert (model.config.dtype, model.param_dtype) == ("bfloat16", "bfloat16")
    bias = model.params["layers"]["experts"]["selection_bias"]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[0], (7 + torch.arange(8) / 1000).numpy())
    convert.export(model, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file(tensors, tmp_path / "sorted.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "sorted.safetensors").read_bytes()
    convert.save(model, tmp_path / "orbax")
    assert_same(convert.load(tmp_path / "orbax").params, model.params)
