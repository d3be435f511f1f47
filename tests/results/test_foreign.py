"""Other tools' spectra are read, ours are written plainly, and nothing read can run code."""

import json
import os
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from known_spectra import EVERYTHING
from scipy.linalg import eigh_tridiagonal

from jaxhess import Spectrum
from jaxhess.errors import InputError
from jaxhess.results.foreign import coefficients, to_csv, to_json
from jaxhess.results.report import FIGURES, _page, write_report
from jaxhess.slq.record import RunRecord

RNG = np.random.default_rng(0)
ALPHAS, BETAS = RNG.normal(size=(3, 8)), RNG.uniform(0.5, 2, size=(3, 8))
OURS = Spectrum(ALPHAS, BETAS, np.full(3, 8), 1000, {"loss": 2.5}, run=RunRecord(rounding=2.0**-30))
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
    (tmp_path / "ours.json").write_text(to_json(OURS))
    assert Spectrum.load(tmp_path / "ours.json") == OURS
    short = Spectrum(ALPHAS, BETAS, np.array([8, 3, 5]), 1000)
    (tmp_path / "short.json").write_text(to_json(short))
    assert Spectrum.load(tmp_path / "short.json") == short
    assert json.loads(to_json(OURS))["summary"]["trace"]["value"] == OURS.trace().value


def test_csv_holds_every_ritz_value_and_reads_back(tmp_path):
    (tmp_path / "ours.csv").write_text(to_csv(OURS))
    assert len((tmp_path / "ours.csv").read_text().splitlines()) == 1 + 3 * 8
    same_quadrature(Spectrum.load(tmp_path / "ours.csv", dim=1000))


class Tensor:
    """As torch's: what the snippets of the docs use of it."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def tolist(self):
        return self.values.tolist()


def results_of_others() -> dict[str, dict]:
    """What each snippet of the docs finds, by the file that it writes: stand-ins with the fields of the tools."""
    halves = zip(DENSITY, (np.float32, np.complex64), strict=True)
    lists = [[list(np.array(row, dtype)) for row in half] for half, dtype in halves]
    padded = [np.pad(x, ((0, 0), (0, 2)), constant_values=c) for x, c in zip(DENSITY, (np.nan, 0), strict=True)]
    spec = {"eigvals": Tensor(DENSITY[0][1]), "gammas": Tensor(DENSITY[1][1])}
    tridiagonal = {"alphas": Tensor(ALPHAS[0]), "betas": Tensor(BETAS[0, :-1]), "last_beta": float(BETAS[0, -1])}
    return {
        "hessformer.json": {"result": {"spec": spec, "T": None, "q": None}},
        "pyhessian.json": {"hessian": SimpleNamespace(density=lambda: tuple(lists))},
        "density.json": {"result": SimpleNamespace(raw_eigenvalues=Tensor(padded[0]), raw_weights=Tensor(padded[1]))},
        "tridiagonal.json": {"result": SimpleNamespace(**tridiagonal)},
    }


def test_the_snippets_of_the_docs_write_what_is_read(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "foreign_results.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: 600), SimpleNamespace(numel=lambda: 400)])
    monkeypatch.chdir(tmp_path)
    found = {}
    for snippet, (name, namespace) in zip(snippets, results_of_others().items(), strict=True):
        exec(snippet, {"model": model, **namespace})
        found[name] = Spectrum.load(name)
        assert found[name].dim == 1000
    same_quadrature(found["hessformer.json"], slice(1, 2))
    same_quadrature(found["pyhessian.json"], rtol=1e-4)  # its lists are in float32
    same_quadrature(found["density.json"])
    np.testing.assert_array_equal(found["tridiagonal.json"].residual_bounds, OURS.residual_bounds[:1])


def test_the_json_of_hessformers_first_command_is_read(tmp_path):
    record = {"evals": DENSITY[0][1], "weights": DENSITY[1][1], "meta": {"k": 8}}
    (tmp_path / "spectrum.json").write_text(json.dumps(record))
    same_quadrature(Spectrum.load(tmp_path / "spectrum.json", dim=1000), slice(1, 2))


def test_csv_of_a_spreadsheet(tmp_path):
    text = to_csv(OURS).replace(",", ", ")
    (tmp_path / "ours.csv").write_text(text, encoding="utf-8-sig")
    same_quadrature(Spectrum.load(tmp_path / "ours.csv", dim=1000))


def test_our_json_without_notes(tmp_path):
    fields = json.loads(to_json(OURS))
    del fields["info"]
    (tmp_path / "ours.json").write_text(json.dumps(fields))
    found = Spectrum.load(tmp_path / "ours.json")
    np.testing.assert_array_equal(found.ritz_values, OURS.ritz_values)
    assert found.info == {"imported": str(tmp_path / "ours.json")}


def written(path: Path) -> Path:
    values = {"eigenvalues": OURS.ritz_values, "weights": OURS.weights}
    if path.suffix == ".npz":
        np.savez(path, **values)
    else:
        ours = {**{k: v.tolist() for k, v in values.items()}, "dim": 1000}
        path.write_text(to_csv(OURS) if path.suffix == ".csv" else json.dumps(ours))
    return path


@pytest.mark.parametrize("suffix", ["npz", "json", "csv"])
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.97])
def test_a_file_that_was_cut_off_is_refused_with_its_name(tmp_path, suffix, part):
    path = written(tmp_path / f"spectrum.{suffix}")
    same_quadrature(Spectrum.load(path, dim=1000))
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"spectrum.{suffix} is no spectrum that can be read: .*\\w"):
        Spectrum.load(path, dim=1000)


def corrupted(content: bytes, chance: random.Random) -> bytes:
    """With some bits flipped, cut, doubled, or with a number that is none."""
    raw, kind = bytearray(content), chance.randrange(5)
    place = chance.randrange(len(raw))
    if kind == 0:
        for _ in range(chance.choice([1, 8])):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del raw[place:]
    elif kind == 2:
        del raw[place : place + chance.randrange(1, 40)]
    elif kind == 3:
        raw[place:place] = chance.choice([b"\x00", b"[" * 100_000, b"NaN", b"1e999", b"9" * 5000, b"\xff\xfe", b'"'])
    else:
        raw[place : place + 4] = chance.randbytes(4)
    return bytes(raw)


def changed(record, chance: random.Random):
    """JSON data with something in them replaced by something else."""
    other = chance.choice([None, 5, -1, 1e400, float("nan"), "x", "</title><script>", [], [[1]], {}, {"a": 1}, True])
    if not isinstance(record, dict | list) or not record or chance.random() < 0.2:
        return other
    keys = list(record) if isinstance(record, dict) else range(len(record))
    key = chance.choice(keys)
    if isinstance(record, dict) and chance.random() < 0.2:
        return {k: v for k, v in record.items() if k != key}
    whole = dict(record) if isinstance(record, dict) else list(record)
    whole[key] = changed(record[key], chance)
    return whole


OLD_INFO = {
    "loss": 2.5,
    "operator": {"kind": "Hessian", "restriction": "mlp in layers 0,1"},
    "probes": {"distribution": "normal"},
    "lanczos": {"reorthogonalize": "none", "orthogonality": [0.1] * 3},
    "eigenpairs": {"values": [1.0, 2.0], "residuals": [0.1, None], "converged": [True, False], "vectors": "e"},
    "noise": {"reference": "x", "asymmetry": 0.1, "nonlinearity": 0.1, "floor": {"random": 0.1, "leading": 0.1}},
}


@pytest.mark.parametrize(
    "kind", ["json", "ours.json", "csv", "npz", "spectrum.json", "spectrum.npz", "old spectrum.json"]
)
def test_whatever_is_damaged_is_read_or_refused_in_one_sentence(tmp_path, kind):
    """200 damages to each kind of file: no other error, no page with markup of others, nothing that hangs."""
    full = Spectrum(ALPHAS, BETAS, np.full(3, 8), 1000, {"mine": 1}, run=EVERYTHING)
    if "spectrum" in kind:
        full.save(tmp_path / "run")
        path, read = tmp_path / "run" / kind.removeprefix("old "), tmp_path / "run"
        if kind.startswith("old"):
            path.write_text(json.dumps({"format": "jaxhess-spectrum-1", "info": OLD_INFO}))
    else:
        path = read = tmp_path / f"a.{kind}"
        path.write_text(to_json(full)) if kind == "ours.json" else written(path)
    whole, chance, refused = path.read_bytes(), random.Random(kind), 0
    for turn in range(200):
        damaged = corrupted(whole, chance)
        if kind.endswith("json") and turn % 2:
            damaged = json.dumps(changed(json.loads(whole), chance)).encode()
        path.write_bytes(damaged)
        found = loaded(read)
        if isinstance(found, str):
            refused += 1
            assert path.name in found
            assert "\n" not in found
        else:
            assert "<script" not in _page(found, dict.fromkeys(FIGURES, b""))
    assert refused > 40


def loaded(path: Path) -> Spectrum | str:
    """The spectrum, or with what words it is refused."""
    try:
        return Spectrum.load(path, dim=1000)
    except ValueError as error:
        return str(error)


def test_a_report_of_an_imported_spectrum_says_what_is_unknown(tmp_path):
    (tmp_path / "ours.csv").write_text(to_csv(OURS))
    found = Spectrum.load(tmp_path / "ours.csv", dim=1000)
    write_report(tmp_path / "report", found)
    assert "residual bound unknown" in (tmp_path / "report" / "report.html").read_text()
    found.save(tmp_path / "run")
    assert Spectrum.load(tmp_path / "run") == found


@pytest.mark.parametrize("suffix", ["pkl", "pt", "pth", "bin", "pickle", "npy"])
def test_pickles_are_refused_with_the_way_out(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(pickle.dumps(DENSITY))
    with pytest.raises(ValueError, match=rf"a\.{suffix} .*can run code: write JSON .*docs/foreign_results.md"):
        Spectrum.load(tmp_path / f"a.{suffix}", dim=10)


def test_objects_in_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", eigenvalues=np.array([[1], [1, 2]], object), weights=np.ones(2))
    with pytest.raises(ValueError, match=r"a\.npz is no spectrum"):
        Spectrum.load(tmp_path / "a.npz", dim=10)
    np.savez(tmp_path / "a.npz", eigenvalues=np.ones(2) + 1j, weights=np.ones(2) / 2)
    with pytest.raises(ValueError, match=r"a\.npz .*no array of real numbers"):
        Spectrum.load(tmp_path / "a.npz", dim=10)


def test_a_small_file_of_large_arrays_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxhess.files.run_folder.LARGEST", 10**5)
    np.savez_compressed(tmp_path / "a.npz", eigenvalues=np.zeros(10**5), weights=np.zeros(10**5))
    assert (tmp_path / "a.npz").stat().st_size < 10**4
    with pytest.raises(ValueError, match=r"a\.npz .*larger than"):
        Spectrum.load(tmp_path / "a.npz", dim=10)


@pytest.mark.parametrize("name", ["spectrum.json", "spectrum.npz", "a.json", "a.csv", "a.npz"])
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_only_regular_files_are_read(tmp_path, name, kind):
    OURS.save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=name):
        Spectrum.load(tmp_path / name if name.startswith("a.") else tmp_path, dim=10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"info": 5}, "its info is 5"),
        ({"run": {"operator": {"kind": ["Hessian"]}}}, "operator.kind: Input should be a valid string"),
        ({"run": {"eigenpairs": 5}}, "eigenpairs: Input should be an object"),
        ({"run": {"eigenpairs": {"values": ["x"], "residuals": []}}}, "eigenpairs.values.0: Input should be a valid"),
    ],
)
def test_a_record_of_other_types_is_refused(tmp_path, change, words):
    OURS.save(tmp_path)
    record = json.loads((tmp_path / "spectrum.json").read_text())
    (tmp_path / "spectrum.json").write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=rf"spectrum\.json is not a spectrum record: .*{words}"):
        Spectrum.load(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(json.loads(to_json(OURS)) | change))
    with pytest.raises(ValueError, match=rf"a\.json is no spectrum that can be read: .*{words}"):
        Spectrum.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "no spectrum that can be read"),
        ("a.json", '{"eigenvalues": [1, 2]}', "their weights"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.1, 0.2]}', "sum to 0.3"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [1.1, -0.1]}', "negative"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [1.0]}', "Each probe needs one weight"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.5, 0.5]}', "how many parameters"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.5, 0.5], "dim": 7}', "of 7 parameters, not of 10"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.5, 0.5], "dim": 10.7}', "whole and positive"),
        ("a.json", '{"eigenvalues": [1, 2], "weights": [0.5, 0.5], "dim": -10}', "whole and positive"),
        ("a.json", "[[[1.0]], [[1.0]]]", "no object"),
        ("a.json", '{"alphas": [[1, 2]], "betas": [[-1, 2]]}', r"a\.json .*not negative"),
        ("a.csv", "x,y\n1,2\n", "ritz_value and weight"),
        ("a.txt", "", "ends in .txt"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_a_sentence(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Spectrum.load(tmp_path / name, None if "how many" in message else 10)
    with pytest.raises(InputError):
        Spectrum.load(tmp_path / "missing.json")
