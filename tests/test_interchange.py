"""Other tools' spectra are read, ours are written plainly, and nothing read can run code."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from scipy.linalg import eigh_tridiagonal

from jaxhess import Spectrum
from jaxhess.interchange import coefficients
from jaxhess.report import write_report

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
ALPHAS, BETAS = RNG.normal(size=(3, 8)), RNG.uniform(0.5, 2, size=(3, 8))
OURS = Spectrum(ALPHAS, BETAS, np.full(3, 8), 1000, {"loss": 2.5}, rounding=2.0**-30)
DENSITY = OURS.ritz_values.tolist(), OURS.weights.tolist()


def same_quadrature(found: Spectrum, probes=slice(None), rtol: float = 1e-10) -> None:
    np.testing.assert_allclose(found.ritz_values, OURS.ritz_values[probes], rtol=rtol)
    np.testing.assert_allclose(found.weights, OURS.weights[probes], rtol=rtol)
    assert np.isnan(found.residual_bounds).all()
    assert found.exact_degree == 15
    assert not found.broke_down.any()


def test_coefficients_invert_the_quadrature_however_small_a_weight():
    theta = np.array([-3.0, -0.1, 0.0, 0.01, 0.5, 40.0, 1e3])
    weights = np.array([1e-25, 0.2, 0.3, 0.1, 0.4, 1e-9, 1e-14])
    weights /= weights.sum()
    alphas, betas = coefficients(theta, weights)
    assert np.isnan(betas[-1])
    found = Spectrum(alphas[None], betas[None], np.array([7]), 10)
    np.testing.assert_allclose(found.ritz_values[0], theta, atol=1e-9)
    np.testing.assert_allclose(found.weights[0], weights, rtol=1e-6)
    assert found.moment(13).value == pytest.approx(np.sum(weights * theta**13), rel=1e-9)


def test_copies_are_merged_and_nodes_without_weight_left_out():
    alphas, betas = coefficients([1.0, 2.0, 2.0, 5.0], [0.25, 0.25, 0.5, 0.0])
    theta, vectors = eigh_tridiagonal(alphas, betas[:-1])
    np.testing.assert_allclose(theta, [1, 2])
    np.testing.assert_allclose(vectors[0] ** 2, [0.25, 0.75])


def test_json_reads_back_as_the_same_spectrum(tmp_path):
    (tmp_path / "ours.json").write_text(OURS.to_json())
    assert Spectrum.load(tmp_path / "ours.json") == OURS
    short = Spectrum(ALPHAS, BETAS, np.array([8, 3, 5]), 1000)
    (tmp_path / "short.json").write_text(short.to_json())
    assert Spectrum.load(tmp_path / "short.json") == short
    assert json.loads(OURS.to_json())["summary"]["trace"]["value"] == OURS.trace().value


def test_csv_holds_every_ritz_value_and_reads_back(tmp_path):
    (tmp_path / "ours.csv").write_text(OURS.to_csv())
    assert len((tmp_path / "ours.csv").read_text().splitlines()) == 1 + 3 * 8
    same_quadrature(Spectrum.load(tmp_path / "ours.csv", dim=1000))


def test_results_of_run_lanczos_of_hessformer(tmp_path):
    m = 8
    matrix = torch.diag(torch.tensor(ALPHAS[1])) + sum(torch.diag(torch.tensor(BETAS[1, : m - 1]), k) for k in (1, -1))
    eigvals, vectors = torch.linalg.eigh(matrix)
    spec = {"eigvals": eigvals, "gammas": vectors[0] ** 2, "lambda_min": float(eigvals[0])}
    basis = [[torch.zeros(30, 20), torch.zeros(400)] for _ in range(m)]
    torch.save({"q": basis, "T": matrix, "spec": spec}, tmp_path / "hessformer.pt")
    found = Spectrum.load(tmp_path / "hessformer.pt")
    assert found.dim == 1000
    same_quadrature(found, slice(1, 2))
    (tmp_path / "spectrum.json").write_text(
        json.dumps({"evals": eigvals.tolist(), "weights": spec["gammas"].tolist(), "meta": {"k": m}})
    )
    same_quadrature(Spectrum.load(tmp_path / "spectrum.json", dim=1000), slice(1, 2))


@pytest.mark.parametrize("kind", ["pickle", "torch", "json"])
def test_density_lists_of_pyhessian(tmp_path, kind):
    """Lists of numpy's scalars; the weights are squares of what torch.linalg.eig gives, and so complex."""
    halves = zip(DENSITY, (np.float32, np.complex64), strict=True)
    lists = [[list(np.array(row, dtype)) for row in half] for half, dtype in halves]
    path = tmp_path / f"density.{ {'pickle': 'pkl', 'torch': 'pt', 'json': 'json'}[kind] }"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(tuple(lists)))
    elif kind == "torch":
        torch.save({"eigen_list_full": lists[0], "weight_list_full": lists[1]}, path)
    else:
        path.write_text(json.dumps(DENSITY))
    same_quadrature(Spectrum.load(path, dim=1000), rtol=1e-4)


def test_an_imaginary_part_that_is_not_rounding_is_refused(tmp_path):
    weights = (np.array(DENSITY[1]) + 1e-8j).tolist()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps((DENSITY[0], weights)))
    same_quadrature(Spectrum.load(tmp_path / "a.pkl", dim=1000))
    weights[1][2] += 0.01j
    (tmp_path / "a.pkl").write_bytes(pickle.dumps((DENSITY[0], weights)))
    with pytest.raises(ValueError, match=r"a\.pkl.*imaginary part 0\.01"):
        Spectrum.load(tmp_path / "a.pkl", dim=1000)


MATRIX = np.diag(ALPHAS[1]) + sum(np.diag(BETAS[1, :7], k) for k in (1, -1))


@pytest.mark.parametrize(
    "q",
    [
        torch.zeros(8, 1000),
        torch.zeros(1000, 8),
        [{"a": torch.zeros(30, 20), "b": torch.zeros(400)}] * 8,
        {"a": torch.zeros(8, 30, 20), "b": torch.zeros(8, 400)},
        [[0.0] * 1000] * 8,
    ],
    ids=["rows", "columns", "trees", "a tree of stacks", "lists"],
)
@pytest.mark.parametrize("name", ["q", "basis"])
def test_the_basis_says_how_many_parameters_however_it_is_kept(tmp_path, q, name):
    torch.save({"T": torch.tensor(MATRIX), name: q}, tmp_path / "a.pt")
    assert Spectrum.load(tmp_path / "a.pt").dim == 1000


def test_the_sign_of_an_off_diagonal_means_nothing(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"T": (2 * np.diag(ALPHAS[1]) - MATRIX).tolist(), "dim": 1000}))
    same_quadrature(Spectrum.load(tmp_path / "a.json"), slice(1, 2))


def test_csv_of_a_spreadsheet(tmp_path):
    text = OURS.to_csv().replace(",", ", ")
    (tmp_path / "ours.csv").write_text(text, encoding="utf-8-sig")
    same_quadrature(Spectrum.load(tmp_path / "ours.csv", dim=1000))


def test_our_json_without_its_record(tmp_path):
    fields = json.loads(OURS.to_json())
    del fields["info"], fields["rounding"]
    (tmp_path / "ours.json").write_text(json.dumps(fields))
    found = Spectrum.load(tmp_path / "ours.json")
    np.testing.assert_array_equal(found.ritz_values, OURS.ritz_values)
    assert found.info == {"imported": str(tmp_path / "ours.json")}


@pytest.mark.parametrize("suffix", ["pt", "npz", "pkl", "json", "csv"])
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.97])
def test_a_file_that_was_cut_off_is_refused_with_its_name(tmp_path, suffix, part):
    path = tmp_path / f"spectrum.{suffix}"
    values = {"eigenvalues": OURS.ritz_values, "weights": OURS.weights}
    if suffix == "pt":
        torch.save({k: torch.tensor(v) for k, v in values.items()}, path)
    elif suffix == "npz":
        np.savez(path, **values)
    else:
        text = OURS.to_csv() if suffix == "csv" else json.dumps(DENSITY)
        path.write_bytes(pickle.dumps(DENSITY) if suffix == "pkl" else text.encode())
    same_quadrature(Spectrum.load(path, dim=1000))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"spectrum.{suffix} is no spectrum that can be read: .*\\w") as caught:
        Spectrum.load(path, dim=1000)
    assert "weights_only" not in str(caught.value)


def test_results_of_hessian_eigenthings(tmp_path):
    pytest.importorskip("hessian_eigenthings")
    from hessian_eigenthings.algorithms.lanczos import LanczosTridiag
    from hessian_eigenthings.algorithms.spectral_density import SpectralDensityResult

    values, weights = (
        np.pad(x, ((0, 0), (0, 2)), constant_values=c) for x, c in zip(DENSITY, (np.nan, 0), strict=True)
    )
    tensors = [torch.zeros(5), torch.zeros(5), torch.tensor(values), torch.tensor(weights)]
    density = SpectralDensityResult(*tensors, sigma=0.1)
    torch.save(density, tmp_path / "object.pt")
    torch.save(dataclasses.asdict(density), tmp_path / "dictionary.pt")
    for name in ("object.pt", "dictionary.pt"):
        same_quadrature(Spectrum.load(tmp_path / name, dim=1000))
    a, b = torch.tensor(ALPHAS[0]), torch.tensor(BETAS[0])
    torch.save(LanczosTridiag(a, b[:-1], [torch.zeros(1000)] * 8, float(b[-1]), 8), tmp_path / "tridiagonal.pt")
    found = Spectrum.load(tmp_path / "tridiagonal.pt")
    assert found.dim == 1000
    np.testing.assert_array_equal(found.residual_bounds, OURS.residual_bounds[:1])


def test_a_report_of_an_imported_spectrum_says_what_is_unknown(tmp_path):
    (tmp_path / "ours.csv").write_text(OURS.to_csv())
    found = Spectrum.load(tmp_path / "ours.csv", dim=1000)
    write_report(tmp_path / "report", found)
    assert "residual bound unknown" in (tmp_path / "report" / "report.html").read_text()
    found.save(tmp_path / "run")
    assert Spectrum.load(tmp_path / "run") == found


class Command:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("suffix", ["pkl", "pt"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, suffix, capsys):
    path = tmp_path / f"spectrum.{suffix}"
    path.write_bytes(pickle.dumps(Command())) if suffix == "pkl" else torch.save(Command(), path)
    with pytest.raises(ValueError, match=path.name) as caught:
        Spectrum.load(path, dim=10)
    assert "weights_only" not in str(caught.value)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "no spectrum that can be read"),
        ("a.json", '{"eigenvalues": [1, 2]}', "their weights"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.1, 0.2]}', "sum to 0.3"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [1.1, -0.1]}', "negative"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [1.0]}', "as many"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.5, 0.5]}', "how many parameters"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.5, 0.5], "dim": 7}', "of 7 parameters, not of 10"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.5, 0.5], "dim": 10.7}', "whole and positive"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.5, 0.5], "dim": -10}', "whole and positive"),
        ("a.json", '{"alphas": [[1, 2]], "betas": [[-1, 2]]}', r"a\.json .*not negative"),
        ("a.csv", "x,y\n1,2\n", "ritz_value and weight"),
        ("a.txt", "", "ends in .txt"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_a_sentence(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Spectrum.load(tmp_path / name, None if "how many" in message else 10)
    with pytest.raises(FileNotFoundError):
        Spectrum.load(tmp_path / "missing.json")
