"""What accelerators can do at most, as data."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

PEAK_MATMUL_FLOPS: dict[str, dict[str, float]] = {
    # Dense products, without sparsity. float32 without TF32, which jaxhess never uses: the vector units' rate.
    "NVIDIA A100": {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},  # A100 data sheet, June 2021
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},  # H100 data sheet, SXM
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 51e12},  # H100 data sheet, PCIe, 2022
    "NVIDIA H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},  # H200 data sheet, SXM
    "NVIDIA B200": {"bfloat16": 2250e12, "float16": 2250e12, "float32": 75e12},  # HGX B200 data sheet, one of eight
}
"""Floating-point operations per second of one device in matrix products, by the beginning of its `device_kind`."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device of a server of eight.

    Attributes:
        kind: The beginning of its `device_kind`, its key in `PEAK_MATMUL_FLOPS`.
        memory: Bytes.
        bandwidth: Of that memory, bytes per second.
        link: Bytes per second that it receives from the others in its server (half of the data sheet's figure, which
            adds both directions).
        network: Bytes per second that it receives from other servers.
        host_link: Bytes per second between a device and its host's memory, one way.
        host: Bytes of a server's own memory.
        node: Devices in a server.
    """

    kind: str
    memory: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    host: float = 2e12
    node: int = 8


ACCELERATORS: dict[str, Accelerator] = {
    # Data sheets as above. Network: the DGX server's ports over its eight devices; host: PCIe 4 or 5, 2 TB in a DGX.
    "A100": Accelerator("NVIDIA A100", 80e9, 2.039e12, 300e9, 25e9, 32e9),  # 80 GB SXM; DGX A100: 8 ports of 200 Gb/s
    "H100": Accelerator(
        "NVIDIA H100 80GB HBM3", 80e9, 3.35e12, 450e9, 50e9, 64e9
    ),  # SXM; DGX H100: 8 ports of 400 Gb/s
    "H200": Accelerator("NVIDIA H200", 141e9, 4.8e12, 450e9, 50e9, 64e9),  # SXM; DGX H200: 8 ports of 400 Gb/s
    "B200": Accelerator(
        "NVIDIA B200", 180e9, 8e12, 900e9, 50e9, 64e9
    ),  # DGX B200 data sheet: 1,440 GB, 64 TB/s of eight
}
"""Hardware to plan for, by the name it is rented under. Sizes in powers of ten, as in the data sheets."""


def peak_matmul_flops(device_kind: str, dtype: str) -> float | None:
    """Operations per second of one device in matrix products of `dtype`; None where the table does not say."""
    for name, peaks in PEAK_MATMUL_FLOPS.items():
        if device_kind.startswith(name):
            return peaks.get(str(jnp.dtype(dtype)))
    return None
