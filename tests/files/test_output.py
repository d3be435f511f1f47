"""Where commands write: what they did not write survives, two runs keep apart, and no finished result is lost."""

import contextlib
import errno
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import run_command

import convert.__main__ as convert_command
from jaxhess import Checkpoint, MatrixOperator, Spectrum
from jaxhess.command import terminal
from jaxhess.errors import InputError
from jaxhess.files.lock import LOCK
from jaxhess.files.manifest import MANIFEST, foreign
from jaxhess.files.output import Output, OutputFile, writing
from jaxhess.files.run_folder import BLOCK_FILES, EXPORTS, RUN_FILES
from jaxhess.results.report import FIGURES

ROOT = Path(__file__).parents[2]
NAMES = ("a.json", "a.png")
FILES = {"a.png": b"png", "a.json": b"{}"}
RNG = np.random.default_rng(0)


def a_spectrum(seed: int = 0) -> Spectrum:
    rng = np.random.default_rng(seed)
    return Spectrum(rng.normal(size=(2, 4)), rng.uniform(1, 2, (2, 4)), np.full(2, 4), 100)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    a_spectrum().save(folder)
    return folder


OUT = ("--out", "{out}")
FOLDERS = {
    "scripts.spectrum": (("--model", "not/read", *OUT), (*RUN_FILES, "eigenvectors", "unfinished", MANIFEST)),
    "scripts.blocks": (
        ("--model", "not/read", *OUT),
        (*BLOCK_FILES, "unfinished", "unfinished-spectra", MANIFEST),
    ),
    "scripts.compare": (("{run}", *OUT), ("comparison.json", "densities.png", "stems.png", MANIFEST)),
    "scripts.export": (("{run}", *OUT), (*EXPORTS[:2], MANIFEST)),
    "scripts.studies.ghosts": (("--model", "not/read", *OUT), ("study.json", "study.html", "ghosts.png", MANIFEST)),
    "scripts.studies.step_size": (("--model", "not/read", *OUT), ("study.json", "step_size.png", MANIFEST)),
    "scripts.studies.fidelity": (("--model", "not/read", *OUT), ("study.json", "fidelity.png", MANIFEST)),
    "scripts.studies.kind_sharpness": (("--model", "not/read", *OUT), ("study.json", "kind_sharpness.png", MANIFEST)),
    **{
        f"scripts.studies.{name}": (OUT, ("study.html", f"{name}.png", MANIFEST))
        for name in (
            *("block_learning_rates", "block_structure", "class_blocks", "classes", "heterogeneity", "random_matrix"),
            *("scaling", "structures", "columns", "data", "difference_bias", "rank", "scale", "theorems"),
        )
    },
    "scripts.studies.all": (OUT, ("index.html", MANIFEST)),
    "scripts.validation.torch": (("--model", "not/read", *OUT), ("agreement.json", "agreement.html", MANIFEST)),
    "scripts.training.tiny": (OUT, ("config.json", "notes.txt", ".git", MANIFEST)),
    "scripts.benchmarks.products": (("--out", "{out}/numbers.json"), ("numbers.json",)),
    "scripts.validation.mesh": (("--model", "not/read", "--out", "{out}/numbers.json"), ("numbers.json",)),
    "scripts.benchmarks.card": (("--out", "{out}/numbers.json"), ("numbers.json",)),
    "scripts.studies.matmul_precision": (("--model", "not/read", *OUT), ("study.json", "study.html", MANIFEST)),
    "scripts.plan": (("--out", "{out}/plan.json"), ("plan.json",)),
    "convert": (("not/read", "{out}"), ("config.json", "thesis.tex", ".git", MANIFEST)),
}
"""Of every command that writes: arguments, and the names that it may write (or, of a checkpoint, any)."""


@pytest.mark.parametrize("command", FOLDERS)
def test_a_foreign_file_is_refused_before_the_work_and_survives(command, run, tmp_path, capsys):
    arguments, names = FOLDERS[command]
    script = convert_command if command == "convert" else importlib.import_module(command)
    for i, name in enumerate(names):
        folder = tmp_path / str(i)
        if "." in name[1:]:
            folder.mkdir()
            (folder / name).write_text(f"my own {name}")
        else:
            (folder / name).mkdir(parents=True)
            (folder / name / "HEAD").write_text("mine")
        (folder / "thesis.tex").write_text("mine too")
        before = contents(folder)
        filled = [x.format(out=folder, run=run) for x in arguments]
        for more in ([], ["--overwrite"]):
            with pytest.raises(SystemExit) as ended:
                run_command(script, *filled, *more)
            message = capsys.readouterr().err
            assert (ended.value.code, message.count("\n")) == (2, 1), message
            assert str(folder) in message
            assert contents(folder) == before
            assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_every_command_with_an_output_is_in_the_table():
    files = (ROOT / "scripts").rglob("*.py")
    scripts = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    own = r"^    (out|json): Path|\((Study|Model)Options\):$"
    writing = {name for name in scripts if re.search(own, module_text(name), re.MULTILINE)}
    shared = {"scripts.studies.harness", "scripts.run_options", "scripts.studies.block_fidelity.products"}
    assert writing - shared == set(FOLDERS) - {
        "convert",
        "scripts.spectrum",
        "scripts.blocks",
        "scripts.studies.fidelity",
    }
    # and nothing is written but through `jaxhess.files.output`, or into a folder that then appears
    for name in set(scripts) - {"scripts.smollm2"}:  # whose file is known by its SHA-256 and replaces no other
        found = re.findall(r".*(?:write_text|savefig|open\(|\.mkdir|unlink|rmtree|write_bytes).*", module_text(name))
        left = [line for line in found if "(folder / " not in line and "def plot" not in line]
        assert left == (["    figure.savefig(path, dpi=110)"] if name == "scripts.training.tiny" else []), name


def module_text(name: str) -> str:
    return (ROOT / f"{name.replace('.', '/')}.py").read_text()


@pytest.mark.parametrize("command", ["scripts.compare", "scripts.export"])
def test_a_command_that_runs_leaves_foreign_files_as_they_are(command, run, tmp_path):
    (tmp_path / ".git").mkdir()
    for name in ("thesis.tex", ".git/HEAD", "figure.png"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    for more in ([], ["--overwrite"]):
        filled = [x.format(out=tmp_path, run=run) for x in FOLDERS[command][0]]
        run_command(importlib.import_module(command), *filled, *more)
        after = contents(tmp_path)
        assert before.items() <= after.items()
        assert set(after) - set(before) == set(FOLDERS[command][1])


def test_a_content_that_cannot_be_made_does_not_cost_the_others(tmp_path):
    def fail(_: Path) -> None:
        raise RuntimeError("no font")

    with Output(tmp_path, NAMES) as output:
        output.write(FILES)
    with Output(tmp_path, NAMES, overwrite=True) as output:
        with pytest.raises(RuntimeError, match="no font"):
            output.write({"a.png": fail})
        assert FILES.items() <= contents(tmp_path).items()  # nothing new, so the old stays
        with pytest.raises(RuntimeError, match="no font"):
            output.write({"a.png": fail, "a.json": b"new"})
        output.write({"a.png": b"then"})
    assert {name: (tmp_path / name).read_bytes() for name in NAMES} == {"a.png": b"then", "a.json": b"new"}


def test_a_figure_that_cannot_be_drawn_does_not_cost_the_run(tmp_path, monkeypatch):
    from scripts import spectrum as command

    def fail(_: Spectrum) -> None:
        raise RuntimeError("no font")

    monkeypatch.setitem(FIGURES, "stem", fail)
    with Output(tmp_path, RUN_FILES) as output, pytest.raises(RuntimeError, match="no font"):
        command.write(command.Options(), MatrixOperator(np.eye(2)), a_spectrum(), None, output, terminal())
    assert Spectrum.load(tmp_path) == a_spectrum()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("elsewhere"), os.mkfifo])
def test_what_has_the_name_of_the_lock_survives(tmp_path, make):
    make(tmp_path / LOCK)
    before = os.lstat(tmp_path / LOCK)
    refused = not (tmp_path / LOCK).is_file() and not (tmp_path / LOCK).is_fifo()
    expected = pytest.raises(InputError, match=f"^{tmp_path / LOCK} is a link or a folder")
    with expected if refused else contextlib.nullcontext(), Output(tmp_path, NAMES) as output:
        output.write(FILES)
    assert os.path.samestat(os.lstat(tmp_path / LOCK), before)


def test_files_with_the_names_of_unfinished_ones_survive(tmp_path):
    mine = [tmp_path / f".{name}.{os.getpid()}.tmp" for name in (*NAMES, MANIFEST)]
    for path in mine:
        path.write_text("mine")
    with Output(tmp_path, NAMES) as output:
        output.write(FILES)
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, MANIFEST, *(path.name for path in mine)}
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_two_runs_do_not_share_a_folder(tmp_path):
    with Output(tmp_path / "out", NAMES) as output:
        with (
            pytest.raises(InputError, match="Another run is writing into"),
            Output(tmp_path / "out", NAMES, overwrite=True),
        ):
            pytest.fail("the work has begun")
        output.write(FILES)
    with Output(tmp_path / "out", NAMES, overwrite=True) as output:
        output.write(FILES)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*NAMES, MANIFEST}


def test_a_killed_run_leaves_no_lock(tmp_path):
    claim = "import sys; from jaxhess.files.output import Output; Output(sys.argv[1], ['a']).claim()"
    code = claim + "; print(flush=True); input()"
    life = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert life.stdout.readline()
    with pytest.raises(InputError), Output(tmp_path / "out", NAMES):
        pytest.fail("the work has begun")
    life.send_signal(signal.SIGKILL)
    life.wait()
    assert (tmp_path / "out" / LOCK).exists()
    with Output(tmp_path / "out", NAMES) as output:
        output.write(FILES)
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no"), Output(tmp_path / "a" / "b", NAMES):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_a_result_whose_place_was_taken_is_saved_beside(tmp_path):
    """Where there are no locks: another run, or a person, has written there meanwhile."""
    out = tmp_path / "out"
    with Output(out, NAMES) as output:
        (out / "a.png").write_text("mine")
        with pytest.raises(InputError, match=rf"a\.png was not .*: the result is in {out}-1\.$"):
            output.write(FILES)
    assert contents(out) == {"a.png": b"mine"}
    assert FILES.items() <= contents(tmp_path / "out-1").items()

    out = tmp_path / "other"
    with Output(out, NAMES, overwrite=True) as output:
        os.unlink(out / LOCK)  # as where it means nothing
        with Output(out, NAMES) as second:
            second.write({"a.json": b"second"})
        with pytest.raises(InputError, match=rf"another run has written .*: the result is in {out}-1\.$"):
            output.write(FILES)
    assert contents(out)["a.json"] == b"second"
    assert foreign(tmp_path / "other-1") is None


def test_on_a_full_disk_the_result_is_saved_elsewhere(tmp_path, monkeypatch):
    out, elsewhere = tmp_path / "disk" / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    written = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "disk" in path.parts:
            written(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(elsewhere))
    with Output(out, NAMES) as output, pytest.raises(InputError, match=f"the disk is full.*is in {elsewhere}/out-1"):
        output.write(FILES)
    assert FILES.items() <= contents(elsewhere / "out-1").items()
    assert not list((tmp_path / "disk").rglob("*"))
    with pytest.raises(InputError, match=f"the disk is full.*is in {elsewhere}/x.json-1/x.json"):
        OutputFile(tmp_path / "disk" / "x.json", "plan").write({"a": 1})


@pytest.mark.parametrize(
    "error",
    [
        ValueError('RESOURCE_EXHAUSTED: Error writing "a": Failed to write 9 bytes to file 3: No space left on device'),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"),
    ],
)
def test_a_full_disk_is_one_sentence(error):
    with pytest.raises(InputError, match=r"^runs/a cannot be written: the disk is full.*\.$"), writing("runs/a"):
        raise error


def test_other_errors_while_writing_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), writing("runs/a"):
        raise ZeroDivisionError


def test_a_single_file_says_whose_it_is(tmp_path):
    path = tmp_path / "plan.json"
    OutputFile(path, "plan").write({"a": 1})
    with pytest.raises(InputError, match="--overwrite"):
        OutputFile(path, "plan")
    with pytest.raises(InputError, match="was not written by this command"):
        OutputFile(path, "benchmark", overwrite=True)
    OutputFile(path, "plan", overwrite=True).write({"a": 2})
    assert b'"a": 2' in path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError):
        OutputFile(path, "plan", overwrite=True)


def test_only_saves_are_removed(tmp_path):
    folder = tmp_path / "unfinished"
    (folder / "steps" / "7").mkdir(parents=True)
    (folder / "identity.json").write_text('{"format": "jaxhess-unfinished-1"}')
    for mine in ("notes.txt", "steps/mine.txt"):
        (folder / mine).write_text("mine")
    Checkpoint(folder).remove()
    assert set(contents(folder)) == {"notes.txt", "steps/mine.txt"}
    Checkpoint(folder).remove()
    assert set(contents(folder)) == {"notes.txt", "steps/mine.txt"}
    with pytest.raises(InputError, match="move it"):
        Checkpoint(folder).check(discard=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "", "--out", ""], "empty"),
        (["--out="], "empty"),
        (["--out", os.fsdecode(b"runs/\xff")], r"'runs/\udcff' is not UTF-8"),
        (["--model", os.fsdecode(b"\xff")], "not UTF-8"),
    ],
)
def test_arguments_that_name_nothing_are_refused(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_command(importlib.import_module("scripts.spectrum"), *arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
