"""What a spectrum owes to its data: random tokens or text, few sequences or many, seen in training or not.

    python -m scripts.studies.data

With no options: the small model in scripts/tiny, text that it was trained on (the standard library of Python) and text
of another kind (scikit-learn's descriptions of its data sets; extra `digits`), a few minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import convert
from convert.text import load_blocks
from jaxhess.data import TokenBlocks, random_blocks
from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Study
from jaxhess.vectors import check_seed
from scripts.studies.harness import FOUNDATION, HESSFORMER, TINY, StudyOptions, command, picture
from scripts.studies.samples.shapes import SampleShape, ratio_over_draws, shape, standard_text
from scripts.training.short_runs import over_seeds

NAME = "data"
SEEN, UNSEEN, RANDOM = "text seen in training", "text of another kind", "random tokens"
COLORS = {SEEN: "#0072B2", UNSEEN: "#D55E00", RANDOM: "#555555"}
MARKERS = {SEEN: "o", UNSEEN: "s", RANDOM: "^"}
IMPACT = "3.3 Understanding the Dataset Impact"

CAPTION = """Left and middle: the ends of the spectrum against the number of sequences, drawn at random; bars are 95%
over independent draws. Right: the Frobenius norm (filled) and what it is for all text like this, with the share that
the scatter of few sequences adds removed (hollow, 95% over probes and data)."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """Of the study."""

    model: str = str(TINY)
    """Hugging Face checkpoint directory, directory made by `python -m convert`, GGUF folder, or hub id."""
    seen: str | None = None
    """Text that the model was trained on; by default the standard library's, for the model in scripts/tiny."""
    unseen: str | None = None
    """Text of another kind; by default scikit-learn's descriptions of its data sets."""
    known: bool | None = None
    """Whether the model is known to have been trained on the first text and not on the second; by default only for the
    model in scripts/tiny."""
    seq_len: int = 64
    """Predicted tokens per sequence."""
    sizes: tuple[int, ...] = (2, 8, 60)
    """Numbers of sequences, ascending."""
    draws: int = 3
    """Independent samples of all sizes but those that would take more than the largest size in all."""
    microbatch: int = 4
    """Most sequences at once."""
    steps: int = 24
    """Lanczos steps."""
    probes: int = 2
    """Random probes."""
    seed: int = 0
    """Of samples and probes."""

    def check(self) -> None:
        """Raises InputError where the options make no study."""
        check_seed(self.seed)
        if len(self.sizes) < 2 or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 2:
            raise InputError(f"--sizes {' '.join(map(str, self.sizes))}: two or more are needed, ascending, from 2 on.")
        if self.draws < 2 or self.steps < 4 or self.probes < 2:
            raise InputError(
                f"--draws {self.draws} --steps {self.steps} --probes {self.probes}: at least 2, 4 and 2 are needed."
            )


SMALL = Options(seq_len=16, sizes=(2, 8, 24), draws=2, steps=10)


Found = dict[tuple[str, int], list[SampleShape]]
"""Samples by kind of text and size."""


def study(options: Options) -> Study:
    """The spectra of all samples, and what follows for the papers' claims."""
    options.check()
    config = convert.load_config(options.model, None)
    config.check_length(options.seq_len)
    texts = {SEEN: text(options, options.seen, SEEN), UNSEEN: text(options, options.unseen, UNSEEN)}
    model = convert.load(options.model, dtype="float32")
    found: Found = {}
    settings = {name: getattr(options, name) for name in ("microbatch", "steps", "probes", "seed")}
    for size in options.sizes:
        draws = max(2, min(options.draws, options.sizes[-1] // size))
        seeds = range(options.seed, options.seed + draws)
        for name, blocks in texts.items():
            found[name, size] = [shape(model, blocks.sampled(size, seed), **settings) for seed in seeds]
    for length in sorted({max(options.seq_len // 4, 1), options.seq_len}):
        for size in options.sizes[:-1]:
            for seed in (options.seed, options.seed + 1):
                sizes = {"seq_len": length, "vocab_size": config.vocab_size, "sequences": size}
                found.setdefault((RANDOM, size), []).append(shape(model, random_blocks(**sizes, seed=seed), **settings))
    drawn = picture(NAME, figure(found), CAPTION)
    record = {
        "parameters": model.num_params,
        "samples": [{"text": name, **dataclasses.asdict(s)} for (name, _), row in found.items() for s in row],
    }
    stated = tuple(claims(found, options, model.num_params))
    return Study("Spectra and their data", stated, tuple(tables(found)), (drawn,), record)


def text(options: Options, source: str | None, kind: str) -> TokenBlocks:
    """All sequences of a text, or some hundred times as many as are drawn.

    Raises:
        InputError: It is too short, or cannot be read; scikit-learn is not installed.
    """
    vocab_size, most = convert.load_config(options.model, None).vocab_size, 300 * options.sizes[-1]
    if source is None:
        found = standard_text(options.model, kind == SEEN, options.seq_len, vocab_size, most)
    else:  # a data set that is streamed has no end
        sequences = 10 * options.sizes[-1] if source.startswith("hub:") else None
        sizes: Any = {"seq_len": options.seq_len, "vocab_size": vocab_size, "sequences": sequences}
        found = load_blocks(source, options.model, **sizes)
    if found.num_sequences < options.sizes[-1]:
        raise InputError(f"The {kind} has {found.num_sequences} sequences; --sizes asks for {options.sizes[-1]}.")
    return found


def claims(found: Found, options: Options, parameters: int) -> Iterator[Claim]:
    """The papers' statements on data beside the samples."""
    first, last = options.sizes[0], options.sizes[-1]
    on = f"{Path(options.model).name}, {parameters:,} parameters, up to {last} x {options.seq_len} tokens"
    random = [s for (name, _), row in found.items() if name == RANDOM for s in row]
    default = options.model == str(TINY) and options.seen is None and options.unseen is None
    known = options.known if options.known is not None else default
    untold = "" if known else "what the model was trained on is not known"

    def claim(
        place: str, statement: str, paper: str, quantity: str, holds: Any, pair: Any, obstacle: str = ""
    ) -> Claim:
        value, error = pair
        return Claim(HESSFORMER, place, statement, paper, quantity, holds, value, error, on, obstacle)

    yield claim(
        f"{IMPACT}, Figure 4",
        "On random data the spectrum has compact support and no outliers.",
        "seen in the figure",
        "largest magnitude over the edge of a semicircle of the same second moment, the geometric mean over samples",
        (None, 1.5),
        geometric([s.support for s in random]),
    )
    kurtosis = [s.kurtosis for s in random]
    yield claim(
        f"{IMPACT}, Figure 4(c)",
        "On random data the spectrum can look like a degenerate semicircle.",
        "seen in the figure",
        "least kurtosis over samples of random tokens (2 for a semicircle)",
        (1.5, 3),
        (min(kurtosis), 0.0),
    )
    yield claim(
        f"{IMPACT}, Figure 4",
        "On random data the shape is consistent over sample size and sequence length.",
        "seen in the figure",
        "largest over least kurtosis of the settings, means over samples",
        (1, 2),
        extreme_ratio(random),
    )
    for name in (SEEN, UNSEEN):
        tails = [(s.tail, s.tail_error) for s in found[name, last] if s.tail is not None and s.tail_error is not None]
        tail = (tails[0][0], 2 * tails[0][1]) if tails else (None, 0.0)
        yield claim(
            f"{IMPACT}, Figure 5",
            f"On text ({name}) the eigenvalues decay by a power law.",
            "seen in the figure",
            "exponent a of value ~ rank^-a over the positive eigenvalues that converged (up to 0.4 for the edge of a "
            "bounded spectrum)",
            (0.5, None),
            tail,
            "" if tails else "fewer than eight eigenvalues converged: more --steps are needed",
        )
        few, many = (over_seeds([s.outliers for s in found[name, size]]) for size in (first, last))
        yield claim(
            f"{IMPACT}, Figure 5",
            f"On text ({name}) there are more outliers as the data set grows.",
            "seen in the figure",
            f"converged eigenvalues of {last} sequences less those of {first}",
            (1, None),
            (many[0] - few[0], math.hypot(many[1], few[1])),
        )
    yield claim(
        f"{IMPACT}, Figure 6(a), 6(b)",
        "On data that the model was trained on, negative eigenvalues vanish with less subsampling.",
        "they disappear",
        f"most negative over largest eigenvalue, {last} sequences",
        (None, 0.05),
        over_seeds([s.negative for s in found[SEEN, last]]),
        untold,
    )
    stays = ratio_over_draws(*([-s.smallest for s in found[UNSEEN, size]] for size in (last, first)))
    yield claim(
        f"{IMPACT}, Figure 6(c), 6(d)",
        "On data that the model was not trained on, more data do not reduce the large negative eigenvalues.",
        "they stay",
        f"most negative eigenvalue of {last} sequences over that of {first}",
        (0.8, None),
        stays,
        untold,
    )
    factor = last / first
    for name in (SEEN, UNSEEN):
        for what in ("largest", "norm"):
            value, error = ratio_over_draws(*([getattr(s, what) for s in found[name, n]] for n in (first, last)))
            quantity = "largest eigenvalue" if what == "largest" else "Frobenius norm"
            yield Claim(
                FOUNDATION,
                "Design tradeoffs (Subsampling), Figure 7",
                f"A data set 30 times as large does not alter the spectrum in a meaningful way ({name}).",
                "seen in the figure",
                f"{quantity} of {first} over that of {last} sequences, {factor:.3g} times as many",
                (0.8, 1.25),
                value,
                error,
                on,
            )


def geometric(values: Sequence[float]) -> tuple[float, float]:
    """The geometric mean, and 95% from the scatter of the logarithms."""
    mean, error = over_seeds(np.log(values).tolist())
    return math.exp(mean), math.exp(mean) * math.expm1(error)


def extreme_ratio(samples: Sequence[SampleShape]) -> tuple[float, float]:
    """The largest over the least kurtosis of the settings: means over samples, and 95% from those two's scatter."""
    settings: dict[tuple[int, int], list[float]] = {}
    for s in samples:
        settings.setdefault((s.sequences, s.seq_len), []).append(s.kurtosis)
    ordered = sorted(settings.values(), key=np.mean)
    return ratio_over_draws(ordered[-1], ordered[0])


def tables(found: Found) -> Iterator[Table]:
    """Every sample, as means over draws."""
    head = ("data", "sequences", "tokens each", "largest", "smallest", "|H|_F", "of all text like it (95%)")
    shapes = ("rms eigenvalue", "support / semicircle's", "kurtosis", "converged", "tail exponent")
    rows: list[tuple[str, ...]] = []
    for (name, size), row in found.items():
        for length in sorted({s.seq_len for s in row}):
            some = [s for s in row if s.seq_len == length]
            low, value, high = (float(np.mean([s.whole[k] for s in some])) for k in range(3))
            tail = f"{some[0].tail:.2g} ± {some[0].tail_error:.1g}" if some[0].tail is not None else "–"
            cells = [
                size,
                length,
                *(f"{with_error([getattr(s, f) for s in some])}" for f in ("largest", "smallest", "norm")),
            ]
            cells += ["not known" if math.isnan(value) else f"{value:.3g} ({low:.3g} to {high:.3g})"]
            cells += [
                f"{np.mean([getattr(s, f) for s in some]):.3g}" for f in ("rms", "support", "kurtosis", "outliers")
            ]
            rows.append((name, *map(str, cells), tail))
    yield Table((*head, *shapes), rows, "Samples; ± 95% over independent draws, where there are several")


def with_error(values: Sequence[float]) -> str:
    mean, error = over_seeds(values)
    return f"{mean:.3g} ± {error:.1g}" if len(values) > 1 else f"{mean:.3g}"


def figure(found: Found) -> Figure:
    """Extremes and norms against the number of sequences."""
    drawn = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = drawn.subplots(1, 3)
    for name in (SEEN, UNSEEN, RANDOM):
        rows = {size: row for (kind, size), row in found.items() if kind == name}
        if name == RANDOM:
            longest = max(s.seq_len for row in rows.values() for s in row)
            rows = {size: [s for s in row if s.seq_len == longest] for size, row in rows.items()}
        draw(left, name, {size: over_seeds([s.largest for s in row]) for size, row in rows.items()})
        draw(middle, name, {size: over_seeds([-s.smallest for s in row]) for size, row in rows.items()})
        draw(right, name, {size: over_seeds([s.norm for s in row]) for size, row in rows.items()})
        whole = {size: np.mean([s.whole for s in row], axis=0) for size, row in rows.items()}
        known = {size: x for size, x in whole.items() if x[0] > 0 and x[2] < 30 * x[0]}
        if known:
            low, value, high = np.array(list(known.values())).T
            sizes = 1.06 * np.array(list(known))  # beside the others
            style = {"mfc": "white", "color": COLORS[name], "capsize": 3, "linestyle": ":"}
            right.errorbar(sizes, value, (value - low, high - value), marker=MARKERS[name], **style)
    for panel, label in ((left, "largest eigenvalue"), (middle, "most negative, magnitude"), (right, "Frobenius norm")):
        panel.set(xscale="log", yscale="log", xlabel="sequences", ylabel=f"{label} (nats)")
        panel.set_xticks(sorted({size for _, size in found}), sorted({str(size) for _, size in found}, key=int))
        panel.minorticks_off()
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    return drawn


def draw(panel: Axes, name: str, points: dict[int, tuple[float, float]]) -> None:
    """Values with their errors; a bar that would reach zero ends a decade below its value."""
    values, errors = np.array(list(points.values())).T
    lower = np.minimum(errors, 0.9 * values)
    panel.errorbar(
        list(points), values, (lower, errors), marker=MARKERS[name], color=COLORS[name], capsize=3, label=name
    )


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
