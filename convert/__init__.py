"""Hugging Face checkpoints <-> jaxhess models."""

from convert.exporting import export
from convert.families import FAMILIES
from convert.loading import load, load_config, read_config
from convert.orbax_checkpoint import save
from convert.tokenizer import load_tokenizer

__all__ = ["FAMILIES", "export", "load", "load_config", "load_tokenizer", "read_config", "save"]
