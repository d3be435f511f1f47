"""`transformers` models that compute in float64 throughout."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def in_float64(model: Any) -> Iterator[Any]:
    """A copy of the model that computes in float64 throughout.

    `model.double()` alone leaves RMSNorm, softmax and the rotary tables of `transformers` in float32, about 1e-7 on a
    Hessian-vector product: they ask for `torch.float32` by name, which inside this block means float64.
    """
    narrow, method, default = torch.float32, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)  # of an integer tensor times a number: the base of dynamic RoPE
    try:
        wide = copy.deepcopy(model).double()
        for module in wide.modules():
            if hasattr(module, "rope_type"):
                _widen_rotary(module)
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale)
        yield wide
    finally:
        torch.float32 = torch.float = narrow
        torch.Tensor.float = method  # type: ignore[method-assign]
        torch.set_default_dtype(default)


def _widen_rotary(module: Any) -> None:
    """Frequencies again, as before the first forward of dynamic and long RoPE: some models have them by layer type."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    by_layer = isinstance(module.rope_type, dict)
    for layer_type, kind in module.rope_type.items() if by_layer else [(None, module.rope_type)]:
        compute = module.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
        rates = compute(module.config, **({"layer_type": layer_type} if by_layer else {}))[0].double()
        prefix = f"{layer_type}_" if by_layer else ""
        setattr(module, f"{prefix}inv_freq", rates)
        setattr(module, f"{prefix}original_inv_freq", rates.clone())
        module.__dict__.pop(f"{prefix}long_inv_freq", None)
    if hasattr(module, "original_max_seq_len"):
        module.max_seq_len_cached = module.original_max_seq_len
