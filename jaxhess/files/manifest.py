"""The manifest of a folder: which of its files are ours, by a fingerprint of their bytes.

`manifest.json` lists every file that was written here. A file is ours if it is listed and its fingerprint is still the
same; every other file belongs to someone else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxhess.errors import InputError
from jaxhess.files.lock import is_lock
from jaxhess.files.orbax import WRITTEN
from jaxhess.files.run_folder import EIGENVECTORS, FORMATS, RECORD, RUN_FILES, read_json

MANIFEST = "manifest.json"
FORMAT = "jaxhess-manifest-1"
LARGE, SAMPLE = 2**26, 2**20
PARTIAL = ".jaxhess-partial-"
UNFINISHED_SAVE = re.compile(r"(.+)\.orbax-checkpoint-tmp")

Entries = dict[str, str | None]
"""Fingerprints by path; None for a folder that Orbax was writing when the manifest was, and may be there in part."""


def foreign(folder: Path) -> str | None:
    """The first thing in the folder that its manifest does not list as it is; None: all of it is ours."""
    if not (folder / MANIFEST).is_file():
        return MANIFEST
    entries = entries_of(folder)
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST and not is_lock(path))
    return next((found for name in names if (found := foreign_at(folder, name, entries))), None)


def write_manifest(folder: Path) -> None:
    """Lists all that is in the folder as ours."""
    found: Entries = {}
    for path in folder.iterdir():
        if path.name != MANIFEST:
            found |= fingerprints(folder, path.name)
    write_entries(folder, found)


def bytes_of(path: Path) -> bytes | None:
    """What is in a file; None where there is none."""
    return path.read_bytes() if path.is_file() else None


def entries_of(folder: Path) -> Entries:
    """What the folder's manifest lists; what an older run's record proves where there is none."""
    text = bytes_of(folder / MANIFEST)
    if text is None:
        return _written_before_manifests(folder)
    try:
        found = json.loads(text)
        files = found["files"] if found["format"] == FORMAT else None
    except (ValueError, LookupError, TypeError, RecursionError):
        files = None
    if not isinstance(files, dict):
        raise InputError(f"{folder / MANIFEST} is not a manifest of ours: move it, or choose another folder.")
    return files


def foreign_at(folder: Path, name: str, entries: Entries) -> str | None:
    """The path in `folder` of what is not as the entries list it, at this name or below it; None: all of it is ours.

    A folder with a manifest of its own is judged by that one.
    """
    path = folder / name
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return name
    if path.is_file():
        return None if entries.get(name) == fingerprint(path) else name
    partial = UNFINISHED_SAVE.match(name)
    if entries.get(partial[1] if partial else name, "") is None:
        return next(
            (f"{name}/{file.relative_to(path)}" for file in files_below(path) if not _is_orbax(path, file)), None
        )
    if (path / MANIFEST).is_file():
        with contextlib.suppress(InputError):
            found = foreign(path)
            return None if found is None else f"{name}/{found}"
        return f"{name}/{MANIFEST}"
    inside = {str(file.relative_to(folder)): file for file in files_below(path)}
    if not inside:
        return name
    for key, file in inside.items():
        if file.is_symlink() or entries.get(key) != fingerprint(file):
            return key
    return None


def fingerprints(folder: Path, name: str) -> Entries:
    """The entries of a file, or of all files in a folder."""
    path = folder / name
    if (path / MANIFEST).is_file():
        return {}  # it speaks for itself
    files = files_below(path) if path.is_dir() else [path] if path.is_file() else []
    return {str(file.relative_to(folder)): fingerprint(file) for file in files}


def files_below(folder: Path) -> Iterator[Path]:
    """All that lies below a folder and is no folder; links are not followed."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        yield from (Path(root) / name for name in sorted((*names, *links)))


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and bytes; of a large one of its size, time of change, first and last MiB.

    So no change goes unnoticed, unless somebody sets a large file's time back, and terabytes need not be read.
    """
    if not path.is_file():
        return "no regular file"
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{found.st_size} ".encode())
        if found.st_size <= LARGE:
            digest.update(file.read())
        else:
            digest.update(f"{found.st_mtime_ns} ".encode() + file.read(SAMPLE))
            file.seek(-SAMPLE, os.SEEK_END)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def write_entries(folder: Path, entries: Entries) -> None:
    """Writes the manifest, whole or not at all."""
    record = {"format": FORMAT, "about": "Files written by jaxhess; others are never replaced.", "files": entries}
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder, ignore_cleanup_errors=True) as place:
        partial = Path(place) / MANIFEST
        partial.write_bytes((json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        os.replace(partial, folder / MANIFEST)


def without(entries: Entries, name: str) -> Entries:
    """All entries but those of a file or folder."""
    return {path: value for path, value in entries.items() if path != name and not path.startswith(f"{name}/")}


def remove(folder: Path, name: str, entries: Entries) -> None:
    """Removes a file or folder that was found to be ours; what somebody has put into it since stays."""
    path = folder / name
    if entries.get(name, "") is None:  # a save that was interrupted, in part there
        for partial in (path, *folder.glob(f"{name}.orbax-checkpoint-tmp*")):
            _remove_files(partial, [file for file in files_below(partial) if _is_orbax(partial, file)])
    elif not path.is_dir():
        path.unlink(missing_ok=True)
    elif (path / MANIFEST).is_file():
        inner = entries_of(path)
        for inner_name in [key for key, value in inner.items() if value is None and "/" not in key]:
            remove(path, inner_name, inner)
        listed = [file for file in files_below(path) if str(file.relative_to(path)) in inner]
        _remove_files(path, [*listed, path / MANIFEST])
    else:
        _remove_files(path, [file for file in files_below(path) if str(file.relative_to(folder)) in entries])


def _remove_files(folder: Path, files: list[Path]) -> None:
    """Removes these files, and the folders that are then empty."""
    for file in files:
        if file.is_file() or file.is_symlink():
            file.unlink()
    for root, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # somebody has put something there a moment ago
            os.rmdir(root)


def _is_orbax(folder: Path, file: Path) -> bool:
    return WRITTEN.fullmatch(file.relative_to(folder).as_posix()) is not None and not file.is_symlink()


def _written_before_manifests(folder: Path) -> Entries:
    """What the record of a finished run proves to be ours, in a folder without a manifest: as it is now."""
    try:
        record = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    except (ValueError, OSError):
        return {}
    if not isinstance(record, dict) or record.get("format") not in FORMATS:
        return {}
    vectors = folder / EIGENVECTORS / "vectors"
    files = [folder / name for name in RUN_FILES if (folder / name).is_file()]
    if vectors.is_dir() and not (folder / EIGENVECTORS / MANIFEST).exists():
        files += [folder / EIGENVECTORS / "eigenpairs.npz", *(x for x in files_below(vectors) if _is_orbax(vectors, x))]
    return {str(file.relative_to(folder)): fingerprint(file) for file in files}
