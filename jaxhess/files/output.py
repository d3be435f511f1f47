"""Where commands write: files that jaxhess did not write are never replaced, runs write one at a time, and no finished
result is lost.

A folder keeps a manifest of what was written into it (`jaxhess.files.manifest`). Every other file belongs to
someone else: it is refused by name before the work, and is never touched, with or without `--overwrite`.

A folder that is written into is locked (flock) until it is released or the process dies, however it dies. Where a file
system has no locks (Lustre without `-o flock`, some NFS, Windows) two runs with one folder both begin: the second to
end finds another manifest than it left, and saves its result beside.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxhess.errors import InputError
from jaxhess.files.lock import lock, unlock
from jaxhess.files.manifest import (
    MANIFEST,
    PARTIAL,
    Entries,
    bytes_of,
    entries_of,
    fingerprint,
    fingerprints,
    foreign_at,
    remove,
    without,
    write_entries,
)

Content = bytes | Callable[[Path], object]
"""Of a file: its bytes, or what writes it at a path."""


class Output:
    """A folder that a command writes into. All methods are local: of several processes only the first calls them.

    Args:
        folder: Made by `claim` if missing, and removed again by `release` if nothing was written.
        names: Of the files and folders in it that may be written.
        overwrite: Replace what an earlier run wrote under these names.
        stale: Other names that an earlier run may have left, removed when this one writes: an old picture never stands
            beside new numbers.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        names: Iterable[str],
        overwrite: bool = False,
        stale: Iterable[str] = (),
    ):
        self.folder, self.names, self.overwrite = Path(folder), tuple(names), overwrite
        self.stale = tuple(stale)
        self._lock: int | None = None
        self._made: list[Path] = []
        self._known: bytes | None = None
        self._written: set[str] = set()

    def claim(self) -> None:
        """Takes the folder, before the work.

        Raises:
            InputError: A name is taken: by an earlier run (without `overwrite`), or by a file that is not ours; another
                run is writing into the folder; it cannot be made or written.
        """
        refuse_unusable(self.folder)
        self._refuse()
        for place in (self.folder.absolute(), *self.folder.absolute().parents):
            if place.exists():
                break
            self._made.append(place)
        try:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = lock(self.folder)
            self._refuse()
        except BaseException:
            self.release()
            raise
        self._known = bytes_of(self.folder / MANIFEST)

    def write(self, files: Mapping[str, Content]) -> None:
        """Writes these files, each whole or not at all; the first time, what an earlier run left goes.

        Raises:
            InputError: They could not be written here, and are in another folder, which it names: the place was taken
                during the work, or the disk is full.
            Exception: What a content's callable raised, once all others are written.
        """
        try:
            if bytes_of(self.folder / MANIFEST) != self._known:
                raise InputError(f"another run has written into {self.folder} meanwhile")
            self._refuse()
            self.folder.mkdir(parents=True, exist_ok=True)
            old = {*self.names, *self.stale} if self.overwrite and not self._written else set()
            failed = _publish(self.folder, files, old)
        except (OSError, InputError) as error:
            reason = f"{self.folder} cannot be written ({_reason(error)})"
            place = _beside(self.folder, lambda folder: _publish(folder, files, ()))
            raise InputError(f"{reason}: the result is in {place}.") from error
        self._written |= set(files)
        self._known = bytes_of(self.folder / MANIFEST)
        if failed is not None:
            raise failed

    def nested(self, name: str) -> Path:
        """The path of a folder in this one, for an `Output` of its own."""
        self._written.add(name)
        return self.folder / name

    def begin(self, name: str) -> Path:
        """The path of a folder that Orbax will write now; what an earlier run left under all our names goes."""
        self._refuse()
        with writing(self.folder):
            entries = entries_of(self.folder)
            for old in self.names:
                remove(self.folder, old, entries)
                entries = without(entries, old)
            write_entries(self.folder, {**entries, name: None})
        self._known = bytes_of(self.folder / MANIFEST)
        return self.folder / name

    def end(self, name: str) -> None:
        """Lists in the manifest what was written since `begin`."""
        with writing(self.folder):
            write_entries(self.folder, without(entries_of(self.folder), name) | fingerprints(self.folder, name))
        self._written.add(name)
        self._known = bytes_of(self.folder / MANIFEST)

    def release(self) -> None:
        """Lets others write here, and removes a folder that `claim` made and that is still empty. Can be repeated."""
        if self._lock is not None:
            unlock(self.folder, self._lock)
            self._lock = None
        with contextlib.suppress(OSError):  # not empty
            for place in self._made:
                place.rmdir()

    def __enter__(self) -> Output:
        self.claim()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _refuse(self) -> None:
        """Raises InputError where a name is taken, except by what this object has written itself."""
        entries = entries_of(self.folder)
        for name in self.names:
            path = self.folder / name
            if not os.path.lexists(path):
                continue
            if (found := foreign_at(self.folder, name, entries)) is not None:
                raise InputError(
                    f"{self.folder / found} was not written by an earlier run, or was changed since, and is never "
                    "replaced: move it, or choose another folder."
                )
            if not self.overwrite and name not in self._written:
                raise InputError(
                    f"{self.folder} already holds a finished run ({name}); choose another folder, or pass "
                    "--overwrite (overwrite=True) to replace it."
                )


class OutputFile:
    """A single JSON file that a command writes. It is ours if it says so: `format` in it is that of the command.

    Raises:
        InputError: It exists, and `overwrite` is False or it is not ours; it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, overwrite: bool = False):
        self.path, self.kind, self.overwrite = Path(path), f"jaxhess-{kind}-1", overwrite
        refuse_unusable(self.path.parent)
        self._refuse()

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes the record, JSON-ready, whole or not at all; beside, if the place is taken or the disk full.

        Raises:
            InputError: It is in another file, which it names.
        """
        text = json.dumps({"format": self.kind, **record}, indent=1, allow_nan=False) + "\n"
        try:
            self._refuse()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _put(self.path.parent, {self.path.name: text.encode()})
        except (OSError, InputError) as error:
            place = _beside(self.path, lambda folder: _put(folder, {self.path.name: text.encode()}))
            raise InputError(
                f"{self.path} cannot be written ({_reason(error)}): the result is in {place / self.path.name}."
            ) from error

    def _refuse(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._is_ours():
            raise InputError(f"{self.path} was not written by this command and is never replaced: choose another file.")
        if not self.overwrite:
            raise InputError(f"{self.path} exists; choose another file, or pass --overwrite to replace it.")

    def _is_ours(self) -> bool:
        if self.path.is_symlink() or not self.path.is_file():
            return False
        try:
            found = json.loads(self.path.read_bytes())
        except (ValueError, OSError, RecursionError):
            return False
        return isinstance(found, dict) and found.get("format") == self.kind


def refuse_unusable(folder: str | os.PathLike[str]) -> None:
    """Raises when nothing could be written into this folder; leaves no trace.

    Raises:
        InputError: It, or what should contain it, is a file, or nothing can be written there.
    """
    folder = Path(folder)
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise InputError(f"The folder {folder} cannot be made: {existing} is a file.")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be written ({error.strerror}).") from error


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises InputError with this path where the system does not let the block write: no space, no permission."""
    try:
        yield
    except Exception as error:  # TensorStore's and Orbax's errors share no class
        if not (isinstance(error, OSError) or disk_full(error)):
            raise
        raise InputError(f"{path} cannot be written: {_reason(error)}.") from error


def disk_full(error: BaseException) -> bool:
    """Whether this is the error of a disk or quota that is full, also in the words of TensorStore."""
    text = str(error)
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT)
    )


def free_name(path: Path) -> Path:
    """The path followed by -1, or the first number that is free."""
    number = 1
    while os.path.lexists(f"{path}-{number}"):
        number += 1
    return Path(f"{path}-{number}")


def _publish(folder: Path, files: Mapping[str, Content], old: Iterable[str]) -> Exception | None:
    """Writes the files and the manifest; the old ones go first, when the new ones are written and only to be renamed.

    Killed in between, the manifest lists what is not there, never the reverse. Returns the error of a content that
    could not be made; the other files are written.
    """
    with _written_aside(folder, files) as (partial, error):
        if not partial:
            return error
        entries = entries_of(folder)
        for name in {*old, *files}:
            if foreign_at(folder, name, entries) is None:
                remove(folder, name, entries)
                entries = without(entries, name)
        new: Entries = {name: fingerprint(path) for name, path in partial.items()}
        write_entries(folder, entries | new)
        for name, path in partial.items():
            os.replace(path, folder / name)
    return error


def _put(folder: Path, files: Mapping[str, Content]) -> None:
    with _written_aside(folder, files) as (partial, _):
        for name, path in partial.items():
            os.replace(path, folder / name)


@contextlib.contextmanager
def _written_aside(folder: Path, files: Mapping[str, Content]) -> Iterator[tuple[dict[str, Path], Exception | None]]:
    """The files in a folder of their own, to be renamed from there, and the error of one that could not be made."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder, ignore_cleanup_errors=True) as place:
        partial, failed = {}, None
        for name, content in files.items():
            path = Path(place) / name
            try:
                if callable(content):
                    content(path)
                else:
                    path.write_bytes(content)
            except OSError:
                raise
            except Exception as error:
                failed = error
            else:
                partial[name] = path
        yield partial, failed


def _beside(path: Path, put: Callable[[Path], object]) -> Path:
    """The folder in which the result is after all: beside, in the system's folder for temporary files, or here.

    Raises:
        InputError: In none of them.
    """
    tried: list[Path] = []
    for parent in dict.fromkeys((path.absolute().parent, Path(tempfile.gettempdir()), Path.cwd())):
        place = free_name(parent / path.name)
        try:
            place.mkdir(parents=True)
        except OSError:
            tried.append(parent)
            continue
        try:
            put(place)
            return place
        except OSError:
            tried.append(parent)
            shutil.rmtree(place, ignore_errors=True)  # made a moment ago, under a name that was free
    raise InputError(
        f"{path} cannot be written, nor can {', '.join(map(str, tried))}: the disks are full or read-only."
    )


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).rstrip(".")
    return f"the disk is full: {text[:300]}" if disk_full(error) else text
