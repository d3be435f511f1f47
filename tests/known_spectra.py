"""Spectra whose truth is known: Lanczos coefficients from dense or diagonal matrices, without any operator."""

import jax.numpy as jnp
import numpy as np
from scipy.linalg import hessenberg

from jaxhess import MatrixOperator
from jaxhess import spectrum as run_spectrum
from jaxhess.krylov.storage import Storage
from jaxhess.slq.record import Lanczos, RunRecord
from jaxhess.slq.spectrum import Spectrum

EXACT = RunRecord(rounding=2.0**-52)
EIGENVALUES = np.concatenate([np.random.default_rng(7).normal(size=50) * 0.1, [5.0, 2.0, 1.0, -0.7, -3.0]])


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
