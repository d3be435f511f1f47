"""What the compiler says of a run: memory, operations and traffic of the program, compiled for abstract arrays."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import Mesh

from jaxhess.distributed.mesh import make_mesh
from jaxhess.errors import InputError
from jaxhess.krylov.lanczos import compile_segment
from jaxhess.operators.loss import LossOperator
from jaxhess.plan.collectives import bytes_by_kind, collective_traffic
from jaxhess.plan.hlo import Program, matmul_flops, read_program
from jaxhess.plan.job import Job


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Facts of the compiled Lanczos segment; bytes and operations are those of one device.

    Examples:
        >>> import jax, jaxhess
        >>> from jaxhess import plan
        >>> sizes = dict(embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8)
        >>> config = jaxhess.DecoderConfig(vocab_size=10, max_positions=8, **sizes)
        >>> job = plan.Job(config, seq_len=8, sequences=1, steps=2)
        >>> found = plan.compiled(job, jaxhess.make_mesh("fsdp=1", jax.devices()[:1]))
        >>> found.arguments > 0, sum(found.traffic.values())  # one device receives nothing
        (True, 0)

    Attributes:
        arguments: Bytes of parameters, batch and Lanczos state.
        outputs: Bytes of the state, which takes the place of the one that came in.
        temporaries: Bytes at the peak beside both. On a CPU those of a bfloat16 program are too many: it widens matrix
            products to float32, and keeps what it has widened.
        flops: Operations of the matrix products in one step.
        traffic: Bytes that one step receives through each kind of collective.
        compile_seconds: Of compilation.
        program: What was compiled, for `jaxhess.plan.roofline`.
    """

    arguments: int
    outputs: int
    temporaries: int
    flops: float
    traffic: dict[str, float]
    compile_seconds: float
    program: Program = dataclasses.field(repr=False, compare=False)

    def facts(self) -> dict[str, Any]:
        """All but the program."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "program"]
        return {name: getattr(self, name) for name in names}


def compiled(job: Job, mesh: Mesh | None = None) -> Compiled:
    """The job's program, compiled for this mesh but never run.

    Examples:
        >>> import jax, jaxhess
        >>> from jaxhess import plan
        >>> sizes = dict(embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8)
        >>> config = jaxhess.DecoderConfig(vocab_size=10, max_positions=8, **sizes)
        >>> job = plan.Job(config, seq_len=8, sequences=1, steps=2)
        >>> found = plan.compiled(job, jaxhess.make_mesh("fsdp=1", jax.devices()[:1]))
        >>> 0.5 < found.flops / plan.flops(job) < 2
        True

    Args:
        job: What to compile; no weight and no token of it exist.
        mesh: Of simulated CPUs as a rule, or of `jaxhess.plan.gpu_devices`. None: over all devices of this process.

    Raises:
        InputError: The devices are not as many as the mesh's; a basis in the host's memory on GPUs that are only
            described, for which the compiler does not know that memory.
    """
    mesh = make_mesh(job.axes or {"fsdp": 1}) if mesh is None else mesh
    if job.storage.basis_memory == "host" and mesh.devices.flat[0].platform != "cpu":
        raise InputError(
            "Compiled for a GPU that is not there, a basis in the host's memory would count as the device's: take the "
            "formula alone (--compiler none), or --basis-memory device."
        )
    began = time.perf_counter()
    # For CUB's radix sort XLA asks a device how much memory it takes, where there may be none.
    absent = mesh.devices.flat[0].platform != jax.devices()[0].platform
    options = {"xla_gpu_enable_cub_radix_sort": False} if absent else None
    program = compile_segment(job.operator(mesh), job.state(mesh), options)
    return facts_of(program, time.perf_counter() - began)


def facts_of(segment: jax.stages.Compiled, compile_seconds: float = 0.0) -> Compiled:
    """Facts of a Lanczos segment that is compiled already.

    Raises:
        InputError: The backend does not say how much memory it takes.
    """
    memory = segment.memory_analysis()
    if memory is None:
        raise InputError("This backend does not say how much memory a compiled program takes.")
    program = read_program(segment)
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        matmul_flops(program, unknown_trips=1),
        bytes_by_kind(collective_traffic(program, unknown_trips=1)),
        compile_seconds,
        program,
    )


def gradient_traffic(job: Job, mesh: Mesh) -> dict[str, float]:
    """Bytes that one gradient of the job's loss receives on each device, through each kind of collective.

    Examples:
        >>> import jax, jaxhess
        >>> from jaxhess import plan
        >>> sizes = dict(embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8)
        >>> config = jaxhess.DecoderConfig(vocab_size=10, max_positions=8, **sizes)
        >>> job = plan.Job(config, seq_len=8, sequences=1, steps=2)
        >>> received = plan.gradient_traffic(job, jaxhess.make_mesh("fsdp=1", jax.devices()[:1]))
        >>> sum(received.values())
        0
    """
    return bytes_by_kind(collective_traffic(gradient.lower(job.operator(mesh)).compile()))


@jax.jit
def gradient(operator: LossOperator) -> Any:
    """The gradient of the mean loss as one program; `gradient.lower` gives its cost before it runs."""
    return operator.value_and_gradient()[1]
