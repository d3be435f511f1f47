"""Hugging Face checkpoints <-> jaxhess models."""

from convert.exporting import export
from convert.families import FAMILIES
from convert.loading import load, load_config, read_config
from convert.optimizer_state import Preconditioner, load_preconditioner
from convert.orbax_checkpoint import save
from convert.tokenizer import load_tokenizer

__all__ = [
    "FAMILIES",
    "Preconditioner",
    "export",
    "load",
    "load_config",
    "load_preconditioner",
    "load_tokenizer",
    "read_config",
    "save",
]
