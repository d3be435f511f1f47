"""Facts read off a compiled program: floating-point operations of its matrix products, bytes moved, memory.

`compiled.cost_analysis()` counts the body of a loop once however often it runs, so it says nothing about scanned
layers or microbatches. Here the optimised HLO is read instead, and what a loop's body costs is multiplied by its trip
count, which XLA writes beside every loop whose length it knows (all `scan`s, and `fori_loop`s of constant bounds).
Programs over several devices are those of one device: so are all counts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator

import jax

from jaxhess.errors import InputError


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = type opcode(operands), attributes`; `operands` are names, without `%`.

    `literal` stands where the operands would: the number of a parameter, the value of a constant.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of every array in the result: one, or those of a tuple."""
        return arrays_of(self.type)

    def attribute(self, pattern: str) -> str | None:
        """First group of the regular expression in the attributes, None where it does not occur."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    def dimensions(self, key: str) -> list[int]:
        """Numbers of `key={0,1}`; empty where the attribute is missing."""
        return [int(n) for n in (self.attribute(rf"\b{key}={{([\d,]*)}}") or "").split(",") if n]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; a fusion, a loop's body and the entry are computations of their own."""

    name: str
    instructions: dict[str, Instruction]

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions that compute the operands."""
        return (self.instructions[name] for name in instruction.operands)


Cost = Callable[[Instruction, Computation], float]


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of an HLO module, and sums over everything it executes."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, str] = dataclasses.field(default_factory=dict)
    """By `stack_frame_id`: the place, `file:line function`, of the innermost call that made an instruction."""

    @classmethod
    def read(cls, text: str) -> Program:
        """The program in HLO text, as `compiled.as_text()` prints it.

        Raises:
            InputError: There is no entry computation in the text: it is not HLO.
        """
        computations: dict[str, Computation] = {}
        entry: str | None = None
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
                name, lines = header.group(2), {}
                computations[name] = Computation(name, lines)
                entry = name if header.group(1) else entry
            elif instruction := _instruction(re.sub(r'\bir = "[^"]*"', 'ir = ""', line)):  # a Pallas kernel's code
                lines[instruction.name] = instruction
        if entry is None:
            raise InputError("No ENTRY computation in the text: this is not an HLO module.")
        return cls(computations, entry, _stack_frames(text))

    def source(self, instruction: Instruction) -> str:
        """Where it comes from, `file:line function`; empty where the compiler does not say."""
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        return "" if frame is None else self.frames.get(int(frame), "")

    def total(self, cost: Cost, *, inside_fusions: bool = True, unknown_trips: int | None = None) -> float:
        """The sum of `cost(instruction, its computation)` over all executed instructions.

        What is inside a loop counts as often as the loop runs; of a conditional's branches the dearest counts.

        Args:
            cost: Of one instruction, without the computations it calls.
            inside_fusions: Whether the instructions of a fusion are looked at, beside the fusion itself.
            unknown_trips: How often loops run whose trip count is not in the program, where the caller knows it: the
                steps of a Lanczos segment.

        Raises:
            InputError: A loop that costs something has no known trip count, and `unknown_trips` does not give it.
        """

        @functools.cache
        def of(name: str) -> float:
            computation = self.computations[name]
            return sum(cost(i, computation) + called(i) for i in computation.instructions.values())

        def called(instruction: Instruction) -> float:
            names = [name for name in callees(instruction) if name in self.computations]
            if instruction.opcode == "conditional":
                return max((of(name) for name in names), default=0.0)
            if instruction.opcode == "fusion" and not inside_fusions:
                return 0.0
            once = sum(of(name) for name in names)
            if instruction.opcode != "while" or once == 0:
                return once
            trips = instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"')
            if trips is None and unknown_trips is None:
                raise InputError(
                    f"Loop {instruction.name} has no known trip count, so what it costs cannot be counted: "
                    "its bounds must be constants when the program is compiled."
                )
            return (unknown_trips or 0) * once if trips is None else int(trips) * once

        return of(self.entry)


def matmul_flops(compiled: jax.stages.Compiled | Program, unknown_trips: int | None = None) -> float:
    """Floating-point operations of all matrix products in one run of the program, on each device: 2 m n k a product.

    Plain dots wherever they are (fusions, calls, loops times their trip counts, the dearest branch of a conditional)
    and, on GPUs, cuBLAS calls. `unknown_trips`: see `Program.total`.

    Raises:
        InputError: A loop around a product has no known trip count, or there is a product of a kind that is not
            counted: a convolution, a ragged or scaled dot, a library call other than cuBLAS.
    """
    return read_program(compiled).total(_matmul_flops, unknown_trips=unknown_trips)


def bytes_accessed(compiled: jax.stages.Compiled | Program, unknown_trips: int | None = None) -> float:
    """Bytes that the kernels of one run read and write on each device, if no cache held anything between two of them.

    Every kernel counts its operands and its result; a fusion that reads a slice of an operand, or updates one in place,
    counts that slice. `unknown_trips`: see `Program.total`.

    Raises:
        InputError: A loop has no known trip count.
    """
    program = read_program(compiled)

    def cost(instruction: Instruction, computation: Computation) -> float:
        return kernel_bytes(program, instruction, computation) or 0.0

    return program.total(cost, inside_fusions=False, unknown_trips=unknown_trips)


def kernel_bytes(program: Program, instruction: Instruction, computation: Computation) -> float | None:
    """Bytes that a kernel reads and writes, as `bytes_accessed` counts them; None for what is no kernel."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return None
    operands = list(computation.operands(instruction))
    if instruction.opcode == "fusion":
        return _fusion_bytes(program.computations[callees(instruction)[0]], instruction)
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2.0 * bytes_of(instruction.type)
    if instruction.opcode in _UPDATES:
        return 2.0 * bytes_of(operands[_UPDATES[instruction.opcode]].type)
    return float(bytes_of(instruction.type) + sum(bytes_of(operand.type) for operand in operands))


def kernel_products(program: Program, instruction: Instruction, computation: Computation) -> dict[str, float]:
    """Operations of a kernel's matrix products, by what computes them.

    These are bfloat16, float16, tfloat32 (float32 inputs at less than the highest precision) and float32; a product
    by an algorithm of several passes, such as `dot_bf16_bf16_f32_x3`, is so many products in the narrower dtype.
    """
    if instruction.opcode == "fusion":
        inner = program.computations[callees(instruction)[0]]
        places = [(i, inner) for i in inner.instructions.values()]
    else:
        places = [(instruction, computation)]
    found: dict[str, float] = {}
    for place, within in places:
        if flops := _matmul_flops(place, within):
            unit, passes = _unit(place, within)
            found[unit] = found.get(unit, 0.0) + passes * flops
    return found


def _unit(product: Instruction, computation: Computation) -> tuple[str, int]:
    """What computes a product, and in how many passes."""
    algorithm = (product.attribute(r'algorithm"?[=:]"?(?:ALG_DOT_|dot_)(\w+)') or "").lower()
    if algorithm:
        passes = re.search(r"_x(\d)$", algorithm)
        narrow = {"bf16": "bfloat16", "tf32": "tfloat32", "f16": "float16", "f32": "float32"}[algorithm.split("_")[0]]
        return narrow, int(passes[1]) if passes else 1
    widest = max((dtype for x in list(computation.operands(product))[:2] for dtype, _ in x.arrays), key=_bits)
    if widest == "f32":
        exact = re.search(r'operand_precision"?[=:][\[{]"?highest', product.attributes, re.IGNORECASE)
        return ("float32" if exact else "tfloat32"), 1
    return {"bf16": "bfloat16", "f16": "float16", "f64": "float64"}.get(widest, widest), 1


def read_program(compiled: jax.stages.Compiled | Program) -> Program:
    """The program itself, read from the optimised HLO unless it has been already."""
    if isinstance(compiled, Program):
        return compiled
    text = compiled.as_text()
    if text is None:
        raise InputError("This backend does not give the text of a compiled program.")
    return Program.read(text)


def callees(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction runs: a fusion's, a loop's body and condition, branches."""
    single = r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    several = r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
    names = re.findall(single, instruction.attributes)
    for group in re.findall(several, instruction.attributes):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    return names


def arrays_of(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array in an HLO type: `(f32[2,3]{1,0}, s32[])` has two."""
    found = re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]", type_text)
    return [(dtype, tuple(int(n.strip("<=")) for n in shape.split(",") if n)) for dtype, shape in found]


def bytes_of(type_text: str) -> int:
    """Bytes of all arrays in an HLO type."""
    return sum(math.ceil(_bits(dtype) / 8 * math.prod(shape)) for dtype, shape in arrays_of(type_text))


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    if dtype == "token":
        return 0
    width = re.match(r"[a-z]+(\d+)", dtype)
    assert width is not None, dtype
    return int(width.group(1))


def _stack_frames(text: str) -> dict[int, str]:
    """The tables at the head of the module, of files, functions, places in them, and frames, put together."""
    head = text.partition("\n%")[0]

    def rows(name: str, pattern: str) -> dict[str, list[str]]:
        table = re.search(rf"^{name}\n(.*?)(?:\n\n|\Z)", head, re.DOTALL | re.MULTILINE)
        return {n: found for n, *found in re.findall(rf"^(\d+) {pattern}", table[1], re.MULTILINE)} if table else {}

    files, functions = rows("FileNames", '"(.*)"()$'), rows("FunctionNames", '"(.*)"()$')
    places = rows("FileLocations", r"\{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
    words = {n: f"{files[file][0]}:{line} {functions[function][0]}" for n, (file, function, line) in places.items()}
    return {int(n): words[place] for n, (place, _) in rows("StackFrames", r"\{file_location_id=(\d+)()").items()}


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if head is None:
        return None
    type_text, rest = _split_type(line[head.end() :])
    opcode, _, rest = rest.partition("(")
    inside, attributes = _closing(rest)
    if opcode in ("constant", "parameter"):
        return Instruction(head.group(1), type_text, opcode, (), attributes, inside)
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(head.group(1), type_text, opcode.strip(), operands, attributes)


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        first, _, rest = text.partition(" ")
        return first, rest
    inside, rest = _closing(text[1:])
    return f"({inside})", rest.lstrip()


def _closing(text: str) -> tuple[str, str]:
    """What comes before and after the parenthesis that closes one just opened."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return text[: found.start()], text[found.end() :]
    return text, ""


def _matmul_flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode == "dot":
        left = next(computation.operands(instruction)).arrays[0][1]
        contracted = math.prod(left[d] for d in instruction.dimensions("lhs_contracting_dims"))
        return 2.0 * math.prod(instruction.arrays[0][1]) * contracted
    if instruction.opcode in ("convolution", "ragged-dot", "scaled-dot"):
        raise InputError(f"{instruction.name} is a {instruction.opcode}; only plain matrix products are counted.")
    if instruction.opcode == "custom-call":
        target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
        if target.startswith(("__cublas$gemm", "__cublas$lt$matmul")):
            return _cublas_flops(instruction, computation)
        if target == PALLAS:
            return _pallas_flops(instruction)
        if re.search(r"matmul|gemm|conv|fmha|dot", target, re.IGNORECASE):
            raise InputError(f"{instruction.name} is a call of {target}, whose operations are not counted.")
    return 0.0


PALLAS = "__gpu$xla.gpu.triton"
"""What a call of a Pallas kernel is named."""


def _pallas_flops(instruction: Instruction) -> float:
    """Operations of a Pallas kernel that declares them: `pallas_call(metadata={"flops": ..., "programs": ...})`.

    These are of the kernel as it was traced, with so many programs; `vmap` gives it more.
    """
    stated = re.search(r"\\22flops\\22: \\22(\d+)\\22, \\22programs\\22: \\22(\d+)\\22", instruction.attributes)
    grid = re.findall(r"\bgrid_[xyz] = (\d+)", instruction.attributes)
    if stated is None or not grid:
        raise InputError(f"{instruction.name} is a Pallas kernel that does not declare its operations.")
    return float(stated[1]) * math.prod(map(int, grid)) / float(stated[2])


def _cublas_flops(instruction: Instruction, computation: Computation) -> float:
    start = instruction.attributes.index("backend_config=") + len("backend_config=")
    config = json.JSONDecoder().raw_decode(instruction.attributes[start:])[0]
    numbers = config.get("gemm_backend_config", config)["dot_dimension_numbers"]
    left, right = (operand.arrays[0][1] for operand in list(computation.operands(instruction))[:2])
    shared = {int(n) for key in ("rhs_contracting_dimensions", "rhs_batch_dimensions") for n in numbers.get(key, [])}
    return 2.0 * math.prod(left) * math.prod(n for d, n in enumerate(right) if d not in shared)


_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
    ]
)


_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Opcodes that change a part of their first operand in place, with the place of the operand that is written."""


def _fusion_bytes(inner: Computation, fusion: Instruction) -> float:
    """Parameters (only the slices read, where nothing else reads them) and the result (only the slices written)."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.instructions.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    read, updated = 0, 0
    for parameter in inner.instructions.values():
        if parameter.opcode != "parameter":
            continue
        readers = _through_bitcasts(parameter.name, users)
        if readers and all(r.opcode in ("dynamic-slice", "gather") for r, _ in readers):
            read += sum(bytes_of(r.type) for r, _ in readers)
        elif readers and all(r.opcode in _UPDATES and r.operands[0] == by for r, by in readers):
            updated += sum(
                bytes_of(parameter.type) - bytes_of(inner.instructions[r.operands[_UPDATES[r.opcode]]].type)
                for r, _ in readers
            )
        else:
            read += bytes_of(parameter.type)
    return float(read + bytes_of(fusion.type) - updated)


def _through_bitcasts(name: str, users: dict[str, list[Instruction]]) -> list[tuple[Instruction, str]]:
    """Instructions that read `name`, each with the name under which it does: bitcasts move nothing."""
    found = []
    for user in users.get(name, []):
        found += _through_bitcasts(user.name, users) if user.opcode == "bitcast" else [(user, name)]
    return found
