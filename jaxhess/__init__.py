"""Exact Hessian spectra of language models, sharded, with error bars."""

from jaxhess import plan
from jaxhess.data import TokenBlocks
from jaxhess.distributed.mesh import make_mesh
from jaxhess.errors import InputError
from jaxhess.krylov.eigenpairs import Eigenpairs, leading_eigenpairs
from jaxhess.krylov.errors import Estimate
from jaxhess.krylov.estimators import diagonal, frobenius_norm, hutchinson
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
    linearize,
    residual_bytes,
)
from jaxhess.operators.adapters import as_lineax, as_scipy
from jaxhess.operators.audit import audit
from jaxhess.pytrees import register_dataclass
from jaxhess.slq.checkpoint import Checkpoint, Interrupted
from jaxhess.slq.lanczos_runs import Progress
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
    "Progress",
    "RopeConfig",
    "SoftmaxCrossEntropy",
    "Spectrum",
    "Storage",
    "TokenBlocks",
    "TrajectoryCallback",
    "TrajectoryPoint",
    "as_lineax",
    "as_scipy",
    "audit",
    "block_spectra",
    "conjugate_gradients",
    "coupling_map",
    "diagonal",
    "frobenius_norm",
    "generalized_marchenko_pastur",
    "hutch_plus_plus",
    "hutchinson",
    "lanczos_segment",
    "leading_eigenpairs",
    "linearize",
    "make_mesh",
    "marchenko_pastur",
    "module_function",
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
