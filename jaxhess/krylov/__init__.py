"""Krylov methods."""

from jaxhess.krylov.eigenpairs import Eigenpairs, leading_eigenpairs
from jaxhess.krylov.lanczos import (
    LanczosState,
    abstract_lanczos,
    compile_segment,
    lanczos_segment,
    orthogonality_loss,
    start_batch,
    start_lanczos,
)
from jaxhess.krylov.quadrature import Quadrature, quadrature

__all__ = [
    "Eigenpairs",
    "LanczosState",
    "Quadrature",
    "abstract_lanczos",
    "compile_segment",
    "lanczos_segment",
    "leading_eigenpairs",
    "orthogonality_loss",
    "quadrature",
    "start_batch",
    "start_lanczos",
]
