"""Families beyond the first six: in float64 they compute what `transformers` computes, to 1e-9, and are written back.

Logits, loss, gradient and exact Hessian-vector product; torch's by double backward, in float64 throughout.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import VOCAB, torch, torch_model
from flax import nnx

import convert
import jaxhess
from convert.families import FAMILIES
from jaxhess.models.language_model import model_graph
from scripts.validation.float64 import in_float64
from tests.convert.test_families import assert_close, batch_of, derivatives, tokens_for, torch_derivatives, torch_loss

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# Name, family, options.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "mixtral", {}),
    ("qwen2_moe", "qwen2_moe", {}),
    ("qwen3_moe, every second layer dense, three of five", "qwen3_moe",
     {"decoder_sparse_step": 2, "num_hidden_layers": 3, "num_experts": 5, "num_experts_per_tok": 3}),
    ("olmoe", "olmoe", {}),
    ("granitemoe", "granitemoe", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0,
                                  "attention_multiplier": 0.3}),
    ("gpt_oss", "gpt_oss", {"rope_scaling": {**YARN, "truncate": False}}),
    ("deepseek_v2", "deepseek_v2", {"rms_norm_eps": 1e-4}),
    ("deepseek_v3, yarn", "deepseek_v3", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
]  # fmt: skip
DENSE: list[tuple[str, str, dict[str, Any]]] = [
    ("gemma", "gemma", {"num_hidden_layers": 1, "hidden_size": 12}),
    ("gemma2", "gemma2", {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 1.5}),
    ("gemma3, old spelling, window on all but every second", "gemma3_text",
     {"sliding_window_pattern": 2, "rope_local_base_freq": 300.0,
      "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5000.0, "query_pre_attn_scalar": 7}),
    ("olmo2", "olmo2", {}),
    ("olmo3, yarn", "olmo3", {"layer_types": ["sliding_attention", "full_attention"], "rope_scaling": YARN}),
    ("phi3, longrope, partly rotated", "phi3",
     {"partial_rotary_factor": 0.5, "head_dim": 8, "hidden_size": 32, "original_max_position_embeddings": 16,
      "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.5, 3.0]}}),
    ("smollm3", "smollm3", {"no_rope_layer_interval": 2}),
    ("granite", "granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0,
                            "attention_multiplier": 0.3}),
    ("stablelm", "stablelm", {"use_qkv_bias": True}),
    ("cohere2", "cohere2", {"sliding_window_pattern": 2, "logit_scale": 0.3}),
]  # fmt: skip
MORE: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral window, tied, one of three experts", "mixtral",
     {"sliding_window": 5, "tie_word_embeddings": True, "num_local_experts": 3, "num_experts_per_tok": 1}),
    ("qwen2_moe, layers dense, sliding and neither, three of five", "qwen2_moe",
     {"mlp_only_layers": [1], "num_hidden_layers": 3, "num_experts": 5, "num_experts_per_tok": 3, "qkv_bias": False,
      "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 4, "tie_word_embeddings": True}),
    ("qwen3_moe", "qwen3_moe", {"norm_topk_prob": True}),
    ("olmoe, biases, tied, all experts", "olmoe",
     {"attention_bias": True, "norm_topk_prob": True, "tie_word_embeddings": True, "num_experts_per_tok": 4,
      "num_key_value_heads": 1}),
    ("granitemoe, biases, tied, one of three", "granitemoe",
     {"attention_bias": True, "tie_word_embeddings": True, "num_local_experts": 3, "num_experts_per_tok": 1}),
    ("gpt_oss, three layers of which one slides, no biases", "gpt_oss",
     {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
      "attention_bias": False, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("deepseek_v2 without compressed queries, groups, yarn, biases", "deepseek_v2",
     {"q_lora_rank": None, "topk_method": "group_limited_greedy", "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
      "routed_scaling_factor": 2.5, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3,
      "rope_scaling": {**YARN, "type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707}}),
    ("deepseek_v3, no dense layers, not renormalized, halves rotated", "deepseek_v3",
     {"first_k_dense_replace": 0, "norm_topk_prob": False, "rope_interleave": False, "q_lora_rank": None,
      "tie_word_embeddings": True, "n_group": 1, "topk_group": 1, "attention_bias": True, "rms_norm_eps": 1e-5}),
]  # fmt: skip
MORE += [
    ("gemma, three layers, biases, untied", "gemma",
     {"num_hidden_layers": 3, "attention_bias": True, "tie_word_embeddings": False, "rope_theta": 300.0}),
    ("gemma2, no caps, biases, untied, one key head, the second layer slides", "gemma2",
     {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True,
      "tie_word_embeddings": False, "num_key_value_heads": 1, "layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma3, new spelling, three layers of which the second is local, capped logits, biases", "gemma3_text",
     {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
      "rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 900.0},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
      "max_position_embeddings": 8, "final_logit_softcapping": 2.0, "attention_bias": True}),
    ("olmo2, biases, tied, one key head", "olmo2",
     {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1, "rope_scaling": YARN}),
    ("olmo3, three layers of one kind of positions, biases", "olmo3",
     {"num_hidden_layers": 3, "attention_bias": True, "num_key_value_heads": 4}),
    ("phi3, window, tied, one key head", "phi3",
     {"sliding_window": 5, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("phi3, short sequences of longrope", "phi3",
     {"original_max_position_embeddings": 32, "num_key_value_heads": 4,
      "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.5, 3.0]}}),
    ("smollm3, biases, untied, sliding where not rotated", "smollm3",
     {"no_rope_layers": [0, 1, 1], "num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True,
      "tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 5}),
    ("granite, biases, tied", "granite",
     {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "residual_multiplier": 0.5}),
    ("stablelm, side by side with one norm, tied", "stablelm",
     {"use_parallel_residual": True, "tie_word_embeddings": True, "partial_rotary_factor": 0.5}),
    ("cohere2, biases, untied, the second layer slides", "cohere2",
     {"attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 4,
      "layer_types": ["full_attention", "sliding_attention"]}),
]  # fmt: skip
"""Further shapes of them, for who changes a family: marked `study`."""


def as_params(tensors: dict[str, torch.Tensor], reference: Any, directory: Path) -> Any:
    """Tensors named as torch's parameters, in our layout: a checkpoint of them, converted."""
    buffers = {k: torch.zeros_like(b) for k, b in reference.named_buffers() if k in reference.state_dict()}
    reference.save_pretrained(directory, state_dict={k: t.detach() for k, t in {**buffers, **tensors}.items()})
    return convert.load(directory).params


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c[0], marks=pytest.mark.study if c in MORE else ()) for c in CASES + DENSE + MORE],
)
def test_float64_agrees_with_torch_and_is_written_back_bit_for_bit(case: Any, tmp_path: Path) -> None:
    _, family, options = case
    with in_float64(torch_model(family, **options)) as reference, jax.enable_x64(True):
        reference.save_pretrained(tmp_path / "checkpoint")
        model = convert.load(tmp_path / "checkpoint")
        assert model.config.dtype == "float64"
        tokens = tokens_for(VOCAB)
        with torch.no_grad():
            logits = reference(torch.from_numpy(tokens).long()[:, :-1]).logits.numpy()
        expected = [
            as_params(tensors, reference, tmp_path / str(i))
            for i, tensors in enumerate(torch_derivatives(reference, tokens))
        ]
        value, gradient, product = derivatives(model, tokens, expected[0])
        assert abs(float(value) - torch_loss(reference, tokens).item()) <= 1e-12 * float(value)
        ours = np.asarray(model.logits(tokens[:, :-1]))
        assert np.abs(ours - logits).max() <= 1e-11 * np.abs(logits).max()
        assert_close(gradient, expected[1], 1e-9)
        assert_close(product, expected[2], 1e-9)

        convert.export(model, tmp_path / "back")  # its config.json made from the DecoderConfig alone
        written, read = (tmp_path / name / "model.safetensors" for name in ("back", "checkpoint"))
        assert written.read_bytes() == read.read_bytes()
        described = json.loads((tmp_path / "back" / "config.json").read_text())
        assert described["model_type"] == family


@pytest.mark.slow
@pytest.mark.parametrize("case", DENSE, ids=[case[0] for case in DENSE])
def test_bfloat16_is_as_near_to_float64_as_that_of_torch(case: Any, tmp_path: Path) -> None:
    """Both round after every operation, by independent errors of one size: their norms are alike, and 2 is ample."""
    _, family, options = case
    narrow = torch_model(family, **options).bfloat16()
    narrow.save_pretrained(tmp_path)
    model, tokens = convert.load(tmp_path), tokens_for(VOCAB)
    inputs = torch.from_numpy(tokens).long()[:, :-1]
    with torch.no_grad():
        theirs = narrow(inputs).logits.double().numpy()
        embedded = narrow.get_input_embeddings()(inputs)
        with in_float64(narrow) as wide:
            if hasattr(wide.get_input_embeddings(), "embed_scale"):  # Gemma's is rounded to the dtype
                wide.get_input_embeddings().embed_scale = narrow.get_input_embeddings().embed_scale.bfloat16()
            exact = wide(inputs).logits.numpy()
    ours = np.asarray(model.logits(tokens[:, :-1]), np.float64)
    assert np.linalg.norm(ours - exact) <= 2 * np.linalg.norm(theirs - exact) <= 0.2 * np.linalg.norm(exact)
    if "gemma" in family:
        decoder = nnx.merge(model_graph(model.config, None), model.params)
        np.testing.assert_array_equal(
            np.asarray(decoder.states(tokens[:, :-1])[0], np.float32), embedded.float().numpy()
        )


@pytest.mark.slow
def test_the_balancing_loss_on_top_is_that_of_transformers(tmp_path: Path) -> None:
    """Over all layers and tokens of a batch; value, gradient and exact product."""

    def total(model: Any, tokens: np.ndarray) -> torch.Tensor:
        out = model(torch.from_numpy(tokens).long()[:, :-1], output_router_logits=True)
        targets = torch.from_numpy(tokens).long()[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(out.logits.reshape(-1, VOCAB), targets)
        return loss + 0.5 * out.aux_loss

    with in_float64(torch_model("mixtral")) as reference, jax.enable_x64(True):
        reference.save_pretrained(tmp_path / "checkpoint")
        model = convert.load(tmp_path / "checkpoint")
        tokens = tokens_for(VOCAB)
        parameters = dict(reference.named_parameters())
        direction = {name: torch.randn(p.shape, dtype=p.dtype) for name, p in parameters.items()}
        loss = total(reference, tokens)
        gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        slope = sum((g * direction[name]).sum() for name, g in zip(parameters, gradient, strict=True))
        product = torch.autograd.grad(slope, list(parameters.values()))
        found = [direction, *(dict(zip(parameters, x, strict=True)) for x in (gradient, product))]
        v, *expected = (as_params(t, reference, tmp_path / str(i)) for i, t in enumerate(found))
        ours = jaxhess.Hessian(dataclasses.replace(model.loss(), balance=0.5), model.params, [batch_of(tokens)])
        value, slopes = ours.value_and_gradient()
        assert abs(float(value) - loss.item()) <= 1e-12 * float(value)
        assert_close(slopes, expected[0], 1e-9)
        assert_close(ours @ v, expected[1], 1e-9)


def test_every_family_has_a_case() -> None:
    first = {"llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2"}
    assert {family for _, family, _ in CASES + DENSE} == FAMILIES.keys() - first
