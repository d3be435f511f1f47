"""Matrix products between float32 and bfloat16: the error of Hessian products and of spectra, and the time on a GPU.

    python -m scripts.studies.matmul_precision

With no options: the small GPT-NeoX model and the text in scripts/tiny, ten minutes on two cores. Where the device has
no such products they are emulated, which the record says. `--card H200` (JAX_PLATFORMS=cpu, extra gpu-plan) compiles
the product of an 8B model for that card with each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from matplotlib.figure import Figure

import convert
import jaxhess
from jaxhess import plan
from jaxhess.distributed.mesh import make_mesh, parse_axes
from jaxhess.errors import InputError
from jaxhess.krylov.quadrature import Quadrature, quadrature
from jaxhess.operators.facts import describe
from jaxhess.operators.matmul import ALGORITHMS, MatmulPrecision
from jaxhess.plan.hardware import card_name
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Study
from jaxhess.vectors import cast, check_seed, random_key, random_probe
from scripts.studies.ghosts import distance as wasserstein
from scripts.studies.harness import ModelOptions, command, picture
from scripts.studies.step_size import distance, vectors

NAME = "matmul_precision"
HENRY = (
    "Henry, Tang and Heinecke, Leveraging the bfloat16 datatype for higher-precision computations (arXiv 1904.06376)"
)
OOTOMO = "Ootomo and Yokota, Recovering single precision accuracy from Tensor Cores (arXiv 2203.03341)"

KEEPS = 3.0
"""A precision keeps float32's spectrum if none of its errors is more than so many times float32's own."""

NOTE = """Relative errors against float64, of products along a random vector, Lanczos vectors and single coordinates."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """The model, its text, and the precisions."""

    precisions: tuple[MatmulPrecision, ...] = get_args(MatmulPrecision)[1:]
    """Beside float32."""
    initial: bool = False
    """Random weights of standard deviation 0.02 in place of the checkpoint's."""
    lanczos: tuple[int, ...] = (2, 20)
    """Lanczos vectors to take beside a random one and single coordinates."""
    steps: int = 30
    """Lanczos steps of the spectra that are compared, with full re-orthogonalisation."""
    probes: int = 2
    """Their probes."""
    card: str | None = None
    """Compile for this card, for the time of a product."""
    timed: str = str(Path(__file__).parents[1] / "benchmarks/configs/llama-3.1-8b.json")
    """The model whose product is timed (a config.json), in float32: 2,048 tokens on each device."""
    timed_mesh: str = "fsdp=8"
    """Its mesh."""

    def check(self) -> None:
        """Raises InputError where the options make no study."""
        if self.steps < 2 or self.probes < 1 or any(k < 2 for k in self.lanczos):
            raise InputError("--steps and --lanczos must be at least 2, --probes at least 1.")
        if not self.precisions or "float32" in self.precisions:
            raise InputError(f"--precisions takes {', '.join(ALGORITHMS)}; float32 is always there.")
        check_seed(self.seed)
        if self.card is not None:
            card_name(self.card)

    def hessian(self, blocks: jaxhess.TokenBlocks, dtype: str) -> jaxhess.Hessian:
        """The Hessian, of random weights if these are asked for."""
        found = super().hessian(blocks, dtype)
        if not self.initial:
            return found
        config = convert.load_config(self.model, dtype)
        return dataclasses.replace(found, params=jaxhess.models.initialize(config, random_key(self.seed)).params)


SMALL = Options(seq_len=16, mesh="fsdp=1", precisions=("bf16x6", "tf32"), lanczos=(2,), steps=8, probes=1)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of one precision, against float64.

    Attributes:
        precision: Its name.
        emulated: Whether this device has no such products.
        products: Relative errors of products, by vector.
        extremes: The largest relative error of the largest and smallest Ritz values.
        bulk: The largest Wasserstein-1 distance of a probe's quadrature, in its mean |eigenvalue|.
        seconds: Of a product on the card; None: not asked for.
    """

    precision: str
    emulated: bool
    products: dict[str, float]
    extremes: float
    bulk: float
    seconds: float | None = None

    def worse(self, other: Errors) -> float:
        """The larger of the ratios of both errors of the spectrum."""
        return max(self.extremes / other.extremes, self.bulk / other.bulk)


def study(options: Options) -> Study:
    """The study of every precision."""
    options.check()
    blocks = options.blocks()
    seconds = times(options)
    with jax.enable_x64(True):
        hessian = options.hessian(blocks, "float32")
        found = errors(options, hessian, blocks.tokens, seconds)
    keeping = [e.precision for e in found[1:] if e.worse(found[0]) <= KEEPS]
    chosen = [name for name in keeping if seconds and seconds[name] <= seconds["float32"] / 3]
    return Study(
        "Matrix products between float32 and bfloat16",
        tuple(claims(found, options.described(hessian))),
        (table(found),),
        (picture(NAME, figure(found), NOTE),),
        {
            "parameters": hessian.dim,
            "data_fingerprint": blocks.fingerprint(),
            "found": [dataclasses.asdict(e) for e in found],
            "keep_the_spectrum": keeping,
            "keep_it_at_a_third_of_the_time": chosen if seconds else None,
        },
    )


def times(options: Options) -> dict[str, float]:
    """Seconds of the timed model's product by precision, from the roofline of its program; none without a card."""
    if options.card is None:
        return {}
    config, axes = convert.read_config(options.timed, "float32"), parse_axes(options.timed_mesh)
    found: dict[str, float] = {}
    for name in ("float32", *options.precisions):
        job = plan.Job(config, axes, steps=options.steps, storage=jaxhess.Storage("none"), matmul_precision=name)
        job = dataclasses.replace(job, sequences=job.devices, microbatch=job.devices)
        program = plan.compiled(job, make_mesh(axes, plan.gpu_devices(options.card, job.devices))).program
        found[name] = plan.roofline(program, options.card).seconds
    return found


def errors(options: Options, hessian: jaxhess.Hessian, tokens: np.ndarray, seconds: dict[str, float]) -> list[Errors]:
    """Those of float32, and then of every precision."""
    reference = hessian.in_dtype("float64")
    along = vectors(hessian, tokens, options.lanczos, options.seed)
    products = {name: reference @ cast(v, "float64") for name, v in along.items()}
    keys = [jax.random.fold_in(random_key(options.seed), k) for k in range(options.probes)]
    probes = [random_probe(key, hessian.shape_dtype) for key in keys]
    exact = jaxhess.Storage("full", vector_dtype="float64", scalar_dtype="float64")
    true = spectra(reference, [cast(v, "float64") for v in probes], options.steps, exact)
    found = []
    for name in ("float32", *options.precisions):
        operator = dataclasses.replace(hessian, matmul_precision=name)
        ours = spectra(operator, probes, options.steps, jaxhess.Storage("full"))
        pairs = list(zip(ours, true, strict=True))
        ends = [abs(a.ritz_values[k] / b.ritz_values[k] - 1) for a, b in pairs for k in (0, -1)]
        found.append(
            Errors(
                name,
                bool(describe(operator).get("matmul_emulated")),
                {vector: distance(operator @ v, products[vector]) for vector, v in along.items()},
                float(max(ends)),
                max(wasserstein(a, b) for a, b in pairs),
                seconds.get(name),
            )
        )
    return found


def spectra(operator: jaxhess.Hessian, probes: list[Any], steps: int, storage: jaxhess.Storage) -> list[Quadrature]:
    """The quadrature of every probe, one after the other."""
    found = []
    for probe in probes:
        state = jaxhess.lanczos_segment(operator, jaxhess.start_lanczos([probe], steps, storage), steps)
        alphas, betas, _ = state.tridiagonal()
        found.append(quadrature(alphas, betas))
    return found


def claims(found: list[Errors], model: str) -> Iterator[Claim]:
    """What papers say of sums of narrow products, here of the spectrum of a Hessian."""
    by_name = {e.precision: e for e in found}
    quantity = f"larger error of the spectrum (extremes, Wasserstein-1), in float32's own; at most {KEEPS:.0f}"
    for name, source, statement in (
        ("bf16x6", HENRY, "Products of three bfloat16 parts keep the accuracy of float32 products (six of them)."),
        ("bf16x3", HENRY, "Products of two bfloat16 parts keep it (three of them)."),
        (
            "tf32x3",
            OOTOMO,
            "Products of TF32 parts, with a correction, recover the accuracy of float32 (three of them).",
        ),
    ):
        at = by_name.get(name)
        ours = at.worse(by_name["float32"]) if at else None
        yield Claim(source, "Abstract", statement, "comparable", quantity, (None, KEEPS), ours, 0.0, f"{model}, {name}")


def table(found: list[Errors]) -> Table:
    """A row for every precision."""
    names = list(found[0].products)
    head = ("products", *names, "extremes", "bulk (W1)", "in float32's", "s on the card", "of float32's")
    rows = []
    for e in found:
        base = found[0].seconds
        time = ("", "") if e.seconds is None or base is None else (f"{e.seconds:.2f}", f"{e.seconds / base:.2f}")
        numbers = (*e.products.values(), e.extremes, e.bulk)
        rows.append((e.precision, *(f"{x:.1e}" for x in numbers), f"{e.worse(found[0]):.1f}", *time))
    emulated = ", ".join(e.precision for e in found if e.emulated)
    return Table(head, rows, f"Relative errors against float64{f'; emulated here: {emulated}' if emulated else ''}")


def figure(found: list[Errors]) -> Figure:
    """Errors of products and of the spectrum, by precision."""
    drawn = Figure(figsize=(9, 5), dpi=130, layout="constrained", facecolor="white")
    panel = drawn.subplots()
    for name in found[0].products:
        panel.plot([e.precision for e in found], [e.products[name] for e in found], "o-", ms=4, lw=1, label=name)
    for what, style in (("extremes", "k*--"), ("bulk", "ks:")):
        label = f"spectrum: {what}"
        panel.plot([e.precision for e in found], [getattr(e, what) for e in found], style, ms=6, lw=1, label=label)
    panel.set(yscale="log", ylabel="relative error against float64")
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    drawn.legend(loc="outside right upper", fontsize=9, frameon=False)
    return drawn


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
