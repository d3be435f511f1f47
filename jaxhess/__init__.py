"""Exact Hessian spectra of language models, sharded, with error bars."""

from jaxhess.data import TokenBlocks
from jaxhess.krylov.lanczos import LanczosState, lanczos_segment, start_lanczos
from jaxhess.mesh import make_mesh
from jaxhess.models import DecoderConfig, LanguageModel, RopeConfig
from jaxhess.operators import Hessian, LinearOperator, MatrixOperator, Microbatches
from jaxhess.slq import Progress, spectrum
from jaxhess.spectra import Estimate, Spectrum
from jaxhess.vectors import random_probe

__version__ = "0.1.0"

__all__ = [
    "DecoderConfig",
    "Estimate",
    "Hessian",
    "LanczosState",
    "LanguageModel",
    "LinearOperator",
    "MatrixOperator",
    "Microbatches",
    "Progress",
    "RopeConfig",
    "Spectrum",
    "TokenBlocks",
    "lanczos_segment",
    "make_mesh",
    "random_probe",
    "spectrum",
    "start_lanczos",
]
