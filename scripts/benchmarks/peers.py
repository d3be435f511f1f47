"""The same products and Lanczos runs in PyTorch, by double backward and by hessian-eigenthings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert
from jaxhess.models import LanguageModel
from jaxhess.vectors import Vector
from scripts.benchmarks.rows import Measurement, largest_ritz_value, relative_error


def peer_rows(
    steps: int, model: LanguageModel, hessian: Any, lanczos: Any, vector: Vector, references: dict[str, Any]
) -> list[Measurement]:
    """The same weights, tokens, vector, loss and steps in PyTorch; its vectors are flat, in the order of its model."""
    import torch
    from hessian_eigenthings import HessianOperator, lanczos_tridiagonal
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    def torch_model(params: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            convert.export(LanguageModel(model.config, params), Path(folder) / "model")
            options = {"attn_implementation": "eager", "dtype": getattr(torch, model.config.dtype)}
            return AutoModelForCausalLM.from_pretrained(Path(folder) / "model", **options)

    def flat(tree: Vector) -> Any:
        like = jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype), tree, model.params)
        return torch.cat([p.detach().reshape(-1) for p in torch_model(like).parameters()])

    def loss_of(network: Any, batch: Any) -> Any:
        logits = network(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    network = torch_model(model.params).eval()
    weights = list(network.parameters())
    tokens, lanczos_tokens = (
        torch.tensor(np.asarray(h.batches[0].stacked.tokens[0]), dtype=torch.long) for h in (hessian, lanczos)
    )
    probe = flat(vector)
    unit = probe / probe.norm()

    def gradient() -> Any:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(network, tokens), weights)])

    def row(name: str, run: Callable[[], Any], expected: str) -> Measurement:
        if expected not in references:
            return Measurement(name, run)
        reference = flat(references[expected]).double().numpy()
        return Measurement(name, run, lambda answer: relative_error(answer.double().numpy(), reference))

    def lanczos_row(name: str, method: Any) -> Measurement:
        operator = HessianOperator(network, [lanczos_tokens], loss_of, method=method)

        def run() -> Any:
            return lanczos_tridiagonal(operator, unit, steps, reorthogonalize=False)

        def error(found: Any) -> float:
            betas = [*found.betas, found.last_beta]
            return relative_error(largest_ritz_value(found.alphas, betas), references["ritz value"])

        return Measurement(f"hessian-eigenthings, {name}", run, error if references else None)

    double_backward = HessianOperator(network, [tokens], loss_of)
    return [
        row("PyTorch gradient", gradient, "gradient"),
        row("PyTorch double-backward product", lambda: double_backward.matvec(probe), "product"),
        lanczos_row("exact", "autograd"),
        lanczos_row("differences", "finite_difference"),
    ]
