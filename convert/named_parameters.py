"""Our parameters, and vectors like them, under the names that they have in a `transformers` model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from convert.configs import family_of, hugging_face_config
from convert.exporting import file_tensor, parts_of_tensors
from convert.mapping import Row, axis_sizes, mapping_rows
from jaxhess.errors import InputError
from jaxhess.krylov.eigenpairs import Eigenpairs
from jaxhess.models import DecoderConfig, abstract_params
from jaxhess.operators.restriction import Restriction, leaf_name
from jaxhess.vectors import Vector


def tensors_by_name(vector: Vector, config: DecoderConfig) -> dict[str, np.ndarray]:
    """A tree like the parameters as tensors named and shaped as in `named_parameters()` of transformers 5.

    What is a parameter here and a buffer there (the bias by which DeepSeek-V3 chooses experts) has its name there.
    Order is that of the model: embedding, layer by layer, head. A tied head is the embedding and not listed.

    Args:
        vector: Nested dictionaries like `LanguageModel.params`; fully addressable.
        config: The model's.
    """
    parts, sizes = _parts(config), axis_sizes(config)
    return {name: file_tensor(vector, config, held, held[0][0].layout.shape(sizes)) for name, held in parts.items()}


def layers_module(config: DecoderConfig) -> str:
    """Name of the module that holds the layers, such as `model.layers`."""
    stacked = next(name for name, held in _parts(config).items() if held[0][0].stacked)
    return stacked[: stacked.index(".0.")]


def save_directions(
    pairs: Eigenpairs, config: DecoderConfig, file: str | Path, block: Restriction | None = None
) -> None:
    """Writes the eigenvectors as safetensors: `NAME` of `named_parameters()`, [k, *shape], and `eigenvalues` [k].

    Together the k-th entries of all names are a unit vector. For PyTorch:

        vectors = safetensors.torch.load_file(file)
        for name, p in model.named_parameters():
            p.data += step * vectors[name][0]

    Args:
        pairs: Vectors on the host.
        config: The model's.
        file: Where to.
        block: The parameters that the operator was restricted to; the vectors are zero elsewhere.

    Raises:
        InputError: The vectors are not like the parameters of this model, or of this block of them.
    """
    params = abstract_params(config)
    expected = params if block is None else block.take(params)
    if _shapes(pairs.vectors, 1) != _shapes(expected):
        raise InputError(
            "The eigenvectors are not like the parameters of the model"
            + (": they may be those of a block of it." if block is None else f" in the block {block}.")
        )
    dtype = jax.tree.leaves(pairs.vectors)[0].dtype
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), params)
    vectors = [jax.tree.map(lambda x, i=i: x[i], pairs.vectors) for i in range(len(pairs.values))]
    each = [tensors_by_name(v if block is None else block.insert(v, zero), config) for v in vectors]
    tensors = {name: np.stack([vector[name] for vector in each]) for name in each[0]}
    facts = {name: np.asarray(getattr(pairs, name), np.float64) for name in ("values", "residuals")}
    save_file(
        {**tensors, "eigenvalues": facts["values"], "residuals": facts["residuals"]}, file, metadata={"format": "pt"}
    )


def _shapes(tree: Any, leading: int = 0) -> dict[str, tuple[int, ...]]:
    """By the leaves' names, without so many leading axes."""
    return {leaf_name(path): x.shape[leading:] for path, x in jax.tree.flatten_with_path(tree)[0]}


def _parts(config: DecoderConfig) -> dict[str, list[tuple[Row, int]]]:
    family = family_of(hugging_face_config(config))
    head = family.head_alias or family.head
    rows = mapping_rows(family, config, prefix=family.prefix, head=head, in_memory=True)
    parts = parts_of_tensors(rows)

    def place(name: str) -> tuple[int, int]:
        row, number = parts[name][0]
        before = next(i for i, r in enumerate(rows) if r.stacked)
        return (1, row.layers[row.place(number)[0]]) if row.stacked else (0 if rows.index(row) < before else 2, 0)

    return {name: parts[name] for name in sorted(parts, key=place)}
