"""Blocks of three families are those of PyTorch's Hessian, by double backward in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import torch, torch_model
from small_models import batch_of

import convert
import jaxhess
from scripts.validation.float64 import in_float64
from tests.operators.test_blocks import labels_of
from tests.structure.test_coupling import exact

SMALL = {"hidden_size": 4, "intermediate_size": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 7}
CASES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": {**SMALL, "head_dim": 4, "tie_word_embeddings": True},
    "gpt2": {"vocab_size": 7, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 6, "n_inner": 5},
}


def layer_of(name: str) -> str:
    """Our name of the block by layers that a PyTorch parameter is in."""
    layer = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
    if layer:
        return f"layers/{layer[1]}"
    return "head" if "lm_head" in name else "final_norm" if "norm" in name or "ln_f" in name else "embed"


def dense_hessian(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """[n, n] of the mean loss, and the block of every row."""
    named = dict(model.named_parameters())
    inputs = torch.from_numpy(tokens).long()
    logits = model(inputs[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), inputs[:, 1:].reshape(-1))
    gradient = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(entry, list(named.values()), retain_graph=True) for entry in flat]
    matrix = torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows])
    return matrix.numpy(), [layer_of(name) for name, p in named.items() for _ in range(p.numel())]


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name == "llama" else pytest.mark.study) for name in CASES]
)
def test_norms_and_extremes_of_layers_are_those_of_torch(family: str, tmp_path: Path) -> None:
    """Norms to 1e-9 (both are float64 throughout, with some hundred roundings in a row), extremes to 1e-8 of the
    largest, sampled norms within four standard errors."""
    tokens = np.random.default_rng(1).integers(0, 7, (2, 6))
    with in_float64(torch_model(family, **CASES[family])) as reference, jax.enable_x64(True):
        reference.save_pretrained(tmp_path)
        theirs, rows = dense_hessian(reference, tokens)
        model = convert.load(tmp_path)
        operator = jaxhess.Hessian(model.loss(), model.params, [batch_of(tokens.astype(np.int32))])
        blocks = jaxhess.Blocks.by(operator, "layers")
        ours = exact(np.asarray(operator.to_matrix()), blocks)
        places = [[row == name for row in rows] for name in blocks.names]
        norms = [[np.linalg.norm(theirs[np.ix_(a, b)]) for b in places] for a in places]
        np.testing.assert_allclose(ours, norms, rtol=1e-9, atol=1e-9 * np.max(norms))
        found = jaxhess.coupling_map(operator, blocks, probes=40)
        assert (np.abs(found.coupling - norms) <= 4 * found.coupling_error + 1e-12).all()
        spectra = jaxhess.block_spectra(operator, blocks, steps=blocks.sizes.max().item(), probes=1)
        for spectrum, place in zip(spectra.spectra, places, strict=True):
            values = np.linalg.eigvalsh(theirs[np.ix_(place, place)])
            ends = [np.nanmin(spectrum.ritz_values), np.nanmax(spectrum.ritz_values)]
            np.testing.assert_allclose(ends, values[[0, -1]], atol=1e-8 * np.abs(values).max())
    assert len(labels_of(blocks)) == len(rows)
