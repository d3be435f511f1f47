"""How many blocks' products fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxhess.distributed import processes
from jaxhess.distributed.memory import available_bytes
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.facts import shares_work


def as_many_as_fit(
    compiled: Callable[[int], jax.stages.Compiled], operator: LinearOperator, count: int, resident: int = 0
) -> int:
    """The most products at once, in rounds of nearly equal length, whose program takes nine tenths of what is left.

    Compiles the program for as many as are tried: usually the one that then runs.

    Args:
        compiled: The program for so many.
        operator: Whose vectors tell the devices; one product at a time where it has no work to share.
        count: Products in all.
        resident: Bytes per device that the run needs beside the program.
    """
    if not shares_work(operator):
        return 1
    together = count
    while together > 1:
        memory = compiled(together).memory_analysis()
        if memory is None:
            return 1
        needed = max(processes.gathered(memory.temp_size_in_bytes + memory.output_size_in_bytes + resident))
        left = 0.9 * min(processes.gathered(available_bytes(jax.tree.leaves(operator.shape_dtype))))
        if needed <= left:
            break
        fewer = max(1, min(together - 1, int(together * left / needed)))
        together = -(-count // -(-count // fewer))
    return together
