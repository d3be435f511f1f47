"""What is recorded of a run: how probes were drawn, what Lanczos kept, of which operator, and what was measured.

`RunRecord` is written into a run folder as JSON and read back with all types checked (`jaxhess.files.typed.read_as`).
Every field has a default that says "not known": a spectrum of another tool has no record.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import Field, JsonValue

from jaxhess.data.sampling import Sampling
from jaxhess.errors import InputError
from jaxhess.files.typed import read_as
from jaxhess.krylov.errors import DataSpread, Estimate
from jaxhess.krylov.ghosts import FLOAT32_ROUNDING, relative_tolerance
from jaxhess.krylov.storage import Reorthogonalize, Storage
from jaxhess.operators.audit import Noise
from jaxhess.operators.restriction import Selection
from jaxhess.slq.job import CommandRecord, Count
from jaxhess.vectors import Distribution

Number = Annotated[float, Field(allow_inf_nan=False)]
Length = Annotated[float, Field(ge=0, allow_inf_nan=False)]

MATRIX_NAMES = {
    "Hessian": "loss Hessian",
    "LinearizedHessian": "loss Hessian",
    "FiniteDifferenceHessian": "loss Hessian by finite differences",
    "GaussNewton": "Gauss-Newton matrix",
    "EmpiricalFisher": "empirical Fisher matrix",
    "MonteCarloFisher": "Monte-Carlo Fisher matrix",
}


@dataclasses.dataclass(frozen=True)
class Probes:
    """How the probes were drawn.

    Raises:
        InputError: There is no such distribution.
    """

    count: Count | None = None
    distribution: Distribution = "normal"
    seed: Count | None = None

    def __post_init__(self) -> None:
        if self.distribution not in get_args(Distribution):
            raise InputError(f"distribution of the probes is 'normal' or 'rademacher', got {self.distribution!r}")


@dataclasses.dataclass(frozen=True)
class Lanczos:
    """How Lanczos was run.

    Attributes:
        steps: Asked for, of each probe.
        storage: What was kept; None: not known. `vector_dtype` None: leaves had different ones. `basis_dtype` None: as
            the vectors.
        batch_size: How many probes advanced together.
        orthogonality: The largest entry of |Q'Q - I| of every probe's kept vectors, None for a probe where it was not
            measured. None: measured for no probe.
    """

    steps: Count | None = None
    storage: Storage | None = None
    batch_size: Count | None = None
    orthogonality: tuple[Length | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.orthogonality is not None:
            values = tuple(None if x is None or math.isnan(x) else float(x) for x in self.orthogonality)
            object.__setattr__(self, "orthogonality", None if set(values) <= {None} else values)

    @property
    def reorthogonalize(self) -> Reorthogonalize | None:
        """Against what vectors were orthogonalised; None: not known."""
        return None if self.storage is None else self.storage.reorthogonalize


@dataclasses.dataclass(frozen=True)
class OperatorRecord:
    """What `jaxhess.operators.facts.describe` says.

    Attributes:
        kind: Name of its class.
        dtypes: That products were computed in.
        accumulation_dtype: Of sums over microbatches.
        restriction: None: none. A text is that of an earlier version, which kept no other.
        terms: Of a sum.
        operator: Of a multiple, or of one that is shifted or preconditioned.
        details: All else, by name: the factor, the shift, the step of finite differences, whether matrix products were
            emulated.
        matmul_precision: Of matrix products in float32; None: there are none, or it is not known.
    """

    kind: str
    dtypes: tuple[str, ...] = ()
    accumulation_dtype: str | None = None
    restriction: Selection | str | None = None
    terms: tuple[OperatorRecord, ...] = ()
    operator: OperatorRecord | None = None
    details: dict[str, JsonValue] = dataclasses.field(default_factory=dict)
    matmul_precision: str | None = None

    @property
    def matrix_name(self) -> str:
        """The matrix in words."""
        if self.kind == "Preconditioned" and self.operator is not None:
            return f"preconditioned {self.operator.matrix_name}"
        name = MATRIX_NAMES.get(self.kind, "operator")
        return f"{name}, block {self.restriction}" if self.restriction else name


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What was found out about what the operator is made of.

    Attributes:
        loss: Mean over all batches.
        count: That it was divided by: of tokens, examples or batches.
        parameters: A checksum, the same on any mesh; only of a run that was saved on the way.
        details: What else `jaxhess.operators.facts.validate` reports, by name.
    """

    loss: Number | None = None
    count: Number | None = None
    parameters: str | None = None
    details: dict[str, JsonValue] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Bytes per device, as the compiler says."""

    arguments: Count
    outputs: Count
    outputs_in_place: Count
    temporaries: Count


@dataclasses.dataclass(frozen=True)
class CompiledRecord:
    """The compiled segment of steps: seconds of all compilations, and its memory where the compiler tells."""

    compile_seconds: Length
    bytes_per_device: ProgramMemory | None = None


@dataclasses.dataclass(frozen=True)
class DataError:
    """As `jaxhess.krylov.errors.DataSpread`; None: the bias is not known, or is not that of an extreme eigenvalue."""

    error: Length
    freedom: Length
    bias: Number | None = None

    def of(self, value: float) -> Estimate:
        """A value without any error over probes, and with this one."""
        bias = math.nan if self.bias is None else self.bias
        return Estimate(value, 0.0, math.inf, data=DataSpread(self.error, self.freedom, bias))


@dataclasses.dataclass(frozen=True)
class EigenpairRecord:
    """Leading eigenpairs that were computed beside the spectrum; what is no finite number is None.

    Attributes:
        values, residuals, converged: As in `jaxhess.Eigenpairs`.
        steps: Lanczos steps that they took.
        vectors: The folder of the eigenvectors, in the run folder.
        data: Of every value the error over the data, or None; nothing: it is not known.
    """

    values: tuple[Number | None, ...]
    residuals: tuple[Number | None, ...]
    converged: tuple[bool, ...] = ()
    steps: Count | None = None
    vectors: str | None = None
    data: tuple[DataError | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The record of a run.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> run = jaxhess.spectrum(A.shifted(1.0), steps=2, probes=1).run
        >>> run.operator.kind, run.operator.details, run.lanczos.storage.reorthogonalize
        ('ShiftedOperator', {'shift': 1.0}, 'full')

    Attributes:
        probes, lanczos: How the spectrum was made. Standard errors and ghosts depend on the distribution of the probes,
            on what was kept and on the orthogonality that was measured.
        operator: Of which it is; None: not known.
        inputs: What the operator is made of.
        rounding: The eps of products, see `jaxhess.operators.precision.unit_roundoff`. With the errors of the steps it
            sets what counts as a ghost, and the slack of the bounds.
        noise: Of the operator's products, where it was measured.
        eigenpairs: Where they were computed.
        program: What was compiled; None where nothing was.
        seconds: Of Lanczos with compilation, over all resumed parts.
        job: Model, data, devices and options of the command; None for a call in Python.
        sampling: How the sequences were chosen; None: not known.

    Raises:
        InputError: `rounding` is not between 0 and 1.
    """

    probes: Probes = Probes()
    lanczos: Lanczos = Lanczos()
    operator: OperatorRecord | None = None
    inputs: Inputs = dataclasses.field(default_factory=Inputs)
    rounding: Number = FLOAT32_ROUNDING
    noise: Noise | None = None
    eigenpairs: EigenpairRecord | None = None
    program: CompiledRecord | None = None
    seconds: Length | None = None
    job: CommandRecord | None = None
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        relative_tolerance(1, self.rounding)

    @property
    def matrix_name(self) -> str:
        """What the spectrum is of, in words."""
        return MATRIX_NAMES["Hessian"] if self.operator is None else self.operator.matrix_name


def operator_record(description: Mapping[str, Any]) -> OperatorRecord:
    """The record of an operator from what `jaxhess.operators.facts.describe` returns.

    Raises:
        InputError: An entry has another type than its field.
    """
    return read_as(OperatorRecord, _described(description))


def inputs_record(facts: Mapping[str, Any]) -> Inputs:
    """The record of an operator's inputs from what `jaxhess.operators.facts.validate` returns.

    Raises:
        InputError: An entry has another type than its field.
    """
    return read_as(Inputs, _with_details(Inputs, facts))


def _described(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    found = _with_details(OperatorRecord, data)
    if "operator" in found:
        found["operator"] = _described(found["operator"])
    if isinstance(found.get("terms"), list | tuple):
        found["terms"] = [_described(term) for term in found["terms"]]
    return found


def _with_details(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a class out of a flat dictionary: names that it does not have are its details."""
    names = {field.name for field in dataclasses.fields(kind)} - {"details"}
    details = {name: value for name, value in data.items() if name not in names}
    return {"details": details, **{name: value for name, value in data.items() if name in names}}
