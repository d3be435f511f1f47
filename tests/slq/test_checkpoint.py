"""Runs that are saved, killed and taken up: nothing is lost, no bit differs, and nothing else passes for them."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_models import Diagonal

from jaxhess import Checkpoint, Interrupted, MatrixOperator, Storage, make_mesh, spectrum
from jaxhess.errors import InputError
from jaxhess.files.lock import LOCK, MARK
from jaxhess.slq import checkpoint as checkpoint_module
from jaxhess.slq.checkpoint import termination

OPERATOR = Diagonal(jnp.linspace(-1, 5, 400))
RUN = {"steps": 12, "probes": 5, "batch_size": 2}


class Killed(Exception):
    pass


def stopped_at(operator, folder, probe: int, step: int, **options) -> None:
    """A run that ends without warning in its callback."""

    def stop(progress):
        if (progress.probe, progress.step) >= (probe, step):
            raise Killed

    with pytest.raises(Killed):
        spectrum(operator, **options, checkpoint=Checkpoint(folder, every=3), callback=stop)


@pytest.mark.parametrize("reorthogonalize", ["none", 4, "full"])
def test_a_run_taken_up_ends_in_the_same_bits(tmp_path, reorthogonalize):
    options = RUN | {"storage": Storage(reorthogonalize)}
    whole = spectrum(OPERATOR, **options)
    stopped_at(OPERATOR, tmp_path, 2, 7, **options)
    seen = []
    checkpoint = Checkpoint(tmp_path, every=3, resume=True)
    rest = spectrum(OPERATOR, **options, checkpoint=checkpoint, callback=lambda p: seen.append((p.probe, p.step)))
    assert seen[0] >= (2, 7)  # from step 6 of the second batch
    for name in ("alphas", "betas", "sizes"):
        np.testing.assert_array_equal(getattr(rest, name), getattr(whole, name))
    for name in ("probes", "lanczos", "operator", "rounding"):
        assert getattr(rest.run, name) == getattr(whole.run, name)
    again = spectrum(OPERATOR, **options, checkpoint=checkpoint)  # finished, its folder not yet removed
    np.testing.assert_array_equal(again.alphas, whole.alphas)
    checkpoint.remove()
    assert not tmp_path.exists()


def test_a_basis_on_the_host_is_saved_too(tmp_path):
    options = {"steps": 12, "probes": 2, "storage": Storage(basis_memory="host", basis_dtype="bfloat16")}
    whole = spectrum(OPERATOR, **options)
    stopped_at(OPERATOR, tmp_path, 1, 5, **options)
    rest = spectrum(OPERATOR, **options, checkpoint=Checkpoint(tmp_path, every=3, resume=True))
    np.testing.assert_array_equal(rest.alphas, whole.alphas)
    np.testing.assert_array_equal(rest.betas, whole.betas)


def test_another_mesh_takes_a_run_up(tmp_path):
    def on(axes: str) -> Diagonal:
        sharding = NamedSharding(make_mesh(axes), PartitionSpec(("fsdp", "tensor")))
        return Diagonal(jax.device_put(OPERATOR.entries, sharding))

    whole = spectrum(on("fsdp=8"), **RUN)
    stopped_at(on("fsdp=8"), tmp_path, 2, 7, **RUN)
    rest = spectrum(on("fsdp=2,tensor=4"), **RUN, checkpoint=Checkpoint(tmp_path, every=3, resume=True))
    np.testing.assert_array_equal(rest.alphas[:2], whole.alphas[:2])
    np.testing.assert_allclose(rest.alphas, whole.alphas, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "probes.seed is 1 here and 0 there"),
        ({"probes": 6}, "probes.count is 6 here and 5 there"),
        ({"steps": 13}, "lanczos.steps is 13 here and 12 there"),
        ({"storage": Storage("none")}, "lanczos.storage.reorthogonalize is none here and full there"),
        ({"storage": Storage(basis_dtype="bfloat16")}, "lanczos.storage.basis_dtype is bfloat16 here and None there"),
        ({"operator": Diagonal(OPERATOR.entries.at[7].add(1e-6))}, "parameters is"),
        ({"operator": MatrixOperator(jnp.diag(OPERATOR.entries))}, "operator.kind is MatrixOperator here"),
        ({"data": "other tokens"}, "data is other tokens here and tokens there"),
    ],
)
def test_another_run_is_refused_and_the_difference_named(tmp_path, change, sentence):
    def checkpoint(data: str = "tokens", **options) -> Checkpoint:
        return Checkpoint(tmp_path, every=3, identity={"data": data}, **options)

    def stop(_):
        raise Killed

    with pytest.raises(Killed):
        spectrum(OPERATOR, **RUN, checkpoint=checkpoint(), callback=stop)
    files = sorted(tmp_path.rglob("*"))
    operator, data = change.pop("operator", OPERATOR), change.pop("data", "tokens")
    with pytest.raises(ValueError, match=sentence):
        spectrum(operator, **(RUN | change), checkpoint=checkpoint(data, resume=True))
    assert sorted(tmp_path.rglob("*")) == files


def test_an_unfinished_run_of_an_earlier_version_is_refused_in_one_sentence(tmp_path):
    stopped_at(OPERATOR, tmp_path, 0, 7, **RUN)
    path = tmp_path / "identity.json"
    path.write_text(path.read_text().replace("unfinished-4", "unfinished-3"))
    with pytest.raises(ValueError, match="of an earlier version of jaxhess"):
        spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(tmp_path, resume=True))


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    stopped_at(OPERATOR, tmp_path, 0, 7, **RUN)
    with pytest.raises(InputError, match="--resume"):
        spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(tmp_path))
    with pytest.raises(ValueError, match="at least 1"):
        spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(tmp_path, every=0))
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(tmp_path, resume=True))
    (tmp_path / "identity.json").unlink()
    for resume in (False, True):
        with pytest.raises(InputError, match="says of what run"):
            spectrum(OPERATOR, **(RUN | {"seed": 1}), checkpoint=Checkpoint(tmp_path, resume=resume))


def test_another_batch_size_holds_from_the_next_batch_on(tmp_path):
    whole = spectrum(OPERATOR, **RUN)
    stopped_at(OPERATOR, tmp_path, 2, 7, **RUN)
    seen = []
    checkpoint = Checkpoint(tmp_path, every=3, resume=True)
    options = RUN | {"batch_size": 1}
    rest = spectrum(OPERATOR, **options, checkpoint=checkpoint, callback=lambda p: seen.append((p.probe, p.together)))
    assert set(seen) == {(2, 2), (4, 1)}
    np.testing.assert_array_equal(rest.alphas[:4], whole.alphas[:4])
    np.testing.assert_allclose(rest.alphas[4], whole.alphas[4], atol=1e-5)


def test_sigterm_saves_and_stops(tmp_path):
    whole = spectrum(OPERATOR, **RUN)

    def ask(progress):
        if progress.step == 3:  # segments double
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="step 3 of probe 1"):
        spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(tmp_path, every=100), callback=ask)
    assert signal.getsignal(signal.SIGTERM) is before
    seen = []
    checkpoint = Checkpoint(tmp_path, every=100, resume=True)
    rest = spectrum(OPERATOR, **RUN, checkpoint=checkpoint, callback=lambda p: seen.append(p.step))
    assert seen[0] > 3
    np.testing.assert_array_equal(rest.betas, whole.betas)


def test_sigterm_ends_a_process_that_saves_nothing_as_ever():
    with termination() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_set()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run that was stopped among its probes, and the same to its end."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    stopped_at(OPERATOR, folder, 2, 7, **RUN)
    return folder, spectrum(OPERATOR, **RUN)


def taken_up(folder, whole) -> str:
    """Why the run is not taken up; empty where it is, and ends in the same bits."""
    try:
        rest = spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(folder, every=3, resume=True))
    except ValueError as error:
        return str(error)
    np.testing.assert_array_equal(rest.alphas, whole.alphas)
    np.testing.assert_array_equal(rest.betas, whole.betas)
    return ""


@pytest.mark.parametrize(
    "damages", [["flipped"], pytest.param(["cut", "gone"], marks=pytest.mark.slow)], ids=["flipped", "removed"]
)
def test_a_damaged_save_is_never_taken_up(damages, saved, tmp_path):
    """Each file of a save with a bit flipped, and cut off or gone: refused with its path, or of no matter.

    Some flips of the arrays' files still decode.
    """
    folder, whole = saved
    chance, refused = random.Random(0), 0
    files = [path.relative_to(folder) for path in sorted((folder / "steps").rglob("*")) if path.is_file()]
    for file, damage in zip(files, itertools.cycle(damages), strict=False):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        raw = bytearray((copy / file).read_bytes())
        if damage == "gone":
            (copy / file).unlink()
        elif damage == "cut":
            (copy / file).write_bytes(raw[: len(raw) // 2])
        elif raw:
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
            (copy / file).write_bytes(raw)
        words = taken_up(copy, whole)
        assert not words or (str(copy) in words and "damaged" in words and "\n" not in words)
        refused += bool(words)
        shutil.rmtree(copy)
    assert refused >= 3


def test_a_changed_number_in_an_array_is_noticed_on_another_mesh(saved, tmp_path, monkeypatch):
    """One that TensorStore reads without complaint."""
    folder, _ = saved
    shutil.copytree(folder, tmp_path / "copy")

    def other(array, like):
        first = (0,) * array.ndim
        return array.at[first].set((1 - array[first].astype(jnp.int32)).astype(array.dtype))

    monkeypatch.setattr(checkpoint_module, "_typed", other)
    sharding = NamedSharding(make_mesh("fsdp=2,tensor=4"), PartitionSpec(("fsdp", "tensor")))
    operator = Diagonal(jax.device_put(OPERATOR.entries, sharding))
    with pytest.raises(ValueError, match=r"copy/steps/\d+ is damaged: its arrays are not those that were saved"):
        spectrum(operator, **RUN, checkpoint=Checkpoint(tmp_path / "copy", every=3, resume=True))


@pytest.mark.parametrize("text", ["[]", "5", '{"format": "other"}', '"' + "[" * 10, "[" * 100_000])
def test_an_identity_that_is_none_is_refused_by_its_path(tmp_path, text):
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(InputError, match=r"identity\.json (is damaged|does not say)"):
        spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(tmp_path, resume=True))


def test_two_runs_do_not_save_into_one_folder(tmp_path):
    checkpoint = Checkpoint(tmp_path / "unfinished", every=3, resume=True)

    def second(_: object) -> None:
        for use in (lambda: spectrum(OPERATOR, **RUN, checkpoint=checkpoint), checkpoint.remove):
            with pytest.raises(InputError, match="Another run is writing into"):
                use()
        raise Killed

    with pytest.raises(Killed):
        spectrum(OPERATOR, **RUN, checkpoint=checkpoint, callback=second)
    whole = spectrum(OPERATOR, **RUN, checkpoint=checkpoint)
    np.testing.assert_array_equal(whole.alphas, spectrum(OPERATOR, **RUN).alphas)
    assert not (checkpoint.folder / LOCK).exists()
    (checkpoint.folder / LOCK).write_bytes(MARK)  # of a run that was killed
    checkpoint.remove()
    assert not checkpoint.folder.exists()
    checkpoint.folder.mkdir()
    (checkpoint.folder / LOCK).touch()  # killed before its first word
    spectrum(OPERATOR, **RUN, checkpoint=checkpoint)


def test_a_folder_of_something_else_is_no_place_for_saves(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"holds thesis\.tex, which is of no unfinished run"):
            spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(tmp_path, resume=resume))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_costs_a_save_and_not_the_run(saved, tmp_path, monkeypatch):
    """It is warned of, the next save is tried, and SIGTERM, which needs a save, ends with the words for it."""
    from orbax.checkpoint import CheckpointManager

    whole, save, tried = saved[1], CheckpointManager.save, []

    def full(self, step, *args, **kwargs):
        tried.append(step)
        if len(tried) in (1, 3):
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 3: No space left on device")
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(CheckpointManager, "save", full)
    with pytest.warns(UserWarning, match="the disk is full"):
        found = spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(tmp_path / "a", every=3))
    np.testing.assert_array_equal(found.alphas, whole.alphas)
    tried.clear()
    with pytest.raises(InputError, match="the disk is full"):
        spectrum(
            OPERATOR,
            **RUN,
            checkpoint=Checkpoint(tmp_path / "b", every=100),
            callback=lambda _: os.kill(os.getpid(), signal.SIGTERM),
        )


# Imports once and forks, so that every life costs its compilation only; backends start in the child.
JOB = """
import os, sys
import numpy as np
import jax, jax.numpy as jnp, orbax.checkpoint
import jaxhess
from small_models import Diagonal

def job(folder, out):
    entries = jnp.concatenate([jnp.linspace(-1, 1, 20_000), jnp.array([3.0, 7.0, 30.0])])
    checkpoint = jaxhess.Checkpoint(folder, every=2, resume=True) if folder != "-" else None
    slow = lambda _: __import__("time").sleep(0.03)  # kills should meet steps and saves, not the compiler only
    found = jaxhess.spectrum(Diagonal(entries), steps=40, probes=4, batch_size=2,
                             checkpoint=checkpoint, callback=slow)
    with open(out, "wb") as file:
        np.savez(file, alphas=found.alphas, betas=found.betas)

for line in sys.stdin:
    folder, out = line.split()
    child = os.fork()
    if child == 0:
        job(folder, out)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.parametrize("kills", [pytest.param(5, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.study)])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(tmp_path, kills):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": ".:tests"}
    parent = subprocess.Popen(
        [sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def start(folder, out) -> int:
        parent.stdin.write(f"{folder} {out}\n")
        parent.stdin.flush()
        return int(parent.stdout.readline())

    def waited() -> int:
        return int(parent.stdout.readline())

    began = time.monotonic()
    start("-", tmp_path / "whole.npz")
    assert waited() == 0
    whole = time.monotonic() - began
    chance = random.Random(0)
    lives, places = 0, set()
    while lives < kills:
        process = start(tmp_path / "run", tmp_path / "rest.npz")
        time.sleep(chance.uniform(0.25, 0.75) * whole)
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process, signal.SIGKILL)
        status = waited()
        lives += status == signal.SIGKILL
        places |= {p.name for p in (tmp_path / "run" / "steps").glob("[0-9]*")}
        if status == 0:  # it had ended: begin again, the kills are to be twenty
            assert_same(tmp_path / "whole.npz", tmp_path / "rest.npz")
            Checkpoint(tmp_path / "run").remove()
    start(tmp_path / "run", tmp_path / "rest.npz")
    assert waited() == 0
    parent.stdin.close()
    assert parent.wait() == 0
    assert len(places) >= 2  # kills left saves at different places
    assert_same(tmp_path / "whole.npz", tmp_path / "rest.npz")


def assert_same(a: Path, b: Path) -> None:
    with np.load(a) as whole, np.load(b) as rest:
        for name in ("alphas", "betas"):
            np.testing.assert_array_equal(rest[name], whole[name])
