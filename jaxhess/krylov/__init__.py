"""Krylov methods: Lanczos, quadrature, ghosts and bounds, eigenpairs, trace estimators, conjugate gradients.

What each choice costs and buys
===============================

For vectors of P entries, m steps, a window of r. Every run holds two vectors and the product. A scalar reduction is one
inner product over all devices; those of one pass of "full" travel together. Ghosts, error of the largest Ritz value and
loss of orthogonality are those of `python scripts/ghosts.py`: the 1.3M-parameter model in scripts/tiny, 80 steps in
float32, against vectors in float64 with full re-orthogonalisation.

==================== ================= ====================== ======= ============ ============
re-orthogonalisation stored beside     scalar reductions      ghosts  error        max |Q'Q - I|
                     the two vectors   per step
==================== ================= ====================== ======= ============ ============
"none"               0                 4                      21      3e-8         not measured
window r = 4         r                 2 + 2 r                19      2e-7         2e-7 (in the window)
window r = 16        r                 2 + 2 r                16      2e-8         2e-7 (in the window)
"full"               m                 2 + 2 m                0       7e-10        5e-7
"full", basis bf16   m/2               4 + 2 m                0       3e-8         1e-4
"full", vectors bf16 m/2, two halves   5 + 2 m                0       8e-5         2e-4
"none", vectors bf16 0, two halves     7                      26      8e-5         not measured
==================== ================= ====================== ======= ============ ============

- **full** (two passes of classical Gram-Schmidt over all vectors): the default. As long as m vectors fit, on the
  devices or (`basis_memory="host"`) in the host's pinned memory, there is no reason for anything else. Each step reads
  the basis four times, whatever the number of tokens: with only 128 of them a step took 0.15 s against 0.04 s without.
- **basis_dtype="bfloat16"** halves the basis and costs nothing that shows: only the directions are rounded that the
  new vector is orthogonalised against, not the recurrence.
- **vector_dtype="bfloat16"** rounds the recurrence itself: extreme Ritz values move by 8e-5 of themselves here, a
  thousand times as much as in float32. It saves two halves of a vector: for models where nothing else fits. What it
  costs is measured in every step and is part of the residual bounds. With outliers a thousand times the bulk these
  bounds are about as wide as the bulk: it shows outliers, and the bulk only as a whole.
- **a window** keeps the last r vectors orthogonal, by two passes of modified Gram-Schmidt. It does not prevent ghosts,
  which come from afar, it delays them: 16 vectors had none after 20 steps where none and 4 had one. For parity with
  arXiv 2602.00816.
- **none** gives right extremes and, up to the first ghosts, the right spectrum. From then on every ghost takes the
  place of a node: the Wasserstein-1 distance from the reference, 3e-6 of the mean |eigenvalue| before, is then about
  what one step fewer makes in the reference itself (0.7 and 1.0 after 80 steps). Ghosts are flagged
  (`Spectrum.ghosts`), merged for counting (`Spectrum.clusters`) and never dropped.

The last two vectors are always kept orthogonal: by the window or basis they are in, or by a pass of their own.

Errors. A Q = Q T + beta_m q_{m+1} e_m' + F: what re-orthogonalisation takes away and what narrow storage rounds is not
in T. Its size is measured in every step (`LanczosState.step_errors`), and every residual bound contains it
(`Quadrature.error_bounds`). Selective orthogonalisation (Parlett and Scott 1979) was tried and left out: it keeps the
whole basis, wins in no row of the table, and went on past the end of the Krylov space.

Sums. alphas and betas are accumulated in float32 or, by `accumulation_dtype`, in float64. In float32 the squared length
of a vector of 1e8 entries is right to 6e-8, for XLA adds in a tree, and an inner product to 2e-11 of the lengths:
float64 is for float64 vectors. A matrix product does not add in a tree on a CPU: it was off by 7e-4 at 1e7 entries, and
full re-orthogonalisation by it was worse than none; `jaxhess.vectors.basis_dot` is a sum of products for that reason
(`pytest -m study -k hundred_million -s` prints these figures).

Breakdown is tested relative to |alpha| + beta; betas are recorded after re-orthogonalisation, so that T is the
projection on the basis that is kept (see `lanczos.BREAKDOWN`).

Sources: Paige (1972) for the recurrence; Cullum and Willoughby (1985) for ghosts; Golub and Meurant (2010) for
quadrature and the Chebyshev-Markov-Stieltjes bounds.
"""

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
from jaxhess.krylov.solve import Solution, conjugate_gradients
from jaxhess.krylov.trace import diagonal, frobenius_norm, hutch_plus_plus, hutchinson, xtrace

__all__ = [
    "Eigenpairs",
    "LanczosState",
    "Quadrature",
    "Solution",
    "abstract_lanczos",
    "compile_segment",
    "conjugate_gradients",
    "diagonal",
    "frobenius_norm",
    "hutch_plus_plus",
    "hutchinson",
    "lanczos_segment",
    "leading_eigenpairs",
    "orthogonality_loss",
    "quadrature",
    "start_batch",
    "start_lanczos",
    "xtrace",
]
