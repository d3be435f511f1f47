"""Several real processes on one machine: one spectrum, written once, and all end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_models import TINY, scaled_up

import convert
from convert.orbax_checkpoint import save
from jaxhess import Hessian, Microbatches, Spectrum, spectrum
from jaxhess.command import one_sentence
from jaxhess.data import random_blocks
from jaxhess.distributed import processes
from jaxhess.models import initialize

SMALL_RUN = [
    *("--data", "random", "--seq-len", "8", "--sequences", "8", "--microbatch", "4", "--no-audit"),
    *("--steps", "5", "--probes", "2", "--batch-size", "1"),
]


class Run:
    """One run of several processes: their ids, and once it has ended their statuses, its seconds and their output.

    Processes from `present` on never come. `joining` and `leaving` are seconds, as in `jaxhess.distributed.processes`;
    where statuses are compared, `leaving` is long: a slow machine must not make one end because of another.
    """

    def __init__(
        self,
        server,
        folder: Path,
        count: int,
        job: str,
        devices: int = 1,
        launcher: str = "none",
        present: int | None = None,
        joining: int = 60,
        leaving: int = 60,
        **arguments,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server, self.present, self.port = server, count if present is None else present, port
        self.log = folder / f"log-{time.monotonic_ns()}-"
        line = {"count": count, "port": port, "log": str(self.log), "job": job, "arguments": arguments}
        line |= {"devices": devices, "launcher": launcher, "present": self.present}
        line |= {"joining": joining, "leaving": leaving}
        server.stdin.write(json.dumps(line) + "\n")
        server.stdin.flush()
        self.children = json.loads(server.stdout.readline())

    def ended(self) -> "Run":
        self.statuses, self.seconds = json.loads(self.server.stdout.readline())
        self.output = [Path(f"{self.log}{p}").read_text() for p in range(self.present)]
        return self

    def errors(self) -> list[str]:
        return [line for text in self.output for line in text.splitlines() if re.match("error:|stopped", line)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(count, job, **arguments)` starts one."""
    environment = {**os.environ, "PYTHONPATH": ".:tests:scripts"}
    server = subprocess.Popen(
        [sys.executable, "tests/process_server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    yield lambda *job, **arguments: Run(server, tmp_path_factory.mktemp("logs"), *job, **arguments)
    server.stdin.close()
    assert server.wait() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(scaled_up(initialize(TINY, jax.random.key(0))), folder)
    return str(folder)


@pytest.fixture(scope="module")
def single(model) -> Spectrum:
    """The spectrum from this process alone, on one device."""
    loaded = convert.load(model)
    blocks = random_blocks(seq_len=8, vocab_size=TINY.vocab_size, sequences=8)
    batches = Microbatches(blocks.microbatches(4))
    return spectrum(Hessian(loaded.loss(), loaded.params, batches), steps=5, probes=2, batch_size=1)


def spectrum_of(run, model, count, out, *more, other=None, **how):
    """Run of the main command, with `other` arguments in some processes, by their number."""
    arguments = ["--model", model, *SMALL_RUN, "--out", str(out), *more]
    return run(count, "command", arguments=arguments, more=other or {}, **how).ended()


def same_spectrum(found: Spectrum, expected: Spectrum) -> None:
    for name in ("alphas", "betas"):
        a, b = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(expected.alphas).max())


def test_two_processes_give_the_spectrum_of_one_and_write_it_once(run, model, single, tmp_path):
    ended = spectrum_of(run, model, 2, tmp_path / "out", devices=2)
    assert ended.statuses == [0, 0], ended.output
    same_spectrum(Spectrum.load(tmp_path / "out"), single)
    mesh = Spectrum.load(tmp_path / "out").run.job.mesh
    assert (mesh.processes, mesh.devices) == (2, 4)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("spectrum.npz", "spectrum.json", "density.png", "distribution.png", "stem.png", "report.html"),
        "manifest.json",
    }
    assert "written to" in ended.output[0]
    assert not [line for line in ended.output[1].splitlines() if "Gloo" not in line and "peer ranks" not in line]


def listeners(port: int) -> set[str]:
    """Local addresses, as the kernel writes them, on which anything on this machine listens at the port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


def test_what_all_refuse_is_printed_once_and_the_store_listens_at_its_address_only(run, model, tmp_path):
    arguments = ["--model", model, *SMALL_RUN, "--out", str(tmp_path / "out"), "--mesh", "fsdp=3"]
    life = run(2, "command", arguments=arguments, more={})
    found: set[str] = set()
    deadline = time.monotonic() + 60
    while not found and time.monotonic() < deadline:
        found = listeners(life.port)
    ended = life.ended()
    assert ended.statuses == [2, 2]
    assert len(ended.errors()) == 1
    assert "fsdp=3 needs 3 devices, but 2 are available" in ended.errors()[0]
    assert not (tmp_path / "out").exists()
    assert len(found) == 1
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and the same on a socket of IPv6


@pytest.mark.parametrize(
    ("address", "bound"),
    [
        ("127.0.0.1:7000", "127.0.0.1:7000"),
        ("localhost:7000", "127.0.0.1:7000"),
        ("[::1]:7000", "[::1]:7000"),
        ("10.1.2.3:7000", "10.1.2.3:7000"),
        ("node7:7000", "10.1.2.7:7000"),
        ("myself:7000", None),  # which this machine takes for 127.0.1.1
        ("unknown:7000", None),
    ],
)
def test_where_the_store_listens(address, bound, monkeypatch):
    names = {"node7": "10.1.2.7", "myself": "127.0.1.1", "localhost": "127.0.0.1"}

    def resolved(host, port, **_):
        if host == "unknown":
            raise socket.gaierror(-2, "Name or service not known")
        return [(None, None, None, "", (names.get(host, host), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    assert processes._bind_address() == bound
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0:7000")
    assert processes._bind_address() is None


def test_slurm_says_where_the_store_listens(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    for name, value in (SRUN | {"SLURM_JOB_ID": "4096", "SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(0, 0, 0, "", ("10.0.0.1", port))])
    assert processes._bind_address() == "10.0.0.1:61440"


SRUN = {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "5"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, None),
        ({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3", "JAX_COORDINATOR_ADDRESS": "a:1"}, (4, 3)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # in the batch script itself, not under srun
        (SRUN, (8, 5)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # in an interactive shell of `salloc`
        (SRUN | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (2, 1)),  # `mpirun` in an allocation
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "JAX_COORDINATOR_ADDRESS": "a:1"}, (2, 1)),
    ],
)
def test_launchers_and_plain_variables_are_found(environment, found):
    assert processes.launched(environment) == found


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "set without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "set without JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "4", "JAX_COORDINATOR_ADDRESS": "a:1"}, "it must be from 0 to 3"),
        (
            {"JAX_NUM_PROCESSES": "four", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"},
            "number of processes is four",
        ),
        *(
            ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": address}, "it is host:port")
            for address in ("garbage", "a:", ":1", "a:port", "a:0", "a:65536", "::1:7", "a:1:7")
        ),
    ],
)
def test_half_a_description_of_the_processes_is_refused(environment, words):
    with pytest.raises(ValueError, match=words):
        processes.launched(environment)


def test_a_command_for_one_process_refuses_several(monkeypatch, capsys):
    for name, value in zip(processes.PLAIN, ("127.0.0.1:1", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit), one_sentence():
        pytest.fail("the command has begun")
    assert "runs in one process, but 2 were started" in capsys.readouterr().err


@pytest.mark.slow
def test_a_start_that_fails_is_one_sentence(run, model, tmp_path):
    ended = spectrum_of(run, model, 2, tmp_path / "out", launcher="mpirun alone")
    assert ended.statuses == [2, 2]
    for output in ended.output:
        assert output.count("error:") == 1
        assert "Could not connect to the other processes: " in output


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(run, tmp_path):
    ended = run(2, "diagonal", out=str(tmp_path / "out"), checkpoint=None, fails=1, leaving=5).ended()
    assert 0 not in ended.statuses
    assert ended.seconds < 60
    assert "ZeroDivisionError: nobody expected this" in ended.output[1]


def test_a_process_that_never_comes_ends_those_that_did(run, tmp_path):
    ended = run(3, "diagonal", out=str(tmp_path / "out"), checkpoint=None, present=2, joining=1).ended()
    assert 0 not in ended.statuses
    assert ended.seconds < 60


@pytest.fixture(scope="module")
def hugging_face(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hugging-face"
    convert.export(convert.load(model), folder)
    return folder


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_a_weight(folder: Path) -> None:
    """The last weight of the file is NaN, which only the process that reads its slice sees."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(np.nan).tobytes())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(shutil.rmtree, "Process 1 cannot see", marks=pytest.mark.slow),
        pytest.param(truncate, "error: In process 1: .* is truncated or damaged", marks=pytest.mark.slow),
        (spoil_a_weight, "error: In process 1: .* holds NaN or infinite values"),
    ],
    ids=["missing", "truncated", "nan"],
)
def test_a_checkpoint_that_is_bad_for_one_process_ends_all_with_its_sentence(run, hugging_face, tmp_path, spoil, words):
    shutil.copytree(hugging_face, tmp_path / "copy")
    spoil(tmp_path / "copy")
    ended = run(2, "load", folders=[str(hugging_face), str(tmp_path / "copy")]).ended()
    assert ended.statuses == [2, 2], ended.output
    assert len(ended.errors()) == 1
    assert re.search(words, ended.errors()[0])


@pytest.mark.slow
def test_data_that_one_process_does_not_see_ends_all_with_one_sentence(run, model, tmp_path):
    text = tmp_path / "text"
    text.write_text("word " * 1000)
    ended = spectrum_of(run, model, 2, tmp_path / "out", "--data", str(text), other={"1": ["--data", "nowhere.txt"]})
    assert ended.statuses == [2, 2]
    assert len(ended.errors()) == 1


def check_eigenvectors(folder: Path) -> None:
    """The two largest eigenvalues of the diagonal are its last entries, and the vectors stand on these."""
    with np.load(folder / "eigenpairs.npz") as saved:
        np.testing.assert_allclose(saved["values"], [30, 7], rtol=1e-5)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.metadata(folder / "vectors").item_metadata.tree
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        vectors = jax.tree.leaves(reader.restore(folder / "vectors", args=ocp.args.PyTreeRestore(restore_args=whole)))
    np.testing.assert_allclose(np.abs(vectors[0][:, [-1, -2]]), np.eye(2), atol=1e-3)


@pytest.mark.slow
def test_three_processes_of_which_one_is_killed_end_and_go_on_in_the_same_bits(run, tmp_path):
    """Killed twice (process 0 has JAX's coordination service), then asked to stop by SIGTERM to one of them.

    The whole run is started as `mpirun` does, whose local ranks number no devices here.
    """
    whole, rest, saves = (str(tmp_path / name) for name in ("whole.npz", "rest.npz", "saves"))
    ended = run(3, "diagonal", out=whole, checkpoint=None, pairs=str(tmp_path / "pairs"), launcher="mpirun").ended()
    assert ended.statuses == [0] * 3, ended.output
    check_eigenvectors(tmp_path / "pairs")

    def signalled(process: int, number: signal.Signals) -> Run:
        """A run in which a process gets a signal when there are two new saves: then all know of the first."""

        def saved() -> set[str]:
            return {p.name for p in Path(saves).glob("steps/*") if p.name.isdigit()}  # others are being written

        seen = before = saved()
        leaving = 60 if number == signal.SIGTERM else processes.SHUTDOWN_SECONDS
        life = run(3, "diagonal", out=rest, checkpoint=saves, slow=0.2, leaving=leaving)
        deadline = time.monotonic() + 60
        while len(seen - before) < 2 and time.monotonic() < deadline:
            seen = seen | saved()
            time.sleep(0.02)
        assert len(seen - before) >= 2
        os.kill(life.children[process], number)
        moment = time.monotonic()
        life.ended()
        print(f"process {process}, {number.name}: all ended after {time.monotonic() - moment:.1f} s")
        assert time.monotonic() - moment < 60
        return life

    for killed in (2, 0):
        life = signalled(killed, signal.SIGKILL)
        assert life.statuses.pop(killed) == -signal.SIGKILL
        assert 0 not in life.statuses

    life = signalled(1, signal.SIGTERM)
    assert life.statuses == [75] * 3
    assert len(life.errors()) == 1
    assert life.errors()[0].startswith("stopped by SIGTERM after step")

    assert run(3, "diagonal", out=rest, checkpoint=saves).ended().statuses == [0] * 3
    with np.load(whole) as a, np.load(rest) as b:
        np.testing.assert_array_equal(a["alphas"], b["alphas"])
        np.testing.assert_array_equal(a["betas"], b["betas"])


@pytest.mark.parametrize("file", ["one_node", "several_nodes"])
@pytest.mark.parametrize(("status", "queued_again"), [(0, False), (1, False), (75, True), (143, False)])
def test_batch_files_start_the_command_and_queue_a_stopped_run_again(tmp_path, file, status, queued_again):
    for name, code in (("srun", status), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $@" >> {tmp_path}/calls\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    script = f"scripts/slurm/{file}.sbatch"
    ended = subprocess.run(["bash", "-u", script, "--model", "a b", "--out", "x"], env=environment, check=False)
    assert ended.returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("srun --cpus-per-task=8 ")
    assert calls[0].endswith(".venv/bin/python scripts/spectrum.py --resume --model a b --out x")
    assert calls[1:] == (["scontrol requeue 7"] if queued_again else [])
    options = set(re.findall(r"^#SBATCH (\S+)", Path(script).read_text(), re.MULTILINE))
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@900", "--mem=0", "--requeue"} <= options
