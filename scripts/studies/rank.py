"""How many eigenvalues are zero or near it: what Lanczos proves, three floors, and the exact rank of classifiers.

    python -m scripts.studies.rank

With no options: the small GPT-NeoX model and the text in scripts/tiny, and classifiers of scikit-learn's digits, four
minutes on two cores. What would refute the claims: weights of more than 5e-5 beside the largest of ten Ritz values;
less than half of all eigenvalues within a floor of zero; a rank that grows faster than neurons times classes, by a
tenth in the exponent; a rank of more than half the parameters; fewer zeros than half of what lies near zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import jax
import numpy as np
import numpy.typing as npt

import jaxhess
from jaxhess.errors import InputError
from jaxhess.krylov.near_zero import near_zero_bounds
from jaxhess.results.foreign import coefficients
from jaxhess.results.study import Claim, Study
from jaxhess.vectors import Vector, check_seed
from scripts.studies.harness import HESSFORMER, ModelOptions, command, picture
from scripts.studies.ranks.classifier import Activation, RankCount, count_rank, exponent, pooled_images
from scripts.studies.ranks.drawn import figure, tables
from scripts.studies.ranks.floors import FORMATS, Format, LanguageModelRank, data_floor, rounding
from scripts.training.images import Source
from scripts.training.short_runs import over_seeds

Array = npt.NDArray[np.float64]

NAME = "rank"
FLATNESS = "Flatness is a False Friend (arXiv 2006.09091; cited from its abstract)"
TABLE_2 = {
    "Wikitext": (
        [-82221.5234, -81374.5859, -50410.7188, -36873.0273, -22338.5938, -7015.3286, 0.0145, 4249.3477, 11931.8496,
         21408.2852],
        [2.3228e-11, 1.2142e-11, 4.9422e-12, 4.7944e-11, 3.1632e-11, 1.9602e-10, 1.0, 3.7041e-10, 2.0554e-11,
         8.0098e-12],
    ),
    "Realnewslike": (
        [-72159.5469, -71471.6719, -29396.1230, -11272.0820, -3630.3208, 1.1277e-06, 1863.6674, 8697.9453, 18385.3047,
         23685.8652],
        [1.4208e-13, 1.2187e-15, 2.6713e-18, 2.4919e-13, 4.9708e-11, 1.0, 3.0464e-10, 1.2413e-11, 3.4053e-12,
         1.0928e-12],
    ),
}  # fmt: skip
"""Ritz values and weights of a 70B model, table 2 of arXiv 2505.11564."""
PAPER_STEPS = 10
FLOAT32 = 2.0**-23
COARSE = 0.5
"""Of the root mean square of all eigenvalues. A floor above it is as large as the matrix: that more than half of the
eigenvalues lie within it then follows from their second moment (Chebyshev's inequality), or nearly."""
STRONG = 0.05
"""Of the largest absolute eigenvalue: beyond it are all Ritz values of the paper's Wikitext table but the peak."""

CAPTION = """Left: how many eigenvalues of the language model's Hessian are farther from zero than a distance: what the
steps taken prove of the probes (dark), and the 95% interval for all eigenvalues (light). Vertical lines: floors below
which an eigenvalue cannot be told from zero, for rounding of products, of weights, and of the data's sample.
Right: rank of the Hessians of trained classifiers, and numbers of eigenvalues beyond parts of the largest, against
neurons times classes, mean over seeds; the bound of arXiv 2006.09091 would keep the rank below a line of slope 1."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """The language model's spectrum, the formats its weights are rounded to, and the classifiers."""

    sequences: int = 8
    """Sequences taken from the start of the data; two halves of them give the floor of the data."""
    steps: int = 40
    """Lanczos steps of the spectrum, and the most for an eigenvector."""
    probes: int = 3
    """Its probes, two or more."""
    reorthogonalize: Literal["full", "none"] = "full"
    """With "none" no Lanczos vectors are kept."""
    formats: tuple[Format, ...] = FORMATS
    """To which weights are rounded."""
    rounded_steps: int = 24
    """Lanczos steps of a rounded model's spectrum."""
    samples: int = 4
    """Random vectors for the floors of weights and data, two or more."""
    activations: tuple[Activation, ...] = get_args(Activation)
    """Of the classifiers; the claims are tested on each."""
    widths: tuple[int, ...] = (8, 16, 32)
    """Of both hidden layers, two or more."""
    seeds: int = 3
    """Initial weights and orders of the data, two or more; errors are over these."""
    train_steps: int = 300
    """Of Adam, 32 images each."""
    images: Source = "digits"
    """`digits` of scikit-learn, or random `prototypes`."""
    examples: int = 1000
    """Images."""

    def check(self) -> None:
        """Raises InputError where the options make no study."""
        check_seed(self.seed)
        if self.sequences % (2 * self.microbatch):
            raise InputError(
                f"--sequences {self.sequences} --microbatch {self.microbatch}: two halves of whole microbatches are "
                "needed."
            )
        if min(self.probes, self.samples, self.seeds) < 2:
            raise InputError("--probes, --samples and --seeds must be at least 2: errors are over them.")
        if min(self.steps, self.rounded_steps) < PAPER_STEPS:
            raise InputError(f"--steps and --rounded-steps must be at least {PAPER_STEPS}, as in the paper's table.")
        if self.widths and (len(set(self.widths)) < 2 or min(self.widths) < 1):
            raise InputError("--widths takes two different positive numbers or more; none leaves the classifiers out.")
        if self.train_steps < 10 or self.examples < 32:
            raise InputError("--train-steps must be at least 10 and --examples at least 32.")

    @property
    def storage(self) -> jaxhess.Storage:
        """What is kept of Lanczos vectors."""
        return jaxhess.Storage(self.reorthogonalize)


SMALL = Options(
    seq_len=16, sequences=2, microbatch=1, mesh="fsdp=1", steps=10, probes=2, formats=("int8",), rounded_steps=10,
    samples=2, seeds=2, activations=("relu",), widths=(4, 8), train_steps=50, examples=200,
)  # fmt: skip


def study(options: Options) -> Study:
    """The language model first, then the classifiers."""
    options.check()
    images = pooled_images(options.images, options.examples) if options.widths else None
    blocks = options.blocks()
    hessian = options.hessian(blocks, "float32")
    found = measure(options, hessian)
    counts = [
        count_rank(activation, width, seed, images, options.train_steps)
        for activation in options.activations
        for width in sorted(set(options.widths))
        for seed in range(options.seeds)
        if images is not None
    ]
    return Study(
        "Rank of Hessians: eigenvalues at zero and near it",
        (*paper_claims(), *model_claims(found, options.described(hessian)), *classifier_claims(counts, options.images)),
        tuple(tables(found, counts)),
        (picture(NAME, figure(found, counts), CAPTION),),
        {
            "parameters": hessian.dim,
            "data_fingerprint": blocks.fingerprint(),
            "loss": found.spectrum.run.inputs.loss,
            "largest": found.largest,
            "trace": found.spectrum.trace().to_dict(),
            "frobenius_norm": found.spectrum.frobenius_norm().to_dict(),
            "peaks": found.peaks.tolist(),
            "floors": {name: x.to_dict() for name, x in found.floors.items()},
            "floors_over_typical": {name: found.over_typical(x) for name, x in found.floors.items()},
            "data_floor": found.data.to_dict(),
            "roundings": [dataclasses.asdict(r) | {"floor": r.floor.to_dict()} for r in found.roundings],
            "alphas": found.spectrum.alphas.tolist(),
            "betas": found.spectrum.betas.tolist(),
            "classifiers": [dataclasses.asdict(c) | {"constant": c.constant, "eigenvalues": None} for c in counts],
        },
    )


def measure(options: Options, hessian: jaxhess.Hessian) -> LanguageModelRank:
    """Spectrum and floors."""
    steps, seed, storage = options.steps, options.seed, options.storage
    spectrum = jaxhess.spectrum(hessian, steps=steps, probes=options.probes, seed=seed, storage=storage)
    rows = spectrum.alphas[:, :PAPER_STEPS], spectrum.betas[:, :PAPER_STEPS]
    short = dataclasses.replace(
        spectrum, alphas=rows[0], betas=rows[1], sizes=np.minimum(spectrum.sizes, PAPER_STEPS),
        step_errors=spectrum.step_errors[:, :PAPER_STEPS],
    )  # fmt: skip
    noise = jaxhess.audit(hessian, seed=seed).floor
    pairs: dict[str, Vector] = {}
    ends: tuple[Literal["smallest", "largest"], ...] = ("smallest", "largest") if options.formats else ()
    for end in ends:
        found = jaxhess.leading_eigenpairs(hessian, 1, which=end, steps=steps, seed=seed, storage=storage)
        pairs[end] = jax.tree.map(lambda x: x[0], found.vectors)
    return LanguageModelRank(
        spectrum,
        short.weights.max(1),
        noise.random if noise is not None and noise.random is not None else math.nan,
        data_floor(hessian, options.samples, seed),
        [
            rounding(hessian, name, pairs, spectrum, options.rounded_steps, options.samples, storage, seed)
            for name in options.formats
        ],
    )  # fmt: skip


def paper_claims() -> Iterator[Claim]:
    """What the paper's own table proves of its matrix."""
    words = {
        "near": ("The Hessian has a huge rank degeneracy very close to zero.", 0.01, "1% of the largest"),
        "at": ("The Hessian has a huge rank degeneracy at zero, as far as float32 can tell.", FLOAT32,
               "2^-23 times the largest"),
    }  # fmt: skip
    for text, (values, weights) in TABLE_2.items():
        for statement, relative, distance in words.values():
            alphas, betas = coefficients(values, weights)
            low, high = near_zero_bounds(alphas, betas, [relative * max(map(abs, values))])
            yield Claim(
                HESSFORMER, f"Section 4.1; Table 2, {text}", statement, "one Ritz value with a weight of 1.0000",
                f"share within {distance} that the ten Ritz values and weights of the table prove", (0.5, 1.0),
                *_middle(low[0], high[0]), model="DeepSeek 70B, by the paper",
            )  # fmt: skip


def model_claims(found: LanguageModelRank, model: str) -> Iterator[Claim]:
    """The same of the model at hand."""
    spectrum = found.spectrum
    place = "Section 4.1; Table 2"
    yield Claim(
        HESSFORMER, place, "After ten Lanczos steps one Ritz value near zero has nearly all of the weight.", "1.0000",
        "one less the largest weight of a Ritz value after ten steps, mean over probes", (0.0, 5e-5),
        *over_seeds(1 - found.peaks), model,
    )  # fmt: skip
    distances = found.distances(0.01)
    for k, (name, distance, low, high) in enumerate(
        zip(distances, distances.values(), *found.shares(distances.values()), strict=True)
    ):
        size = found.over_typical(distance)
        within = name if k == 0 else f"the floor of the {name}, {size:.2g} of the root mean square of all eigenvalues"
        statement = "close to zero" if k == 0 else f"at zero, as far as the {name} tells"
        yield Claim(
            HESSFORMER, place, f"The Hessian has a huge rank degeneracy {statement}.",
            "one Ritz value with a weight of 1.0000", f"share of eigenvalues within {within}", (0.5, 1.0),
            *_middle(low, high), model,
            f"the floor is {size:.2g} of the root mean square of all eigenvalues: that most are smaller says only that "
            "a few are much larger" if k > 0 and size > COARSE else "",
        )  # fmt: skip
    few, many = jaxhess.near_zero(spectrum, [STRONG * found.largest]).counts()
    yield Claim(
        HESSFORMER, place, "Very few directions determine the loss most strongly.",
        "weights of 7e-10 and 4e-10 in all, times 70e9: 50 and 26 eigenvalues",
        f"eigenvalues beyond {STRONG:.0%} of the largest", (None, 100.0),
        *_middle(spectrum.dim - many[0], spectrum.dim - few[0]), model,
    )  # fmt: skip


def _middle(low: float, high: float) -> tuple[float, float]:
    """An interval as a value and its error."""
    return float(low + high) / 2, float(high - low) / 2


def classifier_claims(counts: Sequence[RankCount], images: Source) -> Iterator[Claim]:
    """What the flatness paper says of ranks, by activation."""
    for activation in dict.fromkeys(c.activation for c in counts):
        chosen = [c for c in counts if c.activation == activation]
        by_seed = [[c for c in chosen if c.seed == seed] for seed in sorted({c.seed for c in chosen})]
        widest = [max(row, key=lambda c: c.width) for row in by_seed]
        widths = sorted({c.width for c in chosen})
        model = f"16-w-w-10 {activation} classifiers of {images}"
        at = f"{model}, w = {widths[-1]}, {widest[0].parameters:,} parameters"
        between = ", ".join(map(str, widths))
        yield Claim(
            FLATNESS, "Abstract", "The rank is bounded by a constant times neurons times classes.", "a constant",
            f"exponent of the rank in neurons times classes, w = {between}: a constant bound has at most 1",
            (None, 1.1), *_exponent(by_seed, lambda c: c.rank), model,
        )  # fmt: skip
        yield Claim(
            FLATNESS, "Abstract", "That bound is often a small fraction of the number of parameters.",
            "a small fraction", "rank over parameters", (0.0, 0.5),
            *over_seeds([c.rank / c.parameters for c in widest]), at,
        )  # fmt: skip
        near = [c.parameters - c.beyond(1e-4) for c in widest]
        yield Claim(
            FLATNESS, "Abstract", "It explains why many eigenvalues are either zero or very near zero.", "explains",
            "of the eigenvalues within 1e-4 of the largest from zero, the share that is zero", (0.5, 1.0),
            *over_seeds([(c.parameters - c.rank) / max(n, 1) for c, n in zip(widest, near, strict=True)]), at,
        )  # fmt: skip
        yield Claim(
            FLATNESS, "Abstract", "Eigenvalues that are not near zero are at most a constant times neurons times "
            "classes (the bound, of large eigenvalues alone).", "a constant",
            f"exponent of the number beyond 1% of the largest in neurons times classes, w = {between}", (None, 1.1),
            *_exponent(by_seed, lambda c: c.beyond(1e-2)), model,
        )  # fmt: skip


def _exponent(by_seed: Sequence[list[RankCount]], number: Callable[[RankCount], float]) -> tuple[float, float]:
    """Mean of the exponents over seeds; its error, over seeds, and on top what tells the numbers from a power law."""
    fitted, bent = zip(*(exponent(row, number) for row in by_seed), strict=True)
    mean, error = over_seeds(fitted)
    return mean, error + float(np.mean(bent))


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
