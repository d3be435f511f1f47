"""One table per model family: the names and axes of its checkpoint tensors, and what its configuration says.

Adding a family whose architecture the decoder covers means adding a table here, nothing else.
"""

from __future__ import annotations

from convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from convert.families.experts import GRANITE_MOE, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from convert.families.family import Family
from convert.families.gpt import GPT2, GPT_NEOX
from convert.families.gpt_oss import GPT_OSS
from convert.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

__all__ = ["ACTIVATIONS", "FAMILIES", "Family"]

_EXPERTS = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITE_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3)
FAMILIES = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT_NEOX, GPT2, *_EXPERTS)}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Name in `transformers` -> ours. The first of several names is the one written back."""
