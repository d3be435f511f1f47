"""What a run would be: what its memory and time depend on, and the abstract program that it would run."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from jaxhess.data import TokenBatch
from jaxhess.distributed.mesh import MESH_AXES, batch_sharding, data_shards, param_shardings
from jaxhess.errors import InputError
from jaxhess.krylov.state import LanczosState, abstract_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.models import DecoderConfig, Params, abstract_params, logical_axes
from jaxhess.models.experts import check_mesh
from jaxhess.models.language_model import LOGIT_CHUNK, NextTokenLoss
from jaxhess.operators import FiniteDifferenceHessian, Hessian, LinearizedHessian, Microbatches
from jaxhess.operators.linearized import abstract_linearized
from jaxhess.operators.matmul import MatmulPrecision, check_matmul_precision

Product = Literal["exact", "linearized", "finite-difference"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A spectrum to compute; fields are the options of `scripts/spectrum.py` of the same names.

    Examples:
        >>> import convert
        >>> from jaxhess import plan
        >>> job = plan.Job(convert.read_config("scripts/tiny/config.json"), seq_len=32, sequences=8)
        >>> job.devices, job.products, job.microbatches
        (1, 120, 8)

    Attributes:
        config: The model; its `dtype` is what the weights are stored in.
        axes: Sizes of the mesh axes; those left out are 1.
        microbatch: Sequences whose activations exist at once on all devices together; at least one on each of the
            parts that a batch is cut into.
        hvp: How products are made. What linearised ones keep is planned too, but not the pass that makes it.
        batch_size: Probes that advance together.
        compute_dtype: None: that of the weights.

    Raises:
        InputError: A number is not positive, an unknown choice, or an axis that no mesh has.
    """

    config: DecoderConfig
    axes: dict[str, int] = dataclasses.field(default_factory=dict)
    seq_len: int = 2048
    sequences: int = 512
    microbatch: int = 1
    hvp: Product = "exact"
    step: float | Literal["auto"] = 1e-3
    steps: int = 30
    probes: int = 4
    batch_size: int = 1
    storage: Storage = Storage()
    compute_dtype: str | None = None
    accumulation_dtype: str = "float32"
    matmul_precision: MatmulPrecision = "float32"
    logit_chunk: int = LOGIT_CHUNK
    audit: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_len", "sequences", "microbatch", "steps", "probes", "batch_size", "logit_chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hvp not in get_args(Product):
            raise InputError(
                f"There is no plan for products {self.hvp!r}; there is for {', '.join(get_args(Product))}."
            )
        if self.batch_size > 1 and self.storage.basis_memory == "host":
            raise InputError("A basis in the host's memory is that of one probe: take batch_size 1.")
        if self.hvp == "finite-difference" and self.step == "auto" and jnp.dtype(self.dtype).itemsize < 4:
            raise InputError(
                f"There is no plan for the step auto in {self.dtype}: it is measured on float32 copies. Give a number."
            )
        check_matmul_precision(self.matmul_precision, (self.dtype,))
        for axis, size in self.axes.items():
            if axis not in MESH_AXES or size < 1:
                raise InputError(f"Mesh axis {axis}={size}: the axes are {', '.join(MESH_AXES)}, of size 1 or more.")
        self.storage.check_available()
        self.config.check_length(self.seq_len)
        tensor = self.axes.get("tensor", 1)
        divided = {what: getattr(self.config, what) for what in ("num_heads", "num_kv_heads", "mlp_dim")}
        if self.config.experts is not None:
            divided["experts.mlp_dim"] = self.config.experts.mlp_dim
            check_mesh(self.config.experts, self.shape)
        for what, size in divided.items():
            if size % tensor:
                raise InputError(
                    f"There is no plan for tensor={tensor}, which does not divide {what}={size}: such weights are "
                    "gathered on every device. Take a smaller tensor axis and a larger fsdp axis."
                )

    @property
    def devices(self) -> int:
        """How many the mesh has."""
        return math.prod(self.axes.values())

    @property
    def shape(self) -> Any:
        """A mesh of that shape on no devices."""
        types = (AxisType.Auto,) * len(MESH_AXES)
        return AbstractMesh(tuple(self.axes.get(axis, 1) for axis in MESH_AXES), MESH_AXES, axis_types=types)

    @property
    def dtype(self) -> str:
        """What products are computed in."""
        return self.compute_dtype or self.config.dtype

    @property
    def vector_dtype(self) -> str:
        """What Lanczos vectors are stored in."""
        return self.storage.vector_dtype or self.config.dtype

    @property
    def basis_dtype(self) -> str:
        """What the vectors kept for re-orthogonalisation are stored in."""
        return self.storage.basis_dtype or self.vector_dtype

    @property
    def sequences_per_device(self) -> int:
        """Sequences of one microbatch on one device."""
        shards = data_shards(self.shape)
        return -(-min(self.microbatch, self.sequences) // shards)

    @property
    def microbatches(self) -> int:
        """How many there are."""
        return -(-self.sequences // (self.sequences_per_device * data_shards(self.shape)))

    @property
    def tokens_per_device(self) -> int:
        """Tokens of one microbatch on one device."""
        return self.sequences_per_device * self.seq_len

    @property
    def products(self) -> int:
        """Hessian products of the run."""
        return self.steps * self.probes

    def params(self, mesh: Any = None) -> Params:
        """`jax.ShapeDtypeStruct` of every parameter with its sharding."""
        abstract, axes = _abstract(dataclasses.replace(self.config, query_chunk=1))
        return jax.tree.map(_struct, abstract, param_shardings(abstract, axes, self.shape if mesh is None else mesh))

    def operator(self, mesh: Any) -> Hessian | LinearizedHessian | FiniteDifferenceHessian:
        """The abstract operator."""
        cut = batch_sharding(mesh, axis=1)
        size = (self.microbatches, self.sequences_per_device * data_shards(mesh))
        tokens: Any = jax.ShapeDtypeStruct((*size, self.seq_len + 1), jnp.int32, sharding=cut)
        weights: Any = jax.ShapeDtypeStruct((*size, self.seq_len), jnp.float32, sharding=cut)
        loss = NextTokenLoss(dataclasses.replace(self.config, dtype=self.dtype), mesh, self.logit_chunk)
        params, batches = self.params(mesh), Microbatches(TokenBatch(tokens, weights))
        precision: Any = {"accumulation_dtype": self.accumulation_dtype, "matmul_precision": self.matmul_precision}
        if self.hvp == "finite-difference":
            return FiniteDifferenceHessian(loss, params, batches, step=self.step, **precision)
        hessian = Hessian(loss, params, batches, **precision)
        return abstract_linearized(hessian) if self.hvp == "linearized" else hessian

    def state(self, mesh: Any) -> LanczosState:
        """The abstract state of a Lanczos run."""
        told_apart = 0 if self.hvp == "finite-difference" or self.microbatches == 1 else self.microbatches
        return abstract_lanczos(self.params(mesh), self.steps, self.storage, self.batch_size, microbatches=told_apart)


@functools.cache
def _abstract(config: DecoderConfig) -> tuple[Params, Params]:
    """Shapes and logical axes of the parameters."""
    return abstract_params(config), logical_axes(config)


def _struct(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
