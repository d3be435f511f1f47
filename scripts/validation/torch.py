"""Does PyTorch say the same? The same weights, tokens and probe in both frameworks, one verdict per quantity.

Compares weights, activations layer by layer, logits, loss, gradient, exact and finite-difference Hessian products,
Lanczos coefficients with and without re-orthogonalisation, Ritz values, weights and the density. Exit status 0 if all
agree, 1 if not: it then says where first. 2: it could not be run; 3: nothing differs, but something is not decided, for
want of memory for a wider dtype. With no options: the small GPT-NeoX model and the text in scripts/tiny.

    python -m scripts.validation.torch --model HF_DIR --data corpus.txt
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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
from convert.hub import local_directory
from convert.measurement import MODES, measure, probe_of
from convert.named_parameters import layers_module, tensors_by_name
from convert.text import load_blocks
from jaxhess.command import compile_quickly, default_folder, one_sentence, terminal
from jaxhess.distributed.memory import available_bytes
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import json_ready
from jaxhess.models import DecoderConfig, LanguageModel
from jaxhess.results.page import Section
from jaxhess.results.page import Table as PageTable
from jaxhess.results.page import page as page_of
from jaxhess.vectors import cast

TINY = Path(__file__).parents[1] / "tiny"
RECORD, PAGE = "agreement.json", "agreement.html"
HEAD = ("quantity", "ours", "theirs", "apart", "our rounding", "their rounding", "apart, wider", "")
STYLES = {"DIFFER": "bold red", "no digits": "yellow", "not decided": "yellow"}
TITLES = {True: "Agreement", False: "DIFFERENCE", None: "Agreement not decided"}
STATUS = {True: 0, False: 1, None: 3}
WORDS = {"none": "Lanczos without re-orthogonalisation", "full": "Lanczos with full re-orthogonalisation"}
SMALL = 2**24
"""Parameters below which torch gets one thread: its operations are then so short that threads mostly wait for each
other, ten times as long where cores are shared."""
HOW_TO_READ = """Apart: how far the two sides are apart, in norm over the norm of theirs; of densities the
Wasserstein-1 distance over the mean absolute eigenvalue. Rounding: the distance of each side from its own run in
{wider}: by the triangle inequality the two sides are no farther apart than both and the two wider runs together
(apart, wider). So the verdict is on the latter, which has no rounding of the narrow dtype in it, and on our own error,
which may not be more than ten times theirs. No digits: the functions are the same in {wider}, and in the narrow dtype
both sides' errors are more than a tenth of the quantity. Not decided: nothing wider was computed, and a bound that
holds would reject nothing. Orthogonality: ours and theirs are the largest |Q'Q - I| after the last step."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Small on purpose: a difference shows on a few hundred tokens."""

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
    measures what rounding explains; without Lanczos where its vectors do not fit. `none` saves the memory, and compares
    against a bound, which in bfloat16 decides nothing."""
    query_chunk: int | None = None
    """Queries whose attention scores exist at once on our side; by default half a sequence, so that there are two."""
    logit_chunk: int | None = None
    """Logits that exist at once in our loss; by default half of a microbatch's, so that there are two slices."""
    mesh: str | None = None
    """Device mesh of our side, for example fsdp=8; by default one device."""
    seed: int = 0
    """Of the probe (and of random tokens)."""
    quick_compilation: bool = True
    """Leave out compiler optimisations, which change speed on CPUs and not what is computed: compiling is most of a
    small model's time. Not for models whose products take minutes."""
    out: Path | None = None
    """Folder for agreement.json and agreement.html; by default runs/<date>-validate-<model>."""
    overwrite: bool = False
    """Replace the result in --out if there is one; files that no such command wrote are never replaced."""


def run(options: Options) -> bool | None:
    """The whole comparison; whether everything agrees, None where something is not decided."""
    out = options.out or default_folder(f"validate-{Path(options.model).name}")
    check(options)
    with Output(out, (RECORD, PAGE), options.overwrite) as output:
        return compare(options, output)


def compare(options: Options, output: Output) -> bool | None:
    """The comparison, in a folder that no other writes into."""
    try:
        import torch

        from scripts.validation import torch_reference
    except ImportError as error:
        if error.name != "torch":
            raise
        raise InputError("PyTorch is missing; install the extra: pip install -e '.[torch]'.") from error
    console, began = terminal(), time.perf_counter()
    with jax.enable_x64(True):
        config = convert.load_config(options.model, options.dtype)
        config.check_length(options.seq_len)
        config = dataclasses.replace(config, query_chunk=options.query_chunk or max(1, options.seq_len // 2))
        blocks = load_blocks(
            options.data,
            options.model,
            seq_len=options.seq_len,
            vocab_size=config.vocab_size,
            sequences=options.sequences,
            seed=options.seed,
        )
        mesh = None if options.mesh is None else jaxhess.make_mesh(options.mesh)
        model = convert.load(options.model, mesh, options.dtype).configured(query_chunk=config.query_chunk)
        network = torch_reference.load(local_directory(options.reference or options.model), config.dtype)
        probe = probe_of(model, options.seed)
        by_name = tensors_by_name(probe, config)
        refuse_another(by_name, dict(network.named_parameters()))
        layers = layers_module(config)
        wider, wider_steps = wider_run(options, model)
        console.print(
            f"{options.model}: {model.num_params:,} parameters in {config.dtype}, {blocks.num_sequences} sequences of "
            f"{blocks.seq_len} tokens; {f'both sides again in {wider}' if wider else 'nothing wider'}."
        )
        models = [model]
        if wider is not None:
            models.append(LanguageModel(dataclasses.replace(config, dtype=wider), cast(model.params, wider), mesh))
    if model.num_params < SMALL:
        torch.set_num_threads(1)
    cut: dict[str, Any] = {"microbatch": options.microbatch, "step": options.step}
    narrow_run: dict[str, Any] = {**cut, "modes": MODES, "steps": options.steps}
    wide_run: dict[str, Any] = {**cut, "modes": ("full",), "steps": wider_steps}
    logits = options.microbatch * options.seq_len * config.vocab_size
    logit_chunk = options.logit_chunk or max(1, logits // 2)

    def ours(model: LanguageModel) -> Side:
        kind = narrow_run if model is models[0] else wide_run
        with jax.enable_x64(True):
            return measure(model, blocks, probe, logit_chunk=logit_chunk, **kind)

    def theirs(dtype: str, kind: Mapping[str, Any]) -> Side:
        # As loaded it would compute in its own dtype, but for float64, which transformers leaves in places.
        moved = torch_reference.widened(network, dtype) if dtype in (wider, "float64") else nullcontext(network)
        try:
            with moved as reference:
                return torch_reference.measure(reference, blocks, by_name, layers=layers, **kind)
        except RuntimeError as error:
            raise InputError(f"PyTorch cannot compute this: {' '.join(str(error).split())[:300]}") from error

    # On one device together: nearly all of a small model's time is compilation. Two programs with collectives at once
    # could wait for each other.
    with ThreadPoolExecutor(2 if mesh is None else 1) as pool:
        own = list(pool.map(ours, models))
    narrow = own[0], theirs(config.dtype, narrow_run)
    wide = (own[1], theirs(wider, wide_run)) if wider else None
    verdict = judge(narrow, wide, dtype=config.dtype, wider=wider, depth=config.num_layers, step=options.step)
    unseen = list(not_exercised(config, options.seq_len))
    padding = [
        error.sentence()
        for error in torch_reference.padding_errors(network, blocks, by_name, options.microbatch)
        if error.gradient > error.elsewhere
    ]
    record = {
        **dataclasses.asdict(verdict),
        "agrees": verdict.agrees,
        "first_difference": verdict.first_difference,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()},
        "parameters": model.num_params,
        "dtype": config.dtype,
        "wider": wider,
        "not_exercised": unseen,
        "padding": padding,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "transformers")},
        "seconds": time.perf_counter() - began,
    }
    text = json.dumps(json_ready(record), indent=2, allow_nan=False) + "\n"
    output.write({PAGE: page(options, verdict, record).encode(), RECORD: text.encode()})
    show(console, verdict, [*unseen, *padding])
    console.print(f"{output.folder / PAGE} has the table, {output.folder / RECORD} all numbers.")
    return verdict.agrees


def check(options: Options) -> None:
    """Raises InputError for numbers out of range."""
    for name, least in (("seq_len", 1), ("sequences", 1), ("microbatch", 1), ("steps", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}.")
    if not 0 < options.step < math.inf:
        raise InputError(f"--step is {options.step}; it must be positive.")
    for name in ("query_chunk", "logit_chunk"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1.")


def refuse_another(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises InputError where the parameters of the two models are not of the same names and shapes."""
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        shapes = [list(side[name].shape) if name in side else "missing" for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(f"The models are not the same: {name} is {shapes[0]} in ours and {shapes[1]} in theirs.")


def wider_run(options: Options, model: LanguageModel) -> tuple[str | None, int]:
    """What both sides can be computed in beside their own dtype, for the memory that is left, and the Lanczos steps.

    None: nothing wider; 0: all but Lanczos. Of vectors and weights alone, without activations: on each side the model,
    three results and the Lanczos vectors, and as much again while gradients are made of gradients.
    """
    own = jnp.dtype(model.config.dtype).itemsize
    if options.wider == "none":
        return None, 0
    for steps in (options.steps, 0):
        for dtype in ("float64", "float32"):
            itemsize = jnp.dtype(dtype).itemsize
            needed = 2 * itemsize * model.num_params * (2 * steps + 8)
            if itemsize > own and needed < available_bytes([]):
                return dtype, steps
    return None, 0


def not_exercised(config: DecoderConfig, seq_len: int) -> Iterator[str]:
    """A sentence for every part of the model that sequences of this length do not use."""
    window, rope = config.sliding_window, config.rope
    if window is not None and window >= seq_len and (any(config.sliding_layers) or not config.sliding_layers):
        yield f"Not exercised: sliding window {window} (--seq-len is {seq_len})."
    if rope is not None and rope.kind == "dynamic":
        begins = rope.original_max_positions or config.max_positions
        if begins >= seq_len:
            yield f"Not exercised: RoPE scaling beyond {begins} positions (--seq-len is {seq_len})."


def show(console: Console, verdict: Verdict, notes: Sequence[str]) -> None:
    """The table, and the verdict in a sentence."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    for name in HEAD:
        table.add_column(name, min_width={"quantity": 13, "": 6}.get(name))
    for row in rows(verdict):
        table.add_row(*row, style=STYLES.get(row[-1]))
    console.print(table)
    for text in [*notes, *sentences(verdict)]:
        console.print(text)


def rows(verdict: Verdict) -> Iterator[list[str]]:
    """The cells of every line."""
    for line in verdict.lines:
        wider = "" if line.wider is None else f"{line.wider:.1e}"
        if line.own is not None:
            rounding = [f"{x:.1e}" for x in line.own]
        elif line.explained is None:
            rounding = ["unknown", ""]
        else:
            rounding = ["nothing" if line.kind == "bits" else f"{line.explained:.1e} ({line.kind})", ""]
        values = [f"{x:.6g}" if abs(x) >= 1e-3 else f"{x:.1e}" for x in (line.ours, line.theirs)]
        yield [line.quantity, *values, f"{line.difference:.1e}", *rounding, wider, line.word]


def sentences(verdict: Verdict) -> Iterator[str]:
    """What the table does not say."""
    for mode, steps in verdict.lanczos.items():
        ends = [found[-1] for found in steps["orthogonality"]]
        yield (
            f"{WORDS[mode]}: compared over {steps['compared']} of {len(steps['alphas'][0])} steps, as long as "
            f"|Q'Q - I| is below {steps['limit']:.1g} on both sides (in the end {ends[0]:.1g} and {ends[1]:.1g})."
        )
    without = [line.quantity for line in verdict.lines if line.word == "no digits"]
    if without:
        yield f"The same function, but no digits left in this dtype: {', '.join(without)}."
    if verdict.agrees is None:
        undecided = [line.quantity for line in verdict.lines if line.word == "not decided"]
        yield (
            f"Not decided, without a run in a wider dtype: {', '.join(undecided)}. Nothing else differs. Lanczos rests "
            "on the exact Hessian product, and can be left out (--steps 0)."
        )
    elif verdict.agrees:
        yield "All others agree within rounding." if without else "All agree within rounding."
    else:
        yield verdict.first_difference or ""


def page(options: Options, verdict: Verdict, record: dict[str, Any]) -> str:
    """The HTML page: the table, the Lanczos coefficients step by step, and how to read them."""
    facts = (
        f"{options.model}, {record['parameters']:,} parameters in {record['dtype']}, {options.sequences} sequences of "
        f"{options.seq_len} tokens."
    )
    how_to_read = HOW_TO_READ.format(wider=record["wider"] or "a wider dtype")
    sections = [Section("Every quantity", [PageTable(HEAD, list(rows(verdict))), how_to_read])]
    for mode, steps in verdict.lanczos.items():
        columns = [f"{side} {name}" for name in ("alpha", "beta") for side in ("our", "their")]
        numbers = zip(*zip(*steps["alphas"], strict=True), *zip(*steps["betas"], strict=True), strict=True)
        body = [[str(j), *(f"{x:.7g}" for x in row)] for j, row in enumerate(numbers, 1)]
        sections.append(Section(f"{WORDS[mode]}, step by step", [PageTable(["step", *columns], body)]))
    notes = [facts, *record["not_exercised"], *record["padding"], *sentences(verdict)]
    return page_of(f"{TITLES[verdict.agrees]} with PyTorch", sections, notes)


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    if options.quick_compilation:
        compile_quickly()
    with one_sentence():
        agrees = run(options)
    raise SystemExit(STATUS[agrees])


if __name__ == "__main__":
    main()
