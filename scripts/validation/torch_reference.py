"""The papers' algorithms in PyTorch, written plainly: a reference to check jaxhess against, and to read.

- Exact Hessian-vector products by double backward: Algorithm 1 of *HessFormer* (arXiv 2505.11564).
- Central differences of the gradient, shard by shard: Algorithm 1 of *Hessian Spectral Analysis at Foundation Model
  Scale* (arXiv 2602.00816). Nothing here looks at more than one parameter at a time but for scalars, which is all that
  its sharded form needs: each shard shifts and subtracts what it holds.
- Lanczos with and without orthogonalisation: Algorithm 2 of the first, section 4 of the second.

Vectors are dictionaries of tensors by parameter name. Never forward mode: in torch 2.13 its derivative of LayerNorm is
wrong (pytorch issues 196700 and 198017). Never with `padding_idx`, which `transformers` gives an embedding from the
configuration's `pad_token_id`: torch then drops the gradient of that row, and where the text holds that token what it
differentiates is not the gradient of the loss. `load` clears it; `padding_errors` measures what it does.

HessFormer's published code (github.com/PureStrength-AI/HessFormer, commit 5adcfbd) is not this, and its numbers must
not be expected to agree with any tool's, nor with its own paper: it differentiates `logits.float().mean()` and not the
cross-entropy, it evaluates at the probe (`hvp_fn(batch_loss, v_dict, v_dict)`) and not at the model's weights, so that
its operator is not linear, and by default it uses forward mode. Its T has the betas from before re-orthogonalisation.
`run_lanczos` of it returns what `Spectrum.load` reads; the spectrum is of another matrix.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from convert.agreement import EXACT, LanczosCoefficients, Measure, Side
from convert.measurement import MODES, Mode
from convert.reference import reference_model
from jaxhess.data import TokenBlocks
from scripts.validation.float64 import in_float64

Vector = dict[str, torch.Tensor]
Product = Callable[[Vector], Vector]


class Tridiagonal(NamedTuple):
    """What Lanczos found after m steps.

    Attributes:
        alphas: [m] float64.
        betas: [m] float64; the last one is the norm that was left.
        orthogonality: [m] the largest |Q'Q - I| over the vectors of the first j + 1 steps.
    """

    alphas: torch.Tensor
    betas: torch.Tensor
    orthogonality: torch.Tensor


def load(directory: str | Path, dtype: str | None = None) -> Any:
    """The causal language model in a checkpoint, with attention and experts written out (double backward needs it).

    Embeddings have no `padding_idx`; what they had is in `model.cleared_padding`, token ids by name of the module.
    Buffers that checkpoints hold are parameters, as on our side: the bias by which DeepSeek-V3 chooses experts, whose
    gradient is zero.

    Args:
        directory: A Hugging Face directory, or a GGUF file.
        dtype: Of weights and computation; None: as stored.

    Raises:
        InputError: `transformers` cannot read it.
    """
    logging.disable_progress_bar()
    model = reference_model(Path(directory), dtype)
    model.config.use_cache = False
    model.cleared_padding = {}
    saved = model.state_dict().keys()
    for name, module in model.named_modules():
        for own, buffer in list(module.named_buffers(recurse=False)):
            if f"{name}.{own}" in saved:
                delattr(module, own)
                module.register_parameter(own, torch.nn.Parameter(buffer))
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            model.cleared_padding[name] = module.padding_idx
            module.padding_idx = None
    return model


class Batch(NamedTuple):
    """Tokens [B, T + 1], and weights [B, T] of the predicted ones: 0 where one is padding."""

    tokens: torch.Tensor
    weights: torch.Tensor


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Weighted sum of next-token cross-entropies in nats, from logits in at least float32."""
    logits, targets = model(batch.tokens[:, :-1]).logits.float(), batch.tokens[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (batch.weights.flatten().to(losses.dtype) * losses).sum()


def gradient(model: Any, batches: list[Batch]) -> tuple[float, Vector]:
    """The mean loss over all tokens that count, and its gradient in at least float32."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total, sums = 0.0, _zeros(model)
    for batch in batches:
        loss = loss_sum(model, batch)
        total += loss.item()
        for name, part in zip(names, _gradients(loss, parameters), strict=True):
            sums[name] += part
    count = _count(batches)
    return total / count, {name: x / count for name, x in sums.items()}


def _gradients(loss: torch.Tensor, parameters: Sequence[torch.Tensor], create_graph: bool = False) -> Any:
    """Zero for what the loss does not depend on."""
    return torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)


def double_backward(model: Any, batches: list[Batch]) -> Product:
    """v -> Hv, exact: the gradient of <gradient, v> (Pearlmutter 1994). v is rounded to the weights' dtype first."""
    names, parameters = zip(*model.named_parameters(), strict=True)

    def product(v: Vector) -> Vector:
        sums = _zeros(model)
        for batch in batches:
            gradients = _gradients(loss_sum(model, batch), parameters, create_graph=True)
            parts = [(g * v[name].to(g.dtype)).sum() for name, g in zip(names, gradients, strict=True)]
            slope = torch.stack(parts).sum()
            for name, part in zip(names, _gradients(slope, parameters), strict=True):
                sums[name] += part
        count = _count(batches)
        return {name: x / count for name, x in sums.items()}

    return product


def central_difference(model: Any, batches: list[Batch], step: float) -> Product:
    """v -> (gradient(theta + e u) - gradient(theta - e u)) |v| / 2e with u = v / |v| and e = step sqrt(parameters).

    `step` is thus the root mean square entry of the shift, as in the paper. Each parameter is shifted in float32 and
    rounded to its own dtype where it lies, and put back from a copy, bit for bit. What is divided by is the part along
    u of the shift that was representable: in bfloat16 that is not what was asked for.
    """
    parameters = dict(model.named_parameters())

    def product(v: Vector) -> Vector:
        length = math.sqrt(_dot(v, v))
        e = step * math.sqrt(sum(p.numel() for p in parameters.values()))
        sums, moved = _zeros(model), 0.0
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for sign in (1, -1):
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(_wide(before[name]) + (sign * e / length) * _wide(v[name]))
                    moved += sign * float(((_wide(p) - _wide(before[name])) * _wide(v[name])).sum()) / length
            for name, g in gradient(model, batches)[1].items():
                sums[name] += sign * g
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
        return {name: x * (length / moved) for name, x in sums.items()}

    return product


def lanczos(
    product: Product, probe: Vector, steps: int, orthogonalise: Literal["none", "full"] = "none"
) -> Tridiagonal:
    """`steps` steps of the three-term recurrence from the probe (Paige 1972, variant A1).

    Vectors are stored in the probe's dtype, everything else is in at least float32. "full" keeps them all and takes
    their components away twice. "none" takes those of the last two away once more, as our own does and the papers' bare
    recurrence does not; it keeps the others only to measure what became of orthogonality.
    """
    length = math.sqrt(_dot(probe, probe))
    basis = [{name: (_wide(x) / length).to(x.dtype) for name, x in probe.items()}]
    alphas: list[float] = []
    betas: list[float] = []
    orthogonality: list[float] = []
    worst = 0.0
    for j in range(steps):
        q = basis[j]
        w = product({name: _wide(x) for name, x in q.items()})
        if j:
            _subtract(w, betas[-1], basis[j - 1])
        alphas.append(_dot(w, q))
        _subtract(w, alphas[-1], q)
        for vectors in [basis, basis] if orthogonalise == "full" else [basis[-2:]]:
            for overlap, x in [(_dot(w, x), x) for x in vectors]:
                _subtract(w, overlap, x)
        betas.append(math.sqrt(_dot(w, w)))
        for k, x in enumerate(basis):
            worst = max(worst, abs(_dot(q, x) - (k == j)))
        orthogonality.append(worst)
        basis.append({name: (x / betas[-1]).to(q[name].dtype) for name, x in w.items()})
    return Tridiagonal(*(torch.tensor(x, dtype=torch.float64) for x in (alphas, betas, orthogonality)))


def measure(
    model: Any,
    blocks: TokenBlocks,
    probe: dict[str, np.ndarray],
    *,
    layers: str,
    microbatch: int,
    steps: int,
    step: float,
    modes: Sequence[Mode] = MODES,
) -> Side:
    """What `convert.measurement.measure` measures on our side, by the algorithms of this module."""
    batches, start = _batches(blocks, microbatch), _start(model, probe)
    states, logits = activations(model, batches[0].tokens[:, :-1], layers)
    inside = {f"activations after layer {i}": _array(x) for i, x in enumerate(states[1:-1])}
    loss, slope = gradient(model, batches)
    exact = double_backward(model, batches)
    difference = central_difference(model, batches, step)

    def named(v: Vector) -> dict[str, np.ndarray]:
        return {name: _array(x) for name, x in v.items()}

    return Side(
        weights=named(dict(model.named_parameters())),
        quantities={
            "activations before the layers": _array(states[0]),
            **inside,
            "activations after the final norm": _array(states[-1]),
            "logits": _array(logits),
            "loss": np.asarray(loss),
            "gradient": named(slope),
            "exact Hessian product": named(exact(start)),
            "finite-difference Hessian product": named(difference(start)),
        },
        lanczos={
            mode: LanczosCoefficients(*map(_array, lanczos(exact, start, steps, mode))) for mode in modes if steps
        },
        quadrature=quadrature,
    )


class PaddingError(NamedTuple):
    """What `padding_idx` does to a model, where its token occurs in the text.

    Attributes:
        parameter: Name of the embedding.
        token: The row that it gets no gradient for.
        times: How often the token is read.
        gradient: How far the gradient of the model with `padding_idx` is from that without, relative to the latter.
        elsewhere: The same in all other rows and parameters.
        product: The same of the exact Hessian product with the probe.
    """

    parameter: str
    token: int
    times: int
    gradient: float
    elsewhere: float
    product: float

    def sentence(self) -> str:
        """For who uses other PyTorch tools on this model and text."""
        other = "nowhere else" if self.elsewhere <= EXACT["float32"] else f"by {self.elsewhere:.1%} elsewhere"
        return (
            f"As transformers loads this model, PyTorch takes token {self.token} for padding (padding_idx) and drops "
            f"the gradient of its row. The token is read {self.times:,} times here: the gradient departs by "
            f"{self.gradient:.1%}, in row {self.token} of {self.parameter} and {other}, and the exact Hessian product "
            f"by {self.product:.1%}. This comparison clears padding_idx; in other PyTorch tools, clear it too."
        )


def padding_errors(
    model: Any, blocks: TokenBlocks, probe: dict[str, np.ndarray], microbatch: int
) -> Iterator[PaddingError]:
    """What each `padding_idx` that `load` cleared would do; none where its token is not read."""
    batches, start = _batches(blocks, microbatch), _start(model, probe)
    for module, token in model.cleared_padding.items():
        times = int((blocks.tokens[:, :-1] == token).sum())
        if not times:
            continue
        found = []
        for index in (None, token):
            model.get_submodule(module).padding_idx = index
            try:
                found.append((gradient(model, batches)[1], double_backward(model, batches)(start)))
            finally:
                model.get_submodule(module).padding_idx = None
        parameter = f"{module}.weight"
        slopes, products = zip(*found, strict=True)
        whole = _distance(*slopes)
        for slope in slopes:
            slope[parameter][token] = 0
        yield PaddingError(parameter, token, times, whole, _distance(*slopes), _distance(*products))


def quadrature(alphas: np.ndarray, betas: np.ndarray) -> Measure:
    """Ritz values, ascending, and weights, both [m] float64: eigenvalues of T and squared first components."""
    diagonal, off = torch.from_numpy(alphas), torch.from_numpy(betas[:-1])
    values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return Measure(values.numpy(), vectors[0].square().numpy())


def activations(model: Any, tokens: torch.Tensor, layers: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The residual stream [B, T, D] before the first layer, after each, and normalised after the last; and the logits.

    Args:
        layers: Name of the module that holds the layers, such as `model.layers`.
    """
    blocks = model.get_submodule(layers)
    seen: list[torch.Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    hooks += [
        b.register_forward_hook(lambda _, __, out: seen.append(out if torch.is_tensor(out) else out[0])) for b in blocks
    ]
    hooks.append(model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
    try:
        with torch.no_grad():
            logits = model(tokens).logits
    finally:
        for hook in hooks:
            hook.remove()
    return seen, logits


@contextlib.contextmanager
def widened(model: Any, dtype: str) -> Iterator[Any]:
    """A copy of the model that computes in float32, or by `in_float64` in float64."""
    if dtype == "float64":
        with in_float64(model) as wide:
            yield wide
    else:
        yield copy.deepcopy(model).float()


def _batches(blocks: TokenBlocks, microbatch: int) -> list[Batch]:
    tokens, weights = torch.from_numpy(blocks.tokens).long(), torch.from_numpy(blocks.weights)
    return [Batch(*pair) for pair in zip(tokens.split(microbatch), weights.split(microbatch), strict=True)]


def _start(model: Any, probe: dict[str, np.ndarray]) -> Vector:
    return {name: torch.from_numpy(probe[name].astype("float64")).to(p.dtype) for name, p in model.named_parameters()}


def _distance(true: Vector, other: Vector) -> float:
    apart = {name: x - other[name] for name, x in true.items()}
    return math.sqrt(_dot(apart, apart) / (_dot(true, true) or 1.0))


def _count(batches: list[Batch]) -> float:
    return float(sum(batch.weights.sum() for batch in batches))


def _zeros(model: Any) -> Vector:
    return {name: torch.zeros_like(_wide(p.detach())) for name, p in model.named_parameters()}


def _array(x: torch.Tensor) -> np.ndarray:
    """As numpy has it; bfloat16, which it lacks, in float32."""
    x = x.detach()
    return (x.to(torch.float32) if x.dtype == torch.bfloat16 else x).numpy()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _dot(x: Vector, y: Vector) -> float:
    """Summed in float64: a sum has no part in what is compared."""
    return sum(float((a.double() * y[name].double()).sum()) for name, a in x.items())


def _subtract(w: Vector, factor: float, x: Vector) -> None:
    for name, e in w.items():
        e -= factor * _wide(x[name])
