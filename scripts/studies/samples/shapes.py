"""Samples of text, and what their spectra look like in a few numbers."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
from collections.abc import Sequence

import numpy as np

import jaxhess
from convert.tokenizer import load_tokenizer
from jaxhess.data import TokenBlocks, pack
from jaxhess.errors import InputError
from jaxhess.models import LanguageModel
from scripts.training.corpus import read_corpus
from scripts.training.short_runs import over_seeds

CONVERGED = 0.01
"""Residual bound, relative to it, at which a Ritz value counts as an eigenvalue of its own."""


@dataclasses.dataclass(frozen=True)
class SampleShape:
    """What one sample's spectrum looks like.

    Attributes:
        sequences, seq_len: Of the sample.
        largest, smallest: Extreme Ritz values.
        rms: Root mean square eigenvalue, |H|_F / sqrt(dim).
        kurtosis: Fourth moment over the square of the second: 2 for a semicircle, large where few eigenvalues lead.
        outliers: Eigenvalues that have converged, the mean over probes.
        tail: Exponent a of their decay, value ~ rank^-a, by Hill's estimator over the positive ones; None: below 8.
        tail_error: Its standard error, a / sqrt(number).
        norm: |H|_F of the sample.
        whole: Of the population, low end, value and high end; NaN where not known.
    """

    sequences: int
    seq_len: int
    largest: float
    smallest: float
    rms: float
    kurtosis: float
    outliers: float
    tail: float | None
    tail_error: float | None
    norm: float
    whole: tuple[float, float, float]

    @property
    def support(self) -> float:
        """The largest magnitude over the edge of a semicircle of the same second moment: 1 for a semicircle."""
        return max(self.largest, -self.smallest) / (2 * self.rms)

    @property
    def negative(self) -> float:
        """The most negative eigenvalue's magnitude over the largest's."""
        return max(-self.smallest, 0.0) / self.largest


def standard_text(model: str, seen: bool, seq_len: int, vocab_size: int, most: int) -> TokenBlocks:
    """Sequences of the standard library's files that the model in scripts/tiny was trained on, or of scikit-learn's
    descriptions of its data sets; about `most` of them.

    Raises:
        InputError: scikit-learn is not installed.
    """
    if seen:
        documents: Sequence[str] = list(read_corpus().train.values())
    else:
        try:
            folder = importlib.resources.files("sklearn.datasets") / "descr"
        except ModuleNotFoundError:
            raise InputError(
                "The text of another kind is that of scikit-learn, which is not installed: pip install -e '.[digits]', "
                "or name a text with --unseen."
            ) from None
        files = sorted((x for x in folder.iterdir() if x.name.endswith(".rst")), key=lambda x: x.name)
        documents = [file.read_text(encoding="utf-8") for file in files]
    tokenizer = load_tokenizer(model)

    def encode(part: str) -> list[int]:
        found: list[int] = tokenizer.encode(part, add_special_tokens=False, verbose=False)
        return found

    kept, length = [], 0
    for document in documents:  # more than that changes nothing but the time to read
        kept.append(document)
        length += len(document)
        if length > 4 * most * (seq_len + 1):
            break
    sizes = {"seq_len": seq_len, "vocab_size": vocab_size}
    name = "The text seen in training" if seen else "The text of another kind"
    return pack(kept, encode, **sizes, end_of_text=tokenizer.eos_token_id, name=name)


def shape(
    model: LanguageModel, blocks: TokenBlocks, microbatch: int, steps: int, probes: int, seed: int
) -> SampleShape:
    """The spectrum of a sample, in a few numbers."""
    rows = min(microbatch, blocks.num_sequences // 2)
    batches = jaxhess.Microbatches(blocks.microbatches(rows))
    hessian = jaxhess.Hessian(model.loss(), model.params, batches)
    result = jaxhess.spectrum(
        hessian,
        steps=steps,
        probes=probes,
        seed=seed,
        storage=jaxhess.Storage("none"),
        sampling=jaxhess.Sampling(blocks.num_sequences),
    )
    ends, norm = result.extreme(), result.frobenius_norm()
    whole = norm.for_population()
    kept = [converged(result, probe) for probe in range(result.num_probes)]
    positive = np.sort(kept[0][kept[0] > 0])[::-1]
    tail, tail_error = hill(positive)
    return SampleShape(
        blocks.num_sequences,
        blocks.seq_len,
        ends.largest.value,
        ends.smallest.value,
        norm.value / math.sqrt(result.dim),
        result.moment(4).value / result.moment(2).value ** 2,
        float(np.mean([len(x) for x in kept])),
        tail,
        tail_error,
        norm.value,
        (whole.interval()[0], whole.value, whole.interval()[1]),
    )


def converged(result: jaxhess.Spectrum, probe: int) -> np.ndarray:
    """The Ritz values of a probe, copies merged, whose residual bound is within `CONVERGED` of their magnitude."""
    clusters = result.clusters(probe)
    values = clusters.values
    return np.asarray(values[~clusters.spurious & (clusters.residual_bounds <= CONVERGED * np.abs(values))])


def hill(values: np.ndarray) -> tuple[float | None, float | None]:
    """The exponent a of value ~ rank^-a and its standard error (Hill 1975), from positive values in descending order.

    Examples:
        >>> import numpy as np
        >>> from scripts.studies.samples.shapes import hill
        >>> a, error = hill(np.arange(1.0, 1001.0) ** -0.5)
        >>> round(a, 2), round(error, 3)
        (0.5, 0.016)
    """
    if len(values) < 8:
        return None, None
    a = float(np.log(values[:-1] / values[-1]).sum() / (len(values) - 1))
    return a, a / math.sqrt(len(values) - 1)


def ratio_over_draws(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """The ratio of two means over draws, and 95% to first order.

    Examples:
        >>> from scripts.studies.samples.shapes import ratio_over_draws
        >>> value, error = ratio_over_draws([2.0, 2.0], [4.0, 4.0])
        >>> value, error
        (0.5, 0.0)
    """
    (a, error_a), (b, error_b) = over_seeds(above), over_seeds(below)
    return a / b, abs(a / b) * math.hypot(error_a / a, error_b / b)
