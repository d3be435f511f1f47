"""The command over checkpoints: files that read back, warm against cold, a killed run, bad input in one sentence."""

import csv
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import TINY, check_refused, random_model, run_command

import convert
from jaxhess.errors import InputError
from jaxhess.operators.restriction import leaf_name
from jaxhess.results.trajectory_report import load_trajectory
from jaxhess.vectors import checksum
from scripts import trajectory as script
from scripts.cold_runs import lacking
from scripts.training import tiny

QUICK = ["--data", "random", "--seq-len", "8", "--sequences", "4", "--microbatch", "2", "--eigenpairs", "2"]
QUICK += ["--probes", "2", "--eigenpair-steps", "40"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Three checkpoints, 1% apart, with learning rates beside two of them."""
    top = tmp_path_factory.mktemp("training")
    model = random_model(TINY)
    for number, step in enumerate((5, 10, 20)):
        params = jax.tree.map(lambda x, factor=1 + 0.01 * number: factor * x, model.params)
        folder = top / f"step-{step:06d}"
        convert.export(dataclasses.replace(model, params=params), folder)
        if step > 5:
            logged = [{"step": step, "learning_rate": 0.1 / step}, {"step": step, "eval_loss": 3.0}]
            state = {"log_history": [{"step": 4, "learning_rate": 0.3}, *logged]}
            (folder / "trainer_state.json").write_text(json.dumps(state))
    return top


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run_command(script, "--checkpoints", str(checkpoints), *QUICK, "--cold", "--out", str(out))
    return out


@pytest.mark.slow
def test_the_folder_is_complete_and_reads_back(finished):
    names = {"trajectory.json", "trajectory.csv", "trajectory.png", "report.html", "manifest.json"}
    assert {p.name for p in finished.iterdir()} == names
    points = load_trajectory(finished)
    assert [p.step for p in points] == [5, 10, 20]
    assert [p.learning_rate for p in points] == [None, 0.01, 0.005]
    assert [p.warm for p in points] == [False, True, True]
    assert [p.trace_products for p in points] == [2, 2, 2]
    assert all(p.overlap > 0.9 and p.curves == (0, 1) for p in points[1:])
    with (finished / "trajectory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["eigenvalue_2"]) for row in rows] == [p.eigenvalues[1] for p in points]
    assert rows[0]["learning_rate"] == rows[0]["overlap"] == ""
    page = (finished / "report.html").read_text()
    assert "38 / learning rate" in page
    assert 'src="data:image/png;base64,' in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_warm_and_cold_runs_agree_within_their_residuals(finished):
    points = load_trajectory(finished)
    colds = json.loads((finished / "trajectory.json").read_text())["cold_runs"]
    assert [cold["step"] for cold in colds] == [10, 20]  # the first checkpoint's run is a cold one itself
    for point, cold in zip(points[1:], colds, strict=True):
        apart = np.abs(np.array(point.eigenvalues) - cold["eigenvalues"])
        assert (apart <= np.array(point.residuals) + cold["residuals"]).all()
        assert cold["followed_lacks"] == cold["cold_lacks"] == []
        assert cold["eigenvalues"] != list(point.eigenvalues)  # another starting vector


def test_what_one_of_two_runs_lacks_is_told_by_the_nearest_value():
    ours, others = np.array([[20.0, -12, 10], [0.1, 0.1, 0.1]]), np.array([[20.0, 15, -12], [0.1, 0.1, 0.1]])
    assert (lacking(ours, others), lacking(others, ours)) == ([15.0], [])
    zeros = np.zeros((2, 1))
    assert lacking(zeros, zeros) == []
    assert lacking(zeros, np.array([[1.0], [0.0]])) == [1.0]


@pytest.mark.slow
def test_the_record_names_the_weights_of_every_checkpoint(finished, checkpoints):
    found = json.loads((finished / "trajectory.json").read_text())["checkpoints"]
    folders = sorted(checkpoints.iterdir())
    assert [x["folder"] for x in found] == [str(folder.resolve()) for folder in folders]
    assert [x["weights"] for x in found] == [checksum(convert.load(folder).params) for folder in folders]


@pytest.fixture(scope="module")
def preconditioned(checkpoints, tmp_path_factory) -> Path:
    """The checkpoints, each with a preconditioner that is a number: 1, 2 and 4."""
    top = tmp_path_factory.mktemp("preconditioned") / "training"
    shutil.copytree(checkpoints, top)
    leaves = jax.tree.leaves_with_path(convert.load(top / "step-000005").params)
    for number, folder in enumerate(sorted(top.iterdir())):
        named = {leaf_name(path): np.full(x.shape, 2.0**number, np.float32) for path, x in leaves}
        np.savez(folder / "preconditioner.npz", **named)
    return top


@pytest.mark.study
def test_each_checkpoint_has_its_own_preconditioner_and_resumes_with_no_other(
    finished, preconditioned, tmp_path, monkeypatch, capsys
):
    """Eigenvalues are those of H divided by the number; a run goes on with the same weights and preconditioners."""
    out = tmp_path / "out"
    each = ["--checkpoints", str(preconditioned), *QUICK, "--probes", "0", "--precondition", "each"]
    arguments = [*each, "--out", str(out), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(script, "trajectory_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_command(script, *arguments)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_command(script, *each[:-2], "--out", str(out), "--resume")
    assert "precondition" in capsys.readouterr().err
    first, last = preconditioned / "step-000005" / "model.safetensors", preconditioned / "step-000020"
    for file, other in (
        (first, last / "model.safetensors"),
        (last / "preconditioner.npz", first.with_name("preconditioner.npz")),
    ):
        right = file.read_bytes()
        shutil.copy(other, file)
        with pytest.raises(SystemExit) as ended:
            run_command(script, *arguments)
        assert ended.value.code == 2
        sentence = f"{file.parent.name} does not hold the weights or the preconditioner that the unfinished run in"
        assert sentence in capsys.readouterr().err
        file.write_bytes(right)
    run_command(script, *arguments)
    for number, (p, q) in enumerate(zip(*map(load_trajectory, (out, finished)), strict=True)):
        within = np.array(p.residuals) * 2**number + q.residuals + 1e-5 * q.eigenvalues[0]
        assert (np.abs(np.array(p.eigenvalues) * 2**number - q.eigenvalues) <= within).all()
        assert p.trace is None
    found = json.loads((out / "trajectory.json").read_text())["checkpoints"]
    assert len({x["preconditioner"] for x in found}) == 3
    (last / "preconditioner.npz").unlink()
    sentence = "step-000020 has no preconditioner.npz and no optimizer.pt"
    check_refused(capsys, script, tmp_path / "new", sentence, *each)


@pytest.mark.study
def test_along_a_training_nothing_is_missed_that_a_cold_run_finds(tmp_path):
    """A short training of width 64, a checkpoint every five steps from 75 to 150: warm runs against independent ones.

    About two minutes. Each comparison is by nearest values, within both residuals.
    """
    tiny.run(
        tiny.Options(
            out=tmp_path / "model",
            work=tmp_path / "work",
            vocab_size=500,
            embed_dim=64,
            num_layers=2,
            num_heads=2,
            seq_len=64,
            batch=8,
            steps=150,
            evaluate_every=150,
            keep_every=5,
        )
    )
    folders = [str(folder) for folder in sorted((tmp_path / "work" / "checkpoints").iterdir())[14:]]
    given = ["--checkpoints", *folders, "--data", str(tmp_path / "model" / "sample.txt"), "--seq-len", "64"]
    given += ["--sequences", "8", "--probes", "0", "--cold", "--out", str(tmp_path / "out")]
    run_command(script, *given)
    points = load_trajectory(tmp_path / "out")
    assert all(p.complete and all(p.converged) for p in points)
    colds = json.loads((tmp_path / "out" / "trajectory.json").read_text())["cold_runs"]
    assert len(colds) == len(points) - 1 == 15
    assert [cold["followed_lacks"] for cold in colds] == [[]] * 15
    assert sum(p.products for p in points[1:]) < sum(cold["products"] for cold in colds)


def numbers(folder: Path) -> list[dict]:
    """All that is measured but the time."""
    return [dataclasses.asdict(p) | {"seconds": 0.0} for p in load_trajectory(folder)]


@pytest.mark.slow
def test_a_run_that_sigterm_stops_goes_on_with_the_same_numbers(finished, checkpoints, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ["--checkpoints", str(checkpoints), *QUICK, "--cold", "--out", str(out)]
    rate = script.known_rate

    def stopping(place):
        os.kill(os.getpid(), signal.SIGTERM)
        return rate(place)

    monkeypatch.setattr(script, "known_rate", stopping)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            run_command(script, *arguments, "--resume")
        assert ended.value.code == 75
    assert not (out / "trajectory.json").exists()
    with pytest.raises(SystemExit):  # another run's numbers
        run_command(script, *arguments[:-2], "--out", str(out), "--resume", "--seed", "7")
    with pytest.raises(SystemExit):  # neither resumed nor discarded
        run_command(script, *arguments)
    run_command(script, *arguments, "--resume")
    assert numbers(out) == numbers(finished)
    assert not (out / "unfinished").exists()


def test_a_damaged_save_is_refused(checkpoints, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["--checkpoints", str(checkpoints), *QUICK, "--out", str(out), "--resume"]
    monkeypatch.setattr(script, "trajectory_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        run_command(script, *arguments)
    (data,) = (out / "unfinished" / "steps").glob("*/record/metadata")
    data.write_text(data.read_text().replace('"step": 10', '"step": 11'))
    with pytest.raises(SystemExit) as ended:
        run_command(script, *arguments)
    assert ended.value.code == 2
    assert "is damaged" in capsys.readouterr().err


def revisions(monkeypatch, checkpoints: Path, known: dict[str, str]) -> list:
    """A hub of one model, whose revisions are local folders."""
    asked = []

    class RevisionNotFoundError(Exception):
        pass

    def folder(revision):
        asked.append(revision)
        if revision not in known:
            raise RevisionNotFoundError("404 Client Error.\nRevision Not Found for url: https://hub")
        return checkpoints / known[revision]

    def config(name, file, revision=None):
        return str(folder(revision) / file)

    def snapshot(name, allow_patterns, revision=None):
        return str(folder(revision))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", config)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


@pytest.mark.slow
def test_revisions_of_a_hub_id_are_what_folders_are(finished, checkpoints, tmp_path, monkeypatch):
    revisions(monkeypatch, checkpoints, {"step5": "step-000005", "step10": "step-000010", "step20": "step-000020"})
    out = tmp_path / "out"
    given = ["--model", "someone/model", "--revisions", "step20,step5", "step10"]
    run_command(script, *given, *QUICK, "--out", str(out))
    assert numbers(out) == numbers(finished)
    assert convert.load_config("someone/model", revision="step10") == convert.load_config(checkpoints / "step-000010")
    model = convert.load("someone/model", revision="step10")
    assert (
        model.params["embed"]["kernel"] == convert.load(checkpoints / "step-000010").params["embed"]["kernel"]
    ).all()


def test_a_revision_that_does_not_exist_is_one_sentence_before_any_weights_are_loaded(
    checkpoints, tmp_path, monkeypatch, capsys
):
    asked = revisions(monkeypatch, checkpoints, {"step5": "step-000005"})
    given = ["--model", "someone/model", "--revisions", "step5", "step9", *QUICK]
    sentence = "The hub has no revision step9 of someone/model: name a branch, tag or commit."
    check_refused(capsys, script, tmp_path / "out", sentence, *given)
    assert asked == ["step5", "step9"]
    with pytest.raises(InputError, match="no model of that id at revision step9"):
        convert.load("someone/model", revision="step9")
    with pytest.raises(InputError, match="on this machine and has no revision step9"):
        convert.load(checkpoints / "step-000005", revision="step9")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Name the checkpoints"),
        (["--checkpoints", "HERE", "--revisions", "step1"], "Name the checkpoints"),
        (["--revisions", "step1"], "--revisions are of a hub id"),
        (["--model", "a/b", "--checkpoints", "HERE"], "leave it out with --checkpoints"),
        (["--model", "a/b", "--revisions", "main"], "main does not end in a step"),
        (["--checkpoints", "HERE/nowhere"], "There is no folder"),
        (["--checkpoints", "HERE/step-000005/empty"], "There is no folder"),
        (["--checkpoints", "HERE", "HERE/step-000005"], "are both of step 5"),
        (["--checkpoints", "HERE", "--learning-rate", "-1"], "must be a positive number"),
        (["--checkpoints", "HERE", "--beta1", "1"], "from 0 to below 1"),
        (["--checkpoints", "HERE", "--eigenpairs", "0"], "must be at least 1"),
        (["--checkpoints", "HERE", "--probes", "-1"], "--probes -1 must be a number of probes, or 0"),
        (["--checkpoints", "HERE", "--precondition", "HERE"], "--precondition each takes"),
        (["--model", "a/b", "--revisions", "step1", "--precondition", "each"], "--precondition each takes"),
    ],
)
def test_bad_options_are_one_sentence(checkpoints, tmp_path, capsys, arguments, sentence):
    given = [text.replace("HERE", str(checkpoints)) for text in arguments]
    check_refused(capsys, script, tmp_path / "out", sentence, *given)


def test_folders_that_do_not_go_together_are_refused(checkpoints, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    check_refused(capsys, script, tmp_path / "out", "holds none", "--checkpoints", str(tmp_path / "empty"))
    convert.export(random_model(dataclasses.replace(TINY, mlp_dim=7)), tmp_path / "step-30")
    given = ["--checkpoints", str(checkpoints), str(tmp_path / "step-30"), *QUICK]
    check_refused(capsys, script, tmp_path / "out", "is a checkpoint of another model", *given)
    shutil.copytree(checkpoints / "step-000020", tmp_path / "more" / "step-40")
    (tmp_path / "more" / "step-40" / "trainer_state.json").write_text('{"log_history": 3}')
    with pytest.raises(InputError, match="not the trainer's record of learning rates"):
        script.known_rate(script.Place(40, str(tmp_path / "more" / "step-40"), None))
