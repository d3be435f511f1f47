"""Several processes as one run: start-up, values that all of them agree on, and work that only the first one does.

Every process runs the same program on its own devices. Whatever a process decides by itself (a clock, free memory, a
signal, a file) must be agreed on, or the processes compile different programs and wait for each other for ever. That is
what `agreed`, `gathered`, `any_says`, `on_first` and `meet` are for, which are collective: every process calls them, in
the same order, and never inside what `on_first` does. In a single process they cost nothing. All others are local.

Agreement goes through the key-value store of `jax.distributed` (about a millisecond), not through the devices: it
needs no compilation, takes text of any length, and has a time limit. If one process ends early, the others end too:
`jaxhess.distributed.supervision`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src import clusters, distributed  # the key-value store has no public name; Orbax takes it from here too

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

PATIENCE = 3600
"""Seconds that a process waits for the others, while they read a checkpoint for example. One that has ended is noticed
earlier."""

HANDED_ON = (
    *(InputError, FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError),
    *(OSError, ImportError, ValueError),
)
"""Errors of the first process that the others raise too, in the first of these classes that they belong to."""

_turn = 0
"""Agreements so far, the same in every process: the next one's name in the store."""
_swept = 0
_neighbours = 1


def initialize() -> None:
    """Joins the processes of this run, where there are several; to be called before anything touches a device.

    Under SLURM (`srun`) and Open MPI (`mpirun`) JAX finds out by itself; each process then takes the one GPU of its
    local rank, unless `JAX_LOCAL_DEVICE_IDS` says otherwise. Open MPI 5 no longer says where process 0 is: it needs
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0). Elsewhere that, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` tell.
    On CPUs collectives go through gloo.

    Raises:
        ValueError: Some of the three variables are set and some are not, or one is no number in its range, or no
            address.
        ConnectionError: The others were not there in time.
    """
    global _neighbours
    found = launched(os.environ)
    if found is None:
        return
    count, process = found
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX would take SIGTERM for itself; see `jaxhess.slq.checkpoint.termination`.
    jax.config.update("jax_enable_preemption_service", False)
    from jaxhess.distributed import supervision as watch  # it knows this module

    watch.bring_a_witness(count, process)
    # Of version 5 JAX sees nothing, and would take all GPUs; inside SLURM it would take the daemon's local rank.
    local = None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=process,
            local_device_ids=None if local is None else int(local),
            coordinator_bind_address=_bind_address() if process == 0 else None,
        )
    except (RuntimeError, ValueError) as error:
        watch.dismiss()
        reason = " ".join(str(error).split())[:200]
        address = os.environ.get(PLAIN[0], "the address that JAX found")
        raise ConnectionError(
            f"Process {process} of {count} could not join the others through {address} ({reason}); "
            f"{PLAIN[0]}=host:port names the machine of process 0 and a free port on it."
        ) from None
    watch.start()
    if process > 0:
        warnings.simplefilter("ignore")  # all say the same
    _neighbours = gathered(socket.gethostname()).count(socket.gethostname())


def _bind_address() -> str | None:
    """Where process 0 listens: at the address that the others are told, not, as JAX would, at all of its machine.

    None, and so all, where that is not known, or where the machine knows itself under that name by an address that
    others cannot reach (Debian's 127.0.1.1). `JAX_COORDINATOR_BIND_ADDRESS` has the last word.
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
    """Raises ValueError where several processes were started of what is written for one."""
    found = launched(os.environ)
    if found is not None:
        raise InputError(f"This command is for one process, and {found[0]} were started: each would do all of it.")


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
    if not count.isdigit() or not process.isdigit() or not int(process) < int(count):
        raise InputError(f"Process {process} of {count} processes: they are counted from 0.")
    return (int(count), int(process)) if int(count) > 1 else None


def count() -> int:
    """Processes of this run; does not touch a device."""
    return distributed.global_state.num_processes if client() is not None else 1


def index() -> int:
    """Which of them this is, counted from 0; does not touch a device."""
    return distributed.global_state.process_id if client() is not None else 0


def neighbours() -> int:
    """Processes on this machine, which share its memory. (1 where `initialize` was not called.)"""
    return _neighbours


def agreed(value: T) -> T:
    """The value of process 0, which must be JSON; what the others pass is ignored."""
    if count() == 1:
        return value
    key = f"{_next_turn()}/agreed"
    if index() > 0:
        return json.loads(client().blocking_key_value_get(key, 1000 * PATIENCE))
    text = json.dumps(value)
    client().key_value_set(key, text)
    return json.loads(text)


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order; each must be JSON."""
    if count() == 1:
        return [value]
    global _swept
    place = _next_turn()
    client().key_value_set(f"{place}/{index():09d}", json.dumps(value))
    meet(place)
    found = sorted(client().key_value_dir_get(place))
    while index() == 0 and _swept < _turn - 1:  # all have read what was agreed before
        client().key_value_delete(f"jaxhess/turn/{_swept:09d}/")
        _swept += 1
    return [json.loads(text) for _, text in found]


def any_says(flag: bool) -> bool:
    """Whether it is true in any process."""
    return any(gathered(bool(flag)))


def on_first(action: Callable[[], T]) -> T:
    """What `action` gives in process 0, which alone does it; must be JSON.

    Raises:
        OSError, ImportError, ValueError: In every process what it raised there.
    """
    if count() == 1:
        return action()
    if index() > 0:
        kind, result = agreed(("", None))
        for error in HANDED_ON:
            if kind == error.__name__:
                raise error(result)
        return result  # type: ignore[return-value]
    try:
        result = action()
    except HANDED_ON as raised:
        agreed((next(error.__name__ for error in HANDED_ON if isinstance(raised, error)), str(raised)))
        raise
    agreed(("", result))
    return result


def meet(name: str) -> None:
    """Returns when every process has come here."""
    if count() > 1:
        client().wait_at_barrier(name, 1000 * PATIENCE)


def client() -> Any:
    """The key-value store; None in a single process."""
    return distributed.global_state.client


def _next_turn() -> str:
    global _turn
    _turn += 1
    return f"jaxhess/turn/{_turn - 1:09d}"
