"""The `transformers` model in a checkpoint, of whatever format, with plain weights: what ours is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.checkpoint import configuration
from convert.gguf_model import gguf_file
from convert.json_files import one_line
from convert.quantized import quantization_method
from jaxhess.errors import InputError


def reference_model(path: Path, dtype: str | None = None) -> Any:
    """The causal language model of `transformers`, in evaluation mode, with attention and experts written out.

    Quantized weights are dequantized by `transformers` itself. Of a GGUF file the tensors are read by it and the
    configuration is ours: release 5.24 leaves out the size of heads (Qwen3) and RoPE scaling.

    Args:
        path: A Hugging Face directory or a GGUF file, or a directory with one.
        dtype: Of weights and computation; None: as stored.

    Raises:
        InputError: `transformers` cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    hf_config, _ = configuration(path)
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else getattr(torch, dtype)}
    options |= dict.fromkeys(("attn_implementation", "experts_implementation"), "eager")
    gguf = gguf_file(path)
    if gguf is not None:
        options |= {"gguf_file": gguf.name, "config": _transformers_config(hf_config)}
        options["dtype"] = options["dtype"] if dtype else torch.float32
        path = gguf.parent
    try:
        if quantization_method(hf_config) is not None:
            options["quantization_config"] = _dequantizing(hf_config)
        model: Any = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"transformers cannot read {gguf or path}: {one_line(error, 1000)}") from error
    if getattr(model, "hf_quantizer", None) is not None:  # the weights are plain now, and may change their dtype
        model.hf_quantizer.remove_quantization_config(model)
    return model


def _transformers_config(hf_config: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[hf_config["model_type"]].from_dict(dict(hf_config))


def _dequantizing(hf_config: dict[str, Any]) -> Any:
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    return {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[str(quantization_method(hf_config))](dequantize=True)
