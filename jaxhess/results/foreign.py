"""Spectra in other tools' files, and ours as plain JSON and CSV.

Read are (`jaxhess.results.files.load`), one probe or several, with or without the number of parameters (`dim`):

- JSON or `.npz` of Ritz values and weights (`ritz_values`, `weights`: a list for each probe, or one), or of Lanczos
  coefficients (`alphas`, `betas`); JSON of `evals` and `weights`, as HessFormer's command writes it (commit 0c02567);
- CSV with the columns `ritz_value`, `weight` and, for several, `probe`.

`docs/foreign_results.md` says how to write these from results of HessFormer, PyHessian and hessian-eigenthings. Pickles
and torch files are refused: reading them can run code. Quadratures are turned into Lanczos coefficients
(`coefficients`). What no such file holds is the norm after the last step, so that the residual bounds of what is read
are unknown: NaN.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.files.run_folder import json_ready, read_arrays, read_json
from jaxhess.files.typed import read_as
from jaxhess.results.old_runs import record_of_old_run, rounding_of_old_run
from jaxhess.results.summary import summary
from jaxhess.slq.record import RunRecord
from jaxhess.slq.spectrum import Spectrum

Array = npt.NDArray[np.float64]

QUADRATURE_FORMATS = OLD_FORMAT, FORMAT = "jaxhess-quadrature-1", "jaxhess-quadrature-2"
VALUES = ("ritz_values", "eigenvalues", "evals")
COLUMNS = ("probe", "ritz_value", "weight", "residual_bound", "ghost")
DAMAGE = ValueError, OSError, TypeError, LookupError, ArithmeticError, csv.Error
UNSAFE = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy")


class UnknownDimension(InputError):
    """A file does not say how many parameters the model has, and nobody else did."""


def read_spectrum(path: Path, dim: int | None = None) -> Spectrum:
    """The spectrum in a file of one of the formats above; its record is the file's, or says where it came from.

    Args:
        path: The file.
        dim: Number of parameters, for a file that does not say.

    Raises:
        InputError: There is no such file; it is damaged, of another kind, or its numbers are no quadrature; the number
            of parameters is missing, or another. Names the file.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a run folder, or a file of Ritz values and weights.")
    with _naming(path):
        data = _read(path)
        rows = _padded([coefficients(*pair) if len(pair) == 2 else pair[0] for pair in _probes(data)])
        known = _dimension(data)
    if (rows_of_operator := known or dim) is None:
        raise UnknownDimension(f"{path} does not say how many parameters the model has: give dim, or --dim.")
    if known is not None and dim not in (None, known):
        raise InputError(f"{path} is of {known:,} parameters, not of {dim:,}.")
    with _naming(path):
        run, info = _record(data, path)
        return Spectrum(*rows, rows_of_operator, info, run=run)


def _record(data: dict[str, Any], path: Path) -> tuple[RunRecord, dict[str, Any]]:
    """The record and the notes of a file that we wrote; of any other, where it came from."""
    if not isinstance(data.get("format"), str) or data["format"] not in QUADRATURE_FORMATS:
        return RunRecord(), {"imported": str(path)}
    info = data.get("info", {"imported": str(path)})
    if not isinstance(info, dict):
        raise InputError(f"its info is {info!r:.60}; it is an object.")
    if data["format"] == FORMAT:
        return read_as(RunRecord, data.get("run")), info
    run, info = record_of_old_run(data.get("run"), info)
    return dataclasses.replace(run, rounding=rounding_of_old_run(data)), info


def coefficients(ritz_values: npt.ArrayLike, weights: npt.ArrayLike) -> tuple[Array, Array]:
    """[m] alphas and betas of the tridiagonal whose Gauss quadrature these are, betas[-1] NaN.

    By the rotations of Gragg and Harrod (1984), which lose no accuracy however small a weight is. Nodes without weight
    are left out and equal ones merged: no tridiagonal has them.

    Examples:
        >>> from jaxhess.results.foreign import coefficients
        >>> alphas, betas = coefficients([1.0, 3.0], [0.5, 0.5])
        >>> alphas.round(3), betas.round(3)
        (array([2., 2.]), array([ 1., nan]))

    Raises:
        InputError: The lists differ in length or are empty, a value is not finite, a weight is negative, or they do not
            sum to one within 1%.
    """
    theta, w = np.asarray(ritz_values, np.float64), np.asarray(weights, np.float64)
    if theta.ndim != 1 or theta.shape != w.shape:
        raise InputError(
            f"Shapes differ: ritz_values {theta.shape}, weights {w.shape}. Each probe needs one weight per Ritz value."
        )
    theta, w = theta[~np.isnan(theta)], w[~np.isnan(theta)]
    if not (np.isfinite(theta).all() and np.isfinite(w).all() and (w >= 0).all()):
        raise InputError("a Ritz value or weight is not finite, or a weight is negative.")
    if theta.size == 0 or abs(w.sum() - 1) > 0.01:
        raise InputError(f"the weights of a probe sum to {w.sum():.4g}; they are shares of all eigenvalues, of sum 1.")
    theta, place = np.unique(theta[w > 0], return_inverse=True)
    w = np.bincount(place, w[w > 0]) / w.sum()
    alphas, squares = theta.copy(), np.zeros(theta.size)
    squares[0] = w[0]
    for n in range(1, theta.size):  # one more node: its weight is chased down the tridiagonal
        p, cosine, sine, t = w[n], 1.0, 0.0, 0.0
        for k in range(n + 1):
            total, before = squares[k] + p, sine
            kept = cosine * total
            cosine, sine = (squares[k] / total, p / total) if total > 0 else (1.0, 0.0)
            shift = sine * (alphas[k] - theta[n]) - cosine * t
            alphas[k] -= shift - t
            t = shift
            p = t * t / sine if sine > 0 else before * squares[k]
            squares[k] = kept
    return alphas, np.append(np.sqrt(squares[1:]), np.nan)


def to_json(spectrum: Spectrum) -> str:
    """The spectrum as a JSON object: Ritz values, weights and bounds of every probe, coefficients, record, summary.

    null where a probe took fewer steps, or something is unknown.

    Examples:
        >>> import jaxhess, json
        >>> from jaxhess.results.foreign import to_json
        >>> result = jaxhess.Spectrum(alphas=[[2.0, 2.0]], betas=[[1.0, 0.0]], sizes=[2], dim=2)
        >>> json.loads(to_json(result))["alphas"]
        [[2.0, 2.0]]
    """
    names = ("ritz_values", "weights", "residual_bounds", "ghosts", "alphas", "betas", "sizes", "dim")
    fields = {name: json_ready(getattr(spectrum, name)) for name in names}
    fields |= {"run": json_ready(dataclasses.asdict(spectrum.run)), "summary": summary(spectrum)}
    return json.dumps({"format": FORMAT, **fields, "info": spectrum.info}, indent=1)


def to_csv(spectrum: Spectrum) -> str:
    """One row per Ritz value: probe (from 0), ritz_value, weight, residual_bound (empty if unknown), ghost (0 or 1).

    Examples:
        >>> import jaxhess
        >>> from jaxhess.results.foreign import to_csv
        >>> result = jaxhess.Spectrum(alphas=[[2.0, 2.0]], betas=[[1.0, 0.0]], sizes=[2], dim=2)
        >>> print(to_csv(result).splitlines()[0])
        probe,ritz_value,weight,residual_bound,ghost
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for probe, size in enumerate(spectrum.sizes):
        fields = (spectrum.ritz_values, spectrum.weights, spectrum.residual_bounds, spectrum.ghosts)
        for theta, weight, bound, ghost in zip(*(field[probe, :size] for field in fields), strict=True):
            known = "" if np.isnan(bound) else repr(float(bound))
            rows.writerow([probe, repr(float(theta)), repr(float(weight)), known, int(ghost)])
    return text.getvalue()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever a damaged file, or one of another kind, makes of the reading becomes an InputError with its name."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:300] or "it ends too early."
        raise InputError(f"{path} is no spectrum that can be read: {reason}") from error


def _read(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".npz":
        return dict(read_arrays(path))
    if suffix == ".json":
        found = read_json(path)
        if not isinstance(found, dict):
            raise InputError("it holds no object of Ritz values and weights.")
        return found
    if suffix in UNSAFE:
        raise InputError(
            f"reading {suffix} can run code: write JSON where it was made, as docs/foreign_results.md shows."
        )
    raise InputError(f"its name ends in {suffix or 'nothing'}; known are .json, .csv, .npz, and run folders.")


def _read_csv(path: Path) -> dict[str, Any]:
    with path.open(newline="", encoding="utf-8-sig") as lines:  # Excel writes a byte order mark
        rows = list(csv.DictReader(lines, skipinitialspace=True))
    header = list(rows[0]) if rows else []
    value = next((name for name in ("ritz_value", "eigenvalue", *VALUES) if name in header), None)
    weight = next((name for name in ("weight", "weights") if name in header), None)
    if value is None or weight is None:
        raise InputError(
            f"its columns are {', '.join(map(str, header))[:200]}; needed are ritz_value and weight (and probe)."
        )
    probes: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        probes.setdefault(row.get("probe") or "0", []).append((float(row[value]), float(row[weight])))
    pairs = [list(zip(*probe, strict=True)) for probe in probes.values()]
    return {"ritz_values": [p[0] for p in pairs], "weights": [p[1] for p in pairs]}


def _probes(data: dict[str, Any]) -> Iterator[tuple]:
    """For every probe (Ritz values, weights), or ((alphas, betas),)."""
    if "alphas" in data and "betas" in data:
        for a, b in zip(*(_rows(data[name]) for name in ("alphas", "betas")), strict=True):
            m = int(np.isfinite(a).sum())
            yield ((a[:m], b[:m]),)
        return
    values = next((data[name] for name in VALUES if name in data), None)
    if values is None or "weights" not in data:
        found = ", ".join(map(str, data))[:200] or "nothing"
        raise InputError(f"it holds {found}; needed are Ritz values ({VALUES[0]}) and their weights (weights).")
    yield from zip(_rows(values), _rows(data["weights"]), strict=True)


def _rows(values: Any) -> list[Array]:
    """One row of float64 for each probe; None is NaN."""
    nested = (
        np.ndim(values) > 1 if isinstance(values, np.ndarray) else any(isinstance(row, list | tuple) for row in values)
    )
    return [np.array(row, np.float64) for row in (values if nested else [values])]


def _dimension(data: dict[str, Any]) -> int | None:
    """Parameters, where the file says so.

    Raises:
        InputError: It says a number that is not whole, or not positive.
    """
    if data.get("dim") is None:
        return None
    found = float(data["dim"])
    if not found.is_integer() or found < 1:
        raise InputError(f"its dim is {found:g}; a number of parameters is whole and positive.")
    return int(data["dim"])


def _padded(found: list[tuple[Array, Array]]) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """[probes, steps] alphas and betas and [probes] sizes, as `Spectrum` takes them."""
    if not found:
        raise InputError("it holds no probe.")
    sizes = np.array([len(alphas) for alphas, _ in found], np.int64)
    rows = np.full((2, len(found), int(sizes.max())), np.nan)
    for probe, (alphas, betas) in enumerate(found):
        rows[0, probe, : len(alphas)], rows[1, probe, : len(alphas)] = alphas, betas
    return rows[0], rows[1], sizes
