"""Times of Hessian products and Lanczos runs against the gradient, and with --peers against PyTorch, in one process.

With no options: a random Llama of 6.8M parameters, 4 sequences of 128 tokens for products and 8 for Lanczos runs. The
rounds are interleaved: every row is run once before any is run again, so that a busy machine slows all of them alike.

    python -m scripts.benchmarks.products --out benchmark.json
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import convert
import jaxhess
from jaxhess.command import one_sentence, terminal
from jaxhess.data import TokenBatch
from jaxhess.distributed.memory import bytes_per_device
from jaxhess.distributed.mesh import batch_sharding, data_shards
from jaxhess.errors import InputError
from jaxhess.files.output import OutputFile
from jaxhess.krylov import compile_segment
from jaxhess.models import LanguageModel, initialize
from jaxhess.plan.compiled import gradient
from jaxhess.plan.hardware import peak_matmul_flops
from jaxhess.pytrees import register_dataclass
from jaxhess.slq.spectrum import json_ready
from jaxhess.vectors import Vector, check_seed, random_key
from scripts.benchmarks.peers import peer_rows
from scripts.benchmarks.rows import Measurement, largest_ritz_value, measure, relative_error, show, summarise


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed, and how often."""

    model: str | None = None
    """Hugging Face checkpoint directory, directory made by `python -m convert`, or hub id; by default a random Llama of
    the sizes below."""
    vocab_size: int = 4096
    """Of the random model."""
    embed_dim: int = 256
    """Of the random model."""
    num_layers: int = 6
    """Of the random model."""
    num_heads: int = 4
    """Of the random model."""
    num_kv_heads: int = 4
    """Of the random model."""
    mlp_dim: int = 688
    """Of the random model."""
    sequences: int = 4
    """Sequences of random tokens for the gradient and the products."""
    lanczos_sequences: int = 8
    """Sequences of random tokens for the Lanczos runs."""
    seq_len: int = 128
    """Predicted tokens per sequence."""
    microbatch: int | None = None
    """Sequences whose activations exist at once; by default all."""
    steps: int = 20
    """Of the Lanczos runs, without re-orthogonalisation."""
    rounds: int = 5
    """How often every row is timed; the table has medians and quartiles."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights, products and vectors; by default the checkpoint's, float32 for the random model."""
    remat: bool = False
    """Recompute every layer in the backward pass: less memory, more time. The linearised operator is always without."""
    fd_step: float = 1e-3
    """Of the finite differences, per coordinate: the step of the papers."""
    mesh: str | None = None
    """Device mesh, for example fsdp=8; by default fsdp over all devices."""
    reference: bool = True
    """Compute the errors: every row against the same in float64."""
    peers: bool = False
    """Also time PyTorch: gradient, double backward, and hessian-eigenthings (pip install 'jaxhess[peers]')."""
    seed: int = 0
    """Of weights, tokens and vectors."""
    out: Path | None = None
    """File for everything measured, as JSON."""
    overwrite: bool = False
    """Replace that file."""


def run(options: Options) -> dict[str, Any]:
    """Everything measured: facts about the run and a list of rows, as it is written to `--out`."""
    mesh = jaxhess.make_mesh(options.mesh)
    _check(options, mesh)
    out = None if options.out is None else OutputFile(options.out, "benchmark", options.overwrite)
    model = _model(options, mesh)
    hessian, lanczos_hessian = (_hessian(options, model, n) for n in (options.sequences, options.lanczos_sequences))
    vector = jaxhess.random_probe(random_key(options.seed), hessian.shape_dtype)
    references = _references(options, hessian, lanczos_hessian, vector) if options.reference else {}
    rows = _rows(options, model, hessian, lanczos_hessian, vector, references)
    if options.peers:
        rows += peer_rows(options.steps, model, hessian, lanczos_hessian, vector, references)
    measure(rows, options.rounds)
    device = mesh.devices.flat[0].device_kind
    summarise(rows, peak_matmul_flops(device, model.config.dtype))
    seconds = {row.name: row.result["seconds"] for row in rows}
    exact, vectors_only = (seconds[f"Lanczos, {options.steps} steps, {name}"] for name in ("exact", "vectors only"))
    packages = ("jaxhess", "jax", "jaxlib", "flax", *(("torch", "hessian-eigenthings") if options.peers else ()))
    facts = {
        "options": dataclasses.asdict(options),
        "parameters": model.num_params,
        "dtype": model.config.dtype,
        "device": {"kind": device, "count": mesh.size, "cores": os.cpu_count()},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "vector_bytes": bytes_per_device(jax.tree.leaves(hessian.shape_dtype)),
        "vector_work_share": vectors_only / exact,
        "rows": [{"name": row.name, **row.result} for row in rows],
    }
    if out is not None:
        out.write(json_ready(facts))
    show(terminal(), facts)
    return facts


def _check(options: Options, mesh: jax.sharding.Mesh) -> None:
    check_seed(options.seed)
    for name in ("sequences", "lanczos_sequences", "seq_len", "steps", "rounds"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1.")
    size = options.microbatch
    if size is not None and (size < 1 or options.sequences % size or options.lanczos_sequences % size):
        raise InputError(
            f"--microbatch {size} must divide --sequences {options.sequences} and --lanczos-sequences "
            f"{options.lanczos_sequences}."
        )
    if options.model is None and options.embed_dim % options.num_heads:
        raise InputError(f"--embed-dim {options.embed_dim} is not a multiple of --num-heads {options.num_heads}.")
    if options.peers:
        if options.microbatch is not None or mesh.size > 1:
            raise InputError("--peers compares on one device, all sequences at once: drop --microbatch and the mesh.")
        try:
            import hessian_eigenthings  # noqa: F401
        except ImportError:
            raise InputError("--peers needs hessian-eigenthings: pip install 'jaxhess[peers]'.") from None


def _model(options: Options, mesh: jax.sharding.Mesh) -> LanguageModel:
    if options.model is not None:
        model = convert.load(options.model, mesh=mesh, dtype=options.dtype)
        return model.configured(remat=options.remat)
    config = jaxhess.DecoderConfig(
        vocab_size=options.vocab_size,
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads,
        head_dim=options.embed_dim // options.num_heads,
        mlp_dim=options.mlp_dim,
        max_positions=max(options.seq_len, 2048),
        dtype=options.dtype or "float32",
        remat=options.remat,
    )
    return initialize(config, random_key(options.seed), mesh)


def _hessian(options: Options, model: LanguageModel, sequences: int) -> jaxhess.Hessian:
    """The Hessian over random tokens."""
    assert model.mesh is not None
    size = options.microbatch or sequences
    ids = np.random.default_rng(options.seed).integers(0, model.config.vocab_size, (sequences, options.seq_len + 1))
    tokens = jnp.asarray(ids.reshape(-1, size, options.seq_len + 1), jnp.int32)
    batch = TokenBatch(tokens, jnp.ones((sequences // size, size, options.seq_len), jnp.float32))
    if size % data_shards(model.mesh):
        raise InputError(f"{size} sequences at once cannot be cut over the mesh: take a multiple of its devices.")
    placed = jax.device_put(batch, batch_sharding(model.mesh, axis=1))
    return jaxhess.Hessian(model.loss(), model.params, jaxhess.Microbatches(placed))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _VectorsOnly(jaxhess.LinearOperator):
    """Multiplies by one entry for each of the vector's: a Lanczos run over it is nothing but work on vectors."""

    diagonal: Vector

    def mv(self, v: Vector) -> Vector:
        return jax.tree.map(jnp.multiply, self.diagonal, v)

    @property
    def shape_dtype(self) -> Vector:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.diagonal)


def _rows(
    options: Options, model: LanguageModel, hessian: Any, lanczos: Any, vector: Vector, references: dict[str, Any]
) -> list[Measurement]:
    no_remat = model.configured(remat=False).loss()
    stored, lanczos_stored = (jaxhess.linearize(dataclasses.replace(h, loss=no_remat)) for h in (hessian, lanczos))
    loss, params, batches = hessian.loss, hessian.params, hessian.batches
    difference = jaxhess.FiniteDifferenceHessian(loss, params, batches, step=options.fd_step, per="coordinate")
    four = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x, 0.5 * x]), vector)

    def program(name: str, f: Callable, *arguments: Any, expected: str = "product", first: bool = False) -> Measurement:
        compiled = jax.jit(f).lower(*arguments).compile()
        reference = references.get(expected)

        def error(answer: Vector) -> float:
            return relative_error(jax.tree.map(lambda x: x[0], answer) if first else answer, reference)

        def work() -> Any:
            return jax.block_until_ready(compiled(*arguments))

        return Measurement(name, work, None if reference is None else error, compiled)

    def lanczos_row(name: str, operator: Any, expected: str = "ritz value") -> Measurement:
        def steps() -> jaxhess.LanczosState:
            state = jaxhess.start_lanczos([vector], options.steps, jaxhess.Storage("none"))
            return jax.block_until_ready(jaxhess.lanczos_segment(operator, state, options.steps))

        compiled = compile_segment(operator, jaxhess.start_lanczos([vector], options.steps, jaxhess.Storage("none")))
        reference = references.get(expected)
        error = (
            None if reference is None else lambda s: relative_error(largest_ritz_value(*s.tridiagonal()[:2]), reference)
        )
        return Measurement(f"Lanczos, {options.steps} steps, {name}", steps, error, compiled, options.steps)

    def product(operator: Any, v: Vector) -> Vector:
        return operator.mv(v)

    newton = jaxhess.GaussNewton(loss, params, batches)
    linearised = program("linearised product", product, stored, vector)
    linearised.result["residual_bytes"] = stored.residual_bytes
    return [
        program("gradient", gradient, hessian, expected="gradient"),
        program("exact product", product, hessian, vector),
        linearised,
        program("finite-difference product", product, difference, vector),
        program("Gauss-Newton product", product, newton, vector, expected="gauss-newton"),
        program("four exact products at once", lambda op, vs: jax.vmap(op.mv)(vs), hessian, four, first=True),
        lanczos_row("exact", lanczos),
        lanczos_row("linearised", lanczos_stored),
        lanczos_row("vectors only", _VectorsOnly(vector), expected="nothing"),
    ]


def _references(options: Options, hessian: Any, lanczos: Any, vector: Vector) -> dict[str, Any]:
    """What the rows compute, in float64 at the same weights, on the host."""
    with jax.enable_x64(True):
        wide, wide_lanczos = hessian.in_dtype("float64"), lanczos.in_dtype("float64")
        direction = jax.tree.map(lambda x: x.astype("float64"), vector)
        curvature = jaxhess.GaussNewton(wide.loss, wide.params, wide.batches)
        state = jaxhess.start_lanczos([direction], options.steps, jaxhess.Storage("none", scalar_dtype="float64"))
        state = jaxhess.lanczos_segment(wide_lanczos, state, options.steps)
        trees = {
            "gradient": gradient(wide),
            "product": wide @ direction,
            "gauss-newton": curvature @ direction,
        }
        return {**jax.device_get(trees), "ritz value": largest_ritz_value(*state.tridiagonal()[:2])}


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        run(options)


if __name__ == "__main__":
    main()
