"""Spectra whose truth is known: Lanczos coefficients from dense or diagonal matrices, without any operator."""

import jax.numpy as jnp
import numpy as np
from scipy.linalg import hessenberg

from jaxhess import MatrixOperator
from jaxhess import spectrum as run_spectrum
from jaxhess.krylov.storage import Storage
from jaxhess.operators.audit import Noise, NoiseAlong
from jaxhess.operators.restriction import Selection
from jaxhess.slq.job import CommandRecord, Data, Devices, Model
from jaxhess.slq.record import (
    CompiledRecord,
    EigenpairRecord,
    Inputs,
    Lanczos,
    OperatorRecord,
    Probes,
    ProgramMemory,
    RunRecord,
)
from jaxhess.slq.spectrum import Spectrum

EXACT = RunRecord(rounding=2.0**-52)
EIGENVALUES = np.concatenate([np.random.default_rng(7).normal(size=50) * 0.1, [5.0, 2.0, 1.0, -0.7, -3.0]])

EVERYTHING = RunRecord(
    Probes(2, "rademacher", 7),
    Lanczos(3, Storage(8, "bfloat16", None, "host", "float64"), 2, (1e-7, None)),
    OperatorRecord(
        "SumOperator",
        ("float32",),
        terms=(
            OperatorRecord("Hessian", ("float32",), "float64", Selection(("attention", "layers/*"), (0, 3))),
            OperatorRecord("ScaledOperator", operator=OperatorRecord("GaussNewton"), details={"factor": -1.0}),
        ),
    ),
    Inputs(3.5, 64.0, "ab", {"shift_of_a_random_vector": {"length": 0.1}}),
    2.0**-7,
    Noise(1e-7, None, "Hessian in float64", NoiseAlong(1e-6, 1e-7), NoiseAlong(1e-8, None)),
    EigenpairRecord((2.5, -1.0), (1e-3, None), (True, False), 40, "eigenvectors"),
    CompiledRecord(1.5, ProgramMemory(4, 3, 2, 1)),
    12.5,
    CommandRecord(
        {"steps": 3, "restrict": ("attention",)},
        Model("here", 100, {"num_layers": 4, "sliding_layers": ()}),
        Data("there", 4, 16, 1, "cd"),
        Devices({"fsdp": 8}, 8, "cpu", 1),
        {"jax": "0.10.2"},
        {"data_seconds": 0.5},
    ),
)
"""A record of which every field is set."""


def sampled(probes, steps, eigenvalues=EIGENVALUES, seed=0, info=None):
    """Householder tridiagonalisation of Q diag(eigenvalues) Q' from e_1, Q uniform: Lanczos with uniform probes."""
    rng = np.random.default_rng(seed)
    alphas, betas = np.zeros((probes, steps)), np.zeros((probes, steps))
    for probe in range(probes):
        rotation, triangle = np.linalg.qr(rng.normal(size=(eigenvalues.size, eigenvalues.size)))
        rotation *= np.sign(np.diag(triangle))
        tridiagonal = hessenberg(rotation.T * eigenvalues @ rotation)
        alphas[probe] = np.diag(tridiagonal)[:steps]
        betas[probe] = np.abs(np.append(np.diag(tridiagonal, 1), 0.0))[:steps]
    return Spectrum(alphas, betas, np.full(probes, steps), eigenvalues.size, info or {})


def masses(values, multiplicities, probes, seed=0):
    """[probes, values] unnormalised mass that normal probes have on eigenvalues which occur so often."""
    return np.random.default_rng(seed).chisquare(multiplicities, (probes, values.size))


def llm_like(dim=10**8, seed=1):
    """Different eigenvalues and how often each occurs: 30 outliers over 4 decades, some negative, others near zero."""
    outliers = np.geomspace(1e-2, 1e2, 30) * np.where(np.arange(30) % 4 == 1, -1, 1)
    bulk = 3e-5 * np.random.default_rng(seed).normal(size=400)
    return np.append(bulk, outliers), np.append(np.full(400, (dim - 30) // 400), np.ones(30, int))


def forward(x, density):
    return np.arcsinh(x / density.linthresh)


def of_diagonal(eigenvalues, **options):
    return run_spectrum(MatrixOperator(jnp.diag(jnp.asarray(eigenvalues, jnp.float32))), **options)


def interval_of(estimate):
    return [estimate.value, estimate.standard_error, *estimate.interval()]


def run_record(reorthogonalize=None, orthogonality=None):
    """The record of a run that kept its vectors like this, None: not known."""
    storage = None if reorthogonalize is None else Storage(reorthogonalize)
    return RunRecord(lanczos=Lanczos(storage=storage, orthogonality=orthogonality))


BREAKDOWN = 32  # Rounding units, as in the library's own iteration.


def _matrices(n=300):
    rng = np.random.default_rng(1)
    symmetric, factor = rng.normal(size=(n, n)), rng.normal(size=(n, 2 * n))
    marchenko_pastur = np.linalg.eigvalsh(factor @ factor.T / (2 * n))
    marchenko_pastur[-5:] = [5, 8, 13, 21, 50]
    return {
        "semicircle": np.linalg.eigvalsh((symmetric + symmetric.T) / np.sqrt(2 * n)),
        "Marchenko-Pastur and outliers": marchenko_pastur,
        "six values": np.repeat([-3.0, -1.0, 0.5, 1.0, 2.0, 7.0], n // 6),
        "six decades": np.concatenate([np.geomspace(1e-6, 1, 40), -np.geomspace(1e-5, 0.3, 17)]),
        "indefinite": np.concatenate([np.linspace(-2, -1, n // 2), np.linspace(1, 2, n // 2), [30.0, -20.0]]),
        "rank-deficient": np.concatenate([np.zeros(n - 30), np.linspace(1, 4, 30)]),
        "bulk far below outliers": np.concatenate([rng.normal(size=n) * 1e-3, [1, 2, 5, 10, 40.0, -1, -0.5]]),
    }


MATRICES = _matrices()


def lanczos_of_diagonal(eigenvalues, steps, dtype, seed):
    """alphas, betas, the squares of the normalised start vector and whether it broke down; fully re-orthogonalised."""
    diagonal = eigenvalues.astype(dtype)
    q = np.random.default_rng(seed).normal(size=diagonal.size).astype(dtype)
    q /= np.linalg.norm(q)
    basis, alphas, betas = [q], [], []
    for _ in range(steps):
        w = diagonal * basis[-1]
        alphas.append(w @ basis[-1])
        for _ in range(2):
            for b in basis:
                w -= (b @ w) * b
        betas.append(np.linalg.norm(w))
        reach = np.abs(alphas).max() + np.max(betas)
        if betas[-1] <= BREAKDOWN * np.finfo(dtype).eps * reach:
            break
        basis.append(w / betas[-1])
    masses = q.astype(np.float64) ** 2
    return np.array(alphas, float), np.array(betas, float), masses / masses.sum(), len(alphas) < steps
