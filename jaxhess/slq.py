"""Stochastic Lanczos quadrature: the spectrum of an operator from a few random probes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.krylov.lanczos import LanczosState, Reorthogonalize, compile_segment, lanczos_segment, start_lanczos
from jaxhess.memory import bytes_per_device, devices_of, total_bytes
from jaxhess.operators.base import LinearOperator
from jaxhess.spectra import Spectrum
from jaxhess.vectors import Distribution, Vector, cast, check_accumulation_dtype, random_probe

SEGMENT_SECONDS = 1.0
"""Length of a compiled segment, roughly: how long the host waits between two looks at the run."""


class Progress(NamedTuple):
    """What a run has done so far: `alphas` and `betas` are those of the current probe, [step] each."""

    probe: int
    probes: int
    step: int
    steps: int
    alphas: np.ndarray
    betas: np.ndarray
    seconds: float


def spectrum(
    operator: LinearOperator,
    *,
    steps: int = 40,
    probes: int = 4,
    seed: int = 0,
    reorthogonalize: Reorthogonalize = "full",
    vector_dtype: Any = None,
    accumulation_dtype: str = "float32",
    distribution: Distribution = "normal",
    callback: Callable[[Progress], None] | None = None,
    info: dict[str, Any] | None = None,
) -> Spectrum:
    """The spectral distribution of `operator` by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017, section 3).

    Args:
        operator: Symmetric; `Hessian(loss, params, batches)` or any other.
        steps: Lanczos steps per probe, so products per probe; the quadrature is exact for polynomials of degree
            2 steps - 1.
        probes: Independent random probes; two or more give standard errors across them.
        seed: Of the probes. The same seed gives the same probes bit for bit on any mesh.
        reorthogonalize: "full" keeps every Lanczos vector (steps vectors of memory): no ghosts. "none" keeps two.
        vector_dtype: Storage of the Lanczos vectors; None: the operator's own.
        accumulation_dtype: Of inner products, norms, alphas and betas: "float32" or "float64", never narrower than the
            vectors.
        distribution: Of the probes' entries.
        callback: Called on the host after each compiled segment.
        info: Anything to keep with the result; facts about the run are added.

    Raises:
        ValueError: `steps` or `probes` below 1, or an option that is not known.
        FloatingPointError: The loss or a product is not finite; says which microbatch, probe and step.
    """
    if probes < 1:
        raise ValueError(f"probes is {probes}; at least 1 is needed.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; a Lanczos run takes at least 1.")
    like = operator.shape_dtype
    if vector_dtype is not None:
        _check_vector_dtype(vector_dtype)
    if reorthogonalize == "full":
        check_basis_fits(like, steps, vector_dtype)
    check_accumulation_dtype(accumulation_dtype)
    facts = {"operator": operator.describe(), **operator.validate()}
    key = jax.random.key(seed, impl="threefry2x32")
    alphas, betas = np.full((probes, steps), np.nan), np.full((probes, steps), np.nan)
    sizes = np.zeros(probes, np.int64)
    began = time.perf_counter()
    length = 1
    for p in range(probes):
        probe = random_probe(jax.random.fold_in(key, p), like, distribution)
        if vector_dtype is not None:
            probe = cast(probe, vector_dtype)
        state = start_lanczos(probe, steps, reorthogonalize, accumulation_dtype)
        del probe
        if p == 0:
            program = _described(operator, state)
        done = 0
        while done < steps:
            segment_began = time.perf_counter()
            end = min(done + length, steps)
            state = lanczos_segment(operator, state, end)
            sizes[p] = int(state.size)
            alphas[p, : sizes[p]] = np.asarray(state.alphas, np.float64)[: sizes[p]]
            betas[p, : sizes[p]] = np.asarray(state.betas, np.float64)[: sizes[p]]
            _check_finite(operator, state, alphas[p], betas[p], p)
            done = steps if bool(state.broken) else end
            now = time.perf_counter()
            length = _next_length(length, now - segment_began)
            if callback is not None:
                run = Progress(p, probes, done, steps, alphas[p, : sizes[p]], betas[p, : sizes[p]], now - began)
                callback(run)
        state_dtype = state.alphas.dtype
        del state
    described = {
        "probes": {"count": probes, "distribution": distribution, "seed": seed},
        "lanczos": {
            "steps": steps,
            "reorthogonalize": reorthogonalize,
            "vector_dtype": _dtypes(like, vector_dtype),
            "accumulation_dtype": str(np.dtype(state_dtype)),
        },
        **facts,
        "program": program,
        "seconds": time.perf_counter() - began,
    }
    return Spectrum(alphas=alphas, betas=betas, sizes=sizes, dim=operator.dim, info={**described, **(info or {})})


def check_basis_fits(like: Vector, steps: int, vector_dtype: Any = None) -> None:
    """Raises ValueError when `steps` Lanczos vectors cannot fit the devices' memory, before any of them is made."""
    leaves = jax.tree.leaves(like)
    devices = devices_of(leaves)
    width = None if vector_dtype is None else jnp.dtype(vector_dtype).itemsize
    needed = steps * bytes_per_device(leaves, width) * len(devices)
    present = total_bytes(devices) * len(devices)
    if needed > present:
        raise ValueError(
            f"Full re-orthogonalisation keeps {steps} vectors, {needed / 1e9:.1f} GB, and the devices here have "
            f"{present / 1e9:.1f} GB in all: take fewer steps, a narrower vector dtype, or reorthogonalize='none'."
        )


def _check_finite(operator: LinearOperator, state: LanczosState, alphas: np.ndarray, betas: np.ndarray, p: int) -> None:
    size = int(state.size)
    bad = np.flatnonzero(~np.isfinite(alphas[:size] + betas[:size]))
    if bad.size:
        where = operator.explain_non_finite(state.previous)
        message = f"The product at step {bad[0] + 1} of probe {p + 1} is not finite"
        raise FloatingPointError(f"{message}: {where}." if where else f"{message}.")


def _described(operator: LinearOperator, state: LanczosState) -> dict[str, Any]:
    """Compile time and memory per device (bytes) of the segment's program."""
    began = time.perf_counter()
    compiled = compile_segment(operator, state)
    described: dict[str, Any] = {"compile_seconds": time.perf_counter() - began}
    memory = compiled.memory_analysis()
    if memory is not None:
        described["bytes_per_device"] = {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "outputs_in_place": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
    return described


def _next_length(length: int, seconds: float) -> int:
    """Steps of the next segment; it may at most double, because the first one also compiled."""
    return max(1, min(2 * length, int(length * SEGMENT_SECONDS / max(seconds, 1e-6))))


def _check_vector_dtype(vector_dtype: Any) -> None:
    dtype = jnp.dtype(vector_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"vector_dtype is {dtype}; Lanczos vectors are floating point.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"vector_dtype {dtype} needs JAX in 64-bit mode: set JAX_ENABLE_X64=1 before starting.")


def _dtypes(like: Any, vector_dtype: Any) -> str:
    if vector_dtype is not None:
        return str(jnp.dtype(vector_dtype))
    return ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(like)}))
