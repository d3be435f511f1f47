"""A directory that appears complete or not at all, with a manifest of what is in it (`jaxhess.files.output`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.manifest import MANIFEST, foreign, write_manifest
from jaxhess.files.output import free_name, writing


def check_destination(destination: Path, overwrite: bool) -> None:
    """Checks that `destination` is new, empty, or a checkpoint that may be replaced, and that it can be made.

    Replaced is only what a conversion wrote, all of it and nothing else: the manifest says what that is.

    Raises:
        InputError: It holds something else, or is a file; its parent is a file or cannot be written.
    """
    processes.on_first(lambda: _check(destination, overwrite))


def _check(destination: Path, overwrite: bool) -> None:
    with writing(destination):
        if destination.is_dir():
            if any(destination.iterdir()):
                _check_replaceable(destination, overwrite)
        elif destination.exists():
            raise InputError(f"{destination} is a file; give a directory.")
        parent = next(parent for parent in destination.absolute().parents if parent.exists())
        if not parent.is_dir():
            raise InputError(f"{destination} cannot be made: {parent} is a file.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{destination} cannot be made: {parent} cannot be written.")


def _check_replaceable(destination: Path, overwrite: bool) -> None:
    if not overwrite:
        raise InputError(f"{destination} is not empty; --overwrite (overwrite=True) replaces it.")
    if not (destination / "config.json").is_file():
        raise InputError(f"{destination} holds no checkpoint (no config.json), so it is not overwritten.")
    other = foreign(destination)
    if other == MANIFEST:
        raise InputError(
            f"{destination} has no {MANIFEST} that says that a conversion wrote it, so it is not overwritten: move it, "
            "or choose another directory."
        )
    if other is not None:
        raise InputError(
            f"{destination} holds {other}, which no conversion wrote, or which was changed since, so it is not "
            "overwritten: move that, or choose another directory."
        )


@contextlib.contextmanager
def appearing(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into, renamed to `destination` at the end, removed if anything is raised.

    Of several processes all write into the same one. If another has taken the place in the meantime, what was written
    is kept beside it, and the error says where.

    Raises:
        InputError: `destination` is not empty (without `overwrite`), or holds what no conversion wrote; its parent is a
            file or cannot be written; the disk is full.
    """
    check_destination(destination, overwrite)
    destination = destination.absolute()

    def made() -> str:
        with writing(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            partial = tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent)
        os.chmod(partial, 0o777 & ~_umask())
        return partial

    partial = Path(processes.on_first(made))
    try:
        with writing(destination):
            yield partial
        processes.on_first(lambda: _put_in_place(partial, destination, overwrite))
    finally:
        if processes.index() == 0:  # another that ends early must not take it from those that still write
            shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, destination: Path, overwrite: bool) -> None:
    write_manifest(partial)
    try:
        _check(destination, overwrite)
    except InputError as error:
        place = free_name(destination)
        os.replace(partial, place)
        raise InputError(f"{error} What was written is in {place}.") from error
    if destination.is_dir() and any(destination.iterdir()):
        replaced = Path(tempfile.mkdtemp(prefix=f".{destination.name}.replaced-", dir=destination.parent))
        os.replace(destination, replaced)
        os.replace(partial, destination)
        if foreign(replaced) is None:  # else somebody has put something there a moment ago: it stays
            shutil.rmtree(replaced)
    else:
        os.replace(partial, destination)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
