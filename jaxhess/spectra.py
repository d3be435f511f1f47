"""The result of stochastic Lanczos quadrature: Ritz values and weights of every probe, and what follows from them."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxhess.density import Axis, Density, smoothed
from jaxhess.krylov.quadrature import Quadrature, quadrature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "jaxhess-spectrum-1"
ARRAYS, RECORD = "spectrum.npz", "spectrum.json"

MATRIX_NAMES = {
    "Hessian": "loss Hessian",
    "LinearizedHessian": "loss Hessian",
    "FiniteDifferenceHessian": "loss Hessian by finite differences",
    "GaussNewton": "Gauss-Newton matrix",
    "EmpiricalFisher": "empirical Fisher matrix",
    "MonteCarloFisher": "Monte-Carlo Fisher matrix",
}

Array = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value and its standard error; the error is NaN where the data do not tell."""

    value: float
    standard_error: float


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

    Attributes:
        alphas: [probes, steps] float64 diagonals of T; NaN beyond a probe's size.
        betas: [probes, steps] float64 norms after each step (the last one bounds residuals); NaN beyond a probe's size.
        sizes: [probes] int, the steps each probe took: fewer than `steps` after a breakdown, which ends the Krylov
            space, within rounding: the quadrature is then exact for every function, up to that.
        dim: Rows of the operator: the number of parameters.
        info: What produced it (options, model, data, mesh, versions, timings). Made JSON-ready on entry: tuples become
            lists, numbers that are not finite None, unknown objects their text.

    Raises:
        ValueError: Shapes disagree, a size is outside 1..steps, or an entry within it is not finite (a beta: negative).
    """

    alphas: Array
    betas: Array
    sizes: npt.NDArray[np.int64]
    dim: int
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        alphas, betas = np.array(self.alphas, np.float64), np.array(self.betas, np.float64)
        sizes = np.array(self.sizes)
        if alphas.ndim != 2 or 0 in alphas.shape or betas.shape != alphas.shape or sizes.shape != alphas.shape[:1]:
            raise ValueError(
                "alphas and betas must be [probes, steps] and sizes [probes], none empty, "
                f"got {alphas.shape}, {betas.shape} and {sizes.shape}"
            )
        if sizes.dtype.kind not in "iu" or sizes.min() < 1 or sizes.max() > alphas.shape[1]:
            raise ValueError(f"sizes must be integers from 1 to the number of steps {alphas.shape[1]}, got {sizes}")
        if int(self.dim) != self.dim or self.dim < 1:
            raise ValueError(f"dim must be a positive number of parameters, got {self.dim}")
        beyond = np.arange(alphas.shape[1]) >= sizes[:, None]
        alphas[beyond] = betas[beyond] = np.nan
        bad = ~beyond & ~(np.isfinite(alphas) & np.isfinite(betas) & (betas >= 0))
        if bad.any():
            probe, step = np.argwhere(bad)[0]
            raise ValueError(
                f"probe {probe} step {step} has alpha {alphas[probe, step]} and beta {betas[probe, step]}: "
                "both must be finite and beta not negative"
            )
        cleaned = {"alphas": alphas, "betas": betas, "sizes": sizes.astype(np.int64), "dim": int(self.dim)}
        for name, value in {**cleaned, "info": _json_ready(self.info)}.items():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False  # The cached quadrature belongs to these coefficients.
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spectrum):
            return NotImplemented
        same = all(np.array_equal(getattr(self, n), getattr(other, n), True) for n in ("alphas", "betas", "sizes"))
        return same and self.dim == other.dim and self.info == other.info

    @property
    def num_probes(self) -> int:
        return self.alphas.shape[0]

    @property
    def matrix_name(self) -> str:
        """What the spectrum is of, in words, from the record of the run."""
        operator = self.info.get("operator")
        described = operator if isinstance(operator, dict) else {}
        name = MATRIX_NAMES.get(described.get("kind", "Hessian"), "operator")
        block = described.get("restriction")
        return f"{name}, block {block}" if block else name

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
        """[probes, steps] beta_m |s_mi|; NaN beyond a probe's size."""
        return self._padded(2, np.nan)

    @property
    def broke_down(self) -> npt.NDArray[np.bool_]:
        """[probes] whether the Krylov space was exhausted within rounding: the quadrature is exact but for that."""
        return (self.sizes < self.num_steps) | (self.betas[np.arange(self.num_probes), self.sizes - 1] == 0)

    @property
    def exact_degree(self) -> int | None:
        """Highest k for which `moment(k)` is exact on every probe, 2 min(size); None when every probe broke down."""
        sizes = self.sizes[~self.broke_down]
        return 2 * int(sizes.min()) if sizes.size else None

    def moment(self, k: int) -> Estimate:
        """The estimate of tr(H^k)/dim: the mean over probes of v'H^k v = sum_i w_i theta_i^k, and its standard error.

        Gauss quadrature of m steps is exact to degree 2m - 1; in degree 2m it lacks the product of all m squared betas
        (the squared norm of the next monic Lanczos polynomial), which is known and added. One step thus gives the
        second moment, alpha_1^2 + beta_1^2.

        The standard error is std(ddof=1)/sqrt(probes). A single probe has none to compare with, but v is uniform on the
        sphere of R^n, for which Var(v'Av) = 2/(n+2) (tr(A^2)/n - (tr(A)/n)^2); with A = H^k and both traces from the
        same quadrature this is a plug-in estimate, NaN when degree 2k is beyond what the probe knows.

        Raises:
            ValueError: k is not an integer >= 0, or is above `exact_degree`.
        """
        if int(k) != k or k < 0:
            raise ValueError(f"moment k must be an integer >= 0, got {k}")
        limit = self.exact_degree
        if limit is not None and k > limit:
            raise ValueError(
                f"moment {k} is beyond degree {limit}, the last that {limit // 2} Lanczos steps know; "
                f"run at least {(int(k) + 1) // 2} steps"
            )
        values = self._probe_moments(int(k))
        if self.num_probes > 1:
            return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(self.num_probes)))
        if limit is not None and 2 * k > limit:
            return Estimate(float(values[0]), float("nan"))
        # The variance of theta^k in the measure, as a sum of squares: no cancellation when H is near a multiple of I.
        theta = self.ritz_values[0, : self.sizes[0]]
        variance = self.weights[0, : self.sizes[0]] @ (theta**k - values[0]) ** 2 + self._beyond_gauss(2 * int(k))[0]
        return Estimate(float(values[0]), float(np.sqrt(2 / (self.dim + 2) * variance)))

    def trace(self) -> Estimate:
        """tr(H), dim times the first moment."""
        first = self.moment(1)
        return Estimate(self.dim * first.value, self.dim * first.standard_error)

    def frobenius_norm(self) -> Estimate:
        """||H||_F = sqrt(dim * second moment); the standard error by the delta method, dF = F dM / (2 M)."""
        second = self.moment(2)
        norm = float(np.sqrt(self.dim) * np.sqrt(second.value))
        slope = norm / (2 * second.value) if second.value > 0 else 0.0
        return Estimate(norm, slope * second.standard_error)

    def extreme(self) -> Extremes:
        """The smallest and largest Ritz value over all probes (H's own extremes lie at or beyond them)."""
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
        """The density on a grid with errors across probes; see `jaxhess.density.smoothed` for the arguments."""
        return smoothed(self.ritz_values, self.weights, points, axis, width, linthresh)

    def summary(self) -> dict[str, Any]:
        """What a reader asks first, JSON-ready: what is not known is None."""
        smallest, largest = self.extreme()
        degree = self.exact_degree
        moments = {str(k): self.moment(k)._asdict() for k in range(1, 5) if degree is None or k <= degree}
        return _json_ready(
            {
                "dim": self.dim,
                "num_probes": self.num_probes,
                "num_steps": self.num_steps,
                "sizes": self.sizes,
                "num_broke_down": int(self.broke_down.sum()),
                "smallest": smallest._asdict(),
                "largest": largest._asdict(),
                "trace": self.trace()._asdict(),
                "frobenius_norm": self.frobenius_norm()._asdict(),
                "moments": moments,
                "exact_degree": degree,
                "checks": self.checks(),
            }
        )

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes `spectrum.npz` and `spectrum.json` into the folder, created if missing; the JSON last.

        Each file appears whole or not at all, and a folder with `spectrum.json` is a finished run.

        Raises:
            FileExistsError: The folder holds a finished run and `overwrite` is False.
        """
        refuse_unusable(folder, overwrite)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: getattr(self, name) for name in (*Quadrature._fields, *_STORED)}
        record = {"format": FORMAT, "info": self.info, "summary": self.summary()}
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        _publish(folder, {ARRAYS: buffer.getvalue(), RECORD: text.encode()})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Spectrum:
        """The spectrum that `save` wrote; Ritz values are computed again from alphas and betas.

        Raises:
            FileNotFoundError: The folder or one of its two files is missing.
            ValueError: A file is corrupt or of another format.
        """
        for path in (Path(folder), Path(folder) / RECORD, Path(folder) / ARRAYS):
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist: a finished run folder holds {RECORD} and {ARRAYS}")
        try:
            record = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
            found = record.get("format") if isinstance(record, dict) else None
            if found != FORMAT:
                raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
        except ValueError as error:
            raise ValueError(f"{Path(folder) / RECORD} is not a spectrum record: {error}") from error
        try:
            # From memory: numpy leaves a corrupt file open.
            with np.load(io.BytesIO((Path(folder) / ARRAYS).read_bytes()), allow_pickle=False) as arrays:
                fields = {name: arrays[name] for name in _STORED}
            return cls(**{**fields, "dim": int(fields["dim"])}, info=record.get("info", {}))
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{Path(folder) / ARRAYS} is corrupt or not a spectrum: {error}") from error

    def plot(self, axis: Axis = "symlog") -> Figure:
        """The figure of the eigenvalue density."""
        from jaxhess.plotting import density_figure

        return density_figure(self, axis)

    @functools.cached_property
    def _quadratures(self) -> list[Quadrature]:
        return [quadrature(a[:m], b[:m]) for a, b, m in zip(self.alphas, self.betas, self.sizes, strict=True)]

    def _padded(self, field: int, fill: float) -> Array:
        rows = np.full(self.alphas.shape, fill)
        for row, found in zip(rows, self._quadratures, strict=True):
            row[: found[field].size] = found[field]
        rows.flags.writeable = False
        return rows

    def _probe_moments(self, k: int) -> Array:
        return (self.weights * np.nan_to_num(self.ritz_values) ** k).sum(1) + self._beyond_gauss(k)

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


def refuse_unusable(folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raises when a run could not be saved in this folder; to be called before the long work. Leaves no trace.

    Raises:
        FileExistsError: It holds a finished run and `overwrite` is False.
        NotADirectoryError: It, or what should contain it, is a file.
        PermissionError: Nothing can be written there.
    """
    folder = Path(folder)
    if not overwrite and (folder / RECORD).exists():
        raise FileExistsError(
            f"{folder} already holds a finished run ({RECORD}); choose another folder, or pass "
            "--overwrite (overwrite=True) to replace it"
        )
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"The run folder {folder} cannot be made: {existing} is a file.")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise PermissionError(f"The run folder {folder} cannot be written ({error.strerror}).") from None


_STORED = ("alphas", "betas", "sizes", "dim")


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _json_ready(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [_json_ready(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _publish(folder: Path, files: dict[str, bytes]) -> None:
    """Replaces the files in this order, all of them or (when writing fails) none."""
    temporaries = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, content in files.items():
            temporaries[name].write_bytes(content)
        (folder / RECORD).unlink(missing_ok=True)  # Never an old record beside new arrays.
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
