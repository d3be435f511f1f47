"""How the sequences of a run were chosen: what an error over data is about."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field

from jaxhess.errors import InputError

Count = Annotated[int, Field(ge=0, le=2**63)]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The design of a sample of sequences.

    Examples:
        >>> import jaxhess
        >>> jaxhess.Sampling(sequences=80, population=400).fraction
        0.2

    Attributes:
        sequences: In the sample.
        population: Sequences from which they were drawn at random, without replacement: the error is then that about
            all of these, and zero for all of them. None: about any text like this, as if there were no end of it.
        clusters: Of every microbatch the number of its cluster: those with the same number are parts of one document,
            and count as one. None: every microbatch is independent of the others.

    Raises:
        InputError: There is no sequence, or there are more than the population has.
    """

    sequences: Count
    population: Count | None = None
    clusters: tuple[Count, ...] | None = None

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise InputError(f"A sample of {self.sequences} sequences has no error: it needs at least 1.")
        if self.population is not None and self.sequences > self.population:
            raise InputError(f"{self.sequences} sequences cannot be drawn from a population of {self.population}.")

    @property
    def fraction(self) -> float:
        """The share of the population that was drawn; 0 for one without end."""
        return 0.0 if self.population is None else self.sequences / self.population

    def more_to_halve(self) -> int | None:
        """More sequences that halve the error over data; None: all of them are drawn already."""
        if self.population is None:
            return 3 * self.sequences
        if self.sequences == self.population:
            return None
        inverse = (1 / self.sequences - 1 / self.population) / 4 + 1 / self.population
        return max(1, round(1 / inverse) - self.sequences)
