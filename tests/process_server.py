"""Real processes on loopback for tests: imports once and forks, so that a run costs its compilation only.

Reads jobs, a JSON line each: {"count", "port", "log", "job", "arguments"}; prints the process ids of the run, and when
all have ended their exit statuses (negative: the signal) and the seconds until each had ended. Process p writes to
`log` followed by p. No device may be touched in this process: backends start in the children.
"""

import json
import os
import sys
import time

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401  (imported before the fork)
from jax.sharding import NamedSharding, PartitionSpec
from small_models import Diagonal

import jaxhess
from jaxhess import processes
from jaxhess.command import one_sentence
from scripts import spectrum as script


def command(arguments: list[str], more: dict[str, list[str]]) -> None:
    """`scripts/spectrum.py`, with more arguments in some processes, by their number."""
    sys.argv = ["spectrum.py", *arguments, *more.get(os.environ["JAX_PROCESS_ID"], [])]
    script.main()


def diagonal(out: str, checkpoint: str | None, slow: float, pairs: str | None = None) -> None:
    """A spectrum of 8 probes, two at a time, with `slow` seconds more for each segment; then eigenvectors."""
    with one_sentence(several=True):
        values = np.concatenate([np.linspace(-1, 1, 4093), [3, 7, 30]]).astype(np.float32)
        sharding = NamedSharding(jaxhess.make_mesh(), PartitionSpec("fsdp"))
        entries = jax.make_array_from_callback(values.shape, sharding, lambda i: values[i])
        operator = Diagonal(entries)
        found = jaxhess.spectrum(
            operator,
            steps=40,
            probes=8,
            batch_size=2,
            reorthogonalize="full",
            checkpoint=None if checkpoint is None else jaxhess.Checkpoint(checkpoint, every=5, resume=True),
            callback=lambda _: time.sleep(slow),
        )
        processes.on_first(lambda: np.savez(out, alphas=found.alphas, betas=found.betas))
        if pairs is not None:
            jaxhess.leading_eigenpairs(operator, 2).save(pairs)


def start(job: dict, process: int) -> int:
    child = os.fork()
    if child > 0:
        return child
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{job['port']}"
    os.environ["JAX_NUM_PROCESSES"] = str(job["count"])
    os.environ["JAX_PROCESS_ID"] = str(process)
    log = os.open(f"{job['log']}{process}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 0
    try:
        {"command": command, "diagonal": diagonal}[job["job"]](**job["arguments"])
    except SystemExit as ended:
        status = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


for line in sys.stdin:
    job = json.loads(line)
    children = [start(job, process) for process in range(job["count"])]
    print(json.dumps(children), flush=True)
    began, ended = time.monotonic(), {}
    while len(ended) < len(children):
        child, status = os.wait()
        ended[child] = (os.waitstatus_to_exitcode(status), time.monotonic() - began)
    print(json.dumps([ended[child] for child in children]), flush=True)
