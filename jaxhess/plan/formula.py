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
from jaxhess.plan.layers import layers_of
from jaxhess.plan.remat import again, copies, stored_states

ALIVE: dict[str, dict[str, float]] = {
    "exact": {"weights": 1.36, "gathered": 0, "feed_forward": 8.66, "states": 16.6, "scores": 18, "logits": 2.97},
    "finite-difference": {
        "weights": 0.08, "gathered": 0.7, "feed_forward": 0.78, "states": 9.42, "scores": 7.5, "logits": 1.52
    },
}  # fmt: skip
"""How many arrays of a kind are alive at the peak: of a layer's weights (and of these where they are gathered), its
states in the feed-forward and outside it, and its attention scores; or of the logits of a slice. A tangent beside every
array is among them. Fitted, by the largest relative error, to programs compiled for an H200 in bfloat16
(`tests/plan/test_gpu.py`); `scores` to programs compiled for CPUs."""


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
    rows = bytes_per_device(jax.tree.leaves(state.basis))
    basis, host = (0, rows) if job.storage.basis_memory == "host" else (rows, 0)
    batch = 4 * job.microbatches * job.sequences_per_device * (2 * job.seq_len + 1)
    wide = max(4, jnp.dtype(job.vector_dtype).itemsize, jnp.dtype(job.accumulation_dtype).itemsize)
    summed = theta // jnp.dtype(job.config.dtype).itemsize * wide
    several = job.microbatches > 1
    if job.hvp == "finite-difference":  # shifted parameters; two gradients, or one and the sum
        result = 2 * theta + (summed if several else theta) + summed * (job.step == "auto")
    else:
        result = theta + summed * several
    both = (1 + job.batch_size) / 2  # a value and the tangents of all probes, over a value and one tangent
    alive, kept = ALIVE["exact" if job.hvp == "linearized" else job.hvp], 2
    if job.hvp != "exact":  # no tangents; or nothing but tangents
        kept, both = 1, job.batch_size
    stored = 0.0 if job.hvp == "linearized" else stored_states(job)
    saved = int(both * kept * (job.config.num_layers * sizes.states + stored))
    weights = alive["weights"] + alive["gathered"] * (job.axes.get("fsdp", 1) * job.axes.get("expert", 1) > 1)
    layer = weights * sizes.weights + alive["feed_forward"] * sizes.feed_forward
    layer += alive["states"] * (sizes.states + sizes.heads)
    if not fused(job):
        layer += alive["scores"] * sizes.scores
    head = alive["logits"] * sizes.logits + 2 * sizes.states
    working = int(both * max(layer, head))
    result = job.batch_size * result
    residuals = _linearization(job, sizes) if job.hvp == "linearized" else 0
    # A new vector is kept in float32 while it is made orthogonal to others, or stored so; of several probes all are.
    if job.batch_size > 1:
        updating = job.batch_size * (summed + theta)
    elif job.storage.reorthogonalize == "none" and jnp.dtype(job.vector_dtype).itemsize < 4:
        updating = theta
    else:
        updating = summed + wide * max(bytes_per_device([x]) // x.dtype.itemsize for x in params)
    temporaries = max(result + saved + working, updating)
    audit = theta + batch + 4 * summed + temporaries if job.audit else 0
    return Memory(theta, vector, basis, batch, result, saved, working, temporaries, residuals, audit, host)


def flops(job: Job) -> float:
    """Operations of the matrix products in one Hessian product on each device: 2 m n k each.

    In forward passes, with layers and slices of the vocabulary computed again in the backward pass: an exact product
    takes 11 (3 forward, 3 again, 5 backward, for the gradient itself is not formed), of which probes that advance
    together share 3; a linearised product 6, a gradient 4, finite differences two of these. What of a layer is computed
    again depends on `DecoderConfig.remat` (`jaxhess.plan.remat.again`).

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
    attention = config.num_layers * queries * config.num_heads * (config.head_dim + config.value_dim)
    layers = sum(each.count * (each.attention + each.active) for each in layers_of(config))
    layers_again, attention_again = again(config, chunks)
    head = config.vocab_size * config.embed_dim
    # Probes that advance together share what depends on no tangent.
    shared = 1 / job.batch_size if job.hvp == "exact" else 1.0
    whole = config.remat is True
    if fused(job):  # in its kernels' products, of tiles of 128 queries on the diagonal or below; a pass has two
        seen = (1 + min(128 / job.seq_len, 1)) / 2 / 2
        value, tangent = seen * (9 + 2 * whole), seen * (24 + 6 * whole)
    else:
        value, tangent = 3 + attention_again, 6 + 2 * attention_again
    many = sizes.slices > 1
    gradient = 3 * layers + layers_again + value * attention + (4 if many else 3) * head
    if job.hvp == "exact":  # a gradient without its last products, the weights' own
        passes = shared * (gradient - layers - head) + 6 * layers + 2 * layers_again
        passes += tangent * attention + (8 if many else 6) * head
    elif job.hvp == "linearized":
        passes = 6 * layers + tangent * attention + 6 * head
    else:
        passes = (2 + (12 / job.microbatches if job.step == "auto" else 0)) * gradient
    return 2 * job.tokens_per_device * job.microbatches * passes / job.axes.get("tensor", 1)


def fused(job: Job) -> bool:
    """Whether attention is fused on the cards of the table, by itself or as asked for."""
    config = job.config
    if config.attention != "auto":
        return config.attention == "fused"
    narrow = jnp.dtype(job.dtype).itemsize == 2
    return narrow and config.can_fuse and config.num_kv_heads % job.axes.get("tensor", 1) == 0


def traffic(job: Job) -> dict[str, float]:
    """Bytes that one Hessian product receives on each device, for every kind of collective.

    `fsdp`: a layer's weights are gathered forward and again backward, with their tangents (or at two shifts); their
    gradient is scattered, once for an exact product, twice for finite differences. `tensor`: ten sums of states in a
    layer, either way: after attention and after the feed-forward, forward, backward, and the first of them again, each
    twice. `data`: the gradient's shares are summed; the two halves of an exact product's are added only after that, so
    that both are scattered. `expert`: as `fsdp` for all but the experts; their tokens are gathered, and their results
    scattered.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), axes={"fsdp": 4})
        >>> received = plan.traffic(job)
        >>> received["all-gather"] > received["reduce-scatter"] > received["all-reduce"] == 0
        True
    """
    config, sizes = job.config, _Sizes.of(job)
    data, fsdp, expert, tensor = (job.axes.get(axis, 1) for axis in ("data", "fsdp", "expert", "tensor"))
    moved = dict.fromkeys(KINDS, 0.0)
    central = job.hvp == "finite-difference"
    gradients = 2 + (12 / job.microbatches if job.step == "auto" else 0) if central else 1
    gathers = 2 * gradients if central else 2 + 2 / job.batch_size
    kinds = layers_of(config)
    shared = sum(each.count * (each.attention + each.feed_forward - each.experts) for each in kinds)
    own = sum(each.count * each.experts for each in kinds) / expert
    head = config.vocab_size * config.embed_dim * sizes.bytes / tensor
    parts = fsdp * expert
    around = (parts - 1) / parts
    # A layer's weights, over the share of them that is received; experts are gathered along `fsdp` alone.
    layers = (shared + own * (fsdp - 1) / fsdp / around if around else 0) * sizes.bytes / tensor
    moved["all-gather"] = around * gathers * (layers + head * (1 if sizes.slices > 1 else 0.5))
    halves = 2 if not central and data > 1 else 1
    # Slices of the vocabulary are summed in the float32 of their logits.
    wide = max(4, sizes.bytes) / sizes.bytes if sizes.slices > 1 else 1
    moved["reduce-scatter"] = around * halves * gradients * (layers + wide * head)
    between = 2 * (tensor - 1) / tensor * 10 * (gathers / 4) * config.num_layers * sizes.states
    whole = (shared + own) * sizes.bytes / tensor
    across = 2 * (data - 1) / data * gradients * (whole + head) / parts
    moved["all-reduce"] = between + across
    # Tokens for the experts of other devices, and what these make of them: forward, again, and backward.
    sent = (expert - 1) * sizes.states * sum(each.count for each in kinds if each.experts)
    moved["all-gather"] += 1.5 * gathers * sent
    moved["reduce-scatter"] += gathers * sent
    return {kind: job.microbatches * received for kind, received in moved.items()}


def _linearization(job: Job, sizes: _Sizes) -> int:
    """Bytes that linearised products keep, fitted as `ALIVE` is: arrays of every layer, all logits, states beside."""
    layer = 9 * sizes.feed_forward + 16 * (sizes.states + sizes.heads)
    around = sizes.slices * sizes.logits + 15 * sizes.states
    return int(job.microbatches * (job.config.num_layers * layer + around))


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of one microbatch on one device: `bytes` of an entry, then bytes of arrays, then entries of weights.

    `weights` are a layer's once gathered, `states` [tokens, D], `heads` [tokens, H h], `feed_forward` [tokens, F], of
    experts for all tokens that a device has room for, `scores` of a chunk of queries, `logits` of a slice of the
    vocabulary.
    """

    bytes: int
    weights: float
    states: int
    heads: float
    feed_forward: float
    scores: float
    logits: float
    slices: int

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
        expert, kinds = job.axes.get("expert", 1), layers_of(config)
        layer = max(each.attention + each.feed_forward - each.experts * (1 - 1 / expert) for each in kinds)
        wide = max(copies(job, each) * (each.wide / (2 if config.gated_mlp else 1) + each.rows) for each in kinds)
        queries = min(config.query_chunk, job.seq_len)
        return cls(
            bytes=itemsize,
            weights=layer * itemsize / tensor,
            states=tokens * width * itemsize,
            heads=tokens * config.num_heads * config.head_dim * itemsize / tensor,
            feed_forward=tokens * wide * itemsize / tensor,
            scores=job.sequences_per_device * config.num_heads * queries * job.seq_len * max(4, itemsize) / tensor,
            logits=tokens * rows * max(4, itemsize),
            slices=slices,
        )
