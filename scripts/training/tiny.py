"""Trains the embedded default model: a small GPT-NeoX on the source text of Python's own standard library.

    python -m scripts.training.tiny --out scripts/tiny --overwrite

Tokenizer, weights, loss curve and an excerpt of the text go to `--out`, weights and configuration in Hugging Face
format. Losses are means in nats per token; nats divided by ln 2 and by the bytes of a token are bits per byte.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from convert.destination import appearing, check_destination
from convert.exporting import write_hugging_face
from convert.tokenizer import add_tokenizer
from jaxhess.command import one_sentence
from jaxhess.data import TokenBatch, TokenBlocks
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.models import DecoderConfig, LanguageModel, NextTokenLoss, RopeConfig, abstract_params, initialize
from jaxhess.operators.adam import adam_preconditioner
from jaxhess.operators.restriction import leaf_name
from jaxhess.vectors import Vector, check_seed, random_key
from scripts.training.corpus import END_OF_TEXT, Corpus, excerpt, read_corpus, text_figures, tokenise, train_tokenizer

KEPT = ("tokenizer.json", "params.npz", "decoder.json", "loss_curve.json")
CHECKPOINTS, TRAINER_STATE = "checkpoints", "trainer_state.json"
PRECONDITIONER = "preconditioner.npz"
B2 = 0.98
"""Decay of AdamW's second moments."""
Keep = Callable[[int, LanguageModel, Vector, dict[str, float]], None]
"""Keeps the model after a step, with what Adam divides by, and the step's loss and the next step's learning rate."""
ABOUT_SAMPLE = (
    "sample.txt holds pieces of Python's standard library (see LICENSE-text), in turn from one of train_files, which "
    "the model was trained on, and from one of held_out_files, which it never saw. loss is the model's mean over the "
    "text in blocks of seq_len + 1 tokens, in nats per token."
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Train the embedded default model."""

    out: Path = Path("scripts/tiny")
    """Folder of the model; refused if it holds anything, unless --overwrite."""
    overwrite: bool = False
    """Replace the model in --out."""
    trained: Path | None = None
    """Folder in which an earlier run left its parameters (its --work): export those instead of training."""
    work: Path = Path("runs/tiny-training")
    """Folder for parameters and tokenizer before export, so that a failed export does not cost the training."""
    text: Path | None = None
    """Folder of text to train on instead of the standard library."""
    vocab_size: int = 2000
    """Tokens of the byte-level BPE vocabulary, the 256 bytes and the end-of-text token included."""
    embed_dim: int = 128
    """Width of the residual stream; --num-heads times 8, or a multiple of that."""
    num_layers: int = 4
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""
    seq_len: int = 128
    """Predicted tokens of a training sequence."""
    batch: int = 16
    """Sequences of a training step."""
    steps: int = 2500
    """Training steps; the learning rate falls to nearly 0 over them, so they cannot be cut short."""
    learning_rate: float = 3e-3
    """Peak learning rate, reached after a twentieth of the steps."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases have none."""
    evaluate_every: int = 100
    """Steps between two points of the loss curve."""
    keep_every: int = 0
    """Steps between two checkpoints in --work/checkpoints, for scripts/trajectory.py; 0 for none."""
    sample_bytes: int = 150_000
    """Size of the excerpt `sample.txt`."""
    seed: int = 0
    """Of the initial weights, the order of the data and the excerpt."""


def run(options: Options) -> None:
    """Train, export and report."""
    check_seed(options.seed)
    check_destination(options.out, options.overwrite)  # before the training, not after it
    kept = [checkpoint_folder(options, step) for step in kept_steps(options)]
    for folder in kept:
        check_destination(folder, overwrite=True)
    if kept and kept[0].parent.is_dir():
        others = sorted({path.name for path in kept[0].parent.iterdir()} - {folder.name for folder in kept})
        if others:
            raise InputError(f"{kept[0].parent} holds {others[0]}, which this training would not replace: move it.")
    corpus = read_corpus(options.text)
    work = options.trained or options.work
    if options.trained is None:
        train_and_keep(options, corpus, work)
    export_all(options, corpus, work)


def train_and_keep(options: Options, corpus: Corpus, work: Path) -> None:
    """Leaves `tokenizer.json`, `params.npz`, `decoder.json` and `loss_curve.json` in `work`."""
    with Output(work, KEPT, overwrite=True) as output:
        _train_and_keep(options, corpus, output)


def _train_and_keep(options: Options, corpus: Corpus, output: Output) -> None:
    tokenizer = train_tokenizer(list(corpus.train.values()), options.vocab_size)
    blocks = {name: tokenise(texts, tokenizer, options.seq_len, name) for name, texts in vars(corpus).items()}
    model, curve = train(options, tokenizer.get_vocab_size(), blocks, keeping(options, tokenizer))
    curve |= text_figures(corpus, tokenizer, blocks)
    curve["held_out_bits_per_byte"] = curve["held_out_loss"] / math.log(2) / curve["held_out_bytes_per_token"]
    params = io.BytesIO()
    np.savez(params, **{jax.tree_util.keystr(k): x for k, x in jax.tree.leaves_with_path(model.params)})
    output.write(
        {
            "tokenizer.json": lambda path: tokenizer.save(str(path)),
            "params.npz": params.getvalue(),
            "decoder.json": json_bytes(model.config.to_dict()),
            "loss_curve.json": json_bytes(curve),
        }
    )


def export_all(options: Options, corpus: Corpus, work: Path) -> None:
    """Writes the model folder from what `train_and_keep` left in `work`, and prints the figures.

    Raises:
        InputError: `work` lacks one of the files, or comes from another Python.
    """
    missing = [name for name in KEPT if not (work / name).is_file()]
    if missing:
        raise InputError(f"{work} has no {', '.join(missing)}: it is not the --work folder of a finished training.")
    config = DecoderConfig.from_dict(json.loads((work / "decoder.json").read_text()))
    curve = json.loads((work / "loss_curve.json").read_text())
    if curve["python"] != platform.python_version():
        raise InputError(
            f"{work} was trained with Python {curve['python']}; export it with the same version, because the training "
            "text (its standard library) differs."
        )
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    with np.load(work / "params.npz") as saved:
        params = jax.tree.map_with_path(
            lambda path, _: jnp.asarray(saved[jax.tree_util.keystr(path)]), abstract_params(config)
        )
    model = LanguageModel(config, params)
    fast = fast_tokenizer(tokenizer)
    sample, sources = excerpt(corpus, options.sample_bytes, options.seed)
    blocks = tokenise({"": sample}, tokenizer, config.max_positions, "sample.txt")
    figures = {"seq_len": blocks.seq_len, "sequences": blocks.num_sequences, "fingerprint": blocks.fingerprint()}
    figures["loss"] = mean_loss(model.loss(), params, blocks, options.batch)
    about = {"about": ABOUT_SAMPLE, "python": curve["python"], **figures, **sources}
    with appearing(options.out, options.overwrite) as folder:
        write_hugging_face(model, folder, None)
        add_tokenizer(fast, folder)
        (folder / "sample.txt").write_bytes(sample.encode())
        (folder / "sample.json").write_bytes(json_bytes(about))
        if options.text is None:
            licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
            notice = f"{sys.copyright}\n\nPython Software Foundation License, https://docs.python.org/3/license.html\n"
            (folder / "LICENSE-text").write_text(licence.read_text() if licence.is_file() else notice)
        (folder / "loss_curve.json").write_bytes(json_bytes(curve))
        plot(curve, folder / "loss_curve.png")
    print(
        json.dumps({name: value for name, value in curve.items() if name != "points"} | {"sample": figures}, indent=1)
    )


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as `transformers` saves it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def kept_steps(options: Options) -> list[int]:
    """The steps after which a checkpoint is kept: every `keep_every`th, and the last.

    Raises:
        InputError: `keep_every` is negative.
    """
    if options.keep_every < 0:
        raise InputError(f"--keep-every {options.keep_every} must be a number of steps, or 0 for none.")
    if not options.keep_every or options.trained is not None:
        return []
    return sorted({*range(options.keep_every, options.steps + 1, options.keep_every), options.steps})


def checkpoint_folder(options: Options, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return options.work / CHECKPOINTS / f"step-{step:06d}"


def keeping(options: Options, tokenizer: Tokenizer) -> Keep:
    """What writes a checkpoint in Hugging Face format.

    Loss and learning rate go beside it, to `trainer_state.json`, in the form of the trainer of `transformers`, and
    what Adam divides by to `preconditioner.npz`, which `convert.load_preconditioner` reads.
    """
    fast = fast_tokenizer(tokenizer)

    def keep(step: int, model: LanguageModel, diagonal: Vector, facts: dict[str, float]) -> None:
        state = {"global_step": step, "log_history": [{"step": step, **facts}]}
        with appearing(checkpoint_folder(options, step), overwrite=True) as folder:
            write_hugging_face(model, folder, None)
            add_tokenizer(fast, folder)
            (folder / TRAINER_STATE).write_bytes(json_bytes(state))
            named = {leaf_name(path): x for path, x in jax.tree.leaves_with_path(diagonal)}
            np.savez(folder / PRECONDITIONER, **named)

    return keep


def decoder_config(options: Options, vocab_size: int) -> DecoderConfig:
    """The GPT-NeoX architecture: LayerNorm, parallel residual, a quarter of each head rotated, biases everywhere."""
    head_dim = options.embed_dim // options.num_heads
    return DecoderConfig(
        vocab_size=vocab_size,
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        num_kv_heads=options.num_heads,
        head_dim=head_dim,
        mlp_dim=4 * options.embed_dim,
        max_positions=options.seq_len,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        gated_mlp=False,
        parallel_residual=True,
        rope=RopeConfig(dims=head_dim // 4),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        query_chunk=options.seq_len,
        remat=False,
    )


def train(
    options: Options, vocab_size: int, blocks: dict[str, TokenBlocks], keep: Keep | None = None
) -> tuple[LanguageModel, dict[str, Any]]:
    """The trained model, and its losses along the way and at the end; `keep` is called after `kept_steps`."""
    model = initialize(decoder_config(options, vocab_size), random_key(options.seed))
    loss = model.loss()
    optimizer, rate = optimizer_of(options), learning_rate(options)
    params, state = model.params, optimizer.init(model.params)
    rng = np.random.default_rng(options.seed)
    source = blocks["train"]
    order = np.zeros(0, np.int64)
    watched = every_nth(blocks["held_out"], 64)
    points: list[dict[str, float]] = []
    recent: list[jax.Array] = []
    print(
        f"{model.num_params:,} parameters, {source.tokens.size:,} training tokens in {source.num_sequences} sequences"
    )
    kept = set(kept_steps(options))
    began = time.perf_counter()
    for step in range(1, options.steps + 1):
        while order.size < options.batch:
            order = np.concatenate([order, rng.permutation(source.num_sequences)])
        rows, order = order[: options.batch], order[options.batch :]
        batch = TokenBatch(jnp.asarray(source.tokens[rows]), jnp.asarray(source.weights[rows]))
        params, state, value = training_step(params, state, batch, loss=loss, optimizer=optimizer)
        recent.append(value)
        if keep is not None and step in kept:
            # The rate of the next step, as the Trainer of transformers has it.
            facts = {"loss": float(value), "learning_rate": float(rate(step))}
            keep(step, dataclasses.replace(model, params=params), adam_preconditioner(state, params, b2=B2), facts)
        if step == 1 or step % options.evaluate_every == 0 or step == options.steps:
            held_out = mean_loss(loss, params, watched, options.batch)
            seconds = time.perf_counter() - began
            train_loss = float(np.mean(jax.device_get(recent)))
            points.append({"step": step, "train": train_loss, "held_out": held_out, "seconds": round(seconds, 1)})
            left = seconds / step * (options.steps - step) / 60
            print(
                f"step {step}/{options.steps}  train {train_loss:.4f}  held-out {held_out:.4f}  "
                f"{seconds / step:.2f} s/step  {left:.1f} min left",
                flush=True,
            )
            recent = []
    return dataclasses.replace(model, params=params), {
        "points": points,
        "training_tokens_seen": options.steps * options.batch * options.seq_len,
        "train_loss": mean_loss(loss, params, every_nth(source, 512), options.batch),
        "held_out_loss": mean_loss(loss, params, blocks["held_out"], options.batch),
        "seconds": round(time.perf_counter() - began, 1),
    }


def learning_rate(options: Options) -> optax.Schedule:
    """A linear warm-up over a twentieth of the steps, then a cosine down to a hundredth of the peak."""
    peak, steps = options.learning_rate, options.steps
    return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 20), steps, peak / 100)


def optimizer_of(options: Options) -> optax.GradientTransformation:
    """AdamW at `learning_rate`, with gradients clipped to norm 1."""

    def matrices(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    adamw = optax.adamw(learning_rate(options), b2=B2, weight_decay=options.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"), donate_argnames=("params", "state"))
def training_step(
    params: Any, state: Any, batch: TokenBatch, *, loss: NextTokenLoss, optimizer: optax.GradientTransformation
) -> tuple[Any, Any, jax.Array]:
    """One step: new parameters, new optimizer state, mean loss before the step."""

    def mean(params: Any) -> jax.Array:
        total, count = loss(params, batch)
        return total / count

    value, gradient = jax.value_and_grad(mean)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


def mean_loss(loss: NextTokenLoss, params: Any, blocks: TokenBlocks, microbatch: int) -> float:
    """Mean loss in nats per token."""
    total, count = _loss_sums(params, blocks.microbatches(microbatch), loss=loss)
    return float(np.asarray(total, np.float64).sum() / np.asarray(count, np.float64).sum())


@functools.partial(jax.jit, static_argnames="loss")
def _loss_sums(params: Any, batches: TokenBatch, *, loss: NextTokenLoss) -> tuple[jax.Array, jax.Array]:
    return jax.lax.map(lambda batch: loss(params, batch), batches)


def every_nth(blocks: TokenBlocks, count: int) -> TokenBlocks:
    """About `count` of the blocks, evenly spaced."""
    stride = max(1, blocks.num_sequences // count)
    return TokenBlocks(blocks.tokens[::stride][:count], blocks.weights[::stride][:count])


def json_bytes(data: dict[str, Any]) -> bytes:
    """The contents of a file of indented JSON."""
    return (json.dumps(data, indent=1) + "\n").encode()


def plot(curve: dict[str, Any], path: Path) -> None:
    """Train and held-out loss over steps, with the loss of a model that knows only the tokens' frequencies."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in curve["points"]]
    for name, label in (("train", "train (mean since the point before)"), ("held_out", "held-out files")):
        axes.plot(steps, [point[name] for point in curve["points"]], label=label)
    axes.axhline(
        curve["held_out_loss_of_training_unigrams"], color="gray", linestyle="--", label="token frequencies only"
    )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options)
    with one_sentence():
        run(options)


if __name__ == "__main__":
    main()
