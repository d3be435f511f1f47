"""Time on rented hardware, whether a job fits it, and what to change where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp

from jaxhess.distributed.mesh import data_shards
from jaxhess.errors import InputError
from jaxhess.models.config import Remat
from jaxhess.operators.matmul import ALGORITHMS
from jaxhess.plan import formula
from jaxhess.plan.compiled import Compiled
from jaxhess.plan.gpu import USABLE, fits, memory_limit
from jaxhess.plan.hardware import Accelerator, accelerator
from jaxhess.plan.job import Job
from jaxhess.plan.roofline import roofline

EFFICIENCY = 0.45
"""Share of the peak rate that matrix products reach in the formula's times. The roofline of compiled programs gives
0.40 to 0.71 for models of a billion parameters and more in bfloat16 (`docs/planning.md`)."""


FASTEST_FIRST: tuple[Remat, ...] = ("attention", "feed-forward", True)
"""From the fastest to the smallest. Without any (False) exact products are slower again: scores in float32 go to memory
and back."""

REMAT_SHARE = 0.85
"""Share of the memory that a plan by the formula may fill: its temporaries are off by up to 15%."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a job takes on one kind of card.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), seq_len=32, sequences=8)
        >>> found = plan.forecast(job, "H100")
        >>> found.fits, found.needed < found.usable < 80e9
        (True, True)

    Attributes:
        source: What says so: the "formula", or the GPU's "compiler".
        fits: Whether there is memory for it.
        needed, usable: Bytes on each device.
        host: Bytes of a server's own memory for the vectors kept there.
        seconds_per_product: By the compiler the roofline's. By the formula matrix products, traffic and vector updates,
            one after the other.
        device_hours: Of the whole run, its products alone: without loading, compiling and the audit of noise.
        kilowatt_hours: Of the devices at the most power they take, without the servers around them.
    """

    source: Literal["formula", "compiler"]
    fits: bool
    needed: int
    usable: float
    host: int
    seconds_per_product: float
    device_hours: float
    kilowatt_hours: float


def forecast(job: Job, card: str, compiled: Compiled | None = None) -> Forecast:
    """The job on `card`, a name in `jaxhess.plan.hardware.ACCELERATORS`.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), seq_len=32, sequences=8)
        >>> plan.forecast(job, "H100").device_hours < 0.1
        True

    Args:
        compiled: The job's program, compiled for that card (`jaxhess.plan.gpu_devices`); None: by the formula.

    Raises:
        InputError: The card is not in the table, or its peak in the job's dtype is not.
    """
    device = accelerator(card)
    memory = formula.memory(job)
    host = _host_bytes(job, device)
    if compiled is None:
        needed, seconds = memory.total, _formula_seconds(job, device)
        enough = needed <= memory_limit(device)
    else:
        needed = max(compiled.arguments + compiled.temporaries, memory.audit)
        seconds = roofline(compiled.program, card).seconds / job.batch_size
        enough = fits(device, compiled.arguments, compiled.temporaries) and memory.audit <= memory_limit(device)
    hours = seconds * job.products * job.devices / 3600
    return Forecast(
        "formula" if compiled is None else "compiler",
        enough and host <= USABLE * device.host,
        needed,
        memory_limit(device),
        host,
        seconds,
        hours,
        hours * device.power / 1000,
    )


def _formula_seconds(job: Job, device: Accelerator) -> float:
    """Of one product."""
    algorithm = ALGORITHMS.get(job.matmul_precision)
    unit = str(jnp.dtype(job.dtype)) if algorithm is None else algorithm.unit
    if unit not in device.peaks:
        raise InputError(f"The peak rate of {device.kind} in {unit} is not in the table.")
    peak = device.peaks[unit] / (1 if algorithm is None else len(algorithm.terms))
    memory = formula.memory(job)
    seconds = formula.flops(job) / (EFFICIENCY * peak) + _exchange_seconds(job, device)
    # A step reads and writes some ten vectors. A stored basis is read twice by every pass, of which there are two, or
    # three for rows in 16 bits. A window goes row by row: each row reads the new vector twice and writes it once.
    kept = job.storage.reorthogonalize
    passes = 0 if kept == "none" else 3 if jnp.dtype(job.basis_dtype).itemsize < 4 else 2
    rows = kept if isinstance(kept, int) else 0
    vectors = 10 + 3 * rows * passes
    stored = 2 * passes
    seconds += (vectors * memory.vector + stored * memory.basis) / device.bandwidth
    return seconds + stored * memory.host / device.host_link


def fitting_remat(job: Job, available: float, choices: tuple[Remat, ...] = FASTEST_FIRST) -> Remat:
    """The first of the choices with which the job fits into so many bytes of a device by the formula; else True.

    Products that are linearised keep what they need of one pass: for them it is False.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> from jaxhess.plan.verdict import fitting_remat
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), seq_len=32, sequences=8)
        >>> fitting_remat(job, 1e9), fitting_remat(job, 1e6)
        ('attention', True)
    """
    if job.hvp == "linearized":
        return False
    for remat in choices:
        planned = dataclasses.replace(job, config=dataclasses.replace(job.config, remat=remat))
        if formula.memory(planned).total <= REMAT_SHARE * available:
            return remat
    return True


def changes(job: Job, card: str, scale: float = 1.0) -> list[tuple[str, Job]]:
    """What to change so that the job fits, with the job changed; the smallest change first.

    First the audit of noise is left out, where that is what does not fit. Then single changes, each as small as it may
    be: those that keep the result (microbatch, chunks, where the basis lies), those that cost precision (of the basis,
    of re-orthogonalisation, of the weights), more devices.
    Where none of them is enough alone: microbatch, chunk of queries, re-orthogonalisation and dtypes at their smallest
    together, on as many devices as it takes. Empty where nothing up to 4,096 devices helps.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> config = convert.read_config("scripts/tiny/config.json")
        >>> job = plan.Job(config, seq_len=128, sequences=2**18, microbatch=2**16)
        >>> plan.forecast(job, "H100").fits
        False
        >>> words, changed = plan.changes(job, "H100")[0]
        >>> words, plan.forecast(changed, "H100").fits
        ('--microbatch 4096', True)

    Args:
        scale: What the job takes by the compiler over what it takes by the formula, which the formula's numbers for the
            changed jobs are multiplied by.
    """
    device = accelerator(card)

    def enough(candidate: Job) -> bool:
        room = scale * formula.memory(candidate).total <= memory_limit(device)
        return room and _host_bytes(candidate, device) <= USABLE * device.host

    if formula.memory(job).audit > memory_limit(device):
        quiet = dataclasses.replace(job, audit=False)
        if enough(quiet):
            return [("--no-audit", quiet)]
        return [(f"--no-audit, {words}", changed) for words, changed in changes(quiet, card, scale)]
    found: list[tuple[str, Job]] = []
    for ladder in (
        _batch_size,
        _microbatch,
        _query_chunk,
        _logit_chunk,
        _host,
        _basis_dtype,
        _window,
        _dtype,
        _devices,
    ):
        found += next(([step] for step in ladder(job) if enough(step[1])), [])
    if found:
        return found
    words, smallest = [], job
    for ladder in (_batch_size, _microbatch, _query_chunk, _basis_dtype, _window, _dtype):
        if tried := list(ladder(smallest)):
            words.append(tried[-1][0])
            smallest = tried[-1][1]
    together = [(", ".join(words), smallest)] if words else []
    together += [(", ".join([*words, word]), more) for word, more in _devices(smallest)]
    return next(([step] for step in together if enough(step[1])), [])


def _exchange_seconds(job: Job, device: Accelerator) -> float:
    """Time of the traffic, axis by axis.

    A group inside a server goes at the rate of its links. What leaves it enters every other server once, over the ports
    of all the group's devices there, and goes on over the links.
    """
    moved = formula.traffic(job)
    data, tensor = (job.axes.get(axis, 1) for axis in ("data", "tensor"))
    parts = job.axes.get("fsdp", 1) * job.axes.get("expert", 1)

    def rate(size: int, stride: int) -> float:  # devices of a group, and between two of them
        if size * stride <= device.node:
            return device.link
        return min(device.link, device.network * max(1, device.node // stride))

    alone = dataclasses.replace(job, axes={"tensor": tensor}, microbatch=job.sequences_per_device)
    sums = formula.traffic(alone)["all-reduce"] / alone.microbatches * job.microbatches if tensor > 1 else 0.0
    across = moved["all-reduce"] - sums if data > 1 else 0.0
    rest = sum(moved.values()) - sums - across
    return sums / rate(tensor, 1) + rest / rate(parts, tensor) + across / rate(data, parts * tensor)


def _host_bytes(job: Job, device: Accelerator) -> int:
    """Of one server."""
    return formula.memory(job).host * min(job.devices, device.node)


def _batch_size(job: Job) -> Iterator[tuple[str, Job]]:
    for probes in (4, 2, 1):
        if probes < job.batch_size:
            yield _changed(job, "--batch-size", batch_size=probes)


def _microbatch(job: Job) -> Iterator[tuple[str, Job]]:
    shards = data_shards(job.shape)
    each = job.sequences_per_device
    while each > 1:
        each = each // 2
        yield _changed(job, "--microbatch", microbatch=each * shards)


def _query_chunk(job: Job) -> Iterator[tuple[str, Job]]:
    chunk = job.config.query_chunk
    while chunk > 32:
        chunk = chunk // 2
        yield f"--query-chunk {chunk}", _configured(job, query_chunk=chunk)


def _logit_chunk(job: Job) -> Iterator[tuple[str, Job]]:
    chunk = job.logit_chunk
    while chunk > 2**22:
        chunk = chunk // 2
        yield _changed(job, "--logit-chunk", logit_chunk=chunk)


def _host(job: Job) -> Iterator[tuple[str, Job]]:
    if job.storage.reorthogonalize != "none" and job.storage.basis_memory == "device":
        yield _stored(job, "--basis-memory", basis_memory="host")


def _basis_dtype(job: Job) -> Iterator[tuple[str, Job]]:
    if job.storage.reorthogonalize != "none" and job.basis_dtype != "bfloat16":
        yield _stored(job, "--basis-dtype", basis_dtype="bfloat16")


def _window(job: Job) -> Iterator[tuple[str, Job]]:
    if job.storage.reorthogonalize == "full" and job.steps > 8:
        yield _stored(job, "--reorthogonalize", reorthogonalize=8)
    if job.storage.reorthogonalize != "none":
        yield _stored(job, "--reorthogonalize", reorthogonalize="none")


def _dtype(job: Job) -> Iterator[tuple[str, Job]]:
    measured = job.hvp == "finite-difference" and job.step == "auto"  # in another precision: there is no plan for it
    if job.config.dtype in ("float32", "float64") and not measured:
        yield "--dtype bfloat16", _configured(job, dtype="bfloat16")


def _devices(job: Job) -> Iterator[tuple[str, Job]]:
    """More of them along fsdp, with a sequence on each more; twice as many, and again."""
    each, fsdp = job.sequences_per_device, job.axes.get("fsdp", 1)
    while 2 * job.devices <= 4096:
        fsdp = 2 * fsdp
        axes = {**job.axes, "fsdp": fsdp}
        bigger = dataclasses.replace(job, axes=axes)
        job = dataclasses.replace(bigger, microbatch=each * data_shards(bigger.shape))
        text = ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1)
        yield f"--mesh {text} --microbatch {job.microbatch}", job


def _changed(job: Job, option: str, **field: Any) -> tuple[str, Job]:
    (value,) = field.values()
    return f"{option} {value}", dataclasses.replace(job, **field)


def _stored(job: Job, option: str, **field: Any) -> tuple[str, Job]:
    (value,) = field.values()
    return f"{option} {value}", dataclasses.replace(job, storage=dataclasses.replace(job.storage, **field))


def _configured(job: Job, **fields: Any) -> Job:
    return dataclasses.replace(job, config=dataclasses.replace(job.config, **fields))
