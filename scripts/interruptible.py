"""Imported first by a command that is run: Ctrl-C while its libraries are loaded ends it with one word.

From then on `jaxhess.command.one_sentence` does. It has to be a file of its own, because whatever is in a package loads
JAX first.
"""

import os
import signal


def _end(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
