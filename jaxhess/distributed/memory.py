"""How much memory the devices that hold some arrays have."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.vectors import named_sharding


def devices_of(leaves: Sequence[Any]) -> list[jax.Device]:
    """The local devices of the mesh that the arrays (or abstract arrays) live on; the first device without a mesh."""
    shardings = [named_sharding(x) for x in leaves]
    meshes = [s.mesh for s in shardings if s is not None]
    return list(meshes[0].local_devices) if meshes else jax.local_devices()[:1]


def bytes_per_device(leaves: Sequence[Any], itemsize: int | None = None) -> int:
    """Bytes that the arrays take on one device, in their own dtypes or in one of `itemsize` bytes."""
    return sum(_shard_size(x) * (itemsize or jnp.result_type(x).itemsize) for x in leaves)


def total_bytes(devices: Sequence[jax.Device]) -> float:
    """Memory of one of the devices; infinite where the backend does not say. CPU devices share the machine's."""
    if devices[0].platform == "cpu":
        return host_bytes() / len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)


def host_bytes() -> float:
    """Memory of the machine, shared out among the processes of this run on it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes.neighbours()


def available_bytes(leaves: Sequence[Any]) -> float:
    """Memory that is left on each device of the arrays in this process; infinite where the backend does not say.

    What several processes decide by it they must agree on: `min(processes.gathered(available_bytes(...)))`.
    """
    devices = devices_of(leaves)
    if devices[0].platform == "cpu":
        return _free_on_host() / len(devices)
    stats = devices[0].memory_stats() or {}
    return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)


def most_that_fit(
    compiled: Callable[[int], jax.stages.Compiled], count: int, resident: Callable[[int], list[Any]]
) -> int:
    """The most, of `count` or fewer, whose program fits into nine tenths of the memory left; at least 1.

    Rounds of so many are nearly of one length. Compiles the program for as many as are tried: usually the one that then
    runs. The same in all processes.

    Args:
        compiled: The program for so many.
        count: The most.
        resident: Arrays (or abstract arrays), not there yet, that the run holds beside the program for so many; their
            devices are asked.
    """
    size = count
    while size > 1:
        memory = compiled(size).memory_analysis()
        if memory is None:
            return 1
        extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        leaves = resident(size)
        needed = max(processes.gathered(extra + bytes_per_device(leaves)))
        left = 0.9 * min(processes.gathered(available_bytes(leaves)))
        if needed <= left:
            break
        fewer = max(1, min(size - 1, int(size * left / needed)))
        size = -(-count // -(-count // fewer))
    return size


def _shard_size(leaf: Any) -> int:
    sharding = named_sharding(leaf)
    shape = jnp.shape(leaf)
    return math.prod(shape if sharding is None else sharding.shard_shape(shape))


def _free_on_host() -> float:
    """Memory that new arrays of this process can take: free pages and those that the system would give back."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * float(lines["MemAvailable"].split()[0]) / processes.neighbours()
    except (OSError, KeyError):  # not Linux
        return host_bytes()


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Peak memory per device beside arguments and results, in bytes."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise InputError("This backend does not say how much memory a compiled program takes.")
    return memory.temp_size_in_bytes
