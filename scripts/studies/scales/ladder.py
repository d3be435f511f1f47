"""Decoders of several sizes, trained alike on the bytes of a text."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.data import TokenBatch
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.models import DecoderConfig, abstract_params
from scripts.training.short_runs import TrainingTask, adam, mean_loss, sweep
from scripts.training.small_decoder import byte_config, decoder_problem

HEADS = 4


@dataclasses.dataclass(frozen=True)
class Rung:
    """One model: its width, its layers, and how many times as long as the others it is trained."""

    width: int
    layers: int
    longer: int = 1

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.width} x {self.layers}" + f", {self.longer} x as long" * (self.longer > 1)


LADDER = {0.03: Rung(32, 1), 0.1: Rung(64, 2), 0.3: Rung(96, 3), 1.0: Rung(160, 3), 4.0: Rung(288, 4)}
"""By about how many million parameters it has."""
WIDTHS = (Rung(32, 2), Rung(64, 2), Rung(128, 2))
DEPTHS = (Rung(64, 1), Rung(64, 2), Rung(64, 4))
TRAINING = (Rung(64, 2), Rung(64, 2, longer=4))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every model is trained: Adam, the learning rate rising for a tenth of the steps and then falling to zero."""

    steps: int
    batch: int
    seq_len: int
    rate: float
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRung:
    """A model after training, with its training task."""

    rung: Rung
    task: TrainingTask
    params: Any

    @property
    def parameters(self) -> int:
        """How many."""
        return sum(x.size for x in jax.tree.leaves(self.params))

    @property
    def loss(self) -> float:
        """Over about 128 sequences, evenly spread over the data, in nats per byte."""
        part = jax.tree.map(lambda x: x[:: max(1, len(x) // 128)], self.task.data)
        return mean_loss(dataclasses.replace(self.task, data=part), self.params)


def train(rung: Rung, recipe: Recipe, data: TokenBatch, kept: Path | None) -> TrainedRung:
    """Trains a model, or reads it from the folder `kept`, where trained ones are left under a name of recipe and data.

    Raises:
        InputError: A file there holds another model; the folder cannot be written.
    """
    config = byte_config(rung.width, rung.layers, HEADS, recipe.seq_len)
    task = decoder_problem(config, data, recipe.batch)
    steps = recipe.steps * rung.longer
    name = f"{rung.width}x{rung.layers}_{steps}x{recipe.batch}x{recipe.seq_len}_{recipe.rate:g}_{recipe.seed}"
    name += f"_{hashlib.sha256(np.asarray(data.tokens).tobytes()).hexdigest()[:12]}.npz"
    if kept is not None and (kept / name).exists():
        return TrainedRung(rung, task, _read(kept / name, config))
    params = sweep(task, adam, (recipe.rate,), (recipe.seed,), steps).params[0][0]
    if kept is not None:
        file = io.BytesIO()
        arrays: dict[str, Any] = {jax.tree_util.keystr(k): x for k, x in jax.tree.leaves_with_path(params)}
        np.savez(file, **arrays)
        with Output(kept, (name,), overwrite=False) as output:
            output.write({name: file.getvalue()})
    return TrainedRung(rung, task, params)


def _read(path: Path, config: DecoderConfig) -> Any:
    try:
        with np.load(path) as saved:

            def leaf(key: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
                found = saved[jax.tree_util.keystr(key)]
                if found.shape != like.shape or found.dtype != like.dtype:
                    is_, wanted = (f"{x.dtype} of shape {x.shape}" for x in (found, like))
                    raise ValueError(f"{jax.tree_util.keystr(key)} is {is_}, not {wanted}")
                if not np.isfinite(found).all():
                    raise ValueError(f"{jax.tree_util.keystr(key)} has numbers that are not finite")
                return jnp.asarray(found)

            return jax.tree.map_with_path(leaf, abstract_params(config))
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} does not hold the model of its name ({error}): remove it.") from None
