"""The result of stochastic Lanczos quadrature: Ritz values and weights of every probe, and what follows from them."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.files.run_folder import json_ready
from jaxhess.krylov.bounds import distribution_bounds
from jaxhess.krylov.errors import (
    UNKNOWN,
    Estimate,
    Spread,
    across_probes,
    disagrees,
    of_squares,
    on_the_sphere,
    share_chance,
    share_interval,
)
from jaxhess.krylov.ghosts import (
    Clusters,
    Ghosts,
    classify,
    independent,
    orthogonality_lost,
    tolerances,
    unflagged,
)
from jaxhess.krylov.quadrature import Quadrature
from jaxhess.slq.coefficients import Coefficients, checked, quadratures
from jaxhess.slq.data_errors import moment_spread, read_forms, root_spread
from jaxhess.slq.density import Axis, Density, SpectrumLimits, smoothed
from jaxhess.slq.extremes import Extremes, extremes
from jaxhess.slq.functions import bounds_of_mean, evaluated, excess
from jaxhess.slq.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """Lanczos coefficients of every probe, each probe a unit vector uniform on the sphere.

    Examples:
        >>> import jaxhess
        >>> result = jaxhess.Spectrum(alphas=[[2.0, 2.0]], betas=[[1.0, 0.0]], sizes=[2], dim=2)
        >>> result.ritz_values.round(3), result.weights.round(3)
        (array([[1., 3.]]), array([[0.5, 0.5]]))
        >>> round(result.trace().value, 3)
        4.0

    Attributes:
        alphas: [probes, steps] float64 diagonals of T; NaN beyond a probe's size.
        betas: [probes, steps] float64 norms after each step; NaN beyond a probe's size. The last one bounds residuals;
            NaN there says that it is not known (results of other tools), and no bound is then either.
        sizes: [probes] int, the steps each probe took: fewer than `steps` after a breakdown, which ends the Krylov
            space: the quadrature is then known up to the slack of `distribution_bounds`.
        dim: Rows of the operator: the number of parameters.
        info: What a caller notes: for readers, no number depends on it. Made JSON-ready on entry: tuples become lists,
            numbers that are not finite None, unknown objects their text.
        run: How it was made. Standard errors, ghosts and the slack of bounds depend on it (`RunRecord`).
        step_errors: [probes, steps] float64, what each step left out of the recurrence (`LanczosState.step_errors`); it
            is part of `residual_bounds`. Empty: not known, and taken for zero.
        microbatch_forms: [probes, 2, microbatches, 4] float64, what single microbatches contribute to the first two
            steps (`LanczosState.forms`). Trace, norm and moments then have an error over the data beside that over
            probes: `Estimate.data`. Empty: not known.

    Standard errors are those of sampling the probes: `jaxhess.krylov.errors` says how, and `docs/numerics.md` has
    the measured coverage of their intervals. They are the sphere's, as far as the steps taken know it. For probes
    of random signs that is an upper bound; where the probes' own scatter shows it to be far too large, the scatter
    is taken.

    Raises:
        InputError: Coefficients as in `jaxhess.slq.coefficients`; `dim` is no positive integer.
    """

    alphas: Array
    betas: Array
    sizes: npt.NDArray[np.int64]
    dim: int
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: RunRecord = dataclasses.field(default=RunRecord(), kw_only=True)
    step_errors: Array = dataclasses.field(default_factory=lambda: np.zeros(0), kw_only=True)
    microbatch_forms: Array = dataclasses.field(default_factory=lambda: np.zeros(0), kw_only=True)

    def __post_init__(self) -> None:
        coefficients = checked(self.alphas, self.betas, self.sizes, self.step_errors)
        if int(self.dim) != self.dim or self.dim < 1:
            raise InputError(f"dim must be a positive number of parameters, got {self.dim}")
        cleaned = {**coefficients._asdict(), "dim": int(self.dim), "info": json_ready(self.info)}
        cleaned["microbatch_forms"] = read_forms(self.microbatch_forms, len(coefficients.alphas))
        for name, value in cleaned.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spectrum):
            return NotImplemented
        arrays = ("alphas", "betas", "sizes", "step_errors", "microbatch_forms")
        same = all(np.array_equal(getattr(self, n), getattr(other, n), True) for n in arrays)
        return same and all(getattr(self, n) == getattr(other, n) for n in ("dim", "info", "run"))

    @property
    def num_probes(self) -> int:
        return self.alphas.shape[0]

    @property
    def matrix_name(self) -> str:
        """What the spectrum is of, in words."""
        return self.run.matrix_name

    @property
    def num_steps(self) -> int:
        return self.alphas.shape[1]

    @functools.cached_property
    def ritz_values(self) -> Array:
        """[probes, steps] ascending within a probe; NaN beyond its size."""
        return self._padded(0, np.nan)

    @functools.cached_property
    def weights(self) -> Array:
        """[probes, steps] quadrature weights, summing to one in each row; 0 beyond a probe's size."""
        return self._padded(1, 0.0)

    @functools.cached_property
    def residual_bounds(self) -> Array:
        """[probes, steps] beta_m |s_mi| + `error_bounds`; NaN beyond a probe's size."""
        return self._padded(2, np.nan)

    @functools.cached_property
    def error_bounds(self) -> Array:
        """[probes, steps] how far `step_errors` may have moved each, see `Quadrature`; NaN beyond a probe's size."""
        return self._padded(3, np.nan)

    @functools.cached_property
    def ghosts(self) -> npt.NDArray[np.bool_]:
        """[probes, steps] which Ritz values are copies or spurious, see `krylov.ghosts`; False beyond a probe's size.

        All False for a probe whose Lanczos vectors are known to be independent (`run`; see
        `krylov.ghosts.independent`): what is close is then to be counted as it is.
        """
        rows = np.zeros(self.alphas.shape, bool)
        for row, found in zip(rows, self._ghosts, strict=True):
            row[: found.flags.size] = found.flags
        rows.flags.writeable = False
        return rows

    @property
    def orthogonality_lost(self) -> npt.NDArray[np.bool_]:
        """[probes] whether re-orthogonalisation failed, see `krylov.ghosts`: do not rely on these."""
        return orthogonality_lost(self.run.lanczos.reorthogonalize, self.run.lanczos.orthogonality, self.sizes)

    def clusters(self, probe: int) -> Clusters:
        """The Ritz values of a probe with copies merged, [clusters] ascending; their weights sum to one.

        Where no ghosts are possible (see `ghosts`) every Ritz value is a cluster of its own.
        """
        return self._ghosts[probe].clusters

    @property
    def broke_down(self) -> npt.NDArray[np.bool_]:
        """[probes] whether the Krylov space was exhausted: what is left open is the slack of `distribution_bounds`."""
        return ((self.sizes < self.num_steps) & ~self._open) | (self._last_betas == 0)

    @property
    def exact_degree(self) -> int | None:
        """Highest k for which `moment(k)` is exact on every probe, up to rounding.

        2 min(size), or one less where the last beta is not known. None when every probe broke down: the matrix of which
        all moments are then known differs from the operator by the slack of `distribution_bounds`.
        """
        degrees = (2 * self.sizes - self._open)[~self.broke_down]
        return int(degrees.min()) if degrees.size else None

    def moment(self, k: int) -> Estimate:
        """The estimate of tr(H^k)/dim: the mean over probes of v'H^k v = sum_i w_i theta_i^k, and its standard error.

        Gauss quadrature of m steps is exact to degree 2m - 1; in degree 2m it lacks the product of all m squared betas
        (the squared norm of the next monic Lanczos polynomial), which is known and added. One step thus gives the
        second moment, alpha_1^2 + beta_1^2.

        Where degree 2k is beyond what the steps know, the error of an even moment is the probes' own scatter (NaN for
        one probe), that of an odd one NaN.

        Raises:
            InputError: k is not an integer >= 0, or is above `exact_degree`.
        """
        if int(k) != k or k < 0:
            raise InputError(f"moment k must be an integer >= 0, got {k}")
        limit = self.exact_degree
        if limit is not None and k > limit:
            raise InputError(
                f"moment {k} is beyond degree {limit}, the last that {limit // 2} Lanczos steps know; "
                f"run at least {(int(k) + 1) // 2} steps"
            )
        k = int(k)
        nodes = np.nan_to_num(self.ritz_values) ** k
        values = (self.weights * nodes).sum(1) + self._beyond_gauss(k)
        even = k % 2 == 0
        scatter = of_squares(values) if even else across_probes(values)
        if limit is not None and 2 * k > limit:
            spread = scatter if even else UNKNOWN
        else:
            fourth = math.inf if limit is not None and 4 * k > limit else float(self._beyond_gauss(4 * k).mean())
            spread = self._spread(values, nodes, scatter, float(self._beyond_gauss(2 * k).mean()), fourth)
            if even and spread is not scatter:  # In the logarithm the error of the variance cancels that of the value.
                spread = spread._replace(freedom=np.inf)
        data = moment_spread(k, self.microbatch_forms, self.alphas, self.betas, self.run.sampling)
        return Estimate(float(values.mean()), *spread, positive=even, data=data)

    def trace(self) -> Estimate:
        """tr(H), dim times the first moment."""
        return self.moment(1).times(self.dim)

    def frobenius_norm(self) -> Estimate:
        """||H||_F = sqrt(dim * second moment); the standard error by the delta method, dF = F dM / (2 M)."""
        second = self.moment(2)
        norm = float(np.sqrt(self.dim) * np.sqrt(second.value))
        slope = norm / (2 * second.value) if second.value > 0 else 0.0
        data = second.data and root_spread(second.data, second.value, norm)
        return dataclasses.replace(second, value=norm, standard_error=slope * second.standard_error, data=data)

    def trace_function(self, f: Callable[[Array], npt.ArrayLike]) -> Estimate:
        """tr f(H), estimated by dim times the mean over probes of sum_i w_i f(theta_i) (Ubaru, Chen and Saad 2017).

        The standard error is the sampling error. It rests on the integral of (f - mean)^2, of which the upper
        bound is taken, and is NaN where that is infinite, or after a single step (`trace` has an error then). What the
        quadratures of f lack is in `bounds`, and the interval covers both: the bounds are by the
        Chebyshev-Markov-Stieltjes inequalities (`krylov.integrals`), narrow where f is smooth from end to end of the
        spectrum, wide where it is not and mass can be between Ritz values. They take for granted that no eigenvalue
        lies beyond the extreme Ritz values of all probes by more than their residual bounds, and that f does not vary
        within the points at which it is looked at. After a breakdown f may take any value within the slack of a Ritz
        value (`distribution_bounds`). Bounds are None where every probe broke down and the slack changes nothing.

        Args:
            f: Vectorised: from an array of Ritz values to an array of the same shape. It is asked between them too;
                where it is not finite there, the bounds are infinite.

        Raises:
            InputError: f returns another shape, or a value that is not finite at a Ritz value (says at which).
        """
        nodes = evaluated(f, self.ritz_values)
        values = (self.weights * nodes).sum(1)
        mean = float(values.mean())
        missing, missing_fourth = (excess(f, mean, power, self._quadratures, self.limits) for power in (2, 4))
        steps = self.sizes[~self.broke_down].min(initial=3)
        if steps < 3:  # One Ritz value says nothing of how far the eigenvalues reach, two are too few for the tails.
            missing, missing_fourth = (missing if steps == 2 else math.inf), math.inf
        spread = self._spread(values, nodes, across_probes(values), missing, missing_fourth)
        low, high = bounds_of_mean(f, self._quadratures, self.limits)
        settled = self.broke_down.all() and high - low <= 1e-12 * abs(mean)
        return Estimate(mean, *spread, bounds=None if settled else (low, high)).times(self.dim)

    def log_determinant(self, shift: float = 0.0) -> Estimate:
        """log det(H + shift I) = tr log(H + shift I); an estimate like that of `trace_function`.

        Raises:
            InputError: H + shift I is not positive definite (says which shift would be right).
        """
        smallest = self.extreme().smallest
        if not smallest.value + shift > 0:
            raise InputError(
                f"H + shift I has no logarithm with shift {shift}: the smallest Ritz value is {smallest.value}, and an "
                f"eigenvalue lies within {smallest.residual_bound:.3g} of it; take a shift above "
                f"{smallest.residual_bound - smallest.value}"
            )
        return self.trace_function(lambda theta: np.log(theta + shift))

    def distribution_bounds(self, x: npt.ArrayLike) -> tuple[Array, Array]:
        """Lower and upper bounds, each [probes, len(x)], of the share of a probe's spectral measure at or below x.

        By the Chebyshev-Markov-Stieltjes inequalities, see `krylov.bounds`, for a matrix that differs from the operator
        by no more than the slack: the rounding of the run, and after a breakdown also the last beta, which was taken
        for rounding. Every Ritz value may lie anywhere within its slack. Their means over probes bound the mean of the
        probes' measures, which differs from the operator's distribution of eigenvalues by chance. After a breakdown
        both are the measure's own, up to the slack.

        Raises:
            InputError: x is not one-dimensional, or has an entry that is not a number.
        """
        x = np.asarray(x, np.float64)
        if x.ndim != 1:
            raise InputError(f"x must be one-dimensional, got shape {x.shape}")
        bounds = np.empty((2, self.num_probes, x.size))
        rows = zip(self._quadratures, self.limits.slack, self.broke_down, strict=True)
        for probe, (nodes, slack, broke) in enumerate(rows):
            bounds[:, probe] = distribution_bounds(nodes.ritz_values, nodes.weights, x, slack, exhausted=broke)
        return bounds[0], bounds[1]

    def distribution_interval(self, x: npt.ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
        """Low and high ends, each [len(x)], of what holds the share of all eigenvalues at or below x.

        The means over probes of `distribution_bounds`, widened by the sampling error of the probes.

        Raises:
            InputError: x as there; `level` is not between 0 and 1.
        """
        low, high = (bound.mean(0) for bound in self.distribution_bounds(x))
        return share_interval(low, np.minimum(high, 1.0), share_chance(self.dim, self.num_probes, level))

    def extreme(self) -> Extremes:
        """The smallest and largest Ritz value of all probes; H's own lie at or beyond, but for `residual_bound`."""
        return extremes(self.ritz_values, self.residual_bounds, self.sizes)

    def density(
        self, points: int = 400, axis: Axis = "symlog", width: float | None = None, linthresh: float | None = None
    ) -> Density:
        """The density on a grid with a 95% band; see `jaxhess.slq.density.smoothed` for the arguments."""
        return smoothed(self.ritz_values, self.weights, self.limits, points, axis, width, linthresh)

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes `spectrum.npz` and `spectrum.json` into the folder: see `jaxhess.results.files.save`."""
        from jaxhess.results import files

        files.save(self, folder, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], dim: int | None = None) -> Spectrum:
        """The spectrum of a run folder, or of a file of another tool: see `jaxhess.results.files.load`."""
        from jaxhess.results.files import load

        return load(path, dim)

    def plot(self, axis: Axis = "symlog") -> Figure:
        """The figure of the eigenvalue density."""
        from jaxhess.results.figures import density_figure

        return density_figure(self, axis)

    @property
    def _last_betas(self) -> Array:
        return self.betas[np.arange(self.num_probes), self.sizes - 1]

    @property
    def _open(self) -> npt.NDArray[np.bool_]:
        """[probes] whether the last beta is not known."""
        return np.isnan(self._last_betas)

    @functools.cached_property
    def _quadratures(self) -> list[Quadrature]:
        return quadratures(Coefficients(self.alphas, self.betas, self.sizes, self.step_errors))

    @functools.cached_property
    def _ghosts(self) -> list[Ghosts]:
        settled = independent(self.run.lanczos.reorthogonalize, self.run.lanczos.orthogonality, self.sizes)
        rows = zip(self._quadratures, settled, strict=True)
        return [unflagged(nodes) if known else classify(nodes, self.run.rounding) for nodes, known in rows]

    def _padded(self, field: int, fill: float) -> Array:
        rows = np.full(self.alphas.shape, fill)
        for row, found in zip(rows, self._quadratures, strict=True):
            row[: found[field].size] = found[field]
        rows.flags.writeable = False
        return rows

    def _spread(
        self, values: Array, nodes: Array, scatter: Spread, missing: float = 0.0, missing_fourth: float = 0.0
    ) -> Spread:
        """Of the mean of the values [probes] of v'Av, from the eigenvalues of A [probes, steps] in the quadratures.

        `missing` and `missing_fourth` are what the quadratures lack, see `on_the_sphere`, `scatter` the spread that the
        values alone would give.
        """
        sphere = on_the_sphere(self.dim, values, nodes, self.weights, missing, missing_fourth)
        signs = self.run.probes.distribution == "rademacher" and self.num_probes > 1
        return scatter if signs and disagrees(scatter, sphere) else sphere

    @functools.cached_property
    def _ends(self) -> tuple[float, float]:
        """Between which eigenvalues are taken to lie: the extreme Ritz values of all probes and their residuals."""
        bounds = np.nan_to_num(self.residual_bounds)
        return float(np.nanmin(self.ritz_values - bounds)), float(np.nanmax(self.ritz_values + bounds))

    @functools.cached_property
    def limits(self) -> SpectrumLimits:
        """What bounds and bands rest on. The slack is rounding, after a breakdown also the last beta, taken for it."""
        last = np.where(self.broke_down, self._last_betas, 0.0)
        slack = [
            tolerances(nodes, self.run.rounding) + beta for nodes, beta in zip(self._quadratures, last, strict=True)
        ]
        return SpectrumLimits(self.dim, self._ends, slack, self.broke_down)

    def _beyond_gauss(self, k: int) -> Array:
        """[probes] what v'H^k v exceeds the quadrature by: the product of the squared betas for k = 2 size, else 0."""
        missing = np.zeros(self.num_probes)
        for probe in np.flatnonzero(k == 2 * self.sizes):
            missing[probe] = np.prod(self.betas[probe, : self.sizes[probe]] ** 2)
        return missing
