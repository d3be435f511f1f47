"""How far our logits are from those of `transformers` on the same weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convert.loading import load
from convert.reference import reference_model
from jaxhess.distributed.mesh import data_shards
from jaxhess.errors import InputError
from jaxhess.models import LanguageModel
from jaxhess.vectors import check_seed

TOLERANCE = 1e-4
"""Above the rounding of float32 through a hundred layers, far below what one misplaced tensor does (order 1)."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Largest difference between two sets of logits, and the same divided by the largest logit."""

    absolute: float
    relative: float

    @property
    def within_rounding(self) -> bool:
        """The difference is one of rounding; a NaN is not."""
        return self.relative <= TOLERANCE


def verify(
    ours: Path,
    theirs: Path,
    mesh: Mesh | None = None,
    *,
    dtype: str,
    sequences: int = 4,
    length: int = 32,
    seed: int = 0,
) -> Agreement:
    """Compares logits on random tokens, both sides computing in float32 so that only a real difference shows.

    Args:
        ours: A checkpoint that `convert.load` reads.
        theirs: A Hugging Face directory, or a GGUF file.
        mesh: Where our side is loaded; None: on the first device.
        dtype: Dtype to which the weights of both are rounded first: the narrower of theirs.
        sequences: Random sequences, at least (as many more as the mesh needs for equal parts).
        length: Tokens of each (fewer where the model knows fewer positions).
        seed: Of the random tokens.

    Raises:
        InputError: torch is not installed; `theirs` is no Hugging Face checkpoint that `transformers` reads.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            "--verify needs torch; install the extra: pip install -e '.[torch]' in the repository."
        ) from None
    check_seed(seed)
    reference = reference_model(theirs, dtype)
    model = _in_float32(load(ours, mesh, dtype))
    shards = data_shards(mesh)
    shape = (math.ceil(sequences / shards) * shards, min(length, model.config.max_positions))
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, shape, dtype=np.int32)
    with torch.no_grad():
        expected = reference.float()(torch.from_numpy(tokens).long()).logits.numpy()
    difference = float(np.max(np.abs(np.asarray(model.logits(jnp.asarray(tokens))) - expected)))
    return Agreement(difference, difference / float(np.max(np.abs(expected))))


def _in_float32(model: LanguageModel) -> LanguageModel:
    """`model` computing in float32; its own parameters are given up one by one, so no two copies exist."""
    leaves, structure = jax.tree.flatten(model.params)
    model.params.clear()
    for i, leaf in enumerate(leaves):
        leaves[i] = leaf.astype(jnp.float32)
    config = dataclasses.replace(model.config, dtype="float32")
    return LanguageModel(config, jax.tree.unflatten(structure, leaves), model.mesh)
