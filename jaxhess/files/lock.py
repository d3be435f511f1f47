"""A folder that one run at a time writes into: a locked file (flock) in it, free again when the process dies."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from jaxhess.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".jaxhess-lock"
MARK = b"jaxhess\n"
"""In a lock file that we made: no other file of that name is ever removed."""


def lock(folder: Path) -> int:
    """The descriptor of the folder's lock file, locked where the file system has locks.

    Raises:
        InputError: Another run holds it, or there is a link or folder of that name.
        OSError: The system does not let it be made.
    """
    path = folder / LOCK
    while True:
        descriptor = _opened(path)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"Another run is writing into {folder}: wait for its end, or choose another folder."
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run before removed it a moment ago


def unlock(folder: Path, descriptor: int) -> None:
    """Frees the folder, and removes the lock file if a run made it."""
    with contextlib.suppress(OSError):
        if is_lock(folder / LOCK):
            (folder / LOCK).unlink()  # while it is locked: who waits for it looks again (`lock`)
    os.close(descriptor)


def is_lock(path: Path) -> bool:
    """Whether this is a lock file that we made, now or in a run that was killed."""
    return path.name == LOCK and not path.is_symlink() and path.is_file() and path.read_bytes() == MARK


def _opened(path: Path) -> int:
    while True:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                os.write(descriptor, MARK)
            except OSError:  # the disk is full
                path.unlink(missing_ok=True)
                os.close(descriptor)
                raise
            return descriptor
        try:
            return os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:  # removed a moment ago
            continue
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR):
                raise
            raise InputError(
                f"{path} is a link or a folder, where a run keeps its lock file: move it, or choose another folder."
            ) from error
