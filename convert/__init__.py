"""Hugging Face checkpoints <-> jaxhess models."""

from convert.hugging_face import export
from convert.loading import load
from convert.orbax_checkpoint import save
from convert.tokenizer import load_tokenizer

__all__ = ["export", "load", "load_tokenizer", "save"]
