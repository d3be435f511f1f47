"""Exact Hessian spectra of language models, sharded, with error bars."""

from jaxhess import plan
from jaxhess.data import Sampling, TokenBlocks
from jaxhess.distributed.mesh import make_mesh
from jaxhess.errors import InputError
from jaxhess.krylov.eigenpairs import Eigenpairs, leading_eigenpairs
from jaxhess.krylov.errors import Estimate
from jaxhess.krylov.estimators import diagonal, frobenius_norm, hutchinson
from jaxhess.krylov.influence import Influence, influence
from jaxhess.krylov.lanczos import lanczos_segment
from jaxhess.krylov.sketch import hutch_plus_plus, xtrace
from jaxhess.krylov.solve import conjugate_gradients
from jaxhess.krylov.state import LanczosState, start_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.models import DecoderConfig, LanguageModel, RopeConfig
from jaxhess.models.likelihood import SoftmaxCrossEntropy
from jaxhess.models.module_function import module_function
from jaxhess.operators import (
    BlockDiagonal,
    Blocks,
    EmpiricalFisher,
    FiniteDifferenceHessian,
    GaussNewton,
    Hessian,
    LinearizedHessian,
    LinearOperator,
    LossOperator,
    LowRank,
    MatrixOperator,
    Microbatches,
    MonteCarloFisher,
    Preconditioned,
    adam_preconditioner,
    adam_threshold,
    linearize,
    residual_bytes,
)
from jaxhess.operators.adapters import as_lineax, as_scipy
from jaxhess.operators.audit import audit
from jaxhess.pytrees import register_dataclass
from jaxhess.slq.checkpoint import Checkpoint, Interrupted
from jaxhess.slq.data_errors import eigenvalue_errors
from jaxhess.slq.lanczos_runs import Progress
from jaxhess.slq.near_zero import NearZero, near_zero
from jaxhess.slq.random_matrix import LimitLaw, generalized_marchenko_pastur, marchenko_pastur, semicircle
from jaxhess.slq.run import spectrum
from jaxhess.slq.spectrum import Spectrum
from jaxhess.structure.coupling import CouplingMap, coupling_map
from jaxhess.structure.spectra import BlockSpectra, block_spectra
from jaxhess.structure.trajectory import TrajectoryCallback, TrajectoryPoint, trajectory_point
from jaxhess.vectors import random_probe

__version__ = "0.2.0"

__all__ = [
    "BlockDiagonal",
    "BlockSpectra",
    "Blocks",
    "Checkpoint",
    "CouplingMap",
    "DecoderConfig",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "FiniteDifferenceHessian",
    "GaussNewton",
    "Hessian",
    "Influence",
    "InputError",
    "Interrupted",
    "LanczosState",
    "LanguageModel",
    "LimitLaw",
    "LinearOperator",
    "LinearizedHessian",
    "LossOperator",
    "LowRank",
    "MatrixOperator",
    "Microbatches",
    "MonteCarloFisher",
    "NearZero",
    "Preconditioned",
    "Progress",
    "RopeConfig",
    "Sampling",
    "SoftmaxCrossEntropy",
    "Spectrum",
    "Storage",
    "TokenBlocks",
    "TrajectoryCallback",
    "TrajectoryPoint",
    "adam_preconditioner",
    "adam_threshold",
    "as_lineax",
    "as_scipy",
    "audit",
    "block_spectra",
    "conjugate_gradients",
    "coupling_map",
    "diagonal",
    "eigenvalue_errors",
    "frobenius_norm",
    "generalized_marchenko_pastur",
    "hutch_plus_plus",
    "hutchinson",
    "influence",
    "lanczos_segment",
    "leading_eigenpairs",
    "linearize",
    "make_mesh",
    "marchenko_pastur",
    "module_function",
    "near_zero",
    "plan",
    "random_probe",
    "register_dataclass",
    "residual_bytes",
    "semicircle",
    "spectrum",
    "start_lanczos",
    "trajectory_point",
    "xtrace",
]
