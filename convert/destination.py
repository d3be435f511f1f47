"""A directory that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless `destination` is new, empty, or a checkpoint that may be replaced."""
    if destination.is_dir():
        if not any(destination.iterdir()):
            return
        if not overwrite:
            raise FileExistsError(f"{destination} is not empty; --overwrite (overwrite=True) replaces it.")
        if not (destination / "config.json").is_file():
            raise FileExistsError(f"{destination} holds no checkpoint (no config.json), so it is not overwritten.")
    elif destination.exists():
        raise FileExistsError(f"{destination} is a file; give a directory.")


@contextlib.contextmanager
def appearing(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into, renamed to `destination` at the end, removed if anything is raised.

    Raises:
        FileExistsError: `destination` is not empty (without `overwrite`), or is no checkpoint.
    """
    check_destination(destination, overwrite)
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    partial.chmod(0o777 & ~_umask())
    try:
        yield partial
        if destination.is_dir() and any(destination.iterdir()):
            replaced = Path(tempfile.mkdtemp(prefix=f".{destination.name}.replaced-", dir=destination.parent))
            os.replace(destination, replaced)
            os.replace(partial, destination)
            shutil.rmtree(replaced)
        else:
            os.replace(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
