"""How a command ends: on bad input with one sentence and a non-zero exit, not with a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import jax

from jaxhess.checkpoint import Interrupted

USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError)
"""What the library raises at the door. Set `JAXHESS_TRACEBACK=1` to see where."""

OUT_OF_MEMORY = (
    "Memory is exhausted: lower --microbatch, --query-chunk or --logit-chunk, use --reorthogonalize none, "
    "a narrower --dtype, or cut the parameters over more devices (--mesh fsdp=N)."
)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Turns an error of `USER_ERRORS` inside the block, or exhausted memory, into `error: ...` and exit status 2."""
    try:
        yield
    except (*USER_ERRORS, MemoryError, jax.errors.JaxRuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
            text = f"{OUT_OF_MEMORY} ({text[:200]})"
        elif not isinstance(error, USER_ERRORS):
            raise
        if os.environ.get("JAXHESS_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {text}\n")
        raise SystemExit(2) from None
    except Interrupted as stopped:
        sys.stderr.write(f"{stopped}; go on with --resume\n")
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
