"""What commands share: simulated devices and quick compilation before JAX starts, and how they end: on bad input with
one sentence and status 2, not with a traceback."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import tyro
from rich.console import Console

from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.slq.checkpoint import Interrupted

T = TypeVar("T")

SAVED = 75
"""Exit status of a run that SIGTERM stopped and that is saved (EX_TEMPFAIL of sysexits.h: try again). A process that
SIGTERM kills has status 143 instead."""

OUT_OF_MEMORY = (
    "Memory is exhausted. What helps, with the options that this command has: a lower --microbatch, --query-chunk or "
    "--logit-chunk, --reorthogonalize none, a narrower --dtype, more devices (--mesh fsdp=N)."
)


def simulated_devices(count: int) -> list[jax.Device]:
    """So many CPU devices, simulated where JAX has not started yet.

    Raises:
        InputError: It has, with fewer.
    """
    if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
        with contextlib.suppress(RuntimeError):  # it has started
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")[:count]
    if len(devices) < count:
        raise InputError(f"JAX has started in this process with {len(devices)} CPU devices; {count} are needed.")
    return devices


def default_folder(name: str) -> Path:
    """Where a command writes without `--out`: runs/<date>-<time>-<name>."""
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


def terminal(quiet: bool = False) -> Console:
    """Where a command prints. Nothing is read as markup or emoji: names and paths may hold brackets and colons."""
    return Console(markup=False, emoji=False, quiet=quiet, soft_wrap=True)


def check_arguments(arguments: list[str]) -> None:
    """Raises InputError for arguments that no option can mean: an empty one, or one that is no text."""
    for argument in arguments:
        if argument == "" or re.fullmatch(r"--[^=]*=", argument):
            raise InputError("An argument is empty: leave the option out, or give it a value (. is this folder).")
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = ascii(argument)
            raise InputError(f"The argument {shown} is not UTF-8, and cannot be recorded: rename the file.") from None


def parse(options: type[T], **arguments: Any) -> T:
    """The options of the command line, by `tyro.cli`; ends as `one_sentence` does where their own checks refuse one."""
    try:
        return tyro.cli(options, **arguments)
    except InputError as error:
        _end(f"error: {error}", 2)


@contextlib.contextmanager
def one_sentence(several: bool = False) -> Iterator[None]:
    """Turns an InputError inside the block into `error: ...` and exit status 2; other errors keep their traceback.

    Args:
        several: The block is written for several processes: where there are some they are joined, and they end
            together, also if only one of them fails. Otherwise they are refused.
    """
    # Without PyTorch, which jaxhess does not need, transformers warns that it has no models.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if several:
            processes.initialize()
        else:
            processes.refuse_several()
        check_arguments(sys.argv[1:])
        yield
        processes.finish()
    except InputError as error:
        _end(f"error: {' '.join(str(error).split())}", 2)
    except Interrupted as stopped:
        _end(f"{stopped}; resume it with --resume", SAVED)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
            error.add_note(OUT_OF_MEMORY)
        raise


def _end(text: str, status: int) -> NoReturn:
    if not processes.said_by_first(text):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()  # JAX may end the process before it exits
    raise SystemExit(status) from None


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
    flags.append("--xla_cpu_parallel_codegen_split_count=1")  # parts in parallel cost more than they save
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
