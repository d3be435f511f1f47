"""What accelerators have and can do at most, as data."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxhess.errors import InputError


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device of a server of eight. Sizes are in powers of ten, as in the data sheets.

    Attributes:
        kind: The beginning of its `device_kind` in JAX.
        peaks: Operations per second of dense matrix products, by dtype. float32 is without TF32, the rate of the vector
            units; `tfloat32` is float32 inputs rounded to TF32.
        memory: Bytes.
        bandwidth: Of that memory, bytes per second.
        link: Bytes per second that it receives from the others in its server (half of the data sheet's figure, which
            adds both directions).
        network: Bytes per second that it receives from other servers.
        host_link: Bytes per second between a device and its host's memory, one way.
        power: Watts at most, of the device alone (its thermal design power).
        capability: CUDA compute capability.
        multiprocessors: How many.
        lanes: float32 units of a multiprocessor.
        clock: GHz, boost.
        cache: Bytes of the L2 cache.
        shared: Bytes of shared memory of a multiprocessor; a block can have 1 KiB less.
        host: Bytes of a server's own memory.
        node: Devices in a server.
    """

    kind: str
    peaks: dict[str, float]
    memory: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    power: float
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int
    clock: float
    cache: int
    shared: int
    host: float = 2e12
    node: int = 8


def _peaks(bfloat16: float, tfloat32: float, float32: float) -> dict[str, float]:
    return {"bfloat16": bfloat16, "float16": bfloat16, "tfloat32": tfloat32, "float32": float32}


ACCELERATORS: dict[str, Accelerator] = {
    # Peaks without sparsity, memory, bandwidth, link and power: NVIDIA's data sheets of the A100 (80 GB, SXM), H100 and
    # H200 (SXM), HGX B200 (one of eight). Network: the DGX server's ports over its eight devices (8 of 200 or 400
    # Gb/s); host: PCIe 4 or 5, 2 TB in a DGX. Multiprocessors, lanes, cache and shared memory: the architectures' white
    # papers and the CUDA C++ programming guide, "Technical Specifications per Compute Capability".
    "A100-80GB": Accelerator(
        "NVIDIA A100", _peaks(312e12, 156e12, 19.5e12), 80e9, 2.039e12, 300e9, 25e9, 32e9, 400,
        capability=(8, 0), multiprocessors=108, lanes=64, clock=1.41, cache=41943040, shared=167936,
    ),
    "H100": Accelerator(
        "NVIDIA H100 80GB HBM3", _peaks(989e12, 494e12, 67e12), 80e9, 3.35e12, 450e9, 50e9, 64e9, 700,
        capability=(9, 0), multiprocessors=132, lanes=128, clock=1.98, cache=52428800, shared=233472,
    ),
    "H200": Accelerator(
        "NVIDIA H200", _peaks(989e12, 494e12, 67e12), 141e9, 4.8e12, 450e9, 50e9, 64e9, 700,
        capability=(9, 0), multiprocessors=132, lanes=128, clock=1.98, cache=52428800, shared=233472,
    ),
    "B200": Accelerator(
        "NVIDIA B200", _peaks(2250e12, 1125e12, 75e12), 180e9, 8e12, 900e9, 50e9, 64e9, 1000,
        capability=(10, 0), multiprocessors=148, lanes=128, clock=1.965, cache=132644864, shared=233472,
    ),
}  # fmt: skip
"""Cards to plan for, by name."""

_PCIE = {"NVIDIA H100 PCIe": _peaks(756e12, 378e12, 51e12)}
"""Peaks of devices that are met but not planned for, by the beginning of their `device_kind`. H100 data sheet, 2022."""


def accelerator(name: str) -> Accelerator:
    """The card of that name, in capitals or not; A100 is short for A100-80GB.

    Raises:
        InputError: It is not in the table; lists those that are.
    """
    return ACCELERATORS[card_name(name)]


def card_name(name: str) -> str:
    """The name as it stands in `ACCELERATORS`."""
    for known in ACCELERATORS:
        if name.upper() in (known.upper(), known.split("-")[0].upper()):
            return known
    raise InputError(f"The card {name!r} is not in the table; it has {', '.join(ACCELERATORS)}.")


def card_of(device_kind: str) -> str:
    """The name of the card whose `device_kind` in JAX this is.

    Raises:
        InputError: It is not in the table.
    """
    for name, device in ACCELERATORS.items():
        if device_kind.startswith(device.kind):
            return name
    raise InputError(f"The device {device_kind!r} is not in the table of cards; it has {', '.join(ACCELERATORS)}.")


def peak_matmul_flops(device_kind: str, dtype: str) -> float | None:
    """Operations per second of one device in matrix products of `dtype`; None where the table does not say."""
    known = {device.kind: device.peaks for device in ACCELERATORS.values()} | _PCIE
    for kind, peaks in known.items():
        if device_kind.startswith(kind):
            return peaks.get(str(jnp.dtype(dtype)))
    return None
