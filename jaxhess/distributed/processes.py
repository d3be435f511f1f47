"""Several processes as one run: start-up, values that all of them agree on, and work that only one of them does.

Every process runs the same program on its own devices. Whatever a process decides by itself (a clock, free memory, a
signal, a file) must be agreed on, or the processes compile different programs and wait for each other for ever. That is
what `agreed`, `gathered`, `any_says`, `exists`, `on_first`, `on_every` and `meet` are for. They are collective: every
process calls them, in the same order, and never inside what `on_first` or `on_every` does. In a single process they
cost nothing. All others are local.

If a process is killed, or ends because of an error, JAX's coordination service ends the others: it notices missing
heartbeats, and processes that leave while others stay.

Agreement goes through the key-value store of that service (about a millisecond), not through the devices as in
`jax.experimental.multihost_utils`: it compiles nothing, takes text of any length, and waits while process 0 writes
files. The store has no public name in JAX, nor has the table of launchers that tells where it listens; Orbax takes the
store from the same place.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src import clusters, distributed

from jaxhess.errors import InputError

T = TypeVar("T")

PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "SLURM": ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}
"""What says that a launcher is there, how many processes it started, and which one this is.

`mpirun` inside a SLURM allocation hands on the SLURM variables of its own daemons, so it comes first. An interactive
shell of `salloc` is a step of one task, though SLURM_NTASKS is that of the allocation.
"""

START_SECONDS = 300
"""Seconds that a process waits at the start for those that are not there yet."""

WAIT_SECONDS = 3600
"""Seconds that a process waits for the others, while they read a checkpoint for example."""

HEARTBEAT = 30
"""Seconds without a heartbeat after which JAX ends all processes. Under load a machine stalls for some seconds."""

SHUTDOWN_SECONDS = 15
"""Seconds that an ending process waits for the others. Then JAX ends them."""

_turn = 0
"""Agreements so far, the same in every process: the name of the next one in the store."""
_deleted = 0
_neighbours = 1


def initialize() -> None:
    """Joins the processes of this run, where there are several; to be called before anything touches a device.

    Under SLURM (`srun`) and Open MPI (`mpirun`) JAX finds out by itself; each process then takes the one GPU of its
    local rank, unless `JAX_LOCAL_DEVICE_IDS` says otherwise. Open MPI 5 no longer says where process 0 is: it needs
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0). Elsewhere that, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` tell.
    On CPUs collectives go through gloo.

    If some do not come, JAX ends those that did after `START_SECONDS` seconds.

    Raises:
        InputError: Some of the three variables are set and some are not, or one is no number in its range, or no
            address; JAX does not find the others.
    """
    global _neighbours
    found = launched(os.environ)
    if found is None:
        return
    count, process = found
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX would take SIGTERM for itself; see `jaxhess.slq.checkpoint.termination`.
    jax.config.update("jax_enable_preemption_service", False)
    # Of version 5 JAX sees nothing, and would take all GPUs; inside SLURM it would take the daemon's local rank.
    local = None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=process,
            local_device_ids=None if local is None else int(local),
            coordinator_bind_address=_bind_address() if process == 0 else None,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise InputError(
            f"Could not connect to the other processes: {str(error).rstrip('.')}. Set {PLAIN[0]} to host:port of "
            "process 0, with a port that is free there."
        ) from error
    if process > 0:
        warnings.simplefilter("ignore")  # all say the same
    _neighbours = gathered(socket.gethostname()).count(socket.gethostname())


def _bind_address() -> str | None:
    """Where process 0 listens: at the address that the others are told, not, as JAX would, at all of its machine.

    None, and so all, where that is not known, or where the machine knows itself under that name by an address that
    others cannot reach (Debian's 127.0.1.1). `JAX_COORDINATOR_BIND_ADDRESS` overrides it.
    """
    if os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return None
    address = os.environ.get(PLAIN[0])
    if not address:  # as JAX finds it
        address, *_ = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, 1, 0, [0], None, 300)
    if not address:
        return None
    host, port = address.rsplit(":", 1)
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return None
    local = ipaddress.ip_address(found).is_loopback
    if local and host not in ("localhost", found, f"[{found}]"):
        return None
    return f"[{found}]:{port}" if ":" in str(found) else f"{found}:{port}"


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or (":" in host and host[0] + host[-1] != "[]"):
        raise InputError(f"{PLAIN[0]} is {address!r}; it is host:port, the machine of process 0 and a free port there.")


def refuse_several() -> None:
    """Raises InputError if several processes were started of a command for one."""
    found = launched(os.environ)
    if found is not None:
        raise InputError(
            f"This command runs in one process, but {found[0]} were started. Start it without srun or mpirun."
        )


def launched(environment: Any) -> tuple[int, int] | None:
    """How many processes were started and which one this is; None for a single one. See `initialize` for errors."""
    counts = [
        (environment[size], environment[rank])
        for sign, size, rank in LAUNCHERS.values()
        if sign in environment and size in environment and rank in environment
    ]
    given = [name for name in PLAIN if environment.get(name)]
    if set(PLAIN[1:]) & set(given) or (given and not counts):
        missing = [name for name in PLAIN if name not in given]
        if missing:
            raise InputError(
                f"{' and '.join(given)} set without {' and '.join(missing)}: several processes need all three, "
                "a single one none of them."
            )
        counts = [(environment[PLAIN[1]], environment[PLAIN[2]])]
    if not counts:
        return None
    if environment.get(PLAIN[0]):
        _check_address(environment[PLAIN[0]])
    count, process = counts[0]
    if not count.isdigit() or count == "0":
        raise InputError(f"The number of processes is {count}; it must be at least 1.")
    if not process.isdigit() or not int(process) < int(count):
        last = int(count) - 1
        raise InputError(f"The process number is {process}; with {count} processes it must be from 0 to {last}.")
    return (int(count), int(process)) if int(count) > 1 else None


def count() -> int:
    """Processes of this run; touches no device in a single one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this is, counted from 0; touches no device in a single one."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def neighbours() -> int:
    """Processes on this machine, which share its memory. (1 where `initialize` was not called.)"""
    return _neighbours


def agreed(value: T) -> T:
    """The value of process 0, which must be JSON; what the others pass is ignored."""
    if count() == 1:
        return value
    key = f"{_next_turn()}/agreed"
    if index() > 0:
        return json.loads(_store().blocking_key_value_get(key, 1000 * WAIT_SECONDS))
    text = json.dumps(value)
    _store().key_value_set(key, text)
    return json.loads(text)


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order; each must be JSON."""
    if count() == 1:
        return [value]
    global _deleted
    place = _next_turn()
    _store().key_value_set(f"{place}/{index():09d}", json.dumps(value))
    meet(place)
    found = sorted(_store().key_value_dir_get(place))
    while index() == 0 and _deleted < _turn - 1:  # all have read what was agreed before
        _store().key_value_delete(f"jaxhess/turn/{_deleted:09d}/")
        _deleted += 1
    return [json.loads(text) for _, text in found]


def any_says(flag: bool) -> bool:
    """Whether it is true in any process."""
    return any(gathered(bool(flag)))


def on_first(action: Callable[[], T]) -> T:
    """What `action` gives in process 0, which alone does it; must be JSON.

    Raises:
        InputError: In every process, where it raised that there.
    """
    if count() == 1:
        return action()
    result, error = _tried(action) if index() == 0 else (None, None)
    result, refused = agreed((result, error and str(error)))
    if refused is not None:
        raise InputError(refused) from error
    return result  # type: ignore[return-value]


def on_every(action: Callable[[], T]) -> T:
    """What `action` gives in this process; every one does it by itself.

    Raises:
        InputError: In every process, where it raised that in any.
    """
    if count() == 1:
        return action()
    result, error = _tried(action)
    refused = gathered(error and str(error))
    for process, text in enumerate(refused):
        if text is not None:
            raise InputError(text if set(refused) == {text} else f"In process {process}: {text}") from error
    return result  # type: ignore[return-value]


def exists(path: Path) -> bool:
    """Whether this file or folder is there, for every process.

    Raises:
        InputError: It is for some of them only.
    """
    found = gathered(path.exists())
    if any(found) and not all(found):
        raise InputError(
            f"Process {found.index(False)} cannot see {agreed(str(path))}, but process {found.index(True)} can. Put it "
            "on a file system that all nodes share."
        )
    return found[0]


def meet(name: str) -> None:
    """Returns when every process has come here."""
    if count() > 1:
        _store().wait_at_barrier(name, 1000 * WAIT_SECONDS)


def finish() -> None:
    """Waits until every process has finished, and leaves the run."""
    if count() > 1:
        meet("jaxhess/finish")
        jax.distributed.shutdown()


def said_by_first(text: str) -> bool:
    """Whether process 0, which is another, ends with this text as well, in the next seconds."""
    if count() == 1:
        return False
    if index() == 0:
        _store().key_value_set("jaxhess/end", text)
        return False
    try:
        return _store().blocking_key_value_get("jaxhess/end", 1000 * SHUTDOWN_SECONDS // 3) == text
    except jax.errors.JaxRuntimeError:
        return False


def _tried(action: Callable[[], T]) -> tuple[T | None, InputError | None]:
    try:
        return action(), None
    except InputError as error:
        return None, error


def _store() -> Any:
    return distributed.global_state.client


def _next_turn() -> str:
    global _turn
    _turn += 1
    return f"jaxhess/turn/{_turn - 1:09d}"
