"""What a manifest lists is ours, as it was written: files, eigenvectors, and folders from before there was one."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Diagonal

from jaxhess import Spectrum, leading_eigenpairs
from jaxhess.errors import InputError
from jaxhess.files.manifest import MANIFEST, foreign, write_manifest
from jaxhess.files.output import Output
from jaxhess.files.run_folder import ARRAYS, EIGENVECTORS, RECORD, REPORT_FILES, RUN_FILES
from jaxhess.results import files
from jaxhess.results.report import write_report

NAMES = ("a.json", "a.png")
FILES = {"a.png": b"png", "a.json": b"{}"}
RNG = np.random.default_rng(0)


def a_spectrum(seed: int = 0) -> Spectrum:
    rng = np.random.default_rng(seed)
    return Spectrum(rng.normal(size=(2, 4)), rng.uniform(1, 2, (2, 4)), np.full(2, 4), 100)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_foreign_files_beside_ours_survive_overwriting(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("mine")
    before = contents(tmp_path)
    for overwrite in (False, True, True):
        a_spectrum(overwrite).save(tmp_path, overwrite)
        write_report(tmp_path, a_spectrum(overwrite), overwrite)
    assert before.items() <= contents(tmp_path).items()
    assert Spectrum.load(tmp_path) == a_spectrum(1)


def test_ours_is_ours_only_as_it_was_written(tmp_path):
    a_spectrum().save(tmp_path)
    write_report(tmp_path, a_spectrum())
    page = tmp_path / "report.html"
    page.write_text(page.read_text() + "<!-- my notes -->")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"report\.html was not written by an earlier run, or was changed since"):
        write_report(tmp_path, a_spectrum(1), overwrite=True)
    a_spectrum(1).save(tmp_path, overwrite=True)
    assert page.read_bytes() == before["report.html"]  # the other files of the old run have gone
    assert {p.name for p in tmp_path.iterdir()} == {"spectrum.npz", "spectrum.json", MANIFEST, "report.html"}


@pytest.mark.parametrize("name", NAMES)
def test_links_are_never_followed(tmp_path, name):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "target")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=name), Output(tmp_path / "out", NAMES, overwrite):
            pytest.fail("the work has begun")
    assert (tmp_path / "target").read_text() == "mine"


def test_a_run_folder_from_before_manifests_is_ours_by_its_record(tmp_path):
    a_spectrum().save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    for name in ("report.html", "notes.txt"):
        (tmp_path / name).write_text(name)
    with pytest.raises(InputError, match="already holds a finished run"):
        a_spectrum(1).save(tmp_path)
    a_spectrum(1).save(tmp_path, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"spectrum.npz", "spectrum.json", MANIFEST, "notes.txt"}


def test_a_run_folder_from_before_manifests_gives_no_name_away_for_ever(tmp_path):
    a_spectrum().save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    for name in REPORT_FILES:
        (tmp_path / name).write_text(name)
    with Output(tmp_path, (ARRAYS, RECORD), overwrite=True) as output:
        output.write(files.contents(a_spectrum(1)))
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "thesis.tex").write_text("mine")
    (tmp_path / "stem.png").write_text("mine")
    a_spectrum(2).save(tmp_path, overwrite=True)
    assert (tmp_path / "report.html" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "stem.png").read_text() == "mine"
    assert not (tmp_path / "density.png").exists()
    with pytest.raises(InputError, match=r"report\.html/thesis\.tex was not written|stem\.png was not written"):
        write_report(tmp_path, a_spectrum(2), overwrite=True)


def test_eigenvectors_from_before_manifests_are_ours_without_what_was_put_among_them(tmp_path):
    pairs = leading_eigenpairs(Diagonal(jnp.linspace(0, 1, 12)), 1, steps=12)
    a_spectrum().save(tmp_path)
    pairs.save(tmp_path / EIGENVECTORS)
    for manifest in (tmp_path / MANIFEST, tmp_path / EIGENVECTORS / MANIFEST):
        manifest.unlink()
    mine = tmp_path / EIGENVECTORS / "vectors" / "notes.txt"
    mine.write_text("mine")
    with pytest.raises(InputError, match=f"{mine} was"), Output(tmp_path, (EIGENVECTORS,), overwrite=True):
        pytest.fail("the work has begun")
    mine.unlink()
    with Output(tmp_path, (*RUN_FILES, EIGENVECTORS), overwrite=True) as output:
        output.write(files.contents(a_spectrum(1)))
    assert not (tmp_path / EIGENVECTORS).exists()


def test_eigenvectors_replace_only_eigenvectors(tmp_path):
    pairs = leading_eigenpairs(Diagonal(jnp.linspace(0, 1, 12)), 1, steps=12)
    pairs.save(tmp_path / "e")
    assert foreign(tmp_path / "e") is None
    (tmp_path / "e" / "vectors" / "mine").write_text("mine")
    with pytest.raises(InputError, match="vectors"):
        pairs.save(tmp_path / "e", overwrite=True)
    assert (tmp_path / "e" / "vectors" / "mine").read_text() == "mine"
    (tmp_path / "e" / "vectors" / "mine").unlink()
    pairs.save(tmp_path / "e", overwrite=True)
    with Output(tmp_path, ("e",), overwrite=True) as output:
        output.write({"e": b"a file now"})
    assert {p.name for p in tmp_path.iterdir()} == {"e", MANIFEST}


def test_an_interrupted_save_of_eigenvectors_can_be_replaced(tmp_path):
    pairs = leading_eigenpairs(Diagonal(jnp.linspace(0, 1, 12)), 1, steps=12)
    output = Output(tmp_path / "e", ("vectors",))
    output.claim()
    output.begin("vectors")
    (tmp_path / "e" / "vectors.orbax-checkpoint-tmp-7").mkdir()
    (tmp_path / "e" / "vectors.orbax-checkpoint-tmp-7" / "manifest.ocdbt.__lock").write_text("")
    output.release()
    with Output(tmp_path, ("e",), overwrite=True):  # what the main command asks of the folder above
        pass
    pairs.save(tmp_path / "e", overwrite=True)
    assert foreign(tmp_path / "e") is None


@pytest.mark.parametrize("place", ["vectors/notes.txt", "vectors", "vectors/manifest.ocdbt/x", "eigenpairs.npz"])
def test_what_was_put_into_an_interrupted_save_survives(tmp_path, place):
    pairs = leading_eigenpairs(Diagonal(jnp.linspace(0, 1, 12)), 1, steps=12)
    folder = tmp_path / "e"
    with Output(folder, ("vectors", "eigenpairs.npz")) as output:
        output.begin("vectors")
    mine = folder / place
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(InputError, match=f"{mine} was not written by"):
        pairs.save(folder, overwrite=True)
    with pytest.raises(InputError, match=f"{mine} was not written by"), Output(tmp_path, ("e",), overwrite=True):
        pytest.fail("the work has begun")
    assert mine.read_text() == "mine"


def test_what_was_put_beside_half_an_interrupted_save_survives(tmp_path):
    pairs = leading_eigenpairs(Diagonal(jnp.linspace(0, 1, 12)), 1, steps=12)
    with Output(tmp_path, ("vectors",)) as output:
        output.begin("vectors")
    partial = tmp_path / "vectors.orbax-checkpoint-tmp-7"
    partial.mkdir()
    for name in ("_METADATA", "notes.txt"):
        (partial / name).write_text("")
    pairs.save(tmp_path, overwrite=True)
    assert [path.name for path in partial.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("size", "time_set_back"), [(6 * 2**20, True), (2**33, False)])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_change_anywhere_in_a_file_is_noticed(tmp_path, size, time_set_back, place):
    """Small files are read whole; of a large one (sparse here) the time of the change tells."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(size)
    os.utime(path, (0, 0))
    write_manifest(tmp_path)
    assert foreign(tmp_path) is None
    with path.open("r+b") as file:
        file.seek(int(place * (size - 11)))
        file.write(b"eleven byte")
    if time_set_back:
        os.utime(path, (0, 0))
    assert foreign(tmp_path) == "file"
