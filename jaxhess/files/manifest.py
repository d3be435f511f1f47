"""The manifest of a folder: which of its files are ours, by a fingerprint of their bytes.

`manifest.json` lists every file that was written here. A file is ours if it is listed and its fingerprint is still the
same; all else is somebody's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxhess.files.run_folder import written_before_manifests

MANIFEST, LOCK = "manifest.json", ".jaxhess-lock"
FORMAT = "jaxhess-manifest-1"
SAMPLE = 2**20
UNFINISHED_SAVE = re.compile(r"(.+)\.orbax-checkpoint-tmp")

Entries = dict[str, str | None]
"""Fingerprints by path; None for what was being written when the manifest was, and may be there in part."""


def foreign(folder: Path) -> str | None:
    """The first thing in the folder that its manifest does not list as it is; None: all of it is ours."""
    if not (folder / MANIFEST).is_file():
        return MANIFEST
    entries = entries_of(folder)
    for path in sorted(folder.iterdir()):
        if path.name not in (MANIFEST, LOCK) and not is_ours(folder, path.name, entries):
            return path.name
    return None


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
        return written_before_manifests(folder)
    try:
        found = json.loads(text)
        files = found["files"] if found["format"] == FORMAT else None
    except (ValueError, LookupError, TypeError, RecursionError):
        files = None
    if not isinstance(files, dict):
        raise FileExistsError(f"{folder / MANIFEST} is not a manifest of ours: move it, or choose another folder.")
    return files


def is_ours(folder: Path, name: str, entries: Entries) -> bool:
    """Whether a file or folder is as the entries list it; a folder with a manifest of its own, as that lists it."""
    path = folder / name
    if path.is_symlink():
        return False
    if name in entries and entries[name] is None:
        return True
    if path.is_file():
        return name in entries and entries[name] == fingerprint(path)
    partial = UNFINISHED_SAVE.match(name)
    if partial is not None:
        return partial[1] in entries and entries[partial[1]] is None
    if not path.is_dir():
        return False
    if (path / MANIFEST).is_file():
        with contextlib.suppress(FileExistsError):
            return foreign(path) is None
        return False
    inside = list(_files(path))
    return bool(inside) and all(
        not file.is_symlink() and entries.get(str(file.relative_to(folder))) == fingerprint(file) for file in inside
    )


def fingerprints(folder: Path, name: str) -> Entries:
    """The entries of a file, or of all files in a folder."""
    path = folder / name
    if (path / MANIFEST).is_file():
        return {}  # it speaks for itself
    files = _files(path) if path.is_dir() else [path] if path.is_file() else []
    return {str(file.relative_to(folder)): fingerprint(file) for file in files}


def _files(folder: Path) -> Iterator[Path]:
    """All that lies below a folder and is no folder; links are not followed."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        yield from (Path(root) / name for name in sorted((*names, *links)))


def fingerprint(path: Path) -> str | None:
    """SHA-256 of a file's size, its first and its last MiB: files of 2 MiB whole, terabytes in no time."""
    if not path.is_file():
        return "no regular file"
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.sha256(f"{size} ".encode() + file.read(SAMPLE))
        file.seek(max(SAMPLE, size - SAMPLE))
        digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def write_entries(folder: Path, entries: Entries) -> None:
    """Writes the manifest, whole or not at all."""
    record = {"format": FORMAT, "about": "Files written by jaxhess; others are never replaced.", "files": entries}
    partial = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    try:
        partial.write_bytes((json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        os.replace(partial, folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)


def without(entries: Entries, name: str) -> Entries:
    """All entries but those of a file or folder."""
    return {path: value for path, value in entries.items() if path != name and not path.startswith(f"{name}/")}


def remove(folder: Path, name: str, entries: Entries) -> None:
    """Removes a file or folder that was found to be ours."""
    path = folder / name
    if entries.get(name, "") is None:  # a save that was interrupted, in part there
        for partial in (path, *folder.glob(f"{name}.orbax-checkpoint-tmp*")):
            shutil.rmtree(partial, ignore_errors=True)
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    inner = entries
    if (path / MANIFEST).is_file():
        inner = {f"{name}/{file}": value for file, value in entries_of(path).items()}
        for inner_name in [key for key, value in inner.items() if value is None]:
            remove(folder, inner_name, inner)
        (path / MANIFEST).unlink()
    for file in _files(path):
        if str(file.relative_to(folder)) in inner:
            file.unlink()
    for root, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):  # somebody has put something there a moment ago
            os.rmdir(root)
