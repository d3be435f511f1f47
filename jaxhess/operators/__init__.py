"""Symmetric linear operators: what curvature is measured through."""

from jaxhess.operators.adam import adam_preconditioner, adam_threshold
from jaxhess.operators.base import LinearOperator, LowRank, ScaledOperator, ShiftedOperator, SumOperator
from jaxhess.operators.block_diagonal import BlockDiagonal
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.finite_difference import FiniteDifferenceHessian
from jaxhess.operators.gauss_newton import EmpiricalFisher, GaussNewton, LikelihoodLoss, MonteCarloFisher
from jaxhess.operators.hessian import Hessian
from jaxhess.operators.linearized import LinearizedHessian, linearize, residual_bytes
from jaxhess.operators.loss import LossOperator
from jaxhess.operators.matrix import MatrixOperator
from jaxhess.operators.microbatches import Microbatches
from jaxhess.operators.preconditioned import Preconditioned
from jaxhess.operators.restriction import Restriction

__all__ = [
    "BlockDiagonal",
    "Blocks",
    "EmpiricalFisher",
    "FiniteDifferenceHessian",
    "GaussNewton",
    "Hessian",
    "LikelihoodLoss",
    "LinearOperator",
    "LinearizedHessian",
    "LossOperator",
    "LowRank",
    "MatrixOperator",
    "Microbatches",
    "MonteCarloFisher",
    "Preconditioned",
    "Restriction",
    "ScaledOperator",
    "ShiftedOperator",
    "SumOperator",
    "adam_preconditioner",
    "adam_threshold",
    "linearize",
    "residual_bytes",
]
