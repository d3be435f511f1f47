"""What a reader asks of a spectrum first, and whether its numbers are sound."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxhess.files.run_folder import json_ready
from jaxhess.slq.spectrum import Spectrum


def summary(spectrum: Spectrum) -> dict[str, Any]:
    """Extremes, trace, norm and moments with their errors, counts and checks, JSON-ready: what is not known is None.

    Examples:
        >>> import jaxhess
        >>> from jaxhess.results.summary import summary
        >>> result = jaxhess.Spectrum(alphas=[[2.0, 2.0]], betas=[[1.0, 0.0]], sizes=[2], dim=2)
        >>> found = summary(result)
        >>> found["dim"], found["num_probes"], round(found["trace"]["value"], 3)
        (2, 1, 4.0)
    """
    smallest, largest = spectrum.extreme()
    degree = spectrum.exact_degree
    moments = {str(k): spectrum.moment(k).to_dict() for k in range(1, 5) if degree is None or k <= degree}
    return json_ready(
        {
            "dim": spectrum.dim,
            "num_probes": spectrum.num_probes,
            "num_steps": spectrum.num_steps,
            "sizes": spectrum.sizes,
            "num_broke_down": int(spectrum.broke_down.sum()),
            "num_ghosts": int(spectrum.ghosts.sum()),
            "num_orthogonality_lost": int(spectrum.orthogonality_lost.sum()),
            "rounding": spectrum.run.rounding,
            "smallest": smallest._asdict(),
            "largest": largest._asdict(),
            "trace": spectrum.trace().to_dict(),
            "frobenius_norm": spectrum.frobenius_norm().to_dict(),
            "moments": moments,
            "exact_degree": degree,
            "checks": checks(spectrum),
        }
    )


def checks(spectrum: Spectrum) -> dict[str, float]:
    """The largest violation over probes of identities that cost nothing.

    `sum_weights`: sum w = 1. `first_moment`: sum w theta = alpha_1, relative to the root mean square eigenvalue.
    `second_moment`: sum w theta^2 = alpha_1^2 + beta_1^2, relative; only over probes of more than one step.
    Rounding leaves about 1e-15 times the number of steps; in the first moment also times the ratio of the largest
    to the root mean square eigenvalue. Anything above shows that T or its diagonalisation is broken.

    Examples:
        >>> import jaxhess
        >>> from jaxhess.results.summary import checks
        >>> result = jaxhess.Spectrum(alphas=[[2.0, 2.0]], betas=[[1.0, 0.0]], sizes=[2], dim=2)
        >>> all(violation < 1e-12 for violation in checks(result).values())
        True
    """
    theta, weights = np.nan_to_num(spectrum.ritz_values), spectrum.weights
    root = np.hypot(spectrum.alphas[:, 0], spectrum.betas[:, 0])
    unit = np.where(root > 0, root, 1.0)
    first = ((weights * theta).sum(1) - spectrum.alphas[:, 0]) / unit
    second = (weights * (theta / unit[:, None]) ** 2).sum(1) - (root / unit) ** 2
    found = {"sum_weights": weights.sum(1) - 1, "first_moment": first, "second_moment": second[spectrum.sizes > 1]}
    return {name: float(np.abs(violation).max()) for name, violation in found.items() if violation.size}
