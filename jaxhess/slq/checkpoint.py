"""An unfinished run on disk: what was done so far, saved every few steps and at SIGTERM, to be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.lock import LOCK, lock, unlock
from jaxhess.files.orbax import quiet, reading
from jaxhess.files.output import writing
from jaxhess.files.run_folder import dotted, json_ready, read_json
from jaxhess.krylov.basis import HOST
from jaxhess.operators.facts import MEASURED
from jaxhess.vectors import checksum

FORMAT = "jaxhess-unfinished-4"
IDENTITY, STEPS = "identity.json", "steps"
SAVE = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")
"""Names of saves, whole and begun, in the folder of steps."""


class Interrupted(RuntimeError):
    """A run was stopped by SIGTERM and its state saved.

    Examples:
        >>> import jax.numpy as jnp, jaxhess, os, signal, tempfile
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.arange(1.0, 11.0)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:  # SIGTERM, as a scheduler sends it before it ends a job
        ...         stop, saved = lambda _: os.kill(os.getpid(), signal.SIGTERM), jaxhess.Checkpoint(folder + "/run")
        ...         jaxhess.spectrum(A, steps=4, probes=1, checkpoint=saved, callback=stop)
        ...     except jaxhess.Interrupted as error:
        ...         print(error)
        stopped by SIGTERM after step 1 of probe 1; what was done is saved
    """


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often an unfinished run is saved.

    Each save is a directory of its own (Orbax), complete or not there at all; the one before it is removed afterwards.
    Killed at any moment, also during a save, a run can be resumed from the last one, and ends, on the same mesh, in
    the same bits. (On GPUs that needs `XLA_FLAGS=--xla_gpu_deterministic_ops=true`.)

    Examples:
        >>> import jax.numpy as jnp, jaxhess, tempfile
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.arange(1.0, 11.0)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = jaxhess.Checkpoint(folder + "/unfinished", every=2, resume=True)
        ...     result = jaxhess.spectrum(A, steps=4, probes=1, checkpoint=saved)
        ...     saved.unfinished()  # until the result is saved elsewhere
        ...     saved.remove()
        True

    Attributes:
        folder: Directory of the saves; made if missing.
        every: Lanczos steps between saves.
        resume: Continue the run that the folder holds. It must be the same run; if the folder is empty the run starts.
        identity: What else tells this run from others, by name: a fingerprint of the data, above all. Without one, data
            is known by its mean loss (to 1e-5; 1e-3 in narrow dtypes) and count only.
    """

    folder: str | os.PathLike[str]
    every: int = 10
    resume: bool = False
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, discard: bool = False) -> None:
        """Checks, before the work, that the run can be saved here; `discard`: an unfinished run there is to be removed.

        Raises:
            InputError: `every` is below 1; the folder holds a run of another `identity`, an unfinished run and neither
                `resume` nor `discard` is true, saves without an identity, or anything else.
        """
        if self.every < 1:
            raise InputError(f"A run is saved every {self.every} steps; it must be at least 1.")
        processes.on_first(lambda: self._check_folder(discard))

    def _check_folder(self, discard: bool) -> None:
        known = _identity_in(Path(self.folder))
        if known is None and (Path(self.folder) / STEPS).exists():
            raise InputError(f"{self.folder} holds saves and no {IDENTITY} that says of what run: move it.")
        if known is None and os.path.lexists(self.folder) and (other := _another(Path(self.folder))):
            raise InputError(
                f"{self.folder} holds {other}, which is of no unfinished run: move it, or choose another folder."
            )
        if known is not None and not (self.resume or discard):
            raise InputError(
                f"{self.folder} holds an unfinished run: resume it (--resume, resume=True), discard it "
                "(--overwrite, or remove the folder), or choose another."
            )
        if known is not None and not discard:
            same = {"format": FORMAT, **self.identity}
            _compare({k: v for k, v in known.items() if k in same}, same, self.folder)

    def unfinished(self) -> bool:
        """Whether the folder holds a run. All processes must call this."""
        return processes.on_first((Path(self.folder) / IDENTITY).exists)

    def known(self) -> dict[str, Any]:
        """The identity of the unfinished run in the folder, empty where there is none. All processes must call this."""
        return processes.on_first(lambda: _identity_in(Path(self.folder)) or {})

    def remove(self) -> None:
        """Removes the saves, then the identity file, then the folder if it is empty. Call it when the result is saved.

        Nothing is removed where no identity of ours says that there is an unfinished run, and never anything else.
        """

        def remove() -> None:
            folder = Path(self.folder)
            if _identity_in(folder) is None:
                return
            held = lock(folder)
            try:
                for save in (folder / STEPS).glob("*"):
                    if SAVE.fullmatch(save.name) and not save.is_symlink():
                        shutil.rmtree(save, ignore_errors=True)
                with contextlib.suppress(OSError):  # somebody has put something there
                    (folder / STEPS).rmdir()
                (folder / IDENTITY).unlink()
            finally:
                unlock(folder, held)
            with contextlib.suppress(OSError):
                folder.rmdir()

        processes.on_first(remove)


class Saver:
    """Reads and writes the saves of one run: each process its own parts of the arrays, the first one the rest.

    A save carries checksums: of its record, and of every array's bits. TensorStore has none that would do: of OCDBT
    only the index has a CRC-32C, and Orbax 0.12 writes arrays without one (its zarr v3 has `crc32c` for the index of
    shards, and no option for the chunks). Those of arrays are sums of integers (`jaxhess.vectors.checksum`), the same
    on any mesh: neither side gathers an array, or reads a file again.
    """

    def __init__(self, checkpoint: Checkpoint, identity: dict[str, Any]):
        """Opens the folder.

        Raises:
            InputError: It holds another run (names the differences), another run writes into it, or it cannot be
                written.
        """
        import orbax.checkpoint as ocp

        self.every = checkpoint.every
        self.folder = folder = Path(checkpoint.folder).absolute()
        self._saved: dict[str, Any] = {}
        self._lock: int | None = None
        identity = {"format": FORMAT, **checkpoint.identity, **mesh_independent(json_ready(identity))}

        def claim() -> None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = lock(folder)
                known = _identity_in(folder)
                if known is not None:
                    _compare(known, identity, checkpoint.folder)
                    return
                partial = folder / f".{IDENTITY}.{os.getpid()}"
                partial.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
                os.replace(partial, folder / IDENTITY)

        # Synchronous: the arrays are given to the next segment, which writes into their buffers.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        try:
            processes.on_first(claim)
            with reading(folder / STEPS, self._cure):
                self.manager = ocp.CheckpointManager(folder / STEPS, options=options)
                self.manager.latest_step()
        except BaseException:
            self._release()
            raise

    def latest(self) -> dict[str, Any] | None:
        """The record of the last save, None where there is none.

        Raises:
            InputError: It is damaged.
        """
        import orbax.checkpoint as ocp

        step = self.manager.latest_step()
        if step is None:
            return None
        with self._reading(step):
            self._saved = self.manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            if self._saved["sha256"] != _sha256(self._saved["record"]):
                raise InputError("the record is not the one that was saved")
        return self._saved["record"]

    def restore(self, like: Any) -> Any:
        """The tree of arrays of the last save, in the shapes, dtypes and shardings of this one.

        Raises:
            InputError: It is damaged: a file is missing or cannot be read, or not every bit is as it was saved.
        """
        import orbax.checkpoint as ocp

        leaves, treedef = jax.tree.flatten(like)
        item = {f"{k:05d}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in enumerate(leaves)}
        restore = ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        step = self.manager.latest_step()
        with self._reading(step):
            found = self.manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
            state = [_typed(found[name], x) for name, x in item.items()]
            if bits(state) != self._saved["bits"]:
                raise InputError("its arrays are not those that were saved")
        return jax.tree.unflatten(treedef, state)

    def save(self, step: int, record: dict[str, Any], state: Any = None) -> None:
        """Saves a JSON record and a tree of arrays (or none) as of this many products.

        Raises:
            InputError: The disk is full, or the folder cannot be written.
        """
        import orbax.checkpoint as ocp

        if step in self.manager.all_steps():
            return
        leaves = jax.tree.leaves(state)
        sealed = {"record": record, "sha256": _sha256(record), "bits": bits(leaves)}
        items = {"record": ocp.args.JsonSave(sealed)}
        if state is not None:
            items["state"] = ocp.args.PyTreeSave({f"{k:05d}": x for k, x in enumerate(leaves)})
        with writing(self.folder), quiet():
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)

    def save_or_warn(self, step: int, record: dict[str, Any], state: Any = None, must: bool = False) -> None:
        """Saves. On a full disk a run in one process goes on without the save, unless it `must` be made."""
        try:
            self.save(step, record, state)
        except InputError as error:  # the disk is full, above all
            if must or processes.count() > 1:
                raise
            warnings.warn(f"{error} The run goes on and tries again at the next save.", stacklevel=2)

    def _reading(self, step: int | None) -> contextlib.AbstractContextManager[None]:
        return reading(self.folder / STEPS / str(step), self._cure)

    @property
    def _cure(self) -> str:
        return f"; remove {self.folder} and start again."

    def close(self) -> None:
        self.manager.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            unlock(self.folder, self._lock)
            self._lock = None


def mesh_independent(facts: dict[str, Any]) -> dict[str, Any]:
    """What of a record is the same on any mesh."""
    if not isinstance(facts, dict):
        return facts
    return {k: mesh_independent(v) for k, v in facts.items() if not k.endswith("_per_device") and k not in MEASURED}


@contextlib.contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets inside the block, in place of ending the process; only in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _typed(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The array; made again where JAX forgot that it is in the host's memory (see `jaxhess.krylov.basis.zeros`)."""
    if like.sharding.memory_kind == HOST and jax.typeof(array).memory_space != jax.memory.Space.Host:
        if array.is_fully_addressable:
            return jax.device_put(np.asarray(array), like.sharding)
        parts = {str(shard.index): np.asarray(shard.data) for shard in array.addressable_shards}
        return jax.make_array_from_callback(array.shape, like.sharding, lambda index: parts[str(index)])
    return array


def bits(leaves: list[jax.Array]) -> str:
    """Tells lists of arrays apart by every bit, the same on any mesh; a basis on the host comes row by row."""
    found = []
    for x in leaves:
        if isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host:
            found += [checksum(_row(x, np.int32(k))) for k in range(len(x))]
        else:
            found.append(checksum(x))
    return hashlib.sha256(" ".join(found).encode()).hexdigest()


@jax.jit
def _row(x: jax.Array, k: jax.Array) -> jax.Array:
    return jax.device_put(jax.lax.dynamic_slice_in_dim(x, k, 1, 0), jax.memory.Space.Device)


def _sha256(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _another(folder: Path) -> str | None:
    """Something that is in the place of a new run's folder; a file that a killed run began does not count."""
    if not folder.is_dir():
        return "no folder"
    names = (path.name for path in folder.iterdir() if path.name != LOCK)
    return next((name for name in names if not name.startswith(f".{IDENTITY}.")), None)


def _identity_in(folder: Path) -> dict[str, Any] | None:
    """Of what run the folder holds an unfinished state; None: of none.

    Raises:
        InputError: Its identity is damaged, or not of a run of this library.
    """
    path = folder / IDENTITY
    try:
        if not path.is_file():
            return None
        found = read_json(path)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove {folder} and start again.") from error
    if not isinstance(found, dict) or not str(found.get("format")).startswith(FORMAT[:-1]):
        raise InputError(f"{path} does not say of what run it is: move {folder}, or choose another folder.")
    return found


def _compare(known: dict[str, Any], identity: dict[str, Any], folder: Any) -> None:
    if known.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{folder} holds an unfinished run of an earlier version of jaxhess, which only that version can resume: "
            "finish it there, or start again with --overwrite, or in another folder."
        )
    before, now = dict(dotted(known)), dict(dotted(json.loads(json.dumps(identity))))
    narrow = any(name.startswith("operator") and "16" in str(value) for name, value in before.items())
    differences = [
        f"{name} is {now.get(name, 'absent')} here and {before.get(name, 'absent')} there"
        for name in sorted(before.keys() | now.keys())
        if not _same(name, before.get(name), now.get(name), 1e-3 if narrow else 1e-5)
    ]
    if differences:
        raise InputError(f"{folder} holds an unfinished run with other settings: {'; '.join(differences)}.")


def _same(name: str, a: Any, b: Any, tolerance: float) -> bool:
    if name.split(".")[-1] == "loss" and isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance)  # another mesh sums in another order
    return type(a) is type(b) and a == b
