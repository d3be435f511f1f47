"""How a command ends: on bad input with one sentence and a non-zero exit, not with a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError)
"""What the library raises at the door. Set `JAXHESS_TRACEBACK=1` to see where."""


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Turns an error of `USER_ERRORS` inside the block into `error: ...` on standard error and exit status 2."""
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get("JAXHESS_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
