"""Does PyTorch say the same? The same weights, tokens and probe in both frameworks, one verdict per quantity.

Compares weights, activations layer by layer, logits, loss, gradient, exact and finite-difference Hessian products,
Lanczos coefficients with and without re-orthogonalisation, Ritz values, weights and the density. Exit status 0 only if
all agree, 1 if not: it then says where first. With no options: the small GPT-NeoX model and the text in scripts/tiny.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.metadata
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import convert
import jaxhess
from convert.agreement import Side, Verdict, judge
from convert.by_name import layers_module, tensors_by_name
from convert.hub import local_directory
from convert.measurement import MODES, Mode, measure, probe_of
from convert.text import load_blocks
from jaxhess.command import compile_quickly, one_sentence
from jaxhess.memory import available_bytes
from jaxhess.models import LanguageModel
from jaxhess.report import STYLE
from jaxhess.run_folder import json_ready, refuse_unusable
from jaxhess.vectors import cast

TINY = Path(__file__).parent / "tiny"
RECORD, PAGE = "agreement.json", "agreement.html"
HEAD = ("quantity", "ours", "theirs", "apart", "rounding", "apart, wider", "")
WORDS = {"none": "Lanczos without re-orthogonalisation", "full": "Lanczos with full re-orthogonalisation"}
SMALL = 2**24
"""Parameters below which torch gets one thread: its operations are then so short that threads mostly wait for each
other, ten times as long where cores are shared."""
HOW_TO_READ = """Apart: how far the two sides are apart, in norm over the norm of theirs; of densities the
Wasserstein-1 distance over the mean absolute eigenvalue. Rounding: what it explains, the distance of each side from its
own run in {wider}, added up: by the triangle inequality the two sides are no farther apart than that and the two wider
runs together (apart, wider). So the verdict is on the latter, which has no rounding of the narrow dtype in it, and on
our own error, which may not be more than ten times theirs."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Small on purpose: what differs at all differs on a few hundred tokens."""

    model: str = str(TINY)
    """Hugging Face checkpoint directory, directory made by `python -m convert`, or hub id."""
    reference: str | None = None
    """What transformers loads: a Hugging Face directory or hub id; by default --model. For converted checkpoints."""
    data: str = str(TINY / "sample.txt")
    """Text file, folder of text, .npy/.npz of tokens, `random`, or hub:NAME[@CONFIG][:SPLIT[:COLUMN]]."""
    seq_len: int = 32
    """Predicted tokens per sequence."""
    sequences: int = 4
    """Sequences taken from the start of the data."""
    microbatch: int = 2
    """Sequences whose activations exist at once."""
    steps: int = 8
    """Lanczos steps; 0 leaves Lanczos out."""
    step: float = 1e-3
    """Of finite differences, per coordinate: the root mean square entry of the shift, as in arXiv 2602.00816."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """Of weights and computation in both; by default the checkpoint's own."""
    wider: Literal["auto", "none"] = "auto"
    """Whether both are computed in float64 as well (weights in bfloat16: float32, where float64 does not fit), which
    measures what rounding explains. `none` saves the memory, and compares against a bound."""
    mesh: str | None = None
    """Device mesh of our side, for example fsdp=8; by default one device."""
    seed: int = 0
    """Of the probe (and of random tokens)."""
    quick_compilation: bool = True
    """Leave out compiler optimisations, which change speed on CPUs and not what is computed: compiling is most of a
    small model's time. Not for models whose products take minutes."""
    out: Path | None = None
    """Folder for agreement.json and agreement.html; by default runs/<date>-validate-<model>."""


def run(options: Options) -> bool:
    """The whole comparison; whether everything agrees."""
    out = options.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-validate-{Path(options.model).name}"
    check(options, out)
    try:
        import torch
        import torch_reference
    except ImportError:
        raise ImportError("PyTorch is missing; install the extra: pip install -e '.[torch]'.") from None
    console, began = Console(), time.perf_counter()
    with jax.enable_x64(True):
        config = convert.load_config(options.model, options.dtype)
        config.check_length(options.seq_len)
        blocks = load_blocks(
            options.data,
            options.model,
            seq_len=options.seq_len,
            vocab_size=config.vocab_size,
            sequences=options.sequences,
            seed=options.seed,
        )
        mesh = None if options.mesh is None else jaxhess.make_mesh(options.mesh)
        model = convert.load(options.model, mesh, options.dtype)
        network = torch_reference.load(local_directory(options.reference or options.model), config.dtype)
        wider = wider_dtype(options, model)
        console.print(
            f"{options.model}: {model.num_params:,} parameters in {config.dtype}, {blocks.num_sequences} sequences of "
            f"{blocks.seq_len} tokens; {f'both sides again in {wider}' if wider else 'bounds only, nothing wider'}."
        )
        models, wide = [model], None
        if wider is not None:
            models.append(LanguageModel(dataclasses.replace(config, dtype=wider), cast(model.params, wider), mesh))
        probe = probe_of(model, options.seed)
        by_name = tensors_by_name(probe, config)
    if model.num_params < SMALL:
        torch.set_num_threads(1)
    cut: dict[str, Any] = {"microbatch": options.microbatch, "steps": options.steps, "step": options.step}

    def ours(model: LanguageModel) -> Side:
        modes = MODES if model is models[0] else ("full",)
        with jax.enable_x64(True):
            return measure(model, blocks, probe, modes=modes, **cut)

    def theirs(network: Any, modes: Sequence[Mode]) -> Side:
        layers = layers_module(config)
        return torch_reference.measure(network, blocks, by_name, layers=layers, modes=modes, **cut)

    # On one device together: nearly all of a small model's time is compilation. Two programs with collectives at once
    # could wait for each other.
    with ThreadPoolExecutor(2 if mesh is None else 1) as pool:
        own = list(pool.map(ours, models))
    narrow = own[0], theirs(network, MODES)
    if wider is not None:
        with torch_reference.widened(network, wider) as wide_network:
            wide = own[1], theirs(wide_network, ("full",))
    verdict = judge(narrow, wide, dtype=config.dtype, wider=wider, depth=config.num_layers, step=options.step)
    record = {
        **dataclasses.asdict(verdict),
        "agrees": verdict.agrees,
        "first_difference": verdict.first_difference,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()},
        "parameters": model.num_params,
        "dtype": config.dtype,
        "wider": wider,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "transformers")},
        "seconds": time.perf_counter() - began,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / RECORD).write_text(json.dumps(json_ready(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / PAGE).write_text(page(options, verdict, record), encoding="utf-8")
    show(console, verdict)
    console.print(f"{out / PAGE} has the table, {out / RECORD} all numbers.")
    return verdict.agrees


def check(options: Options, out: Path) -> None:
    """Raises ValueError for numbers out of range, and where nothing can be written."""
    for name, least in (("seq_len", 1), ("sequences", 1), ("microbatch", 1), ("steps", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}.")
    if not 0 < options.step < math.inf:
        raise ValueError(f"--step is {options.step}; it must be positive.")
    refuse_unusable(out)


def wider_dtype(options: Options, model: LanguageModel) -> str | None:
    """What both sides can be computed in beside their own dtype, for the memory that is left; None: nothing wider.

    Of vectors and weights alone, without activations: on each side the model, three results and the Lanczos vectors,
    and as much again while gradients are made of gradients.
    """
    own = jnp.dtype(model.config.dtype).itemsize
    if options.wider == "none":
        return None
    for dtype in ("float64", "float32"):
        itemsize = jnp.dtype(dtype).itemsize
        needed = 2 * itemsize * model.num_params * (2 * options.steps + 8)
        if itemsize > own and needed < available_bytes([]):
            return dtype
    return None


def show(console: Console, verdict: Verdict) -> None:
    """The table, and the verdict in a sentence."""
    table = Table(*HEAD, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows(verdict):
        table.add_row(*row, style=None if row[-1] == "agree" else "bold red")
    console.print(table)
    for text in sentences(verdict):
        console.print(text)


def rows(verdict: Verdict) -> Iterator[list[str]]:
    """The cells of every line."""
    for line in verdict.lines:
        explained = {"bits": "nothing", "bound": f"{line.explained:.1e} (bound)", "measured": f"{line.explained:.1e}"}
        wider = "" if line.wider is None else f"{line.wider:.1e}"
        verdict_text = "agree" if line.agrees else "DIFFER"
        values = [f"{x:.7g}" for x in (line.ours, line.theirs)]
        yield [line.quantity, *values, f"{line.difference:.1e}", explained[line.kind], wider, verdict_text]


def sentences(verdict: Verdict) -> Iterator[str]:
    """What the table does not say."""
    for mode, steps in verdict.lanczos.items():
        ends = [found[-1] for found in steps["orthogonality"]]
        yield (
            f"{WORDS[mode]}: compared over {steps['compared']} of {len(steps['alphas'][0])} steps, as long as "
            f"|Q'Q - I| is below {steps['limit']:.1g} on both sides (in the end {ends[0]:.1g} and {ends[1]:.1g})."
        )
    yield "All agree within rounding." if verdict.agrees else verdict.first_difference or ""


def page(options: Options, verdict: Verdict, record: dict[str, Any]) -> str:
    """The HTML page: the table, the Lanczos coefficients step by step, and how to read them."""

    def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
        def cells(row: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

        lines = "\n".join(cells(row, "td") for row in body)
        return f'<div class="wide"><table><thead>{cells(head, "th")}</thead><tbody>\n{lines}\n</tbody></table></div>'

    parts = [
        f"<h1>{'Agreement' if verdict.agrees else 'DIFFERENCE'} with PyTorch</h1>",
        f'<p class="note">{html.escape(options.model)}, {record["parameters"]:,} parameters in {record["dtype"]}, '
        f"{options.sequences} sequences of {options.seq_len} tokens.</p>",
        *(f"<p>{html.escape(text)}</p>" for text in sentences(verdict)),
        table(HEAD, rows(verdict)),
        f'<p class="note">{html.escape(HOW_TO_READ.format(wider=record["wider"] or "a wider dtype"))}</p>',
    ]
    for mode, steps in verdict.lanczos.items():
        parts.append(f"<h2>{WORDS[mode]}, step by step</h2>")
        columns = [f"{side} {name}" for name in ("alpha", "beta") for side in ("our", "their")]
        numbers = zip(*zip(*steps["alphas"], strict=True), *zip(*steps["betas"], strict=True), strict=True)
        body = [[str(j), *(f"{x:.7g}" for x in row)] for j, row in enumerate(numbers, 1)]
        parts.append(table(["step", *columns], body))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Agreement with PyTorch</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    if options.quick_compilation:
        compile_quickly()
    with one_sentence():
        agrees = run(options)
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
