"""Errors over data: closed forms, 200 subsamples of a finite corpus, and what is said where there are none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import network

from jaxhess import (
    Checkpoint,
    Estimate,
    FiniteDifferenceHessian,
    Hessian,
    InputError,
    Microbatches,
    Sampling,
    Spectrum,
    Storage,
    eigenvalue_errors,
    leading_eigenpairs,
    spectrum,
)
from jaxhess.krylov.errors import DataSpread
from jaxhess.krylov.split import split_bias
from jaxhess.operators.microbatches import as_groups
from jaxhess.results.data_section import NO_DATA_ERROR, data_section, halved_by
from jaxhess.slq.data_errors import data_spread, moment_spread

POPULATION, SEQUENCES, MICROBATCHES, PROBES = 400, 80, 8, 8
NUMBERS = np.random.default_rng(0)
INPUTS = (NUMBERS.normal(size=(POPULATION, 6)) * [3, 2, 1, 1, 0.5, 0.5]).astype(np.float32)
LABELS = (NUMBERS.integers(0, 3, POPULATION) + (INPUTS[:, 0] > 0)) % 3
PARAMS = {name: jnp.asarray(NUMBERS.normal(size=s) / 2, jnp.float32) for name, s in (("a", (6, 8)), ("b", (8, 3)))}


def classifier_loss(params, batch):
    inputs, labels = batch
    logits = jnp.tanh(inputs @ params["a"]) @ params["b"]
    return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]), len(labels)


def classifier(rows, microbatches=MICROBATCHES):
    parts = INPUTS[rows].reshape(microbatches, -1, 6), LABELS[rows].reshape(microbatches, -1)
    return Hessian(classifier_loss, PARAMS, Microbatches(jax.tree.map(jnp.asarray, parts)))


@pytest.mark.slow
def test_intervals_cover_the_whole_corpus():
    """Two standard errors, probes and data together, hold the corpus's own values in 90 to 99% of 200 subsamples."""
    matrix = np.asarray(classifier(np.arange(POPULATION), 1).to_matrix(), np.float64)
    truths = {"trace": np.trace(matrix), "norm": np.linalg.norm(matrix), "largest": np.linalg.eigvalsh(matrix)[-1]}
    inside = {name: [] for name in truths}
    sampling = Sampling(SEQUENCES, POPULATION)
    for seed in range(200):
        operator = classifier(np.random.default_rng(1 + seed).permutation(POPULATION)[:SEQUENCES])
        result = spectrum(operator, steps=4, probes=PROBES, seed=seed, sampling=sampling, storage=Storage("none"))
        pairs = leading_eigenpairs(operator, 1, which="largest", steps=30, seed=seed)
        (data,) = eigenvalue_errors(operator, pairs, sampling)
        found = {name: x.for_population() for name, x in (("trace", result.trace()), ("norm", result.frobenius_norm()))}
        for name, estimate in found.items():
            inside[name].append(abs(estimate.value - truths[name]) <= 2 * estimate.standard_error)
        inside["largest"].append(abs(pairs.values[0] - data.bias - truths["largest"]) <= 2 * data.error)
    shares = {name: np.mean(x) for name, x in inside.items()}
    assert all(0.9 <= share <= 0.99 for share in shares.values()), shares


def drawn_forms(matrices, probes, rng):
    """Forms of these matrices [K, n, n] of count one, and the first two alphas and betas, by NumPy."""
    whole, (count, n, _) = matrices.mean(0), matrices.shape
    forms, alphas, betas = np.zeros((probes, 2, count, 4)), np.zeros((probes, 2)), np.zeros((probes, 2))
    for p in range(probes):
        q, before = rng.normal(size=n), np.zeros(n)
        q /= np.linalg.norm(q)
        for j in range(2):
            each = matrices @ q
            forms[p, j] = np.stack([each @ q, each @ before, (each**2).sum(1), np.ones(count)], axis=1)
            w = whole @ q - (betas[p, j - 1] * before if j else 0)
            alphas[p, j] = w @ q
            w -= alphas[p, j] * q
            betas[p, j], before = np.linalg.norm(w), q
            q = w / betas[p, j]
    return Spectrum(alphas, betas, np.full(probes, 2), n, microbatch_forms=forms)


@pytest.mark.parametrize("noise", [1.0, 5.0])
def test_the_norm_without_the_scatter_of_few_sequences_has_the_right_interval(noise):
    """Nearly all of the sample's norm can be the scatter of its microbatches: 95% intervals of what is left."""
    rng = np.random.default_rng(0)
    base = np.diag([1.5, 0.5, 0.5, *np.full(27, 0.05)])
    truth, inside, ratios = np.linalg.norm(base), [], []
    for _ in range(300):
        raw = noise * rng.normal(size=(8, 30, 30)) / 30
        result = drawn_forms(base + raw + raw.transpose(0, 2, 1), 20, rng)
        low, high = result.frobenius_norm().for_population().interval()
        inside.append(low <= truth <= high)
        ratios.append(result.frobenius_norm().value / truth)
    assert 0.91 <= np.mean(inside) <= 0.99  # of 300 runs three standard deviations of 95% are 0.04
    assert noise == 1 or np.mean(ratios) > 1.5


def test_the_bias_of_the_second_moment_is_the_variance_of_the_operator():
    """Of one draw in closed form: sum_b |R_b v|^2 K / (K - 1), from the matrices themselves."""
    rng = np.random.default_rng(1)
    matrices = rng.normal(size=(5, 6, 6))
    matrices += matrices.transpose(0, 2, 1)
    result = drawn_forms(matrices, 1, np.random.default_rng(2))
    v = np.random.default_rng(2).normal(size=6)
    v /= np.linalg.norm(v)
    rest = (matrices - matrices.mean(0)) @ v / 5
    np.testing.assert_allclose(result.moment(2).data.bias, 5 / 4 * np.square(rest).sum())


@pytest.mark.usefixtures("float64")
def test_errors_of_diagonal_batches_are_the_textbook_ones():
    """Counts that differ: the variance of a ratio of means (Cochran 1977, section 6.4), with the correction."""
    diagonals = NUMBERS.uniform(1, 2, (5, 3))
    counts = np.array([1.0, 2.0, 2.0, 1.0, 3.0])

    def loss(w, batch):
        d, count = batch
        return count * jnp.sum(d * w**2) / 2, count

    operator = Hessian(loss, jnp.ones(3), Microbatches((jnp.asarray(diagonals), jnp.asarray(counts))))
    result = spectrum(operator, steps=3, probes=2, storage=Storage("none", scalar_dtype="float64"))
    forms = result.microbatch_forms
    np.testing.assert_allclose(forms[:, 0, :, 3], np.tile(counts, (2, 1)))
    ratio = forms[:, 0, :, 0].sum(1) / counts.sum()
    np.testing.assert_allclose(ratio, result.alphas[:, 0], rtol=1e-12)
    one = dataclasses.replace(result, alphas=result.alphas[:1], betas=result.betas[:1], sizes=result.sizes[:1],
                              step_errors=result.step_errors[:1], microbatch_forms=forms[:1])  # fmt: skip
    residuals = forms[0, 0, :, 0] - ratio[0] * counts
    variance = (1 - 0.25) / 5 / counts.mean() ** 2 * np.sum(residuals**2) / 4
    found = moment_spread(1, one.microbatch_forms, one.alphas, one.betas, Sampling(5, 20))
    assert found.freedom == 4
    np.testing.assert_allclose(found.error, np.sqrt(variance), rtol=1e-12)


def test_clusters_are_added_up_and_the_scatter_of_single_probes_is_left_to_the_probes():
    parts = NUMBERS.normal(size=(1, 6))
    parts -= parts.mean()
    even = np.full(6, 1 / 6)
    merged = data_spread(parts, even, Sampling(6, clusters=(0, 0, 1, 1, 2, 2)))
    np.testing.assert_allclose(merged, data_spread(parts.reshape(1, 3, 2).sum(2), np.full(3, 1 / 3), Sampling(3)))
    common = np.sqrt(6 / 5) * np.linalg.norm(parts)
    same = data_spread(np.repeat(parts, 4, 0), even, Sampling(6))
    np.testing.assert_allclose(same[:2], (common, 5))
    scattered = NUMBERS.normal(size=(4000, 6)) * 5  # without anything in common: next to nothing is the data's
    assert data_spread(scattered - scattered.mean(1, keepdims=True), even, Sampling(6)).error < 0.5
    assert data_spread(parts, even, Sampling(6, 6)).error == 0
    padded = data_spread(np.append(parts, [[0.0]], 1), np.append(even, 0), Sampling(6, clusters=(0, 0, 1, 1, 2, 2, 3)))
    np.testing.assert_allclose(padded, merged)
    with pytest.raises(InputError, match="clusters for 2 microbatches; there are 6"):
        data_spread(parts, even, Sampling(6, clusters=(0, 1)))


def test_the_bias_of_the_largest_eigenvalue_is_that_over_all_samples():
    """E of the largest eigenvalue of means of 16 random matrices less that of their mean, against splitting one."""
    rng = np.random.default_rng(1)
    base = np.diag([10.0, 1.0, 0.0])

    def sample():
        noise = rng.normal(size=(16, 3, 3))
        return (base + noise + noise.transpose(0, 2, 1)).astype(np.float32)

    draws = [sample() for _ in range(400)]
    excess = np.array([np.linalg.eigvalsh(x.mean(0))[-1] for x in draws]) - 10
    estimates = []
    for x in draws[:16]:
        operator = Hessian(lambda w, m: w @ m @ w / 2, jnp.zeros(3), Microbatches(jnp.asarray(x)))
        values, vectors = np.linalg.eigh(x.mean(0))
        vector = jnp.asarray(vectors[:, -1], jnp.float32)
        estimates.append(split_bias(operator, float(values[-1]), vector, np.full(16, 1 / 16)))
    error = 3 * np.hypot(np.std(estimates) / np.sqrt(16), excess.std() / np.sqrt(400))
    assert abs(np.mean(estimates) - excess.mean()) < error


def test_halves_whose_leading_vectors_are_others_are_seen():
    """The whole's eigenvector is one of each half too, and orthogonal to the leading one of the second."""
    batches = [jnp.array([4.0, 0.0, 0.0]), jnp.array([0.0, 3.9, 0.0])]
    operator = Hessian(lambda w, x: x @ w**2 / 2, jnp.zeros(3), batches)
    assert abs(split_bias(operator, 2.0, jnp.array([1.0, 0.0, 0.0]), [0.5, 0.5]) - 1.95) < 1e-3


def test_only_converged_ends_have_a_bias():
    operator = classifier(np.arange(SEQUENCES))
    pairs = leading_eigenpairs(operator, 3, which="largest", steps=60, tolerance=1e-4)
    found = eigenvalue_errors(operator, pairs, Sampling(SEQUENCES))
    assert found[0].bias > 0
    assert np.isnan([x.bias for x in found[1:]]).all()
    vague = dataclasses.replace(pairs, converged=np.zeros(3, bool))
    assert np.isnan([x.bias for x in eigenvalue_errors(operator, vague)]).all()
    assert [x.bias for x in eigenvalue_errors(operator, vague, Sampling(SEQUENCES, SEQUENCES))] == [0, 0, 0]


def test_where_there_is_no_error_over_data_none_is_given():
    operator = network(sizes=(4,))
    alone = spectrum(operator, steps=2, probes=2)
    several = network(sizes=(2, 2))
    differences = FiniteDifferenceHessian(several.loss, several.params, several.batches, step=1e-2)
    for result in (alone, spectrum(differences, steps=2, probes=2)):
        assert result.trace().data is None
        assert np.isnan(result.trace().for_population().interval()).all()
    one_step = spectrum(several, steps=1, probes=2)
    assert one_step.trace().data is not None
    assert one_step.frobenius_norm().data is None
    assert spectrum(several, steps=2, probes=2).moment(4).data is None
    for wrong in (np.ones((2, 2, 3)), np.stack([np.ones((2, 3, 4)), 2 * np.ones((2, 3, 4))])):
        with pytest.raises(InputError, match="microbatch_forms must be"):
            dataclasses.replace(alone, microbatch_forms=wrong)
    zero = Hessian(lambda w, x: jnp.sum(0 * x * w), jnp.ones(3), [jnp.ones(3)] * 3)  # curvature of zero everywhere
    nothing = spectrum(zero, steps=2, probes=2)
    assert nothing.trace().data.error == 0
    assert np.isnan(nothing.frobenius_norm().for_population().value)
    too_few = Estimate(4.0, 0.1, 9, positive=True, data=DataSpread(0.5, 3, bias=5.0))
    assert np.isnan(too_few.for_population().value)
    vague = Estimate(4.0, 0.1, 9, positive=True, data=DataSpread(0.5, 3, bias=3.9)).for_population()
    assert vague.interval()[0] == 0 < vague.interval()[1] < 3
    with pytest.raises(InputError, match="clusters for 3 microbatches"):
        spectrum(several, steps=2, sampling=Sampling(4, clusters=(0, 0, 1)))


def test_forms_are_kept_when_a_run_is_saved_and_when_it_is_resumed(tmp_path):
    operator = network(sizes=(2, 2, 2))
    whole = spectrum(operator, steps=4, probes=3, batch_size=1, sampling=Sampling(6, 60))
    whole.save(tmp_path / "run")
    assert Spectrum.load(tmp_path / "run") == whole
    assert whole.trace().to_dict()["data"]["error"] == whole.trace().data.error

    class Killed(Exception):
        pass

    def stop(progress):
        if progress.probe == 1 and progress.step >= 2:
            raise Killed

    def resumed(operator, folder):
        options = {"steps": 4, "probes": 3, "batch_size": 1}
        with pytest.raises(Killed):
            spectrum(network(sizes=(2, 2, 2)), **options, checkpoint=Checkpoint(folder, every=1), callback=stop)
        return spectrum(operator, **options, checkpoint=Checkpoint(folder, every=1, resume=True))

    np.testing.assert_array_equal(resumed(operator, tmp_path / "a").microbatch_forms, whole.microbatch_forms)
    (batch,) = operator.batches
    joined = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch.stacked)
    cut = dataclasses.replace(operator, batches=(Microbatches(joined),))
    other = resumed(cut, tmp_path / "b")  # all in one microbatch from there on
    assert other.trace().data is None
    np.testing.assert_allclose(other.trace().value, whole.trace().value, rtol=1e-4)
    ragged = dataclasses.replace(
        operator, batches=as_groups([*rows(joined, 0, 3), *rows(joined, 3, 5), *rows(joined, 5, 6)])
    )
    assert resumed(ragged, tmp_path / "c").trace().data is None  # as many, but of other sequences


def rows(stacked, first, last):
    return [jax.tree.map(lambda x: x[0, first:last], stacked)]


def test_a_report_says_which_error_is_larger_and_what_halves_it():
    result = spectrum(classifier(np.arange(SEQUENCES)), steps=3, probes=2, sampling=Sampling(SEQUENCES, POPULATION))
    section = data_section(result)
    names = [row[0] for row in section.parts[0].rows]
    assert names == ["trace", "Frobenius norm"]
    few = Estimate(1.0, 0.1, 5, data=DataSpread(0.5, 7))
    assert halved_by(result, few) == f"{Sampling(SEQUENCES, POPULATION).more_to_halve()} more sequences"
    assert halved_by(result, dataclasses.replace(few, standard_error=1.0)) == "6 more probes"
    alone = spectrum(network(sizes=(4,)), steps=2, probes=2)
    assert data_section(alone).parts == [NO_DATA_ERROR]
