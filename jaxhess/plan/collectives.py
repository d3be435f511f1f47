"""Bytes that a compiled program moves between devices, by kind of collective.

Counted is what each device receives in a ring over its group of n: (n-1)/n of what an all-gather returns, (n-1)/n of
what a reduce-scatter or an all-to-all is given, twice that for an all-reduce (a reduce-scatter and an all-gather), all
of a permutation.

XLA writes every sum over devices as an all-reduce. Its compilers for GPU and TPU then make a reduce-scatter of one
whose every use is a slice (`ReduceScatterCreator`), and one of two that are added (`AllReduceReassociate`,
`ReduceScatterReassociate`): the two halves of a tangent. Its CPU compiler, which makes the plans without a card,
does neither, so both are recognised here and counted as what they become: as long as nothing else uses them, which is
these passes' own condition.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import jax
import numpy as np

from jaxhess.errors import InputError
from jaxhess.plan.hlo import Computation, Instruction, Program, arrays_of, bytes_of, callees, read_program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What goes through one kind of collective, over groups of one kind, in one run of a program on each device.

    Attributes:
        kind: One of `KINDS`.
        group: Devices that exchange with each other.
        reach: The largest difference between the numbers of two of them, plus one: within a node of so many devices it
            stays inside.
        largest: Entries of the largest array: 1 where only scalars are exchanged.
        count: Arrays exchanged.
        received: Bytes.
    """

    kind: str
    group: int
    reach: int
    largest: int
    count: float
    received: float


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One array of one collective, with the attributes of `Traffic`; `share` is below 1 where it is one of several that
    are added up before they are exchanged."""

    kind: str
    group: int
    reach: int
    entries: int
    share: float
    received: float

    @property
    def key(self) -> tuple[str, int, int]:
        return self.kind, self.group, self.reach


def exchanges_of(program: Program) -> dict[tuple[str, str], list[Exchange]]:
    """The arrays that every collective exchanges, by (computation, instruction).

    Raises:
        InputError: The groups of a collective cannot be read.
    """
    sums = _Sums(program)
    found = {}
    for name, computation in program.computations.items():
        for instruction in computation.instructions.values():
            if exchanged := _exchanges(instruction, computation, sums):
                found[name, instruction.name] = exchanged
    return found


def collective_traffic(compiled: jax.stages.Compiled | Program, unknown_trips: int | None = None) -> list[Traffic]:
    """What one run moves between devices, by kind and group; `unknown_trips`: see `Program.total`.

    Raises:
        InputError: A loop around a collective has no known trip count, or the groups of a collective cannot be read.
    """
    program = read_program(compiled)
    exchanges = exchanges_of(program)
    keys = sorted({exchange.key for found in exchanges.values() for exchange in found})

    def total(key: tuple[str, int, int], what: str) -> float:
        def cost(instruction: Instruction, computation: Computation) -> float:
            found = exchanges.get((computation.name, instruction.name), ())
            return sum(getattr(exchange, what) for exchange in found if exchange.key == key)

        return program.total(cost, unknown_trips=unknown_trips)

    def largest(key: tuple[str, int, int]) -> int:
        return max(exchange.entries for found in exchanges.values() for exchange in found if exchange.key == key)

    traffic = [Traffic(*key, largest(key), total(key, "share"), total(key, "received")) for key in keys]
    return [t for t in traffic if t.count]


def bytes_by_kind(traffic: list[Traffic]) -> dict[str, float]:
    """Bytes that each device receives, for every kind in `KINDS`."""
    return {kind: sum(t.received for t in traffic if t.kind == kind) for kind in KINDS}


def replica_groups(instruction: Instruction) -> np.ndarray:
    """The devices that exchange with each other: [groups, devices in each].

    Raises:
        InputError: They are written in a way that is not known here.
    """
    text = instruction.attributes
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _arranged(found[2], found[3]).reshape(_numbers(found[1]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", text):
        names = re.findall(r"'([^']*)'=", found[1])
        sizes = [int(n) for n in re.findall(r"'=(\d+)", found[1])]
        chosen = re.findall(r"'([^']*)'", found[3])
        ids = np.arange(np.prod(sizes))
        if listed := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", (found[2] or "").strip()):
            ids = _arranged(listed[1], listed[2])
        if (found[2] is None or listed) and set(chosen) <= set(names) and ":" not in found[3]:
            axes = [names.index(name) for name in chosen]
            kept = [i for i in range(len(names)) if i not in axes]
            members = int(np.prod([sizes[i] for i in axes]))
            return ids.reshape(sizes).transpose(*kept, *axes).reshape(-1, members)
    raise InputError(f"The groups of {instruction.name} cannot be read: {text[:200]}.")


def _arranged(shape: str, order: str | None) -> np.ndarray:
    """The numbers from 0 in an array of this shape, transposed."""
    sizes = _numbers(shape)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else None)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


_SAME = ("bitcast", "copy", "reshape", "transpose", "convert", "get-tuple-element", "all-reduce-done")
"""Opcodes whose result is their operand, laid out or stored otherwise."""


def _exchanges(instruction: Instruction, computation: Computation, sums: _Sums) -> list[Exchange]:
    """The arrays that a collective exchanges; none for an instruction that is not one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return []
    given = [operand.type for operand in computation.operands(instruction)]
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes)
        reach = 1 + max((abs(int(a) - int(b)) for a, b in pairs), default=0)
        return [Exchange(kind, 2, reach, _entries(t), 1.0, float(bytes_of(t))) for t in given if reach > 1]
    groups = replica_groups(instruction)
    group, reach = groups.shape[1], int(np.ptp(groups, axis=1).max()) + 1
    around = (group - 1) / group
    if group == 1:
        return []
    whole = group if kind == "all-gather" else 1
    found = []
    for index, t in enumerate(given):
        became, passes, share = kind, whole, 1.0
        if kind == "all-reduce":
            sliced, summands = sums.fate(computation, instruction, index if len(given) > 1 else None)
            became, passes, share = ("reduce-scatter", 1, 1 / summands) if sliced else (kind, 2, 1 / summands)
        found.append(Exchange(became, group, reach, whole * _entries(t), share, share * passes * around * bytes_of(t)))
    return found


def _entries(type_text: str) -> int:
    return sum(math.prod(shape) for _, shape in arrays_of(type_text))


class _Sums:
    """What becomes of the results of all-reduces, through bitcasts, conversions and fusions."""

    def __init__(self, program: Program):
        self.program = program
        self.users: dict[str, dict[str, list[Instruction]]] = {}
        self.fusions: dict[str, tuple[Computation, Instruction]] = {}
        for computation in program.computations.values():
            users = self.users.setdefault(computation.name, {})
            for instruction in computation.instructions.values():
                for name in dict.fromkeys(instruction.operands):
                    users.setdefault(name, []).append(instruction)
                if instruction.opcode == "fusion":
                    self.fusions[callees(instruction)[0]] = computation, instruction

    def fate(self, computation: Computation, reduced: Instruction, index: int | None) -> tuple[bool, int]:
        """Whether one result is only sliced in the end, and how many all-reduces are only added up with it, itself
        among them."""
        groups = replica_groups(reduced)
        sliced, summands = False, 1
        readers = list(self._readers(computation, reduced.name, index))
        while readers:
            within, reader, _ = readers[0]
            if not sliced and all(r.opcode == "dynamic-slice" for _, r, _ in readers):
                sliced = True
            elif all(r.opcode == "add" for _, r, _ in readers):  # several where XLA has copied it into its users
                others = [self._summands(w, o, groups) for w, r, n in readers for o in r.operands if o != n]
                if not others or not all(others) or len(set(others)) > 1:
                    break
                summands += others[0]
            else:
                break
            readers = list(self._readers(within, reader.name))
        return sliced, summands

    def _summands(self, computation: Computation, name: str, groups: np.ndarray) -> int:
        """How many all-reduces over these groups a value is the sum of; 0 where it is something else."""
        instruction = computation.instructions[name]
        if instruction.opcode in _SAME or instruction.opcode == "dynamic-slice":
            return self._summands(computation, instruction.operands[0], groups)
        if instruction.opcode == "parameter" and computation.name in self.fusions:
            outer, fusion = self.fusions[computation.name]
            return self._summands(outer, fusion.operands[int(instruction.literal)], groups)
        if instruction.opcode == "add":
            parts = [self._summands(computation, operand, groups) for operand in instruction.operands]
            return sum(parts) if all(parts) else 0
        is_sum = instruction.opcode.startswith("all-reduce")
        return int(is_sum and np.array_equal(replica_groups(instruction), groups))

    def _readers(
        self, computation: Computation, name: str, index: int | None = None
    ) -> Iterator[tuple[Computation, Instruction, str]]:
        """What reads a value, with the name that it reads; `index` chooses one of a tuple."""
        for user in self.users[computation.name].get(name, []):
            if user.opcode == "get-tuple-element":
                if index is None or user.attribute(r"index=(\d+)") == str(index):
                    yield from self._readers(computation, user.name)
            elif user.opcode in _SAME:
                yield from self._readers(computation, user.name, index)
            elif user.opcode == "fusion":
                inner = self.program.computations[callees(user)[0]]
                places = {str(place) for place, operand in enumerate(user.operands) if operand == name}
                for parameter in inner.instructions.values():
                    if parameter.opcode == "parameter" and parameter.literal in places:
                        yield from self._readers(inner, parameter.name)
            else:
                yield computation, user, name
