"""All processes exit together: when one fails, is killed, or loses its machine, the others print that and exit too.

A process that waits in a collective is blocked in C++ and can check nothing; a thread does it. Every second each
process updates its heartbeat in the key-value store and reads whether any has failed; process 0 also reads whether all
heartbeats still change. The first failure that is recorded is the one that all report.

The store is in process 0. If process 0 is gone, JAX aborts the others at once with its own message. So every process
starts a small child process (`_witness`), which prints a message if its parent ends without printing one.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from jaxhess.distributed import processes

SILENCE = 30.0
"""Seconds without a heartbeat after which a process counts as gone. Under load a machine stalls for some seconds."""

GRACE = 3.0
"""Seconds that a process has to find the same error by itself: bad options are then reported once."""

FAILURE, PULSE, LEFT = "jaxhess/failure", "jaxhess/pulse", "jaxhess/left"

DONE = "done"
WITNESS = f"""
import sys
last = [line.strip() for line in sys.stdin][-1]
if last != {DONE!r}:
    sys.stderr.write(last + "\\n")
"""

_over = threading.Event()
_remark = ""
_witness: subprocess.Popen[str] | None = None
_thread: threading.Thread | None = None


def bring_a_witness(count: int, process: int) -> None:
    """Starts the child process, before there is any connection that it could inherit and keep open."""
    global _witness
    _witness = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WITNESS], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    _tell(
        f"error: process {process} of {count} was killed, or could not join the others: process 0 is not where "
        f"{processes.PLAIN[0]} or the launcher says, or some did not start"
    )


def start() -> None:
    """Starts the thread; `finish` ends it. All processes are there."""
    global _thread
    _tell(_last_words())
    _thread = threading.Thread(target=_watch, name="watch", daemon=True)
    _thread.start()


def dismiss() -> None:
    """Ends the child process without a message: this process prints its own."""
    _tell(DONE)


def remark(sentence: str) -> None:
    """Sets what to add when this process ends because of another, such as where the last checkpoint is."""
    global _remark
    _remark = sentence
    _tell(f"{_last_words()}; {sentence}")


def finish() -> None:
    """Waits until every process has finished, and leaves the run."""
    if processes.count() > 1:
        processes.meet("jaxhess/finish")
        _over.set()
        if _thread is not None:
            _thread.join(10)  # it may be at the store
        jax.distributed.shutdown()
        dismiss()


def fail(words: str, status: int) -> NoReturn:
    """Ends this process and all others. An error that all have is printed once, by the first."""
    first = _written_down(words)
    if first["process"] == processes.index():
        _say(words)
    elif first["words"] != words:
        _say(_of_another(first))
    _leave(status)


def await_verdict() -> None:
    """Waits until the thread ends this process because another failed or is gone; returns if that does not happen.

    For a process whose collective failed: the cause is probably in another process.
    """
    time.sleep(SILENCE + 2 * GRACE)


def _watch() -> None:
    seen: dict[str, tuple[str, float]] = {}
    beats, looked = 0, time.monotonic()
    while not _over.wait(1.0):
        if time.monotonic() - looked > SILENCE / 2:
            seen.clear()  # this process was stopped itself
        looked = time.monotonic()
        try:
            beats += 1
            _store().key_value_set(f"{PULSE}/{processes.index():09d}", str(beats), allow_overwrite=True)
            if processes.index() == 0:
                _look_for_silence(seen)
            failure = _failure()
        except jax.errors.JaxRuntimeError:
            continue  # process 0 is gone, and JAX ends this one
        if failure is not None and not _over.wait(0 if failure["gone"] else GRACE):
            _say(_of_another(failure))
            _leave(1)


def _look_for_silence(seen: dict[str, tuple[str, float]]) -> None:
    """Records the first process whose heartbeat has stopped. `seen`: the last one of each, and since when."""
    now = time.monotonic()
    for key, beat in _store().key_value_dir_get(PULSE):
        if seen.get(key, ("", 0))[0] != beat:
            seen[key] = (beat, now)
        elif now - seen[key][1] > SILENCE:
            process = int(key.rsplit("/", 1)[1])
            _written_down("it was killed, or its machine is down or out of memory", process, gone=True)
            return


def _written_down(words: str, process: int | None = None, gone: bool = False) -> dict[str, Any]:
    """The first failure: this one, unless there is one already."""
    process = processes.index() if process is None else process
    failure = {"process": process, "words": words, "gone": gone}
    try:
        _store().key_value_set(f"{FAILURE}/first", json.dumps(failure))
    except jax.errors.JaxRuntimeError:  # there is one
        return _failure() or failure
    return failure


def _failure() -> dict[str, Any] | None:
    found = _store().key_value_dir_get(FAILURE)
    return json.loads(found[0][1]) if found else None


def _of_another(failure: dict[str, Any]) -> str:
    what = "is gone" if failure["gone"] else "failed"
    words = failure["words"].removeprefix("error: ").rstrip(".")
    return f"error: process {failure['process']} {what}: {words}{'; ' if _remark else ''}{_remark}"


def _last_words() -> str:
    return (
        f"error: process {processes.index()} of {processes.count()} was killed, or JAX aborted it because another is "
        "gone, process 0 if nothing else is said above"
    )


def _tell(words: str) -> None:
    """Replaces the message of the child process."""
    if _witness is not None and _witness.stdin is not None:
        with contextlib.suppress(OSError):
            _witness.stdin.write(f"{words}\n")
            _witness.stdin.flush()


def _say(words: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


def _leave(status: int) -> NoReturn:
    """Exits at once, without the clean-up in which JAX would wait for the others. Process 0 exits last: without it JAX
    aborts the others before they have printed their error."""
    dismiss()
    try:
        _store().key_value_set(f"{LEFT}/{processes.index():09d}", "")
        failure = _failure()
        expected = processes.count() - bool(failure and failure["gone"])
        patience = time.monotonic() + 4 * GRACE
        while processes.index() == 0 and time.monotonic() < patience:
            if len(_store().key_value_dir_get(LEFT)) >= expected:
                patience = 0
            time.sleep(0.2)
    finally:
        os._exit(status)


def _store() -> Any:
    return processes.client()
