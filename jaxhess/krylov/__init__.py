"""Krylov methods: the Lanczos iteration on sharded pytrees, and the quadrature that follows from its tridiagonal."""

from jaxhess.krylov.lanczos import LanczosState, compile_segment, lanczos_segment, start_lanczos
from jaxhess.krylov.quadrature import Quadrature, quadrature

__all__ = ["LanczosState", "Quadrature", "compile_segment", "lanczos_segment", "quadrature", "start_lanczos"]
