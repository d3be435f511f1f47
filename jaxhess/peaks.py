"""What accelerators can do at most, as data."""

from __future__ import annotations

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


def peak_matmul_flops(device_kind: str, dtype: str) -> float | None:
    """Operations per second of one device in matrix products of `dtype`; None where the table does not say."""
    for name, peaks in PEAK_MATMUL_FLOPS.items():
        if device_kind.startswith(name):
            return peaks.get(str(jnp.dtype(dtype)))
    return None
