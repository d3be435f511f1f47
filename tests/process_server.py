"""Real processes on loopback for tests: imports once and forks, so that a run costs its compilation only.

Reads jobs, a JSON line each: {"count", "port", "log", "job", "arguments"} and what `start` knows; prints the process
ids of the run, and when all have ended their exit statuses (negative: the signal) and the seconds until all had. What
process p writes is then in `log` followed by p. No device may be touched in this process: backends start in the
children.
"""

import atexit
import json
import os
import sys
import time
import traceback

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401  (imported before the fork)
from jax.sharding import NamedSharding, PartitionSpec
from small_models import Diagonal

import convert
import jaxhess
from jaxhess.command import one_sentence
from jaxhess.distributed import processes
from scripts import spectrum as script

MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "{count}",
    "OMPI_COMM_WORLD_RANK": "{process}",
    "OMPI_COMM_WORLD_LOCAL_RANK": "{process}",
}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}"}
LAUNCHERS = {
    "none": {**ADDRESS, "JAX_NUM_PROCESSES": "{count}", "JAX_PROCESS_ID": "{process}"},
    "mpirun": {**ADDRESS, **MPIRUN},
    "mpirun alone": MPIRUN,
}
"""What tells a process of the others."""


def command(arguments: list[str], more: dict[str, list[str]]) -> None:
    """`scripts/spectrum.py`, with more arguments in some processes, by their number."""
    _, process = processes.launched(os.environ)
    sys.argv = ["spectrum.py", *arguments, *more.get(str(process), [])]
    script.main()


def load(folders: list[str]) -> None:
    """`convert.load` of a folder for each process."""
    with one_sentence(several=True):
        convert.load(folders[processes.index()], jaxhess.make_mesh())


def diagonal(
    out: str, checkpoint: str | None, slow: float = 0, pairs: str | None = None, fails: int | None = None
) -> None:
    """A spectrum of 8 probes, two at a time, with `slow` seconds more for each segment; then eigenvectors.

    In process `fails` an error that nobody expects is raised after the first segment.
    """

    def after_a_segment(_: jaxhess.Progress) -> None:
        time.sleep(slow)
        if processes.index() == fails:
            raise ZeroDivisionError("nobody expected this")

    with one_sentence(several=True):
        # As many entries as two, three and four processes divide.
        values = np.concatenate([np.linspace(-1, 1, 4089), [3, 7, 30]]).astype(np.float32)
        sharding = NamedSharding(jaxhess.make_mesh(), PartitionSpec("fsdp"))
        entries = jax.make_array_from_callback(values.shape, sharding, lambda i: values[i])
        operator = Diagonal(entries)
        found = jaxhess.spectrum(
            operator,
            steps=40,
            probes=8,
            batch_size=2,
            checkpoint=None if checkpoint is None else jaxhess.Checkpoint(checkpoint, every=5, resume=True),
            callback=after_a_segment,
        )
        processes.on_first(lambda: np.savez(out, alphas=found.alphas, betas=found.betas))
        if pairs is not None:
            jaxhess.leading_eigenpairs(operator, 2).save(pairs)


JOBS = {"command": command, "load": load, "diagonal": diagonal}


def start(job: dict, process: int) -> int:
    """The process's id."""
    child = os.fork()
    if child > 0:
        return child
    for name, value in LAUNCHERS[job["launcher"]].items():
        os.environ[name] = value.format(process=process, **job)
    jax.config.update("jax_num_cpu_devices", job["devices"])
    processes.START_SECONDS, processes.SHUTDOWN_SECONDS = job["joining"], job["leaving"]
    log = os.open(f"{job['log']}{process}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 0
    try:
        JOBS[job["job"]](**job["arguments"])
    except SystemExit as ended:
        status = ended.code or 0
    except Exception:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # JAX leaves the other processes in one of them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    job = json.loads(line)
    children = [start(job, process) for process in range(job["present"])]
    print(json.dumps(children), flush=True)
    began = time.monotonic()
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps([statuses, time.monotonic() - began]), flush=True)
