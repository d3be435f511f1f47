"""What a run takes, in closed form: bytes, operations and traffic of one device, without compiling anything.

Arguments, outputs and operations are counts, and agree with the compiled program. Temporaries depend on what a compiler
keeps alive together: their parts are counted, and how many of each are alive at the peak was measured (`ALIVE`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.distributed.memory import bytes_per_device
from jaxhess.models.vocabulary import vocabulary_slices
from jaxhess.plan.collectives import KINDS
from jaxhess.plan.job import Job
from jaxhess.plan.remat import again, stored_states

ALIVE: dict[str, dict[str, float]] = {
    "exact": {"weights": 2.4, "feed_forward": 8, "states": 4, "scores": 18, "logits": 3.8, "slice": 8},
    "finite-difference": {"weights": 1.3, "feed_forward": 2, "states": 3, "scores": 7.5, "logits": 1, "slice": 4},
}
"""How many arrays of a kind are alive at the peak: of a layer's weights, its states in the feed-forward and outside it,
and its attention scores; or of a slice's logits and rows. Fitted to programs compiled for CPUs in float32, see
`tests/plan/test_plan.py`; a tangent beside every array, and gradients that wait to be reduced, are among them."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), seq_len=32, sequences=8)
        >>> memory = plan.memory(job)
        >>> memory.total == memory.arguments + memory.temporaries
        True

    Attributes:
        theta: Parameters.
        vector: One Lanczos vector; a run holds two.
        basis: Vectors kept for re-orthogonalisation, none where the host keeps them.
        batch: Tokens of all microbatches, and their weights.
        result: The product and what it is summed up in; for finite differences also shifted parameters and a gradient,
            and one vector more to measure their step.
        saved: States between layers, kept for the backward pass, and their tangents.
        working: What is alive within one layer or one slice of the vocabulary, whichever is more: gathered weights and
            their gradients, activations, attention scores or logits.
        temporaries: Those three together; or what it takes to update the vectors, where that is more.
        residuals: What linearised products keep.
        audit: The peak of the audit of noise that a run begins with, 0 without: four vectors in float32 or wider.
        host: Vectors kept in the host's memory.
    """

    theta: int
    vector: int
    basis: int
    batch: int
    result: int
    saved: int
    working: int
    temporaries: int
    residuals: int
    audit: int
    host: int

    @property
    def outputs(self) -> int:
        """What a program returns, in the place of what it was given."""
        return 2 * self.vector + self.basis

    @property
    def arguments(self) -> int:
        """What a program is given."""
        return self.theta + self.outputs + self.batch + self.residuals

    @property
    def total(self) -> int:
        """The peak."""
        return max(self.arguments + self.temporaries, self.audit)


def memory(job: Job) -> Memory:
    """What the job takes on each device.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), seq_len=32, sequences=8)
        >>> memory = plan.memory(job)
        >>> memory.total > memory.theta + 2 * memory.vector  # the parameters and the last two Lanczos vectors
        True
    """
    sizes = _Sizes.of(job)
    params = jax.tree.leaves(job.params())
    state = job.state(job.shape)
    theta = bytes_per_device(params)
    vector = bytes_per_device(jax.tree.leaves(state.current))
    stored = bytes_per_device(jax.tree.leaves(state.basis))
    basis, host = (0, stored) if job.storage.basis_memory == "host" else (stored, 0)
    batch = 4 * job.microbatches * job.sequences_per_device * (2 * job.seq_len + 1)
    wide = max(4, jnp.dtype(job.vector_dtype).itemsize, jnp.dtype(job.accumulation_dtype).itemsize)
    summed = theta // jnp.dtype(job.config.dtype).itemsize * wide
    if job.hvp == "exact":
        result = summed if job.microbatches == 1 and wide == sizes.bytes else theta + summed * (job.microbatches > 1)
    else:
        result = summed + 2 * theta + summed * (job.step == "auto")
    residuals = 0
    alive, kept = ALIVE[job.hvp], 2 if job.hvp == "exact" else 1
    saved = int(kept * (job.config.num_layers * sizes.states + stored_states(job)))
    layer = sum(alive[kind] * getattr(sizes, kind) for kind in ("weights", "feed_forward", "scores"))
    layer += alive["states"] * (sizes.states + sizes.heads)
    head = alive["logits"] * sizes.logits + alive["slice"] * sizes.slice + 2 * sizes.states
    working = int(max(layer, head))
    # Leaf by leaf: new vectors grow while the product is still whole.
    updating = summed + 2 * wide * max(bytes_per_device([x]) // x.dtype.itemsize for x in params)
    temporaries = max(result + saved + working, updating)
    audit = theta + batch + 4 * summed + temporaries if job.audit else 0
    return Memory(theta, vector, basis, batch, result, saved, working, temporaries, residuals, audit, host)


def flops(job: Job) -> float:
    """Operations of the matrix products in one Hessian product on each device: 2 m n k each.

    In forward passes, with layers and slices of the vocabulary computed again in the backward pass: an exact product
    takes 11 (3 forward, 3 again, 5 backward, for the gradient itself is not formed), a gradient 4, finite differences
    two of these. What of a layer is computed again depends on `DecoderConfig.remat` (`jaxhess.plan.remat.again`).

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), seq_len=32, sequences=8)
        >>> import dataclasses
        >>> 2 < plan.flops(job) / plan.flops(dataclasses.replace(job, seq_len=16)) < 3  # attention takes the square
        True
    """
    config, sizes = job.config, _Sizes.of(job)
    chunks = -(-job.seq_len // config.query_chunk)
    queries = chunks * config.query_chunk if chunks > 1 else job.seq_len
    attention = 2 * config.num_layers * queries * config.num_heads * config.head_dim
    layers = config.num_layers * sizes.layer
    weights_again, attention_again = again(config, chunks)
    layers_again = config.num_layers * weights_again
    head = config.vocab_size * config.embed_dim
    if job.hvp == "exact":
        passes = 8 * layers + 3 * layers_again + (9 + 3 * attention_again) * attention
        passes += (11 if sizes.slices > 1 else 8) * head
    else:
        gradient = 3 * layers + layers_again + (3 + attention_again) * attention
        gradient += (4 if sizes.slices > 1 else 3) * head
        passes = (2 + (12 / job.microbatches if job.step == "auto" else 0)) * gradient
    return 2 * job.tokens_per_device * job.microbatches * passes / job.axes.get("tensor", 1)


def traffic(job: Job) -> dict[str, float]:
    """Bytes that one Hessian product receives on each device, for every kind of collective.

    `fsdp`: a layer's weights are gathered forward and again backward, with their tangents (or at two shifts); their
    gradient is scattered, once for an exact product, twice for finite differences. `tensor`: ten sums of states in a
    layer, either way: after attention and after the feed-forward, forward, backward, and the first of them again, each
    twice. `data`: the gradient's shares are summed; the two halves of an exact product's are added only after that, so
    that both are scattered.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), axes={"fsdp": 4})
        >>> received = plan.traffic(job)
        >>> received["all-gather"] > received["reduce-scatter"] > received["all-reduce"] == 0
        True
    """
    config, sizes = job.config, _Sizes.of(job)
    data, fsdp, tensor = (job.axes.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    moved = dict.fromkeys(KINDS, 0.0)
    gradients = 1 if job.hvp == "exact" else 2 + (12 / job.microbatches if job.step == "auto" else 0)
    gathers = 4 if job.hvp == "exact" else 2 * gradients
    layers = config.num_layers * sizes.weights
    head = config.vocab_size * config.embed_dim * sizes.bytes / tensor
    around = (fsdp - 1) / fsdp
    moved["all-gather"] = around * gathers * (layers + head * (1 if sizes.slices > 1 else 0.5))
    halves = 2 if job.hvp == "exact" and data > 1 else 1
    moved["reduce-scatter"] = around * halves * gradients * (layers + head)
    between = 2 * (tensor - 1) / tensor * 10 * (gathers / 4) * config.num_layers * sizes.states
    across = 2 * (data - 1) / data * gradients * (layers + head) / fsdp
    moved["all-reduce"] = between + across
    return {kind: job.microbatches * received for kind, received in moved.items()}


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of one microbatch on one device: `bytes` of an entry, then bytes of arrays, then entries of weights.

    `weights` are a layer's once gathered, `states` [tokens, D], `heads` [tokens, H h], `feed_forward` [tokens, F],
    `scores` of a chunk of queries, `logits` and rows of a `slice`; `layer` and `last` count the weights in a layer's
    products, and in its last one.
    """

    bytes: int
    weights: float
    states: int
    heads: float
    feed_forward: float
    scores: float
    logits: float
    slice: float
    slices: int
    layer: int
    last: int

    @classmethod
    def of(cls, job: Job) -> _Sizes:
        config, tokens, tensor = job.config, job.tokens_per_device, job.axes.get("tensor", 1)
        width, itemsize = config.embed_dim, jnp.dtype(job.dtype).itemsize
        params: Any = job.params()
        table = params.get("head", params["embed"])["kernel"]
        cut = jax.eval_shape(
            lambda x: vocabulary_slices(x, tokens, job.logit_chunk, config.mlp_dim * width, job.shape).kernels, table
        )
        slices, parts, rows, _ = cut.shape
        rows = rows if parts == tensor else rows * parts
        down = config.mlp_dim * width
        out = config.num_heads * config.head_dim * width
        layer = 2 * out + 2 * config.num_kv_heads * config.head_dim * width + (3 if config.gated_mlp else 2) * down
        queries = min(config.query_chunk, job.seq_len)
        return cls(
            bytes=itemsize,
            weights=layer * itemsize / tensor,
            states=tokens * width * itemsize,
            heads=tokens * config.num_heads * config.head_dim * itemsize / tensor,
            feed_forward=tokens * config.mlp_dim * itemsize / tensor,
            scores=job.sequences_per_device * config.num_heads * queries * job.seq_len * max(4, itemsize) / tensor,
            logits=tokens * rows * max(4, itemsize),
            slice=rows * width * itemsize,
            slices=slices,
            layer=layer,
            last=down + (out if config.parallel_residual else 0),
        )
