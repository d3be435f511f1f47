"""Text and tokens, as microbatches."""

from jaxhess.data.blocks import TokenBatch, TokenBlocks, label_weights, pad_ragged, random_blocks
from jaxhess.data.reading import TEXT_SUFFIXES, Encode, pack, read_blocks, read_documents
from jaxhess.data.sampling import Sampling

__all__ = [
    "TEXT_SUFFIXES",
    "Encode",
    "Sampling",
    "TokenBatch",
    "TokenBlocks",
    "label_weights",
    "pack",
    "pad_ragged",
    "random_blocks",
    "read_blocks",
    "read_documents",
]
