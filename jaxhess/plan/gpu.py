"""The GPU's own compiler, without a GPU: devices that programs can be compiled for, and never run on.

XLA compiles for a CUDA device from a description of it (`GpuTargetConfigProto`), written here from the hardware table.
What needs a real device is missing: kernels are not tuned by trial, and CUDA's context, NCCL's buffers and what is lost
between blocks of memory are not counted (`USABLE` leaves room for them).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import jax
from jax.experimental import topologies

from jaxhess.errors import InputError
from jaxhess.plan.hardware import Accelerator, accelerator, card_name

USABLE = 0.92
"""Share of a device's memory that a program can have: the rest is the runtime's, the collectives' buffers and what is
lost between blocks. JAX takes 0.75 of it unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise."""

MOST = 512
"""Devices at most that programs are compiled for."""

PLUGIN = "jax_cuda13_plugin"


def available() -> bool:
    """Whether the extra `gpu-plan` is installed."""
    return importlib.util.find_spec(PLUGIN) is not None


def gpu_devices(card: str, count: int, memory: float | None = None) -> list[Any]:
    """So many devices of this kind, in servers of eight, to compile programs for.

    Examples:
        >>> from jaxhess import plan
        >>> from jaxhess.plan import gpu
        >>> gpu.available() and len(plan.gpu_devices("H200", 16)) == 16  # doctest: +SKIP
        True
        >>> plan.gpu_devices("V100", 8)
        Traceback (most recent call last):
        jaxhess.errors.InputError: The card 'V100' is not in the table; it has A100-80GB, H100, H200, B200.

    Args:
        card: A name in `jaxhess.plan.hardware.ACCELERATORS`.
        count: Fewer than eight are on one server; more fill theirs.
        memory: Bytes that a program can have on each; None: `memory_limit`, what the card has. Where there is too
            little XLA orders a program otherwise, and says nothing of what it would take.

    JAX must not have started any other backend than the CPU's in this process: set `jax_platforms` to `cpu` before.

    Raises:
        InputError: The card is not in the table, the extra `gpu-plan` is not installed or of another release than JAX,
            the devices do not fill their servers or are more than 512, or JAX has been started with other platforms.
    """
    device = accelerator(card)
    _check_installed()
    if count > MOST:
        raise InputError(f"Programs are compiled for at most {MOST} devices, not for {count}: take the formula alone.")
    if count > device.node and count % device.node:
        raise InputError(
            f"A mesh of {count} devices does not fill servers of {device.node}: take at most {device.node} devices, or "
            f"a multiple of {device.node}."
        )
    if jax.config.jax_platforms != "cpu":  # type: ignore[attr-defined]
        raise InputError("JAX must be limited to CPUs to compile for a card: set JAX_PLATFORMS=cpu before it starts.")
    hosts, each = (1, count) if count <= device.node else (count // device.node, device.node)
    described = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(card_name(card), memory), topology=f"{hosts}x1x{each}"
    )
    return list(described.devices)


def memory_limit(device: Accelerator) -> float:
    """Bytes that one program may take in all on the device."""
    return USABLE * device.memory


def fits(device: Accelerator, arguments: float, temporaries: float) -> bool:
    """Whether XLA would find room for a program: what it warns of otherwise is that it "can't reduce memory use".

    Its limit for temporaries is 95% of what arguments leave (its option `xla_gpu_memory_limit_slop_factor`).
    """
    return temporaries <= 0.95 * (memory_limit(device) - arguments)


def target_config(card: str, memory: float | None = None) -> str:
    """The card's `GpuTargetConfigProto`, in text form; `memory` as for `gpu_devices`."""
    device = accelerator(card)
    major, minor = device.capability
    # Without a device XLA takes 80% of the memory for its own; on one, JAX's allocator says how much there is.
    total = round((memory or memory_limit(device)) / 0.8)
    # Hopper and Blackwell have instructions that only their own architecture understands.
    feature = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    links = 12 if major == 8 else 18
    facts = f"""
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        shared_memory_per_block: 49152 shared_memory_per_core: {device.shared}
        shared_memory_per_block_optin: {device.shared - 1024}
        core_count: {device.multiprocessors} fpus_per_core: {device.lanes}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        memory_bandwidth: {round(device.bandwidth)} l2_cache_size: {device.cache}
        clock_rate_ghz: {device.clock} device_memory_size: {total}
        pcie_bandwidth: {round(device.host_link)} device_address_bits: 64 ecc_enabled: true
        cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}
        name: "{device.kind}" model_str: "{device.kind}" device_vendor: "NVIDIA Corporation"
        platform_version: "Compute Capability {major}.{minor}"
        driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
        dnn_version: "9.10.0" cub_version: "3.1.2"
        device_interconnect_info {{ active_links: {links} }}
    """
    return (
        f"gpu_device_info {{ {facts} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } '
        f'device_description_str: "{device.kind}"'
    )


def _check_installed() -> None:
    """Raises InputError where XLA's compiler for GPUs is missing or does not belong to the installed JAX."""
    if not available():
        raise InputError(
            "XLA's compiler for GPUs is not installed: pip install 'jaxhess[gpu-plan]', or "
            f"pip install jax-cuda13-plugin=={jax.__version__} nvidia-cuda-nvcc nvidia-nvvm. It needs no GPU."
        )
    found = importlib.metadata.version("jax-cuda13-plugin")
    if found != jax.__version__:
        raise InputError(
            f"XLA's compiler for GPUs is of release {found}, but JAX is {jax.__version__}: "
            f"pip install jax-cuda13-plugin=={jax.__version__}."
        )
