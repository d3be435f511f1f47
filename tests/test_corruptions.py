"""Random damage to every kind of file that is read: it loads, or one sentence of ours says why not.

No crash, no hang, no code run. Cases are decided by their numbers: `damaged` makes the same file again.
"""

from __future__ import annotations

import copy
import dataclasses
import faulthandler
import json
import math
import os
import pickle
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from gguf_checkpoints import write_gguf
from safetensors.torch import load_file, save_file
from small_models import Diagonal

import convert
from convert.loading import read_config
from convert.text import load_blocks
from jaxhess import Checkpoint, Spectrum, spectrum
from jaxhess.errors import InputError
from jaxhess.results.foreign import to_csv, to_json

ROOT = Path(__file__).parent.parent
TINY = ROOT / "scripts" / "tiny"
OPERATOR = Diagonal(jnp.linspace(-1, 5, 50))
RUN = {"steps": 4, "probes": 1, "seed": 3}
QUICK, ALL = 100, 1000
SECONDS = 60
"""A case that is not over by then is a hang: the process ends with all tracebacks."""

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 5, 10**400, 2**31, 2**63, -(2**70), 0.5, 1e300, -1e300, float("inf"), float("nan"), "",
    "a", "../../etc/passwd", "\0", "x\ny", "nan", [], [1], ["a"], [[]], [None] * 3, {}, {"a": 1}, {"": None},
]  # fmt: skip


class RunsCode:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


# Damage


def flip(rng: np.random.Generator, content: bytes) -> bytes:
    """One to eight bits."""
    changed = bytearray(content)
    for place in rng.integers(0, max(len(content), 1), rng.integers(1, 9)):
        if content:
            changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def truncate(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(0, max(len(content), 1)))]


def overwrite(rng: np.random.Generator, content: bytes) -> bytes:
    """A stretch of random bytes over, or between, the others."""
    start, length = int(rng.integers(0, len(content) + 1)), int(rng.integers(1, 65))
    return content[:start] + rng.bytes(length) + content[start + (length if rng.random() < 0.5 else 0) :]


def replace(rng: np.random.Generator, content: bytes) -> bytes:
    """Another file altogether."""
    others = [
        b"",
        rng.bytes(100),
        b"{}",
        b"[]",
        b"null",
        b"\x80\x04N.",
        pickle.dumps(RunsCode()),
        b"PK\x05\x06" + bytes(18),
    ]
    others += [(TINY / "config.json").read_bytes(), (TINY / "tokenizer_config.json").read_bytes(), content * 2]
    return others[rng.integers(len(others))]


def mutate(rng: np.random.Generator, content: bytes) -> bytes:
    """One to three values of a JSON text changed, removed, renamed, repeated or nested deeply."""
    try:
        data = json.loads(content)
    except ValueError:
        return flip(rng, content)
    for _ in range(rng.integers(1, 4)):
        places = [(parent, key) for parent, key in _places(data)]
        if not places:
            break
        parent, key = places[rng.integers(len(places))]
        how = rng.integers(5)
        if how <= 1:
            parent[key] = copy.deepcopy(HOSTILE[rng.integers(len(HOSTILE))])
        elif how == 2:
            del parent[key]
        elif isinstance(parent, dict):
            parent["x" if how == 3 else f"{key}_"] = parent.pop(key)
        else:
            parent.insert(key, parent[key])
    text = json.dumps(data)
    if rng.random() < 0.1:
        text = text[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + text[-1:]
    return text.encode()


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    items = list(data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ())
    for key, value in items[:50]:  # of a vocabulary some
        yield data, key
        yield from _places(value)


# Files


@dataclasses.dataclass(frozen=True)
class FileKind:
    """How a good one is made in a folder, which files of it are damaged, and how the whole is read."""

    make: Callable[[Path], Any]
    damaged: str
    read: Callable[[Path], Any]
    share: float = 1.0


def make_checkpoint(folder: Path) -> None:
    write_checkpoint(folder, "llama")


def make_index(folder: Path) -> None:
    make_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
    for number, names in enumerate((sorted(tensors)[:9], sorted(tensors)[9:])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        index["weight_map"] |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_pickle(folder: Path) -> None:
    make_checkpoint(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def make_gguf(folder: Path) -> None:
    write_gguf(folder / "x.gguf", "llama", "Q4_0")


def read_gguf(folder: Path) -> None:
    convert.load(folder / "x.gguf")
    convert.load_tokenizer(folder / "x.gguf")


def make_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    (folder / "text.txt").write_text((TINY / "sample.txt").read_text()[:2000])


def make_tokens(folder: Path) -> None:
    tokens = np.arange(40).reshape(8, 5)
    np.save(folder / "x.npy", tokens)


def make_archive(folder: Path) -> None:
    tokens = np.arange(40).reshape(8, 5)
    np.savez_compressed(folder / "x.npz", tokens=tokens, weights=np.ones((8, 4)))


def make_run(folder: Path) -> None:
    spectrum(OPERATOR, **RUN).save(folder)


def make_foreign(folder: Path) -> None:
    found = spectrum(OPERATOR, **RUN)
    values, weights = found.ritz_values, found.weights
    text = json.dumps({"ritz_values": values.tolist(), "weights": weights.tolist(), "dim": 50})
    (folder / "plain.json").write_text(text)
    (folder / "own.json").write_text(to_json(found))
    (folder / "x.csv").write_text(to_csv(found))
    np.savez(folder / "x.npz", ritz_values=values, weights=weights, dim=50)


def make_converted(folder: Path) -> None:
    make_checkpoint(folder / "source")
    convert.save(convert.load(folder / "source"), folder / "model")
    shutil.rmtree(folder / "source")


def make_save(folder: Path) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step >= 3:
            raise Stop

    with pytest.raises(Stop):
        spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(folder / "save", every=2), callback=stop)


def read_tokens(path: Path) -> None:
    load_blocks(str(path), "no model", seq_len=4, vocab_size=100)


def read_text(folder: Path) -> None:
    load_blocks(str(folder / "text.txt"), folder, seq_len=8, vocab_size=2000)


def read_foreign(folder: Path) -> None:
    """All files, each of which must be good or refused by itself."""
    errors = []
    for file in sorted(folder.iterdir()):
        try:
            Spectrum.load(file, dim=50)
        except ValueError as error:
            errors.append(error)
    for error in errors:
        raise error


def resume(folder: Path) -> None:
    resumed = spectrum(OPERATOR, **RUN, checkpoint=Checkpoint(folder / "save", every=2, resume=True))
    np.testing.assert_array_equal(resumed.alphas, spectrum(OPERATOR, **RUN).alphas)  # or the damage went unseen


KINDS = {
    "config.json": FileKind(make_checkpoint, "config.json", read_config, 1.5),
    "config.json beside weights": FileKind(make_checkpoint, "config.json", convert.load),
    "index": FileKind(make_index, "*.index.json", convert.load_config),
    "safetensors": FileKind(make_checkpoint, "model.safetensors", convert.load, 1.5),
    "pickle": FileKind(make_pickle, "pytorch_model.bin", convert.load),
    "gguf": FileKind(make_gguf, "x.gguf", read_gguf),
    "tokenizer": FileKind(make_tokenizer, "tokenizer*.json", read_text),
    "text": FileKind(make_tokenizer, "text.txt", read_text),
    "npy": FileKind(make_tokens, "x.npy", lambda folder: read_tokens(folder / "x.npy"), 1.5),
    "npz": FileKind(make_archive, "x.npz", lambda folder: read_tokens(folder / "x.npz"), 1.5),
    "run folder": FileKind(make_run, "spectrum.*", Spectrum.load, 1.5),
    "foreign spectra": FileKind(make_foreign, "*.*", read_foreign, 1.5),
    "converted checkpoint": FileKind(make_converted, "model/**/*", lambda folder: convert.load(folder / "model"), 0.2),
    "unfinished run": FileKind(make_save, "save/**/*", resume, 0.2),
}


# Cases


class Watch:
    """An audit hook, which Python never takes off again: on while a case is read."""

    forbidden = (
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "subprocess.Popen",
        "socket.connect",
        "pty.spawn",
    )

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, _: Any) -> None:
        if self.on and event in self.forbidden:
            self.seen.append(event)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with a kind's good files, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("good")
            KINDS[name].make(made[name])
            KINDS[name].read(Path(shutil.copytree(made[name], tmp_path_factory.mktemp("copy") / "copy")))
        return made[name]

    return make


def damaged(good: Path, kind: FileKind, number: int, place: Path) -> tuple[Path, str]:
    """A copy of the good folder with the damage of case `number`, and what was done."""
    rng = np.random.default_rng(number)
    folder = Path(shutil.copytree(good, place))
    files = sorted(file for file in folder.glob(kind.damaged) if file.is_file())
    file = files[rng.integers(len(files))]
    ways = [flip, truncate, overwrite, replace] + [mutate] * (4 if file.suffix == ".json" else 0)
    way = ways[rng.integers(len(ways))]
    file.write_bytes(way(rng, file.read_bytes()))
    return folder, f"{way.__name__} of {file.relative_to(folder)}"


def outcome(read: Callable[[Path], Any], folder: Path) -> str | None:
    """What is wrong with how the folder was read; None: it loaded, or a sentence of ours refused it."""
    try:
        read(folder)
    except InputError as error:
        text = str(error)
        return None if text and "\n" not in text and len(text) < 1000 else f"no sentence: {text}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error)[-3:])
    return None


def run_cases(name: str, total: int, good: Path, watch: Watch, tmp_path: Path) -> None:
    kind = KINDS[name]
    count = math.ceil(total * kind.share / sum(k.share for k in KINDS.values()))
    failures = []
    for number in range(count):
        folder, done = damaged(good, kind, number, tmp_path / str(number))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        watch.on = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrong = outcome(kind.read, folder)
        finally:
            watch.on = False
            faulthandler.cancel_dump_traceback_later()
        if wrong:
            failures.append(f"case {number}, {done}: {wrong}")
        shutil.rmtree(folder)
    assert not watch.seen
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures)


SLOW_TO_READ = ("converted checkpoint", "unfinished run")


@pytest.mark.parametrize("name", [name for name in KINDS if name not in SLOW_TO_READ])
def test_damaged_files_are_read_or_refused_in_a_sentence(name, good, watch, tmp_path) -> None:
    run_cases(name, QUICK, good(name), watch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_thousand_damaged_files_are_read_or_refused_in_a_sentence(name, good, watch, tmp_path) -> None:
    run_cases(name, ALL, good(name), watch, tmp_path)
