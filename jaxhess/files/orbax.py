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

from jaxhess.errors import InputError

WRITTEN = re.compile(
    r"((ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]{32})|array_metadatas/process_\d+|_sharding|_METADATA"
    r"|_CHECKPOINT_METADATA|commit_success\.txt)(\.__lock)?"
)
"""Paths of the files that Orbax and TensorStore write for a tree of arrays; the suffix is that of one half written."""


@contextlib.contextmanager
def reading(path: Path, cure: str = "") -> Iterator[None]:
    """Turns whatever fails inside the block into a ValueError that says that this path is damaged.

    Exhausted memory and missing permission are no damage, and raised as they are.
    """
    try:
        with quiet():
            yield
    except Exception as error:  # TensorStore's and Orbax's errors share no class
        if isinstance(error, MemoryError | PermissionError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise InputError(f"{path} is damaged: {first_words(error)}{cure or '.'}") from None


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


def first_words(error: BaseException) -> str:
    """What an error says first: TensorStore adds every layer it passed through, and a dump of its specification."""
    while isinstance(error.__cause__, Exception):  # Orbax gives an index, TensorStore below it the parameter
        error = error.__cause__
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        return f"its metadata lack {text}"
    text = re.sub(r'^[A-Z_]+: |Error opening "\w+" driver: | in OCDBT database at local file "[^"]*"', "", text)
    text = re.split(r": | \[tensorstore_spec|\. See full", text)[0]
    return text[:200].rstrip(" .") or type(error).__name__
