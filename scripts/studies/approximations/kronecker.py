"""Kronecker factors of the curvature of every linear map: K-FAC of the Gauss-Newton matrix, and the nearest ones.

A kernel W [inputs, outputs] maps a token's input a to y = W'a. Write the curvature of a prediction's loss in its logits
z as the sum of s s' over columns s of a root of it, and let g be the gradient of s'z in y. The Gauss-Newton block of W
is the mean over predictions, of the sum over s, of x x' with x the sum of a_t (x) g_t over the tokens t that share the
map. K-FAC takes A (x) G for it: A is the mean of a a' over tokens, and G the sum of g g' over tokens and columns, per
prediction. That is exact if tokens are independent of each other, and inputs of gradients. It is the flavour "expand"
of arXiv 2311.00636 (known to us from its abstract and from curvlinops, which calls the exact expectation over the
model's predictions "type-2"). Nothing is sampled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from jaxhess.errors import InputError
from jaxhess.models import DecoderConfig, LanguageModel
from jaxhess.models.decoder import layer_facts
from jaxhess.models.language_model import model_graph
from jaxhess.operators.restriction import leaf_name

Array = npt.NDArray[np.float64]

MAPS = {
    "attention/query": 1,
    "attention/key": 1,
    "attention/value": 1,
    "attention/out": 2,
    "mlp/gate": 1,
    "mlp/up": 1,
    "mlp/down": 1,
}
"""Linear maps of a layer, and how many axes of their kernels are inputs."""


class LinearMap(NamedTuple):
    """Where a kernel lies among all parameters.

    Attributes:
        name: As blocks by matrices have it.
        places: [inputs, outputs] numbers of its entries in `ravel_pytree`'s order.
    """

    name: str
    places: npt.NDArray[np.int64]


class Factors(NamedTuple):
    """A (x) G, which stands for the curvature of W [inputs, outputs]; A is square, or [inputs] of a diagonal one."""

    inputs: Array
    outputs: Array


def linear_maps(params: Any) -> list[LinearMap]:
    """All linear maps of a decoder's parameters. The embedding is one of one-hot tokens."""
    found, start = [], 0
    for path, leaf in jax.tree.flatten_with_path(params)[0]:
        name, shape = leaf_name(path), leaf.shape
        places = np.arange(start, start + leaf.size).reshape(shape)
        start += leaf.size
        parts = name.split("/")
        if parts[-1] != "kernel":
            continue
        if parts[0] != "layers":
            # A row for every token: its inputs in the embedding, and its outputs in the head.
            found.append(LinearMap(name, places if parts[0] == "embed" else places.T))
            continue
        inputs = math.prod(shape[1 : 1 + MAPS["/".join(parts[1:3])]])
        for k, layer in enumerate(places):
            found.append(LinearMap(f"layers/{k}/{'/'.join(parts[1:])}", layer.reshape(inputs, -1)))
    return found


def nearest(matrix: Array, maps: list[LinearMap]) -> dict[str, Factors]:
    """For each map the factors nearest to its diagonal block in the Frobenius norm.

    The leading singular pair of the block with its entries rearranged to [inputs^2, outputs^2], of which a Kronecker
    product has rank one (Van Loan and Pitsianis 1993).
    """
    found = {}
    for name, places in maps:
        rows, columns = places.shape
        block = matrix[np.ix_(places.ravel(), places.ravel())].reshape(rows, columns, rows, columns)
        u, s, v = np.linalg.svd(block.transpose(0, 2, 1, 3).reshape(rows**2, columns**2), full_matrices=False)
        left, right = u[:, 0].reshape(rows, rows), v[0].reshape(columns, columns)
        sign = math.copysign(math.sqrt(s[0]), np.trace(left))
        found[name] = Factors(sign * (left + left.T) / 2, sign * (right + right.T) / 2)
    return found


def kfac(model: LanguageModel, rows: npt.NDArray[np.int32]) -> dict[str, Factors]:
    """K-FAC's factors of every linear map of a small decoder, for the mean loss over sequences [B, tokens + 1].

    Raises:
        InputError: The decoder has parts that this is not written for.
    """
    plain = DecoderConfig(
        **{field: getattr(model.config, field) for field in PLAIN}, dtype=model.config.dtype, remat=False
    )
    if model.config != plain:
        raise InputError("K-FAC is written for a Llama with its own output matrix, all else as DecoderConfig has it.")
    sums = None
    for tokens in rows:
        found = _sums(model.config, model.params, jnp.asarray(tokens[:-1]))
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    assert sums is not None
    count = rows.shape[0] * (rows.shape[1] - 1)
    return {name: Factors(np.asarray(a) / count, np.asarray(g) / count) for name, (a, g) in sums.items()}


PLAIN = (
    "vocab_size",
    "embed_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "max_positions",
    "query_chunk",
)
"""What may differ between the decoders that K-FAC is written for."""


class _Noted:
    """A linear map that notes its input, and adds a shift to its output: the gradient in the shift is that in y."""

    def __init__(self, own: Any, shift: jax.Array):
        self.own, self.shift = own, shift

    def __call__(self, x: jax.Array) -> jax.Array:
        self.input = x
        return self.own(x) + self.shift


def logits_and_inputs(
    config: DecoderConfig, params: Any, tokens: jax.Array, shifts: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits [T, V] of a sequence [T], every linear map's output shifted, and the inputs of all maps but the embedding.

    The layers are those of the model itself, taken one by one with their linear maps replaced by noting ones.
    """
    decoder = nnx.merge(model_graph(config, None), params)
    graph, stacked = nnx.split(decoder.layers)
    facts = layer_facts(config, tokens.size)
    inputs: dict[str, jax.Array] = {}
    x = decoder.embed.kernel[...][tokens][None] + shifts["embed/kernel"]
    for k in range(config.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, k=k: leaf[k], stacked))
        noted = {}
        for name in MAPS:
            room, own = name.split("/")
            part = getattr(block, room)
            noted[name] = _Noted(getattr(part, own), shifts[f"layers/{k}/{name}/kernel"])
            object.__setattr__(part, own, noted[name])
        x, _ = block(x, jax.tree.map(lambda fact, k=k: fact[k], facts))
        inputs |= {f"layers/{k}/{name}/kernel": one.input for name, one in noted.items()}
    inputs["head/kernel"] = decoder.final_norm(x)
    return (inputs["head/kernel"] @ decoder.output_matrix().T)[0], inputs


@functools.partial(jax.jit, static_argnums=0)
def _sums(config: DecoderConfig, params: Any, tokens: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Of every map the sum of a a' over the tokens of a sequence, and of g g' over tokens and columns s."""
    length = tokens.size
    zeros = {name: jnp.zeros((1, length, *shape)) for name, shape in _outputs(config)}
    logits, pull, inputs = jax.vjp(
        lambda shifts: logits_and_inputs(config, params, tokens, shifts), zeros, has_aux=True
    )
    p = jax.nn.softmax(logits)
    # diag(p) - p p' is the sum of s s' over classes c, s = sqrt(p_c) (e_c - p).
    roots = jnp.sqrt(p)[:, :, None] * (jnp.eye(p.shape[1]) - p[:, None])
    apart = jnp.eye(length)[:, None, :, None] * roots[:, :, None]  # [T, V, T, V]: of one prediction at a time
    (gradients,) = jax.vmap(pull)(apart.reshape(-1, *logits.shape))
    sums = {}
    for name, g in gradients.items():
        flat = g.reshape(-1, math.prod(zeros[name].shape[2:]))
        if name == "embed/kernel":
            counts = jnp.zeros(config.vocab_size).at[tokens].add(1)  # the diagonal of the sum of one-hot a a'
            sums[name] = counts, flat.T @ flat
        else:
            a = inputs[name].reshape(length, -1)
            sums[name] = a.T @ a, flat.T @ flat
    sums["head/kernel"] = inputs["head/kernel"][0].T @ inputs["head/kernel"][0], jnp.einsum("tcv,tcw->vw", roots, roots)
    return sums


def _outputs(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Maps but the head, and the shapes of their outputs."""
    heads = (config.num_heads, config.head_dim)
    shapes = {"query": heads, "key": heads, "value": heads, "gate": (config.mlp_dim,), "up": (config.mlp_dim,)}
    yield "embed/kernel", (config.embed_dim,)
    for k in range(config.num_layers):
        for name in MAPS:
            yield f"layers/{k}/{name}/kernel", shapes.get(name.split("/")[1], (config.embed_dim,))
