"""Spectra side by side: the same operator's are the same within chance, another's are not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import run_command

from jaxhess import Spectrum
from jaxhess.results.comparison import distance, row, wasserstein
from jaxhess.results.foreign import to_csv, to_json
from scripts import compare as script

ROOT = Path(__file__).parents[2]
BULK = np.random.default_rng(0).normal(size=300)
OUTLIERS = np.append(BULK[:-2], [20.0, 35.0])


def lanczos(eigenvalues: np.ndarray, probes: int, seed: int, steps: int = 8) -> Spectrum:
    """Of a diagonal matrix, fully re-orthogonalised, in float64."""
    rng = np.random.default_rng(seed)
    alphas, betas = np.zeros((2, probes, steps))
    for p in range(probes):
        q = rng.normal(size=eigenvalues.size)
        basis = [q / np.linalg.norm(q)]
        for j in range(steps):
            w = eigenvalues * basis[j]
            alphas[p, j] = w @ basis[j]
            for _ in range(2):
                for x in basis:
                    w = w - (w @ x) * x
            betas[p, j] = np.linalg.norm(w)
            basis.append(w / betas[p, j])
    return Spectrum(alphas, betas, np.full(probes, steps), eigenvalues.size)


def test_the_distance_is_how_far_mass_moves():
    a = lanczos(BULK, 3, 1)
    shifted = Spectrum(a.alphas + 0.25, a.betas, a.sizes, a.dim)
    assert wasserstein(a, shifted) == pytest.approx(0.25, rel=1e-9)
    assert distance(a, a).wasserstein == 0


@pytest.mark.parametrize("eigenvalues", [BULK, OUTLIERS], ids=["bulk", "outliers"])
@pytest.mark.parametrize("probes", [(2, 2), (4, 4), (2, 8)])
def test_the_same_operator_is_the_same_within_twice_chance_in_nearly_all_runs(eigenvalues, probes):
    """The reference itself is estimated from few pairs: from two probes on either side it errs in one run of ten."""
    found = [
        distance(lanczos(eigenvalues, probes[0], 2 * k), lanczos(eigenvalues, probes[1], 2 * k + 1)) for k in range(60)
    ]
    assert np.mean([d.same for d in found]) >= (0.8 if min(probes) == 2 and sum(probes) == 4 else 0.9)
    # The reference is not too large either: on average it is what such distances are.
    ratio = np.sqrt(np.mean([d.wasserstein**2 for d in found]) / np.mean([d.chance**2 for d in found]))
    assert 0.7 < ratio < 1.4


def test_another_operator_is_different():
    a, b = lanczos(BULK, 4, 1), lanczos(1.3 * BULK, 4, 2)
    assert distance(a, b).same is False
    assert distance(a, lanczos(BULK, 4, 2)).same is True


def test_the_number_of_steps_is_no_difference():
    """Six steps of a bulk are farther from twenty steps of it than chance makes probes; their first six are not."""
    short, long = lanczos(BULK, 4, 1, steps=6), lanczos(BULK, 4, 2, steps=20)
    found = distance(short, long)
    assert (found.same, found.steps) == (True, 6)
    assert found == distance(short, lanczos(BULK, 4, 2, steps=6))
    assert wasserstein(short, long) > found.wasserstein
    assert distance(short, lanczos(1.3 * BULK, 4, 2, steps=20)).same is False


def test_a_probe_that_broke_down_goes_on_without_finding_more():
    three = np.repeat([-1.0, 0.5, 2.0], 100)
    a = lanczos(three, 4, 1, steps=3)
    ended = Spectrum(np.pad(a.alphas, ((0, 0), (0, 5))), np.pad(a.betas, ((0, 0), (0, 5))), a.sizes, a.dim)
    found = distance(ended, lanczos(three, 4, 2, steps=2))
    assert (found.same, found.steps) == (True, 2)
    assert distance(ended, ended).steps == 8


def test_one_probe_each_has_no_reference():
    assert distance(lanczos(BULK, 1, 1), lanczos(BULK, 1, 2)).same is None


def test_a_row_holds_only_moments_that_the_steps_know():
    assert len(row("a", lanczos(BULK, 2, 1, steps=1)).moments) == 2
    found = row("a", lanczos(BULK, 2, 1)).moments
    assert len(found) == 4
    assert found[1].value == pytest.approx(np.mean(BULK**2), abs=4 * found[1].standard_error)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spectra")
    spectrum = lanczos(OUTLIERS, 4, 1)
    spectrum.save(folder / "run")
    (folder / "ours.json").write_text(to_json(spectrum))
    (folder / "plain.csv").write_text(to_csv(lanczos(OUTLIERS, 4, 2)))
    (folder / "other.csv").write_text(to_csv(lanczos(2 * OUTLIERS, 4, 3)))
    return folder


def test_the_command_compares_folders_and_files(files, tmp_path, capsys):
    paths = [str(files / name) for name in ("run", "ours.json", "plain.csv", "other.csv")]
    record = script.run(script.Options(spectra=tuple(map(Path, paths)), out=tmp_path / "out"))
    assert [d["same"] for d in record["distances_from_the_first"]] == [True, True, False]
    assert record["distances_from_the_first"][0]["wasserstein"] == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("comparison.json", "densities.png", "stems.png", "manifest.json")
    }
    text = " ".join(capsys.readouterr().out.split())
    assert "run to other.csv" in text
    assert "different" in text


def test_the_number_of_parameters_is_asked_for_where_nothing_says_it(files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(script, str(files / "plain.csv"), "--out", str(tmp_path / "a"))
    assert "--dim" in capsys.readouterr().err
    run_command(script, str(files / "plain.csv"), "--dim", "300", "--out", str(tmp_path / "b"))
    run_command(script, str(files / "plain.csv"), str(files / "ours.json"), "--out", str(tmp_path / "c"))


def test_a_comparison_is_not_replaced_unasked(files, tmp_path, capsys):
    arguments = [str(files / "run"), "--out", str(tmp_path)]
    run_command(script, *arguments)
    before = (tmp_path / "comparison.json").read_bytes()
    with pytest.raises(SystemExit):
        run_command(script, *arguments)
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "comparison.json").read_bytes() == before
    run_command(script, str(files / "ours.json"), *arguments[1:], "--overwrite")
    assert json.loads((tmp_path / "comparison.json").read_text())["spectra"][0]["label"] == "ours.json"


@pytest.mark.parametrize("name", [r"$\frac{$", "[/x]", "_hidden", ":smile:", "[bold]"])
def test_names_are_shown_as_they_are(files, tmp_path, name, capsys):
    Spectrum.load(files / "run").save(tmp_path / name)
    run_command(script, str(tmp_path / name), str(files / "ours.json"), "--out", str(tmp_path / name / name))
    assert name in capsys.readouterr().out.replace("\n", "")


def test_comparing_needs_no_torch():
    code = "import sys, scripts.compare; assert not {'torch', 'transformers', 'convert'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
