"""Symmetric linear operators: what curvature is measured through."""

from jaxhess.operators.base import LinearOperator, MatrixOperator
from jaxhess.operators.hessian import Hessian
from jaxhess.operators.microbatches import Microbatches

__all__ = ["Hessian", "LinearOperator", "MatrixOperator", "Microbatches"]
