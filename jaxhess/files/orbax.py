"""Orbax's files: one error for all that a damaged one can lead to."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxhess.errors import InputError

WRITTEN = re.compile(
    r"((ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]{32})|array_metadatas/process_\d+|_sharding|_METADATA"
    r"|_CHECKPOINT_METADATA|commit_success\.txt)(\.__lock)?"
)
"""Paths of the files that Orbax and TensorStore write for a tree of arrays; the suffix is that of one half written."""


@contextlib.contextmanager
def reading(path: Path, cure: str = "") -> Iterator[None]:
    """Turns whatever fails inside the block into an InputError that says that this path is damaged, and how.

    Exhausted memory is no damage, and raised as it is.
    """
    try:
        with quiet():
            yield
    except Exception as error:  # TensorStore's and Orbax's errors share no class
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
            raise
        what = "cannot be read" if isinstance(error, PermissionError) else "is damaged"
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        text = re.split(r" \[tensorstore_spec| See full TensorStore", " ".join(f"{kind}{error}".split()))[
            0
        ]  # pages of JSON
        raise InputError(f"{path} {what}: {text.rstrip('.')}{cure or '.'}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps to itself what Orbax's other reads and writes print after the first of them has failed, a page for each."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    disabled, hook = [logger.disabled for logger in loggers], sys.unraisablehook
    try:
        for logger in loggers:
            logger.disabled = True
        sys.unraisablehook = lambda _: None
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold the failed reads, which complain when collected
        gc.collect()
        time.sleep(0.2)  # those still under way in TensorStore's threads end in vain, and say so
        raise
    finally:
        for logger, was in zip(loggers, disabled, strict=True):
            logger.disabled = was
        sys.unraisablehook = hook
