"""One table per model family: the names and axes of its checkpoint tensors, and what its configuration says.

Adding a family whose architecture the decoder covers means adding a table here, nothing else.
"""

from __future__ import annotations

from convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from convert.families.experts import GRANITE_MOE, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from convert.families.family import Family
from convert.families.gemma import GEMMA, GEMMA2, GEMMA3
from convert.families.gpt import GPT2, GPT_NEOX
from convert.families.gpt_oss import GPT_OSS
from convert.families.layer_norm import COHERE2, STABLELM
from convert.families.llama import GRANITE, LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from convert.families.olmo import OLMO2, OLMO3
from convert.families.phi import PHI3
from convert.families.uncovered import UNCOVERED

__all__ = ["ACTIVATIONS", "FAMILIES", "UNCOVERED", "Family"]

_EXPERTS = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITE_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3)
_DENSE = (GEMMA, GEMMA2, GEMMA3, OLMO2, OLMO3, PHI3, SMOLLM3, GRANITE, STABLELM, COHERE2)
FAMILIES = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT_NEOX, GPT2, *_EXPERTS, *_DENSE)}

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
