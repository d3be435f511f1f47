"""Spectra in other tools' files, and ours as plain JSON and CSV.

Read are (`Spectrum.load`; the formats were checked against the tools' sources):

- HessFormer: the dictionary of `run_lanczos` (commit 5adcfbd), saved by `torch.save`: T, and spec.eigvals, spec.gammas.
  Also the JSON of its first version's command (commit 0c02567): evals, weights.
- PyHessian: the two lists of `hessian.density()` (master), eigen_list_full and weight_list_full, one list per probe,
  the weights complex numbers without imaginary part (its torch.linalg.eig makes them such), as a JSON, pickle or
  `torch.save` of the pair, or of a dictionary with those two names.
- hessian-eigenthings (1.0.0a5): SpectralDensityResult (raw_eigenvalues, raw_weights, NaN where a run was shorter) and
  LanczosTridiag, as `torch.save(dataclasses.asdict(result))`, or of the object where that package is installed.
- JSON, `.npz` or CSV of Ritz values and weights, one probe or several, with or without the number of parameters.

Nothing that is read can run code: pickles may hold numbers, arrays and containers and nothing else. Quadratures are
turned into Lanczos coefficients (`coefficients`). What no such file holds is the norm after the last step, so that the
residual bounds of what is read are unknown: NaN.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jaxhess.record import RunRecord
from jaxhess.run_folder import json_ready

if TYPE_CHECKING:
    from jaxhess.spectra import Spectrum

Array = npt.NDArray[np.float64]

FORMAT = "jaxhess-quadrature-1"
VALUES = ("ritz_values", "eigenvalues", "eigvals", "evals", "eigen_list_full", "raw_eigenvalues")
WEIGHTS = ("weights", "gammas", "weight_list_full", "raw_weights")
COLUMNS = ("probe", "ritz_value", "weight", "residual_bound", "ghost")
DAMAGE = ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, RuntimeError
IMAGINARY = 1e-6
"""A larger imaginary part is none of rounding in float32."""
TORCH_SUFFIXES, PICKLE_SUFFIXES = (".pt", ".pth", ".bin"), (".pkl", ".pickle")


class UnknownDimension(ValueError):
    """A file does not say how many parameters the model has, and nobody else did."""


def read_spectrum(make: Callable[..., Spectrum], path: Path, dim: int | None = None) -> Spectrum:
    """The spectrum in a file of one of the formats above; its record is the file's, or says where it came from.

    Args:
        make: The class `Spectrum`.
        path: The file.
        dim: Number of parameters, for a file that does not say.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another kind, or its numbers are no quadrature; the number of parameters is
            missing, or another. Names the file.
        ImportError: It is a torch file, and torch is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a run folder, or a file of Ritz values and weights.")
    with _naming(path):
        data = _read(path)
        rows = _padded([coefficients(*pair) if len(pair) == 2 else pair[0] for pair in _probes(data)])
        known = _dimension(data, int(rows[2].max()))
    if known is None and dim is None:
        raise UnknownDimension(f"{path} does not say how many parameters the model has: give dim, or --dim.")
    if known is not None and dim not in (None, known):
        raise ValueError(f"{path} is of {known:,} parameters, not of {dim:,}.")
    record, facts = {"imported": str(path)}, {}
    with _naming(path):
        if isinstance(data, dict) and data.get("format") == FORMAT:
            record, facts = data.get("info", record), {k: data[k] for k in ("rounding",) if k in data}
            facts["run"] = RunRecord.read(data["run"]) if "run" in data else RunRecord.of_old_info(record)
        return make(*rows, known or dim, record, **facts)


def coefficients(ritz_values: npt.ArrayLike, weights: npt.ArrayLike) -> tuple[Array, Array]:
    """[m] alphas and betas of the tridiagonal whose Gauss quadrature these are, betas[-1] NaN.

    By the rotations of Gragg and Harrod (1984), which lose no accuracy however small a weight is. Nodes without weight
    are left out and equal ones merged: no tridiagonal has them.

    Raises:
        ValueError: The lists differ in length or are empty, a value is not finite, a weight is negative, or they do not
            sum to one within 1%.
    """
    theta, w = np.asarray(ritz_values, np.float64), np.asarray(weights, np.float64)
    if theta.ndim != 1 or theta.shape != w.shape:
        raise ValueError(f"{theta.shape} Ritz values and {w.shape} weights; a probe has as many of both.")
    theta, w = theta[~np.isnan(theta)], w[~np.isnan(theta)]
    if not (np.isfinite(theta).all() and np.isfinite(w).all() and (w >= 0).all()):
        raise ValueError("a Ritz value or weight is not finite, or a weight is negative.")
    if theta.size == 0 or abs(w.sum() - 1) > 0.01:
        raise ValueError(f"the weights of a probe sum to {w.sum():.4g}; they are shares of all eigenvalues, of sum 1.")
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
    """
    names = ("ritz_values", "weights", "residual_bounds", "ghosts", "alphas", "betas", "sizes", "dim", "rounding")
    fields = {name: json_ready(getattr(spectrum, name)) for name in names}
    fields |= {"run": json_ready(dataclasses.asdict(spectrum.run)), "summary": spectrum.summary()}
    return json.dumps({"format": FORMAT, **fields, "info": spectrum.info}, indent=1)


def to_csv(spectrum: Spectrum) -> str:
    """One row per Ritz value: probe (from 0), ritz_value, weight, residual_bound (empty if unknown), ghost (0 or 1)."""
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
    """Whatever a damaged file, or one of another kind, makes of the reading becomes a ValueError with its name."""
    try:
        yield
    except (*DAMAGE, csv.Error, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:300] or "it ends too early."
        raise ValueError(f"{path} is no spectrum that can be read: {reason}") from None


def _read(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".npz":
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays)
    if suffix in PICKLE_SUFFIXES:
        return _NumbersOnly(io.BytesIO(path.read_bytes())).load()
    if suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    known = ", ".join((".json", ".csv", ".npz", *PICKLE_SUFFIXES, *TORCH_SUFFIXES))
    raise ValueError(f"its name ends in {suffix or 'nothing'}; known are {known}, and run folders.")


def _read_csv(path: Path) -> dict[str, Any]:
    with path.open(newline="", encoding="utf-8-sig") as lines:  # Excel writes a byte order mark
        rows = list(csv.DictReader(lines, skipinitialspace=True))
    header = list(rows[0]) if rows else []
    value = next((name for name in ("ritz_value", "eigenvalue", *VALUES) if name in header), None)
    weight = next((name for name in ("weight", *WEIGHTS) if name in header), None)
    if value is None or weight is None:
        raise ValueError(f"its columns are {', '.join(header)}; needed are ritz_value and weight (and probe).")
    probes: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        probes.setdefault(row.get("probe") or "0", []).append((float(row[value]), float(row[weight])))
    pairs = [list(zip(*probe, strict=True)) for probe in probes.values()]
    return {"ritz_values": [p[0] for p in pairs], "weights": [p[1] for p in pairs]}


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError(f"{path} is a torch file; install the extra: pip install -e '.[torch]'.") from None
    scalar = np.float64(0).__reduce__()[0]  # PyHessian's lists are of numpy's scalars
    kinds = ("float32", "float64", "complex64", "complex128")
    numpy_scalars: list[Any] = [scalar, np.dtype, *(type(np.dtype(kind)) for kind in kinds)]
    try:
        with torch.serialization.safe_globals([*numpy_scalars, *_result_classes()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose own words advise to let the file run code
        raise ValueError("it is damaged, or holds other things than numbers, tensors and containers.") from None
    except RuntimeError:
        raise ValueError("it is no whole torch file.") from None


def _result_classes() -> Iterator[type]:
    """hessian-eigenthings' own classes of results, where it is installed: plain dataclasses."""
    names = (("spectral_density", "SpectralDensityResult"), ("lanczos", "LanczosTridiag"), ("result", "EigenResult"))
    for module, name in names:
        try:
            yield getattr(importlib.import_module(f"hessian_eigenthings.algorithms.{module}"), name)
        except ImportError:
            return


class _NumbersOnly(pickle.Unpickler):
    """Reads containers, numbers and arrays; refuses whatever else a pickle may ask to be imported."""

    def find_class(self, module: str, name: str) -> Any:
        plain = {("numpy", "dtype"), ("numpy", "ndarray"), ("builtins", "complex")}
        inner = {"scalar", "_reconstruct"}
        if (module, name) in plain or (module in ("numpy._core.multiarray", "numpy.core.multiarray") and name in inner):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only numbers, arrays and containers are read.")


def _probes(data: Any) -> Iterator[tuple]:
    """For every probe (Ritz values, weights), or ((alphas, betas),)."""
    if not isinstance(data, dict | list | tuple):
        data = vars(data)  # a dataclass of hessian-eigenthings
    if isinstance(data, list | tuple):
        if len(data) != 2:
            raise ValueError(f"it holds a list of {len(data)}; PyHessian's density() gives two, values and weights.")
        data = dict(zip(("eigen_list_full", "weight_list_full"), data, strict=True))
    if "alphas" in data and "betas" in data:
        yield from _from_coefficients(data)
        return
    if "T" in data:
        matrix = _numbers(data["T"])
        betas = np.abs(np.diagonal(matrix, 1))  # norms: a sign would only turn Lanczos vectors around
        yield ((np.diagonal(matrix).copy(), np.append(betas, np.nan)),)
        return
    nested = {**data, **(data["spec"] if isinstance(data.get("spec"), dict) else {})}
    values, weights = (next((nested[n] for n in names if n in nested), None) for names in (VALUES, WEIGHTS))
    if values is None or weights is None:
        found = ", ".join(map(str, nested)) or "nothing"
        raise ValueError(f"it holds {found}; needed are Ritz values ({VALUES[0]}) and their weights ({WEIGHTS[0]}).")
    several = any(np.ndim(_numbers(row)) for row in values)
    yield from zip(
        (_numbers(row) for row in (values if several else [values])),
        (_numbers(row) for row in (weights if several else [weights])),
        strict=True,
    )


def _from_coefficients(data: dict[str, Any]) -> Iterator[tuple]:
    """Those of our own JSON, or of one LanczosTridiag, whose last beta stands apart."""
    alphas, betas = _numbers(data["alphas"]), _numbers(data["betas"])
    if alphas.ndim == 1:
        m = alphas.size
        yield ((alphas, np.append(betas[: m - 1], data.get("last_beta", np.nan))),)
        return
    for a, b in zip(alphas, betas, strict=True):
        m = int(np.isfinite(a).sum())
        yield ((a[:m], b[:m]),)


def _numbers(values: Any) -> Array:
    """As float64; None is NaN. torch's bfloat16 has no numpy form of its own.

    Raises:
        ValueError: A number has an imaginary part that is not rounding.
    """
    if hasattr(values, "detach"):
        values = (values.cdouble() if values.is_complex() else values.double()).detach().numpy()
    if isinstance(values, list | tuple) and any(hasattr(v, "detach") for v in values):
        values = [_numbers(v) for v in values]
    found = np.array(values)
    if np.iscomplexobj(found):
        if not (np.abs(found.imag) <= IMAGINARY).all():
            raise ValueError(f"a number has the imaginary part {np.abs(found.imag).max():.2g}.")
        found = found.real
    return found.astype(np.float64)


def _dimension(data: Any, steps: int) -> int | None:
    """Parameters, where the file says so or holds vectors of them: a list, or one array or tree of `steps` vectors.

    Raises:
        ValueError: It says a number that is not whole, or not positive.
    """
    data = data if isinstance(data, dict | list | tuple) else vars(data)
    if not isinstance(data, dict):
        return None
    if data.get("dim") is not None:
        if int(data["dim"]) != float(data["dim"]) or int(data["dim"]) < 1:
            raise ValueError(f"its dim is {data['dim']}; a number of parameters is whole and positive.")
        return int(data["dim"])
    vectors: Any = next((data[name] for name in ("q", "basis") if data.get(name) is not None), [])
    if isinstance(vectors, list | tuple):
        return _size(vectors[0]) or None if vectors else None
    whole, rest = divmod(_size(vectors), steps)
    return whole if whole and not rest else None


def _size(vector: Any) -> int:
    """Numbers in an array, or in a tree of arrays or numbers."""
    if isinstance(vector, dict | list | tuple):
        return sum(map(_size, vector.values() if isinstance(vector, dict) else vector))
    return math.prod(np.shape(vector))


def _padded(found: list[tuple[Array, Array]]) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """[probes, steps] alphas and betas and [probes] sizes, as `Spectrum` takes them."""
    if not found:
        raise ValueError("it holds no probe.")
    sizes = np.array([len(alphas) for alphas, _ in found], np.int64)
    rows = np.full((2, len(found), int(sizes.max())), np.nan)
    for probe, (alphas, betas) in enumerate(found):
        rows[0, probe, : len(alphas)], rows[1, probe, : len(alphas)] = alphas, betas
    return rows[0], rows[1], sizes
