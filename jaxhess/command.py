"""What commands share: simulated devices and quick compilation before JAX starts, and how they end: on bad input with
one sentence and a non-zero exit, not with a traceback."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
from rich.console import Console

from jaxhess.distributed import processes
from jaxhess.distributed import supervision as watch
from jaxhess.errors import InputError
from jaxhess.files.output import disk_full
from jaxhess.slq.checkpoint import Interrupted

USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError)
"""What the library raises at the door. Set `JAXHESS_TRACEBACK=1` to see where."""

SAVED = 75
"""Exit status of a run that SIGTERM stopped and that is saved (EX_TEMPFAIL of sysexits.h: try again). What a scheduler
says of a process that SIGTERM killed is another, 143."""

OUT_OF_MEMORY = (
    "Memory is exhausted: lower --microbatch, --query-chunk or --logit-chunk, use --reorthogonalize none, "
    "a narrower --dtype, or cut the parameters over more devices (--mesh fsdp=N)."
)


def simulated_devices(count: int) -> list[jax.Device]:
    """So many CPU devices, simulated where JAX has not started yet.

    Raises:
        ValueError: It has, with fewer.
    """
    if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
        with contextlib.suppress(RuntimeError):  # it has started
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")[:count]
    if len(devices) < count:
        raise InputError(f"JAX has started in this process with {len(devices)} CPU devices; {count} are needed.")
    return devices


def terminal(quiet: bool = False) -> Console:
    """Where a command prints. Nothing is read as markup or emoji: names and paths may hold brackets and colons."""
    return Console(markup=False, emoji=False, quiet=quiet)


def check_arguments(arguments: list[str]) -> None:
    """Raises ValueError for arguments that no option can mean: an empty one, or one that is no text."""
    for argument in arguments:
        if argument == "" or re.fullmatch(r"--[^=]*=", argument):
            raise InputError("An argument is empty: leave the option out, or give it a value (. is this folder).")
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = ascii(argument)
            raise InputError(f"The argument {shown} is not UTF-8, and cannot be recorded: rename the file.") from None


@contextlib.contextmanager
def one_sentence(several: bool = False) -> Iterator[None]:
    """Turns an error of `USER_ERRORS` inside the block, or exhausted memory, into `error: ...` and exit status 2.

    Args:
        several: The block is written for several processes: where there are some they are joined, and they end
            together, also if only one of them fails. Otherwise they are refused.
    """
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == "interruptible":  # all is loaded
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        check_arguments(sys.argv[1:])
        if several:
            processes.initialize()
        else:
            processes.refuse_several()
        yield
        watch.finish()
    except (*USER_ERRORS, MemoryError, jax.errors.JaxRuntimeError) as error:
        text = " ".join(str(error).split())
        if disk_full(error) and not (isinstance(error, OSError) and error.errno is None):  # else it says so itself
            text = f"The disk is full. ({text[:300]})"
        elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
            text = f"{OUT_OF_MEMORY} ({text[:200]})"
        elif not isinstance(error, USER_ERRORS):
            _end_unforeseen(error)
            raise
        if os.environ.get("JAXHESS_TRACEBACK"):
            _end_unforeseen(error)
            raise
        _end(f"error: {text}", 2)
    except Interrupted as stopped:
        _end(f"{stopped}; go on with --resume", SAVED)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except Exception as error:
        _end_unforeseen(error)
        raise


def _end(words: str, status: int) -> NoReturn:
    if processes.count() > 1:
        watch.fail(words, status)
    sys.stderr.write(f"{words}\n")
    raise SystemExit(status) from None


def _end_unforeseen(error: Exception) -> None:
    """Ends one of several processes with the traceback; returns where there is only one, which raises."""
    if processes.count() == 1:
        return
    if isinstance(error, jax.errors.JaxRuntimeError):  # a collective failed: likely for another process that failed
        watch.await_verdict()
    traceback.print_exception(error)
    watch.fail(f"error: {type(error).__name__}: {' '.join(str(error).split())[:500]}", 1)


def compile_quickly() -> None:
    """Makes XLA leave out optimisations on CPUs that change speed and not mathematics: a third of the compile time.

    For programs that run a few times only. To be called before JAX makes its first array. Where XLA has both its older
    code generator and its new one, that is the older, which compiles in a third of the time. Does nothing where
    XLA_FLAGS sets the level of optimisation already.
    """
    present = os.environ.get("XLA_FLAGS", "")
    if "--xla_backend_optimization_level" in present:
        return
    flags = [present, "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
