"""The result of stochastic Lanczos quadrature: Ritz values and weights of every probe, and what follows from them."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.files.foreign import read_spectrum, to_csv, to_json
from jaxhess.files.output import Output
from jaxhess.files.run_folder import ARRAYS, EXPORTS, RECORD, REPORT_FILES, json_ready, read_run, run_files
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
    FLOAT32_ROUNDING,
    Clusters,
    Ghosts,
    classify,
    independent,
    orthogonality_lost,
    relative_tolerance,
    tolerances,
    unflagged,
)
from jaxhess.krylov.integrals import integral_bounds
from jaxhess.krylov.quadrature import Quadrature, quadrature
from jaxhess.operators.restriction import restriction_text
from jaxhess.record import RunRecord
from jaxhess.slq.density import Axis, Density, Known, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Estimate", "Extreme", "Extremes", "Spectrum", "json_ready"]

MATRIX_NAMES = {
    "Hessian": "loss Hessian",
    "LinearizedHessian": "loss Hessian",
    "FiniteDifferenceHessian": "loss Hessian by finite differences",
    "GaussNewton": "Gauss-Newton matrix",
    "EmpiricalFisher": "empirical Fisher matrix",
    "MonteCarloFisher": "Monte-Carlo Fisher matrix",
}

Array = npt.NDArray[np.float64]


class Extreme(NamedTuple):
    """An extreme Ritz value, its residual bound, and the std of the probes' own extremes (NaN for one probe)."""

    value: float
    residual_bound: float
    spread: float


class Extremes(NamedTuple):
    smallest: Extreme
    largest: Extreme


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
        info: What produced it (options, model, data, mesh, versions, timings): for readers, no number depends on it.
            Made JSON-ready on entry: tuples become lists, numbers that are not finite None, unknown objects their text.
        run: What standard errors and ghosts depend on.
        rounding: The eps of products, see `jaxhess.operators.precision.unit_roundoff`. With `step_errors` it sets what
            counts as a ghost, and the slack of the bounds.
        step_errors: [probes, steps] float64, what each step left out of the recurrence (`LanczosState.step_errors`); it
            is part of `residual_bounds`. Empty: not known, and taken for zero.

    Standard errors are of the chance in the probes: `jaxhess.krylov.errors` says how, and `docs/numerics.md` has
    the measured coverage of their intervals. They are the sphere's, as far as the steps taken know it. For probes
    of random signs that is an upper bound; where the probes' own scatter shows it to be far too large, the scatter
    is taken.

    Raises:
        ValueError: Shapes disagree, a size is outside 1..steps, an entry within it is not finite (a beta: negative), or
            `rounding` is not between 0 and 1.
    """

    alphas: Array
    betas: Array
    sizes: npt.NDArray[np.int64]
    dim: int
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: RunRecord = dataclasses.field(default=RunRecord(), kw_only=True)
    rounding: float = dataclasses.field(default=FLOAT32_ROUNDING, kw_only=True)
    step_errors: Array = dataclasses.field(default_factory=lambda: np.zeros(0), kw_only=True)

    def __post_init__(self) -> None:
        alphas, betas = np.array(self.alphas, np.float64), np.array(self.betas, np.float64)
        sizes = np.array(self.sizes)
        if alphas.ndim != 2 or 0 in alphas.shape or betas.shape != alphas.shape or sizes.shape != alphas.shape[:1]:
            raise InputError(
                "alphas and betas must be [probes, steps] and sizes [probes], none empty, "
                f"got {alphas.shape}, {betas.shape} and {sizes.shape}"
            )
        if sizes.dtype.kind not in "iu" or sizes.min() < 1 or sizes.max() > alphas.shape[1]:
            raise InputError(f"sizes must be integers from 1 to the number of steps {alphas.shape[1]}, got {sizes}")
        if int(self.dim) != self.dim or self.dim < 1:
            raise InputError(f"dim must be a positive number of parameters, got {self.dim}")
        beyond = np.arange(alphas.shape[1]) >= sizes[:, None]
        alphas[beyond] = betas[beyond] = np.nan
        unknown = np.isnan(betas) & (np.arange(alphas.shape[1]) == sizes[:, None] - 1)
        bad = ~beyond & ~(np.isfinite(alphas) & (unknown | (np.isfinite(betas) & (betas >= 0))))
        if bad.any():
            probe, step = np.argwhere(bad)[0]
            raise InputError(
                f"probe {probe} step {step} has alpha {alphas[probe, step]} and beta {betas[probe, step]}: "
                "both must be finite and beta not negative"
            )
        relative_tolerance(1, self.rounding)
        errors = np.array(self.step_errors, np.float64) if np.size(self.step_errors) else np.zeros_like(alphas)
        if errors.shape != alphas.shape or not (beyond | (np.isfinite(errors) & (errors >= 0))).all():
            raise InputError(f"step_errors must be [probes, steps], finite and not negative, got {errors}")
        errors[beyond] = np.nan
        cleaned = {"alphas": alphas, "betas": betas, "sizes": sizes.astype(np.int64), "dim": int(self.dim)}
        cleaned |= {"info": json_ready(self.info), "rounding": float(self.rounding), "step_errors": errors}
        for name, value in cleaned.items():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False  # The cached quadrature belongs to these coefficients.
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spectrum):
            return NotImplemented
        arrays = ("alphas", "betas", "sizes", "step_errors")
        same = all(np.array_equal(getattr(self, n), getattr(other, n), True) for n in arrays)
        return same and all(getattr(self, n) == getattr(other, n) for n in ("dim", "info", "run", "rounding"))

    @property
    def num_probes(self) -> int:
        return self.alphas.shape[0]

    @property
    def matrix_name(self) -> str:
        """What the spectrum is of, in words, from the record of the run."""
        operator = self.info.get("operator")
        described = operator if isinstance(operator, dict) else {}
        name = MATRIX_NAMES.get(str(described.get("kind", "Hessian")), "operator")
        block = described.get("restriction")
        return f"{name}, block {restriction_text(block)}" if block else name

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
        """[probes] whether re-orthogonalisation failed, see `krylov.ghosts`: do not rely on these probes."""
        return orthogonality_lost(self.run, self.sizes)

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
        one probe). That of an odd moment is then not known: NaN.

        Raises:
            ValueError: k is not an integer >= 0, or is above `exact_degree`.
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
        return Estimate(float(values.mean()), *spread, positive=even)

    def trace(self) -> Estimate:
        """tr(H), dim times the first moment."""
        return self.moment(1).times(self.dim)

    def frobenius_norm(self) -> Estimate:
        """||H||_F = sqrt(dim * second moment); the standard error by the delta method, dF = F dM / (2 M).

        Where one eigenvalue dominates, dF is that eigenvalue over sqrt(2 probes), whatever the probes saw of it.
        """
        second = self.moment(2)
        norm = float(np.sqrt(self.dim) * np.sqrt(second.value))
        slope = norm / (2 * second.value) if second.value > 0 else 0.0
        return dataclasses.replace(second, value=norm, standard_error=slope * second.standard_error)

    def trace_function(self, f: Callable[[Array], npt.ArrayLike]) -> Estimate:
        """tr f(H), estimated by dim times the mean over probes of sum_i w_i f(theta_i) (Ubaru, Chen and Saad 2017).

        The standard error is that of chance in the probes. It rests on the integral of (f - mean)^2, of which the upper
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
            ValueError: f returns another shape, or a value that is not finite at a Ritz value (says at which).
        """
        taken = np.isfinite(self.ritz_values)
        theta = self.ritz_values[taken]
        with np.errstate(all="ignore"):
            found = np.asarray(f(theta.copy()), np.float64)
        if found.shape != theta.shape:
            raise InputError(f"f must be vectorised: for Ritz values of shape {theta.shape} it gave {found.shape}")
        if not np.isfinite(found).all():
            worst = int(np.argmin(np.isfinite(found)))
            raise InputError(f"f is {found[worst]} at the Ritz value {theta[worst]}: it must be finite at all of them")
        nodes = np.zeros(self.alphas.shape)
        nodes[taken] = found
        values = (self.weights * nodes).sum(1)
        mean = float(values.mean())
        missing, missing_fourth = (self._missing(f, mean, nodes - mean, power) for power in (2, 4))
        steps = self.sizes[~self.broke_down].min(initial=3)
        if steps < 3:  # One Ritz value says nothing of how far the eigenvalues reach, two are too few for the tails.
            missing, missing_fourth = (missing if steps == 2 else math.inf), math.inf
        spread = self._spread(values, nodes, across_probes(values), missing, missing_fourth)
        low, high = self._integral_bounds(f)
        settled = self.broke_down.all() and high - low <= 1e-12 * abs(mean)
        return Estimate(mean, *spread, bounds=None if settled else (low, high)).times(self.dim)

    def log_determinant(self, shift: float = 0.0) -> Estimate:
        """log det(H + shift I) = tr log(H + shift I); an estimate like that of `trace_function`.

        Raises:
            ValueError: H + shift I is not positive definite (says which shift would be right).
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
            ValueError: x is not one-dimensional, or has an entry that is not a number.
        """
        x = np.asarray(x, np.float64)
        if x.ndim != 1:
            raise InputError(f"x must be one-dimensional, got shape {x.shape}")
        bounds = np.empty((2, self.num_probes, x.size))
        for probe, (nodes, broke) in enumerate(zip(self._quadratures, self.broke_down, strict=True)):
            bounds[:, probe] = distribution_bounds(
                nodes.ritz_values, nodes.weights, x, self._slack(probe), exhausted=broke
            )
        return bounds[0], bounds[1]

    def distribution_interval(self, x: npt.ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
        """Low and high ends, each [len(x)], of what holds the share of all eigenvalues at or below x.

        The means over probes of `distribution_bounds`, and on top of them the chance in the probes.

        Raises:
            ValueError: x as there; `level` is not between 0 and 1.
        """
        low, high = (bound.mean(0) for bound in self.distribution_bounds(x))
        return share_interval(low, np.minimum(high, 1.0), share_chance(self.dim, self.num_probes, level))

    def extreme(self) -> Extremes:
        """The smallest and largest Ritz value over all probes.

        H's own extremes lie at or beyond them, but for `residual_bound` and rounding.
        """
        last = self.sizes - 1
        return Extremes(self._extreme(np.zeros_like(last), np.argmin), self._extreme(last, np.argmax))

    def checks(self) -> dict[str, float]:
        """The largest violation over probes of identities that cost nothing.

        `sum_weights`: sum w = 1. `first_moment`: sum w theta = alpha_1, relative to the root mean square eigenvalue.
        `second_moment`: sum w theta^2 = alpha_1^2 + beta_1^2, relative; only over probes of more than one step.
        Rounding leaves about 1e-15 times the number of steps; in the first moment also times the ratio of the largest
        to the root mean square eigenvalue. Anything above shows that T or its diagonalisation is broken.
        """
        theta = np.nan_to_num(self.ritz_values)
        root = np.hypot(self.alphas[:, 0], self.betas[:, 0])
        unit = np.where(root > 0, root, 1.0)
        first = ((self.weights * theta).sum(1) - self.alphas[:, 0]) / unit
        second = (self.weights * (theta / unit[:, None]) ** 2).sum(1) - (root / unit) ** 2
        found = {"sum_weights": self.weights.sum(1) - 1, "first_moment": first, "second_moment": second[self.sizes > 1]}
        return {name: float(np.abs(violation).max()) for name, violation in found.items() if violation.size}

    def density(
        self, points: int = 400, axis: Axis = "symlog", width: float | None = None, linthresh: float | None = None
    ) -> Density:
        """The density on a grid with a 95% band; see `jaxhess.slq.density.smoothed` for the arguments."""
        slack = [self._slack(probe) for probe in range(self.num_probes)]
        known = Known(self.dim, self._ends, slack, self.broke_down)
        return smoothed(self.ritz_values, self.weights, known, points, axis, width, linthresh)

    def summary(self) -> dict[str, Any]:
        """What a reader asks first, JSON-ready: what is not known is None."""
        smallest, largest = self.extreme()
        degree = self.exact_degree
        moments = {str(k): self.moment(k).to_dict() for k in range(1, 5) if degree is None or k <= degree}
        return json_ready(
            {
                "dim": self.dim,
                "num_probes": self.num_probes,
                "num_steps": self.num_steps,
                "sizes": self.sizes,
                "num_broke_down": int(self.broke_down.sum()),
                "num_ghosts": int(self.ghosts.sum()),
                "num_orthogonality_lost": int(self.orthogonality_lost.sum()),
                "rounding": self.rounding,
                "smallest": smallest._asdict(),
                "largest": largest._asdict(),
                "trace": self.trace().to_dict(),
                "frobenius_norm": self.frobenius_norm().to_dict(),
                "moments": moments,
                "exact_degree": degree,
                "checks": self.checks(),
            }
        )

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes `spectrum.npz` and `spectrum.json` into the folder, created if missing; the JSON last.

        Each file appears whole or not at all, and a folder with `spectrum.json` is a finished run. With `overwrite` the
        old run goes, with its report and exports; files that the library did not write stay, and are never replaced.

        Raises:
            FileExistsError: The folder holds a finished run and `overwrite` is False, or files of these names that the
                library did not write.
            OSError: The folder cannot be written. What could be saved elsewhere is, and the message says where.
        """
        with Output(folder, (ARRAYS, RECORD), overwrite, stale=(*REPORT_FILES, *EXPORTS)) as output:
            output.write(self.files())

    def files(self) -> dict[str, bytes]:
        """The contents of the two files that `save` writes."""
        names = (*Quadrature._fields, "ghosts", *_STORED, "rounding", "step_errors")
        arrays = {name: getattr(self, name) for name in names}
        run = json_ready(dataclasses.asdict(self.run))
        return run_files(arrays, {"run": run, "info": self.info, "summary": self.summary()})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], dim: int | None = None) -> Spectrum:
        """The spectrum that `save` wrote; what follows from alphas and betas is computed again.

        A folder that was written before the rounding was kept is taken for a float32 run; one whose vectors had 16 bits
        before their rounding was measured is warned about. A file is read as
        `jaxhess.files.foreign` says: JSON, CSV or npz of Ritz values and weights.

        Args:
            folder: A run folder, or such a file.
            dim: Number of parameters, for a file that does not say.

        Raises:
            FileNotFoundError: The folder, one of its two files, or the file is missing.
            ValueError: A file is corrupt or of another format; the number of parameters is missing, or another.
        """
        if not Path(folder).is_dir() and Path(folder).suffix:
            return read_spectrum(cls, Path(folder), dim)
        arrays, record = read_run(folder)
        info = record.get("info", {})
        try:
            run = RunRecord.read(record["run"]) if "run" in record else RunRecord.of_old_info(info)
        except ValueError as error:
            raise InputError(f"{Path(folder) / RECORD} is not a spectrum record: {error}") from None
        try:
            alphas, betas, sizes, rows = (arrays[name] for name in _STORED)
            rounding = float(arrays.get("rounding", FLOAT32_ROUNDING))
            errors = arrays.get("step_errors", np.zeros(0))
            lanczos = info.get("lanczos")
            kept = lanczos if isinstance(lanczos, dict) else {}
            stored = [str(kept.get(name)) for name in ("vector_dtype", "basis_dtype")]
            if not errors.size and any("16" in dtype for dtype in stored):
                warnings.warn(
                    f"{folder} is of an earlier version, which did not measure the rounding of 16-bit vectors: its "
                    "residual bounds may be too small. Run it again for bounds that hold.",
                    stacklevel=2,
                )
            return cls(alphas, betas, sizes, int(rows), info, run=run, rounding=rounding, step_errors=errors)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{Path(folder) / ARRAYS} is corrupt or not a spectrum: {error}") from None

    def to_json(self) -> str:
        """The spectrum as a JSON object that any tool reads: see `jaxhess.files.foreign`."""
        return to_json(self)

    def to_csv(self) -> str:
        """One row per Ritz value: probe, ritz_value, weight, residual_bound, ghost."""
        return to_csv(self)

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
        def one(alphas: Array, betas: Array, errors: Array) -> Quadrature:
            nodes = quadrature(alphas, np.append(betas[:-1], np.nan_to_num(betas[-1])), errors)
            return nodes._replace(residual_bounds=nodes.residual_bounds * np.nan) if np.isnan(betas[-1]) else nodes

        rows = zip(self.alphas, self.betas, self.step_errors, self.sizes, strict=True)
        return [one(a[:m], b[:m], e[:m]) for a, b, e, m in rows]

    @functools.cached_property
    def _ghosts(self) -> list[Ghosts]:
        settled = independent(self.run, self.sizes)
        return [
            unflagged(nodes) if known else classify(nodes, self.rounding)
            for nodes, known in zip(self._quadratures, settled, strict=True)
        ]

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
        signs = self.run.distribution == "rademacher" and self.num_probes > 1
        return scatter if signs and disagrees(scatter, sphere) else sphere

    @functools.cached_property
    def _ends(self) -> tuple[float, float]:
        """Between which eigenvalues are taken to lie: the extreme Ritz values of all probes and their residuals."""
        bounds = np.nan_to_num(self.residual_bounds)
        return float(np.nanmin(self.ritz_values - bounds)), float(np.nanmax(self.ritz_values + bounds))

    def _slack(self, probe: int) -> Array:
        """[size] by how far rounding may have moved each Ritz value of a probe.

        After a breakdown also the last beta, which was taken for rounding.
        """
        last = self._last_betas[probe] if self.broke_down[probe] else 0.0
        return tolerances(self._quadratures[probe], self.rounding) + last

    def _integral_bounds(self, f: Callable[[Array], npt.ArrayLike]) -> tuple[float, float]:
        """Of the mean over probes of v'f(H)v."""
        found = [
            integral_bounds(f, nodes.ritz_values, nodes.weights, self._ends, self._slack(probe), exhausted=broke)
            for probe, (nodes, broke) in enumerate(zip(self._quadratures, self.broke_down, strict=True))
        ]
        low, high = np.mean(found, axis=0)
        return float(low), float(high)

    def _missing(self, f: Callable[[Array], npt.ArrayLike], mean: float, deviations: Array, power: int) -> float:
        """By how much, averaged over probes, the integral of (f - mean)^power may exceed its quadrature.

        `deviations` are f - mean at the nodes, [probes, steps].
        """
        with np.errstate(over="ignore", invalid="ignore"):
            found = (self.weights * deviations**power).sum(1).mean()
            most = self._integral_bounds(lambda x: (np.asarray(f(x), np.float64) - mean) ** power)[1]
            missing = float(most - found)
        return math.inf if math.isnan(missing) else max(0.0, missing)

    def _beyond_gauss(self, k: int) -> Array:
        """[probes] what v'H^k v exceeds the quadrature by: the product of the squared betas for k = 2 size, else 0."""
        missing = np.zeros(self.num_probes)
        for probe in np.flatnonzero(k == 2 * self.sizes):
            missing[probe] = np.prod(self.betas[probe, : self.sizes[probe]] ** 2)
        return missing

    def _extreme(self, columns: npt.NDArray[np.int64], choose: Callable[[Array], np.intp]) -> Extreme:
        probes = np.arange(self.num_probes)
        values = self.ritz_values[probes, columns]
        best = choose(values)
        spread = float(values.std(ddof=1)) if self.num_probes > 1 else float("nan")
        return Extreme(float(values[best]), float(self.residual_bounds[best, columns[best]]), spread)


_STORED = ("alphas", "betas", "sizes", "dim")
