"""Time on rented hardware, whether a job fits it, and what to change where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from jaxhess.distributed.mesh import data_shards
from jaxhess.errors import InputError
from jaxhess.plan import formula
from jaxhess.plan.hardware import ACCELERATORS, Accelerator, peak_matmul_flops
from jaxhess.plan.job import Job

USABLE = 0.92
"""Share of a device's memory that a program can have: the rest is the runtime's, the collectives' buffers and what is
lost between blocks. JAX takes 0.75 of it unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise."""

EFFICIENCY = 0.4
"""Share of the peak rate that matrix products are assumed to reach: what large models are usually trained at. Not
measured; the times of a plan scale with it."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a job takes on one kind of hardware.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), seq_len=32, sequences=8)
        >>> found = plan.forecast(job, "H100")
        >>> found.fits, found.needed < found.usable < 80e9
        (True, True)

    Attributes:
        needed, usable: Bytes on each device.
        host: Bytes of a server's own memory for the vectors kept there, and `host_present`, what it has.
        seconds_per_product: Matrix products, traffic and vector updates, one after the other; nothing overlaps.
        device_hours: Of the whole run, its products alone: without loading, compiling and the audit of noise.
    """

    needed: int
    usable: float
    host: int
    host_present: float
    seconds_per_product: float
    device_hours: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable and self.host <= USABLE * self.host_present


def forecast(job: Job, hardware: str, efficiency: float = EFFICIENCY) -> Forecast:
    """The job on `hardware`, a name in `ACCELERATORS`, by the formulas.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), seq_len=32, sequences=8)
        >>> plan.forecast(job, "H100").device_hours < 0.1
        True

    Raises:
        InputError: Unknown hardware, or one whose peak in the job's dtype is not known.
    """
    device = accelerator(hardware)
    peak = peak_matmul_flops(device.kind, job.dtype)
    if peak is None:
        raise InputError(f"The peak rate of {hardware} in {job.dtype} is not in the table.")
    memory = formula.memory(job)
    seconds = formula.flops(job) / (efficiency * peak) + _exchange_seconds(job, device)
    # A step reads and writes some ten vectors. A stored basis is read twice by every pass, of which there are two, or
    # three for rows in 16 bits. A window goes row by row: each row reads the new vector twice and writes it once.
    kept = job.storage.reorthogonalize
    passes = 0 if kept == "none" else 3 if jnp.dtype(job.basis_dtype).itemsize < 4 else 2
    rows = kept if isinstance(kept, int) else 0
    vectors = 10 + 3 * rows * passes
    stored = 2 * passes
    seconds += (vectors * memory.vector + stored * memory.basis) / device.bandwidth
    seconds += stored * memory.host / device.host_link
    hours = seconds * job.products * job.devices / 3600
    return Forecast(memory.total, USABLE * device.memory, _host_bytes(job, device), device.host, seconds, hours)


def changes(job: Job, hardware: str) -> list[tuple[str, Job]]:
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
        ('--microbatch 8192', True)
    """
    device = accelerator(hardware)

    def fits(candidate: Job) -> bool:
        enough = formula.memory(candidate).total <= USABLE * device.memory
        return enough and _host_bytes(candidate, device) <= USABLE * device.host

    if formula.memory(job).audit > USABLE * device.memory:
        quiet = dataclasses.replace(job, audit=False)
        if fits(quiet):
            return [("--no-audit", quiet)]
        return [(f"--no-audit, {words}", changed) for words, changed in changes(quiet, hardware)]
    found: list[tuple[str, Job]] = []
    for ladder in (_microbatch, _query_chunk, _logit_chunk, _host, _basis_dtype, _window, _dtype, _devices):
        found += next(([step] for step in ladder(job) if fits(step[1])), [])
    if found:
        return found
    words, smallest = [], job
    for ladder in (_microbatch, _query_chunk, _basis_dtype, _window, _dtype):
        if tried := list(ladder(smallest)):
            words.append(tried[-1][0])
            smallest = tried[-1][1]
    together = [(", ".join(words), smallest)] if words else []
    together += [(", ".join([*words, word]), more) for word, more in _devices(smallest)]
    return next(([step] for step in together if fits(step[1])), [])


def accelerator(name: str) -> Accelerator:
    """The hardware of that name; InputError lists the known ones."""
    if name not in ACCELERATORS:
        raise InputError(f"Unknown hardware {name!r}; known are {', '.join(ACCELERATORS)}.")
    return ACCELERATORS[name]


def _exchange_seconds(job: Job, device: Accelerator) -> float:
    """Time of the traffic, axis by axis.

    A group inside a server goes at the rate of its links. What leaves it enters every other server once, over the ports
    of all the group's devices there, and goes on over the links.
    """
    moved = formula.traffic(job)
    data, fsdp, tensor = (job.axes.get(axis, 1) for axis in ("data", "fsdp", "tensor"))

    def rate(size: int, stride: int) -> float:  # devices of a group, and between two of them
        if size * stride <= device.node:
            return device.link
        return min(device.link, device.network * max(1, device.node // stride))

    alone = dataclasses.replace(job, axes={**job.axes, "data": 1, "fsdp": 1}, microbatch=job.sequences_per_device)
    sums = formula.traffic(alone)["all-reduce"] / alone.microbatches * job.microbatches if tensor > 1 else 0.0
    across = moved["all-reduce"] - sums if data > 1 else 0.0
    rest = sum(moved.values()) - sums - across
    return sums / rate(tensor, 1) + rest / rate(fsdp, tensor) + across / rate(data, fsdp * tensor)


def _host_bytes(job: Job, device: Accelerator) -> int:
    """Of one server."""
    return formula.memory(job).host * min(job.devices, device.node)


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
