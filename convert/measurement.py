"""Everything between the weights and the spectrum, measured on our side, under the names of `transformers`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from convert.agreement import LanczosCoefficients, Measure, Side
from convert.named_parameters import tensors_by_name
from jaxhess.data import TokenBlocks
from jaxhess.krylov.lanczos import lanczos_segment
from jaxhess.krylov.quadrature import quadrature
from jaxhess.krylov.state import start_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.models import LOGIT_CHUNK, DecoderConfig, LanguageModel, Params, model_graph
from jaxhess.operators import FiniteDifferenceHessian, Hessian, Microbatches
from jaxhess.vectors import Vector, cast, random_key, random_probe, widen

Mode = Literal["none", "full"]
MODES: tuple[Mode, ...] = ("none", "full")
"""Of re-orthogonalisation. In exact arithmetic they are the same: of a run in a wider dtype "full" is the reference for
both."""


def probe_of(model: LanguageModel, seed: int) -> Vector:
    """A random vector like the parameters: that of the first probe of `jaxhess.spectrum` with this seed."""
    key = jax.random.fold_in(random_key(seed), 0)
    return random_probe(key, model.params)


def measure(
    model: LanguageModel,
    blocks: TokenBlocks,
    probe: Vector,
    *,
    microbatch: int,
    steps: int,
    step: float,
    modes: Sequence[Mode] = MODES,
    logit_chunk: int = LOGIT_CHUNK,
) -> Side:
    """Our side, with the library's own operators and Lanczos.

    Args:
        model: The model; float64 needs `jax.enable_x64`.
        blocks: All that the loss is over. Activations are of the first microbatch.
        probe: What products are taken with and Lanczos starts from; cast to the parameters' dtype.
        microbatch: Sequences at once.
        steps: Lanczos steps; 0: none is run.
        modes: Of re-orthogonalisation.
        step: Of finite differences, per coordinate.
        logit_chunk: Logits that exist at once in the loss.
    """
    batches = Microbatches(blocks.microbatches(microbatch, model.mesh))
    loss_of = model.loss(logit_chunk)
    operator = Hessian(loss_of, model.params, batches)
    probe = cast(probe, model.params)
    # Sequences that fill up the batch for a mesh are no part of what is compared.
    present = min(microbatch, blocks.num_sequences)
    states, final, logits = _activations(model.config, model.mesh, model.params, batches.stacked.tokens[0][:, :-1])
    inside = {f"activations after layer {i}": np.asarray(x)[:present] for i, x in enumerate(states[1:])}
    loss, gradient = _value_and_gradient(operator)
    difference = FiniteDifferenceHessian(loss_of, model.params, batches, step=step, per="coordinate")

    def named(v: Vector) -> dict[str, np.ndarray]:
        return tensors_by_name(v, model.config)

    return Side(
        weights=named(model.params),
        quantities={
            "activations before the layers": np.asarray(states[0])[:present],
            **inside,
            "activations after the final norm": np.asarray(final)[:present],
            "logits": np.asarray(logits)[:present],
            "loss": np.asarray(loss),
            "gradient": named(gradient),
            "exact Hessian product": named(operator @ widen(probe)),
            "finite-difference Hessian product": named(difference @ widen(probe)),
        },
        lanczos={mode: _lanczos(operator, probe, steps, mode) for mode in modes if steps},
        quadrature=_quadrature,
    )


def _lanczos(operator: Hessian, probe: Vector, steps: int, mode: Mode) -> LanczosCoefficients:
    """Step by step, every vector kept on the host."""
    state = start_lanczos([probe], steps, Storage(mode))
    vectors, orthogonality, worst = [], [], 0.0
    for j in range(steps):
        vectors.append(np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(state.current)]))
        overlaps = np.array([q @ vectors[-1] for q in vectors])
        overlaps[-1] -= 1
        worst = max(worst, float(np.abs(overlaps).max()))
        orthogonality.append(worst)
        state = lanczos_segment(operator, state, j + 1)
    alphas, betas = (np.asarray(x[0], np.float64) for x in (state.alphas, state.betas))
    return LanczosCoefficients(alphas, betas, np.array(orthogonality))


def _quadrature(alphas: np.ndarray, betas: np.ndarray) -> Measure:
    nodes = quadrature(alphas, betas)
    return Measure(nodes.ritz_values, nodes.weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _activations(config: DecoderConfig, mesh: Mesh | None, params: Params, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """The residual stream [L + 1, B, T, D], the final states [B, T, D] without the factor on logits, and the logits."""
    decoder = nnx.merge(model_graph(config, mesh), params)
    with jax.default_matmul_precision("highest"):
        return decoder.states(tokens), decoder.hidden(tokens) / config.logit_scale, decoder(tokens)


@jax.jit
def _value_and_gradient(operator: Hessian) -> tuple[jax.Array, Vector]:
    return operator.value_and_gradient()
