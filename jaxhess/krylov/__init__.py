"""Krylov methods: Lanczos, quadrature, ghosts and bounds, eigenpairs, trace estimators, conjugate gradients, influence.

`docs/numerics.md` has the measured cost and errors of every choice of re-orthogonalisation and storage, and how exact
sums are.

The last two vectors are always kept orthogonal: by the window or basis they are in, or by a pass of their own.

Errors. A Q = Q T + beta_m q_{m+1} e_m' + F: what re-orthogonalisation takes away and what narrow storage rounds is not
in T. Its size is measured in every step (`LanczosState.step_errors`), and every residual bound contains it
(`Quadrature.error_bounds`).

Breakdown is tested relative to |alpha| + beta; betas are recorded after re-orthogonalisation, so that T is the
projection on the basis that is kept (see `lanczos.BREAKDOWN`).

Sources: Paige (1972) for the recurrence; Cullum and Willoughby (1985) for ghosts; Golub and Meurant (2010) for
quadrature and the Chebyshev-Markov-Stieltjes bounds.
"""

from jaxhess.krylov.eigenpairs import Eigenpairs, leading_eigenpairs
from jaxhess.krylov.estimators import diagonal, frobenius_norm, hutchinson
from jaxhess.krylov.influence import Influence, influence
from jaxhess.krylov.lanczos import compile_segment, lanczos_segment, orthogonality_loss
from jaxhess.krylov.quadrature import Quadrature, quadrature
from jaxhess.krylov.sketch import hutch_plus_plus, xtrace
from jaxhess.krylov.solve import Solution, conjugate_gradients
from jaxhess.krylov.state import LanczosState, abstract_lanczos, start_lanczos
from jaxhess.krylov.storage import Storage

__all__ = [
    "Eigenpairs",
    "Influence",
    "LanczosState",
    "Quadrature",
    "Solution",
    "Storage",
    "abstract_lanczos",
    "compile_segment",
    "conjugate_gradients",
    "diagonal",
    "frobenius_norm",
    "hutch_plus_plus",
    "hutchinson",
    "influence",
    "lanczos_segment",
    "leading_eigenpairs",
    "orthogonality_loss",
    "quadrature",
    "start_lanczos",
    "xtrace",
]
