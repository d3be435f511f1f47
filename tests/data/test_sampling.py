"""Which sequences are taken, and what an error over the data is then about."""

import numpy as np
import pytest

from jaxhess import InputError, Sampling, TokenBlocks

BLOCKS = TokenBlocks(np.arange(60).reshape(12, 5) + 1, np.ones((12, 4)))


def test_a_random_sample_is_without_replacement_and_the_seeds_own():
    sample = BLOCKS.sampled(7, seed=3)
    rows = {tuple(row) for row in sample.tokens.tolist()}
    assert len(rows) == 7
    assert rows <= {tuple(row) for row in BLOCKS.tokens.tolist()}
    assert sample.fingerprint() == BLOCKS.sampled(7, seed=3).fingerprint() != BLOCKS.sampled(7, seed=4).fingerprint()
    assert sample.sampling(2) == Sampling(7, population=12)
    assert BLOCKS.sampled(12).sampling(2).fraction == 1
    with pytest.raises(InputError, match="13 sequences cannot be drawn from 12"):
        BLOCKS.sampled(13)


def test_microbatches_within_one_document_are_one_cluster():
    tokens = np.ones((10, 5), int)
    tokens[[0, 7], 2] = 0  # documents begin in the first microbatch of two and in the fourth
    blocks = TokenBlocks(tokens, np.ones((10, 4)), separator=0)
    assert blocks.sampling(2).clusters == (1, 1, 1, 2, 2)
    assert blocks.sampling(2).population is None
    tokens[:] = 1
    assert TokenBlocks(tokens, np.ones((10, 4)), separator=0).sampling(2).clusters is None


def test_more_sequences_halve_the_error():
    for sampling in (Sampling(10), Sampling(10, 1000), Sampling(90, 100)):
        more = sampling.more_to_halve()
        if sampling.population is None:
            assert more == 30
            continue
        n, size = sampling.sequences, sampling.population
        ratio = (1 / (n + more) - 1 / size) / (1 / n - 1 / size)
        assert abs(ratio - 1 / 4) < 0.05  # whole sequences
    assert Sampling(100, 100).more_to_halve() is None
    with pytest.raises(InputError, match="101 sequences cannot"):
        Sampling(101, 100)
    with pytest.raises(InputError, match="at least 1"):
        Sampling(0)
