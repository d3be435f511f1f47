"""Finite-difference Hessian products against the step: error of products and of Ritz values, by dtype and by vector.

With no options: the small GPT-NeoX model and the text in scripts/tiny, a few minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import convert
import jaxhess
from convert.text import load_blocks
from jaxhess.command import one_sentence, terminal
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import json_ready
from jaxhess.krylov.quadrature import quadrature
from jaxhess.operators.restriction import leaf_name
from jaxhess.results.figures import format_number, png
from jaxhess.vectors import Vector, cast, check_seed, norm, random_key, random_probe, size

TINY = Path(__file__).parent / "tiny"
RECORD, PLOT = "step_size.json", "step_size.png"
PAPER = (1e-4, 1e-3)
"""The per-coordinate steps that arXiv 2602.00816 recommends."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Steps are per coordinate: the root mean square entry of the shift."""

    model: str = str(TINY)
    """Hugging Face checkpoint directory, directory made by `python -m convert`, or hub id."""
    data: str = str(TINY / "sample.txt")
    """Text file, folder of text, .npy/.npz of tokens, `random`, or hub:NAME[@CONFIG][:SPLIT[:COLUMN]]."""
    seq_len: int = 64
    """Predicted tokens per sequence."""
    sequences: int = 2
    """Sequences taken from the start of the data."""
    microbatch: int = 2
    """Sequences whose activations exist at once."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    """Of weights and computation."""
    reference: Literal["float64", "float32"] = "float64"
    """Precision of the exact product that errors are measured against."""
    shift: Literal["realised", "float32"] = "realised"
    """See `FiniteDifferenceHessian`."""
    smallest: float = 1e-7
    """Smallest step of the grid."""
    largest: float = 1e-1
    """Largest step of the grid."""
    per_decade: int = 2
    """Steps of the grid in a factor of ten."""
    lanczos: tuple[int, ...] = (2, 20)
    """Lanczos vectors to take beside a random one and single coordinates; the first is the random one."""
    ritz_steps: int = 8
    """Lanczos steps of the runs whose extreme Ritz values are compared."""
    seed: int = 0
    """Of the random vector."""
    mesh: str | None = None
    """Device mesh, for example fsdp=8; by default fsdp over all devices."""
    out: Path | None = None
    """Folder for the table and the plot; by default runs/<date>-step-size."""
    overwrite: bool = False
    """Replace a finished study in that folder; files that no such command wrote are never replaced."""


def run(options: Options) -> dict[str, Any]:
    """The whole study; returns what it also saved."""
    out = options.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-step-size"
    with Output(out, (RECORD, PLOT), options.overwrite) as output:
        return studies(options, output)


def studies(options: Options, output: Output) -> dict[str, Any]:
    """The study of every dtype, in a folder that no other writes into."""
    check_options(options)
    config = convert.load_config(options.model, options.dtypes[0])
    config.check_length(options.seq_len)
    if options.reference == "float64":
        jax.config.update("jax_enable_x64", True)
    console = terminal()
    began = time.perf_counter()
    mesh = jaxhess.make_mesh(options.mesh)
    blocks = load_blocks(
        options.data,
        options.model,
        seq_len=options.seq_len,
        vocab_size=config.vocab_size,
        sequences=options.sequences,
        seed=options.seed,
    )
    batches = jaxhess.Microbatches(blocks.microbatches(options.microbatch, mesh))
    studies = []
    for dtype in options.dtypes:
        model = convert.load(options.model, mesh=mesh, dtype=dtype)
        exact = jaxhess.Hessian(model.loss(), model.params, batches)
        studies.append(study(options, exact, blocks.tokens, console))
    record = {
        "options": dataclasses.asdict(options),
        "parameters": model.num_params,
        "data_fingerprint": blocks.fingerprint(),
        "studies": studies,
        "seconds": time.perf_counter() - began,
    }
    text = json.dumps(json_ready(record), indent=2, allow_nan=False) + "\n"
    output.write({PLOT: png(plot(record)), RECORD: text.encode()})
    print_tables(console, record)
    console.print(f"written to {output.folder} in {record['seconds']:.0f} s")
    return record


def check_options(options: Options) -> None:
    """Raises ValueError where the options make no study."""
    if not 0 < options.smallest < options.largest < math.inf:
        raise InputError(
            f"--smallest {options.smallest} --largest {options.largest}: 0 < smallest < largest is needed."
        )
    if options.per_decade < 1 or options.ritz_steps < 1:
        raise InputError(f"--per-decade {options.per_decade} and --ritz-steps {options.ritz_steps} must be at least 1.")
    if any(k < 2 for k in options.lanczos):
        raise InputError(
            f"--lanczos {' '.join(map(str, options.lanczos))}: the first Lanczos vector is the random one."
        )
    check_seed(options.seed)
    if not options.dtypes:
        raise InputError("--dtypes names none; it takes float32, bfloat16, float16.")


def study(options: Options, exact: jaxhess.Hessian, tokens: np.ndarray, console: Console) -> dict[str, Any]:
    """One dtype's errors: for every vector over the grid, at the automatic step and exactly; and of Ritz values."""
    dtype = str(jax.tree.leaves(exact.params)[0].dtype)
    reference = exact.in_dtype(options.reference)
    difference = jaxhess.FiniteDifferenceHessian(
        exact.loss, exact.params, exact.batches, 1.0, "coordinate", options.shift
    )
    truncating = dataclasses.replace(difference, loss=reference.loss, params=reference.params)
    steps = grid(options)
    rows = []
    for name, v in vectors(options, exact.in_dtype("float32"), tokens).items():
        product = reference @ cast(v, options.reference)
        length = float(norm(product))
        errors = [distance(dataclasses.replace(difference, step=s) @ v, product) for s in steps]
        automatic = per_coordinate(difference.calibrated(v))
        row = {
            "vector": name,
            "errors": errors,
            "exact_error": distance(exact @ v, product),
            "automatic": {
                "step": automatic,
                "error": distance(dataclasses.replace(difference, step=automatic) @ v, product),
            },
        }
        # Where truncation is all of the error: in the reference's precision, at the automatic step.
        wide = distance(dataclasses.replace(truncating, step=automatic) @ cast(v, options.reference), product)
        rows.append(row | law(steps, errors, wide / automatic**2, length))
        console.print(f"{dtype:9s} {name:34s} {automatic:.1e} automatic", style="dim")
    return {"dtype": dtype, "steps": steps, "vectors": rows, "ritz": ritz_study(options, exact, reference, difference)}


def law(steps: list[float], errors: list[float], truncation: float, length: float) -> dict[str, Any]:
    """The best step of the grid, and the a / e + b e^2 (relative to the product) that the errors follow.

    a from the steps below a third of the best one, b measured apart; the balance is at e = (a / 2b)^(1/3).
    """
    usable = np.where(np.isfinite(errors), errors, np.inf)
    best = int(np.argmin(usable))
    below = [e * s for s, e in zip(steps, usable, strict=True) if s < steps[best] / 3 and np.isfinite(e)]
    rounding = float(np.median(below[-3:])) if below else float("nan")
    return {
        "product_norm": length,
        "best": {"step": steps[best], "error": float(usable[best])},
        "rounding": rounding,
        "truncation": truncation,
        "predicted_step": float(np.cbrt(rounding / (2 * truncation))) if truncation > 0 else float("nan"),
    }


def ritz_study(
    options: Options, exact: jaxhess.Hessian, reference: jaxhess.Hessian, difference: jaxhess.FiniteDifferenceHessian
) -> dict[str, Any]:
    """Relative errors of the extreme Ritz values of short Lanczos runs: over the grid, at automatic steps, exact."""
    probe = random_probe(random_key(options.seed), exact.in_dtype("float32").shape_dtype)

    def extremes(operator: jaxhess.LinearOperator, dtype: str = "float32") -> np.ndarray:
        state = jaxhess.start_lanczos([cast(probe, dtype)], options.ritz_steps)
        state = jaxhess.lanczos_segment(operator, state, options.ritz_steps)
        alphas, betas, _ = state.tridiagonal()
        if not np.isfinite(alphas + betas).all() or alphas.size == 0:
            return np.full(2, np.nan)
        return quadrature(alphas, betas).ritz_values[[0, -1]]

    true = extremes(reference, options.reference)
    fixed = [extremes(dataclasses.replace(difference, step=s)) for s in grid(options)]
    automatic = extremes(dataclasses.replace(difference, step=None))

    def errors(found: np.ndarray) -> dict[str, float]:
        return dict(zip(("smallest", "largest"), map(float, np.abs(found / true - 1)), strict=True))

    return {
        "reference": {"smallest": float(true[0]), "largest": float(true[1])},
        "fixed": [errors(found) for found in fixed],
        "automatic": errors(automatic),
        "exact": errors(extremes(exact)),
    }


def vectors(options: Options, exact: jaxhess.Hessian, tokens: np.ndarray) -> dict[str, Vector]:
    """A random vector, Lanczos vectors that follow from it, and single coordinates, in float32."""
    like = exact.shape_dtype
    found = {"random": random_probe(random_key(options.seed), like)}
    if options.lanczos:
        state = jaxhess.start_lanczos([found["random"]], max(options.lanczos), jaxhess.Storage("none"))
        for k in sorted(options.lanczos):
            state = jaxhess.lanczos_segment(exact, state, k - 1)
            found[f"Lanczos {k}"] = jax.tree.map(lambda x: x[0], state.current)
    common = int(np.bincount(np.asarray(tokens).ravel()).argmax())
    named = {leaf_name(path): k for k, (path, _) in enumerate(jax.tree.flatten_with_path(like)[0])}
    for name, label in (
        ("final_norm/scale", "one norm gain"),
        ("embed/kernel", "one embedding"),
        ("layers/mlp/up/kernel", "largest MLP weight"),
    ):
        if name in named:
            weights = jax.tree.leaves(exact.params)[named[name]]
            sizes = jnp.abs(weights[common : common + 1]) if name.startswith("embed") else jnp.abs(weights)
            place = np.array(np.unravel_index(int(jnp.argmax(sizes)), sizes.shape))
            place[0] += common if name.startswith("embed") else 0
            leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.zeros_like, exact.params))
            leaves[named[name]] = leaves[named[name]].at[tuple(place)].set(1)
            found[label] = jax.tree.unflatten(treedef, leaves)
    return found


def grid(options: Options) -> list[float]:
    """Steps from the smallest to the largest, evenly spaced in the logarithm."""
    decades = math.log10(options.largest / options.smallest)
    return [float(s) for s in np.geomspace(options.smallest, options.largest, round(decades * options.per_decade) + 1)]


def per_coordinate(calibrated: jaxhess.FiniteDifferenceHessian) -> float:
    """The step per coordinate of an operator whose step is per unit vector."""
    return calibrated.step / math.sqrt(size(calibrated.shape_dtype))


@jax.jit
def _distance(found: Vector, true: Vector) -> jax.Array:
    return norm(jax.tree.map(lambda x, y: x.astype(y.dtype) - y, found, true)) / norm(true)


def distance(found: Vector, true: Vector) -> float:
    """|found - true| / |true|."""
    return float(_distance(found, true))


COLORS = ("#1b2a41", "#2f6fb3", "#5fa8d3", "#c8553d", "#e09f3e", "#588157", "#8d5a97", "#6c757d")


def plot(record: dict[str, Any]) -> Figure:
    """One column per dtype: errors of products above, of Ritz values below."""
    studies = record["studies"]
    figure = Figure(figsize=(6.4 * len(studies) + 0.4, 9), dpi=130, layout="constrained", facecolor="white")
    axes = figure.subplots(2, len(studies), squeeze=False, sharex=True, sharey="row")
    for column, found in enumerate(studies):
        _product_panel(axes[0, column], found)
        _ritz_panel(axes[1, column], found, record["options"]["ritz_steps"])
        for panel in axes[:, column]:
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.axvspan(*PAPER, color="#f2e8cf", zorder=0)
            panel.grid(alpha=0.25, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        axes[1, column].set_xlabel("step: root mean square entry of the shift")
    axes[0, 0].set_ylabel("relative error of the product")
    axes[1, 0].set_ylabel("relative error of the Ritz value")
    axes[0, 0].set_ylim(1e-7, 30)
    axes[1, 0].set_ylim(1e-7, 30)
    lines = [
        Line2D([], [], color=COLORS[k], marker="o", markersize=3, label=row["vector"])
        for k, row in enumerate(studies[0]["vectors"])
    ]
    lines += [
        Line2D([], [], color="black", marker="*", markersize=11, linestyle="none", label="automatic step"),
        Line2D([], [], color="black", marker="|", markersize=11, linestyle="none", label="predicted best step"),
        Line2D([], [], color="black", linewidth=1, label="automatic step for every vector (below)"),
        Line2D([], [], color="black", linestyle=":", label="exact products (above: their median)"),
        Line2D([], [], color="#f2e8cf", linewidth=8, label="steps of arXiv 2602.00816"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(f"Finite-difference Hessian products, {record['parameters']:,} parameters", fontsize=12)
    return figure


def _product_panel(panel: Any, found: dict[str, Any]) -> None:
    for color, row in zip(COLORS, found["vectors"], strict=False):
        panel.plot(found["steps"], row["errors"], "o-", markersize=3, linewidth=1.2, color=color)
        automatic = row["automatic"]
        panel.plot(automatic["step"], automatic["error"], "*", markersize=12, color=color, markeredgecolor="white")
        if math.isfinite(row["predicted_step"]):
            panel.plot(row["predicted_step"], row["best"]["error"] / 2.5, "|", markersize=11, color=color)
    panel.axhline(np.median([row["exact_error"] for row in found["vectors"]]), color="black", linestyle=":")
    panel.set_title(f"products in {found['dtype']}", fontsize=11)


def _ritz_panel(panel: Any, found: dict[str, Any], steps: int) -> None:
    ritz = found["ritz"]
    for name, color in (("largest", COLORS[3]), ("smallest", COLORS[1])):
        value = format_number(ritz["reference"][name])
        errors = [e[name] for e in ritz["fixed"]]
        panel.plot(found["steps"], errors, "o-", markersize=3, color=color, label=f"{name} Ritz value, {value}")
        panel.axhline(ritz["automatic"][name], color=color, linewidth=1)
        panel.axhline(ritz["exact"][name], color=color, linewidth=1, linestyle=":")
    panel.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="lower right")
    panel.set_title(f"extreme Ritz values after {steps} Lanczos steps in {found['dtype']}", fontsize=11)


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """Errors of products, and of Ritz values, as two tables per dtype."""
    for found in record["studies"]:
        usual = int(np.argmin(np.abs(np.log(np.array(found["steps"]) / PAPER[1]))))
        products = Table(title=f"Relative error of products in {found['dtype']}", box=SIMPLE_HEAD, pad_edge=False)
        products.add_column("vector", no_wrap=True)
        usual_heading = f"at {found['steps'][usual]:.0e}".replace("e-0", "e-")
        for heading in ("exact", "best at", "error", "auto at", "error", usual_heading):
            products.add_column(heading, justify="right", no_wrap=True)
        for row in found["vectors"]:
            numbers = (row["exact_error"], *row["best"].values(), *row["automatic"].values(), row["errors"][usual])
            products.add_row(row["vector"], *(f"{x:.1e}" for x in numbers))
        console.print(products)
        ritz = Table(title=f"Error of Ritz values in {found['dtype']}", box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("products", "smallest", "largest"):
            ritz.add_column(heading, justify="left" if heading == "products" else "right")
        runs = {"exact": found["ritz"]["exact"], "automatic step": found["ritz"]["automatic"]}
        runs |= {f"step {s:.1e}": e for s, e in zip(found["steps"], found["ritz"]["fixed"], strict=True)}
        for name, errors in runs.items():
            ritz.add_row(name, f"{errors['smallest']:.1e}", f"{errors['largest']:.1e}")
        console.print(ritz)


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        run(options)


if __name__ == "__main__":
    main()
