"""How long a program compiled for a GPU takes at least: a roofline of each of its kernels.

A kernel takes the larger of two times: its operations at the rate of matrix products, its bytes at the rate of memory.
The program takes their sum, for a GPU runs them one after the other, and the launch of each. Collectives run beside
them from where the program starts them to where it waits for them, one at a time. Of a conditional's branches the one
that takes less counts: the other is for a rare case (a norm whose squares overflow, a step that must be measured anew).
"""

from __future__ import annotations

import dataclasses
import re

from jaxhess.errors import InputError
from jaxhess.plan.collectives import Exchange, exchanges_of
from jaxhess.plan.hardware import Accelerator, accelerator
from jaxhess.plan.hlo import PALLAS, Computation, Instruction, Program, bytes_of, callees, kernel_bytes, kernel_products

MATMUL = 0.8
"""Share of a card's peak rate that large matrix products are taken to reach."""

MEMORY = 0.875
"""Share of a memory's data-sheet rate that kernels are taken to reach."""

LINK = 0.8
"""Share of a link's data-sheet rate that collectives are taken to reach."""

CUSTOM = 0.5
"""Share of the peak rate that a kernel of our own (Pallas) is taken to reach."""

LAUNCH = 2e-6
"""Seconds between the end of a kernel and the beginning of the next."""

CAUSES = ("weights", "attention", "vocabulary", "vectors", "communication", "layers", "other")
"""What kernels are for: matrix products with weights and the slices of stacked weights; attention; logits and loss;
vectors and sums over microbatches; collectives; what else is in a layer; what has no source line."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernels of one source line and one cause together, in one step; all numbers are those of one device.

    Examples:
        >>> from jaxhess import plan
        >>> plan.Kernels("model.py:3 norm", "layers", count=2, flops=0, bytes=2e9, seconds=5e-4).bytes
        2000000000.0

    Attributes:
        source: `file:line function`; what kind of instruction, where the compiler does not say.
        cause: One of `CAUSES`.
        count: How many run.
        flops: Operations of matrix products.
        bytes: Read from memory and written to it; of a collective, received.
        seconds: Without launches; of a collective, whether or not other kernels run beside it.
    """

    source: str
    cause: str
    count: float
    flops: float
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What one step of a Lanczos segment takes on one device, at least; made by `roofline`.

    Examples:
        >>> from jaxhess import plan
        >>> from jaxhess.plan.hlo import Program
        >>> text = r'''
        ... ENTRY main (x: f32[8]) -> f32[8] {
        ...   x = f32[8] parameter(0)
        ...   ROOT y = f32[8] negate(%x)
        ... }'''
        >>> plan.roofline(Program.read(text), "H100").by_cause()["other"][0]  # bytes
        64.0

    Attributes:
        seconds: In all.
        matmul_seconds: Of the operations of matrix products alone.
        flops: Operations of matrix products.
        bytes: Read from memory and written to it.
        launches: Kernels.
        launch_seconds: Between them.
        communication_seconds: Of all collectives.
        waiting_seconds: Of them where nothing else runs.
        kernels: By source line and cause; those that take longest first.
    """

    seconds: float
    matmul_seconds: float
    flops: float
    bytes: float
    launches: float
    launch_seconds: float
    communication_seconds: float
    waiting_seconds: float
    kernels: tuple[Kernels, ...]

    @property
    def ceiling(self) -> float:
        """The share of the attainable rate of matrix products that the program can reach at most."""
        return self.matmul_seconds / self.seconds if self.seconds else 0.0

    def by_cause(self) -> dict[str, tuple[float, float]]:
        """(bytes, seconds) for every cause there is."""
        found = {cause: [k for k in self.kernels if k.cause == cause] for cause in CAUSES}
        return {c: (sum(k.bytes for k in ks), sum(k.seconds for k in ks)) for c, ks in found.items() if ks}


def roofline(program: Program, card: str) -> Roofline:
    """The roofline of one step of a Lanczos segment that was compiled for this card.

    Examples:
        >>> from jaxhess import plan
        >>> from jaxhess.plan.hlo import Program
        >>> text = '''
        ... ENTRY main (x: f32[1024,1024]) -> f32[1024,1024] {
        ...   x = f32[1024,1024] parameter(0)
        ...   ROOT y = f32[1024,1024] negate(%x)
        ... }'''
        >>> found = plan.roofline(Program.read(text), "H200")
        >>> found.bytes, found.launches
        (8388608.0, 1.0)

    Args:
        program: If it has a loop of unknown length, which are the steps, one passage of it; otherwise all of it.
        card: What it was compiled for, a name in `jaxhess.plan.hardware.ACCELERATORS`.

    Raises:
        InputError: The card is not in the table, or its rate in products of some dtype is not.
    """
    run = _Run(program, accelerator(card))
    seconds = run.seconds(_step(program))
    kernels = sorted(run.found.values(), key=lambda k: -k.seconds)
    local = [k for k in kernels if k.cause != "communication"]
    launches = sum(k.count for k in kernels)
    return Roofline(
        seconds,
        run.matmul_seconds,
        sum(k.flops for k in kernels),
        sum(k.bytes for k in local),
        launches,
        LAUNCH * launches,
        sum(k.seconds for k in kernels if k.cause == "communication"),
        run.waiting,
        tuple(kernels),
    )


def whole_copies(program: Program, least: float) -> dict[str, float]:
    """Kernels of a step that only copy or transpose, with a result of at least so many bytes: bytes by name.

    Examples:
        >>> from jaxhess import plan
        >>> from jaxhess.plan.hlo import Program
        >>> text = r'''
        ... ENTRY main (x: f32[8,9]) -> f32[9,8] {
        ...   x = f32[8,9] parameter(0)
        ...   ROOT y = f32[9,8] transpose(%x)
        ... }'''
        >>> plan.whole_copies(Program.read(text), least=100)
        {'y': 288.0}
    """
    found: dict[str, float] = {}

    def look(name: str) -> None:
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode in ("while", "conditional", "call"):
                for inner in callees(instruction):
                    look(inner)
            elif bytes_of(instruction.type) >= least and _only_moves(program, instruction, computation):
                found[instruction.name] = float(bytes_of(instruction.type))

    look(_step(program))
    return found


_MOVES = frozenset(
    ["parameter", "constant", "bitcast", "copy", "transpose", "reshape", "convert", "get-tuple-element", "tuple"]
)


def _only_moves(program: Program, instruction: Instruction, computation: Computation) -> bool:
    if instruction.opcode in ("copy", "transpose"):
        source = computation.instructions[instruction.operands[0]]
        filled = {"broadcast", "constant"}  # what is copied is one number: the start of a sum or a stack
        inner = (
            program.computations[callees(source)[0]].instructions.values() if source.opcode == "fusion" else [source]
        )
        return not {i.opcode for i in inner} <= filled
    if instruction.opcode != "fusion":
        return False
    inner = program.computations[callees(instruction)[0]].instructions.values()
    opcodes = {i.opcode for i in inner}
    return opcodes <= _MOVES and bool(opcodes & {"copy", "transpose", "bitcast", "reshape", "convert"})


def _step(program: Program) -> str:
    """The body of the loop over steps; the whole program where there is none."""
    for computation in program.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode == "while" and instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"') is None:
                body = instruction.attribute(r"\bbody=%?([\w.-]+)")
                assert body is not None
                return body
    return program.entry


class _Run:
    """A run of the program on a clock with two hands: kernels, and collectives beside them."""

    def __init__(self, program: Program, device: Accelerator):
        self.program, self.device = program, device
        self.exchanges = exchanges_of(program)
        self.found: dict[tuple[str, str], Kernels] = {}
        self.matmul_seconds = self.waiting = 0.0

    def seconds(self, name: str, times: float = 1.0) -> float:
        """Of the computation, run once; what it does is added up `times` over."""
        computation = self.program.computations[name]
        now = busy = 0.0  # where the kernels are, and until when the links are taken
        arrives: dict[str, float] = {}
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = float(instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
                body = instruction.attribute(r"\bbody=%?([\w.-]+)")
                assert body is not None
                now += trips * self.seconds(body, trips * times)
            elif opcode == "conditional":
                branches = [_Run(self.program, self.device) for _ in callees(instruction)]
                taken = [run.seconds(inner) for run, inner in zip(branches, callees(instruction), strict=True)]
                now += self.seconds(callees(instruction)[taken.index(min(taken))], times)
            elif opcode == "call" or (opcode == "async-start" and instruction.name not in self.exchanges):
                now += sum(self.seconds(inner, times) for inner in callees(instruction))
            elif moved := self.exchanges.get((name, instruction.name)):
                took = sum(self._link_seconds(exchange) for exchange in moved)
                busy = max(busy, now) + took
                self._add(instruction, "communication", times, 0.0, sum(e.share * e.received for e in moved), took)
                if opcode.endswith("-start"):
                    arrives[instruction.name] = busy
                else:
                    self.waiting += times * (busy - now)
                    now = busy
                now += LAUNCH
            elif opcode.endswith("-done"):
                end = arrives.get(instruction.operands[0], now)
                self.waiting += times * max(0.0, end - now)
                now = max(now, end)
            else:
                now += self._kernel(instruction, computation, times)
        return now

    def _kernel(self, instruction: Instruction, computation: Computation, times: float) -> float:
        moved = kernel_bytes(self.program, instruction, computation)
        if moved is None:
            return 0.0
        products = kernel_products(self.program, instruction, computation)
        flops = sum(products.values())
        operations = sum(count / (self._share(instruction) * self._rate(unit)) for unit, count in products.items())
        took = max(operations, moved / (MEMORY * self.device.bandwidth))
        self.matmul_seconds += times * operations
        self._add(instruction, self._cause(instruction, flops), times, flops, moved, took)
        return took + LAUNCH

    def _share(self, instruction: Instruction) -> float:
        return CUSTOM if instruction.attribute(r'custom_call_target="([^"]*)"') == PALLAS else MATMUL

    def _rate(self, unit: str) -> float:
        if unit not in self.device.peaks:
            raise InputError(f"The rate of {self.device.kind} in {unit} products is not in the table.")
        return self.device.peaks[unit]

    def _link_seconds(self, exchange: Exchange) -> float:
        if exchange.reach <= self.device.node:
            rate = self.device.link
        else:  # what enters a server comes over the ports of all the group's devices there, and goes on over the links
            inside = max(1, self.device.node * exchange.group // exchange.reach)
            rate = min(self.device.link, self.device.network * inside)
        return exchange.share * exchange.received / (LINK * rate)

    def _source(self, instruction: Instruction) -> str:
        if instruction.opcode == "fusion":
            inner = self.program.computations[callees(instruction)[0]]
            for within in inner.instructions.values():
                if within.opcode == "dot" and (source := self.program.source(within)):
                    return source
        return self.program.source(instruction)

    def _cause(self, instruction: Instruction, flops: float) -> str:
        file = self._source(instruction).partition(":")[0]
        for pattern, cause in _FILES:
            if re.search(pattern, file):
                return cause
        if re.search("models/(layers|decoder)", file):
            moves = re.search(r"dynamic_(update_)?slice|dynamic_(update_)?index", instruction.attributes)
            return "weights" if flops or moves else "layers"
        return "other"

    def _add(self, i: Instruction, cause: str, times: float, flops: float, moved: float, seconds: float) -> None:
        source = self._source(i) or i.opcode
        file, _, rest = source.partition(":")
        source = re.sub(r"^.*/(?=jaxhess/)", "", file) + (f":{rest}" if rest else "")
        old = self.found.get((source, cause), Kernels(source, cause, 0.0, 0.0, 0.0, 0.0))
        self.found[source, cause] = Kernels(
            source,
            cause,
            old.count + times,
            old.flops + times * flops,
            old.bytes + times * moved,
            old.seconds + times * seconds,
        )


_FILES = (
    ("models/.*attention|models/rotary", "attention"),
    ("models/(vocabulary|losses|likelihood)", "vocabulary"),
    ("jaxhess/(krylov|operators|vectors)", "vectors"),
)
