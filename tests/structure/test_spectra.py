"""The spectra of all blocks in one run are those of the dense diagonal blocks; distances are those of measures."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from small_models import matrix, network, operator_of

from jaxhess import Blocks, Checkpoint, Spectrum, Storage, block_spectra, make_mesh
from jaxhess.errors import InputError
from jaxhess.slq import run
from jaxhess.structure.distances import edges, jensen_shannon, masses, noise_floor, tenth_largest
from tests.operators.test_blocks import rows_of
from tests.structure.test_coupling import CASES, cut, dense, small_hessian

VALUES, GROUPS = [9.0, -4.0, 3.0, 2.0, 1.5, 1.0, 0.3, -0.2, 0.1, 0.05], [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("family", CASES)
def test_extremes_are_those_of_the_dense_diagonal_blocks(float64, family):
    """To 1e-8 with full re-orthogonalisation: more steps than the smallest blocks have rows end their runs there."""
    operator, a = dense(family)
    blocks = Blocks.by(operator.shape_dtype, "layers")
    found = block_spectra(operator, blocks, steps=80, probes=2)
    assert found.sizes.tolist() == blocks.sizes.tolist()
    for b, spectrum in enumerate(found.spectra):
        exact = np.linalg.eigvalsh(cut(a, blocks)[b][b])
        scale = np.abs(exact).max()
        for values in spectrum.ritz_values:
            assert np.nanmax(values) == pytest.approx(exact[-1], abs=1e-8 * scale)
            assert np.nanmin(values) == pytest.approx(exact[0], abs=1e-8 * scale)
        assert (spectrum.sizes <= spectrum.dim).all()
        low, high = spectrum.trace().interval(0.9999)
        assert low <= exact.sum() <= high


@pytest.mark.parametrize("storage", [Storage("full"), Storage("none"), Storage(3)], ids=["full", "none", "window"])
@pytest.mark.parametrize("together", [None, 2])
def test_every_storage_finds_the_blocks_eigenvalues(storage, together):
    """In float32; each block ends by itself, at its own number of rows."""
    a = matrix(VALUES)
    blocks = rows_of(a, GROUPS)
    found = block_spectra(operator_of(a), blocks, steps=12, probes=2, storage=storage, together=together)
    for b, (spectrum, row) in enumerate(zip(found.spectra, cut(a, blocks), strict=True)):
        exact = np.linalg.eigvalsh(row[b])
        np.testing.assert_allclose(np.nanmax(spectrum.ritz_values, 1), exact[-1], atol=1e-4)
        np.testing.assert_allclose(np.nanmin(spectrum.ritz_values, 1), exact[0], atol=1e-4)
        if storage.reorthogonalize == "full":
            assert spectrum.sizes.tolist() == [len(exact)] * 2
            np.testing.assert_allclose(spectrum.ritz_values[:, : len(exact)], [exact] * 2, atol=1e-4)
            assert max(spectrum.run.lanczos.orthogonality) < 1e-5
    assert found["b2"].trace().value == pytest.approx(a[9, 9], abs=1e-5)


def test_a_block_of_zeros_and_one_that_is_everything():
    a = np.zeros((6, 6))
    a[:4, :4] = matrix([1.0, 2.0, 3.0, 4.0])
    found = block_spectra(operator_of(a), rows_of(a, [0, 0, 0, 0, 1, 1]), steps=5, probes=1)
    assert found["b1"].sizes.tolist() == [1]
    assert found["b1"].ritz_values[0, 0] == 0
    assert found["b0"].ritz_values[0, :4] == pytest.approx([1, 2, 3, 4], abs=1e-5)


@pytest.mark.study
def test_blocks_spectra_do_not_depend_on_the_mesh():
    change = {"vocab_size": 16, "embed_dim": 8, "mlp_dim": 8}
    largest = []
    for mesh in (None, make_mesh("fsdp=8")):
        operator = small_hessian(mesh=mesh, **change)
        found = block_spectra(operator, Blocks.by(operator.shape_dtype, "layers"), steps=8, probes=1)
        largest.append([s.ritz_values.max() for s in found.spectra])
    np.testing.assert_allclose(largest[1], largest[0], rtol=1e-4)


def test_vectors_of_16_bit_parameters_are_kept_in_float32():
    operator = network("bfloat16")
    blocks = Blocks.by(operator, "layers")
    found = block_spectra(operator, blocks, steps=2, probes=1)
    assert found.spectra[0].run.lanczos.storage.vector_dtype == "float32"
    with pytest.raises(InputError, match="float32 or wider"):
        block_spectra(operator, blocks, steps=2, storage=Storage(vector_dtype="bfloat16"))
    with pytest.raises(InputError, match="on the devices"):
        block_spectra(operator, blocks, steps=2, storage=Storage("full", basis_memory="host"))


def test_a_run_that_was_stopped_goes_on_and_ends_in_the_same_bits(tmp_path):
    a = matrix(VALUES)
    operator, blocks = operator_of(a), rows_of(a, GROUPS)
    whole = block_spectra(operator, blocks, steps=6, probes=2)
    saved = Checkpoint(tmp_path / "saves", every=2, resume=True)

    def stop(progress):
        if (progress.probe, progress.step) == (1, 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block_spectra(operator, blocks, steps=6, probes=2, checkpoint=saved, callback=stop)
    begun = []
    resumed = block_spectra(
        operator, blocks, steps=6, probes=2, checkpoint=saved, callback=lambda p: begun.append((p.probe, p.step))
    )
    assert begun[0][0] == 1
    assert begun[0][1] > 2
    for name in ("alphas", "betas"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    with pytest.raises(InputError, match="together is 1 here and 3 there"):
        block_spectra(operator, blocks, steps=6, probes=2, together=1, checkpoint=saved)
    with pytest.raises(InputError, match="partition"):
        block_spectra(operator, rows_of(a, [0] * 5 + [1] * 5), steps=6, probes=2, checkpoint=saved)


def spectrum_of(values, weights) -> Spectrum:
    """A spectrum whose quadrature has these nodes and weights: of a diagonal matrix, by Lanczos from sqrt(weights)."""
    state = np.sqrt(np.asarray(weights, float))
    basis, alphas, betas = [state], [], []
    for _ in values:
        w = np.asarray(values) * basis[-1]
        alphas.append(w @ basis[-1])
        for _ in range(2):
            for q in basis:
                w = w - (q @ w) * q
        betas.append(np.linalg.norm(w))
        basis.append(w / max(betas[-1], 1e-300))
    betas[-1] = 0.0
    return Spectrum(np.array([alphas]), np.array([betas]), np.array([len(values)]), 1000)


def test_masses_are_where_the_eigenvalues_are_and_sum_to_one():
    spectrum = spectrum_of([-1.0, 1e-9, 1e-2, 10.0], [0.1, 0.2, 0.3, 0.4])
    found, grid = masses(spectrum, 10.0), edges(10.0)
    assert found.sum() == pytest.approx(1)
    centers = np.searchsorted(grid, [-1.0, 0.0, 1e-2]) - 1
    assert found[centers[1]] == pytest.approx(0.2, abs=1e-6)
    assert found[: len(grid) // 2 - 1].sum() == pytest.approx(0.1, abs=1e-6)
    # A Gaussian of a quarter of a decade has its mass within a decade, but for 6e-5.
    assert found[centers[2] - 8 : centers[2] + 9].sum() == pytest.approx(0.3, abs=1e-3)
    assert found[-9:].sum() == pytest.approx(0.4, abs=1e-3)


def test_distances_are_those_of_distributions():
    """Of two atoms far apart with weights p and 1 - p against the one of them: the binary divergence."""
    one, both, other = (spectrum_of(*x) for x in (([1.0], [1.0]), ([1.0, 1e-4], [0.5, 0.5]), ([1e-4], [1.0])))
    found = jensen_shannon([one, both, other])
    assert found[0, 0] == 0
    assert found[0, 2] == pytest.approx(1, abs=1e-3)
    divergence = 0.5 * np.log2(1 / 0.75) + 0.5 * (0.5 * np.log2(0.5 / 0.75) + 0.5)
    assert found[0, 1] == pytest.approx(np.sqrt(divergence), abs=1e-3)
    np.testing.assert_array_equal(found, found.T)
    assert jensen_shannon([one, other], normalised=True)[0, 1] == pytest.approx(0, abs=1e-6)
    negative = spectrum_of([-1.0], [1.0])
    assert jensen_shannon([one, negative], normalised=True)[0, 1] == pytest.approx(1, abs=1e-3)


def test_masses_whose_half_would_vanish_leave_a_distance_finite():
    """The tail of a weight of 1e-190, 24 standard deviations away, is about 1e-317: below the normal numbers."""
    one, other = (
        SimpleNamespace(ritz_values=np.array([[-1.0, 1.0]]), weights=np.array([[1.0, weight]]), num_probes=1)
        for weight in (1e-190, 0.0)
    )
    found = masses(one, 1.0)
    assert found[found > 0].min() >= np.finfo(float).tiny
    assert jensen_shannon([one, other])[0, 1] == pytest.approx(0, abs=1e-9)


def test_normalised_distances_do_not_see_a_scale():
    values = np.linspace(0.1, 3, 15)
    one, larger = (spectrum_of(factor * values, np.full(15, 1 / 15)) for factor in (1.0, 1000.0))
    assert jensen_shannon([one, larger])[0, 1] > 0.9
    assert jensen_shannon([one, larger], normalised=True)[0, 1] == pytest.approx(0, abs=1e-6)


def test_spectra_of_zeros_are_alike():
    zero = spectrum_of([0.0], [1.0])
    assert not jensen_shannon([zero, zero]).any()
    assert not jensen_shannon([zero, zero], normalised=True).any()
    with pytest.raises(InputError, match="one that is not zero"):
        edges(0.0)


def test_the_tenth_largest_is_counted_by_weights():
    """Four outliers and a bulk: among 1,000 rows, weights of 1/1,000 and 20/1,000 are one and twenty eigenvalues."""
    values, weights = [100.0, 90.0, 80.0, 70.0, 2.0, 1.0], [0.001, 0.001, 0.001, 0.001, 0.02, 0.976]
    assert tenth_largest(spectrum_of(values, weights)) == pytest.approx(2.0)
    assert tenth_largest(spectrum_of([3.0, -1.0], [0.001, 0.999])) == pytest.approx(3e-3)  # never near zero
    few = dataclasses.replace(spectrum_of([3.0, 2.0, 1.0, 0.0], [0.25] * 4), dim=4)
    assert tenth_largest(few) == pytest.approx(2.0)


def test_a_block_of_nearly_zeros_does_not_move_the_distances_of_others():
    one, other = spectrum_of([1.0, 0.1], [0.02, 0.98]), spectrum_of([1.0, 1e-3], [0.02, 0.98])
    alone = jensen_shannon([one, other], normalised=True)[0, 1]
    tiny = dataclasses.replace(spectrum_of([1.0, 1e-9], [0.5, 0.5]), dim=4)
    assert jensen_shannon([one, other, tiny], normalised=True)[0, 1] == pytest.approx(alone, abs=0.05)
    assert alone > 0.5


def test_the_floor_is_the_distance_of_two_halves_of_the_probes():
    """Of one matrix: with 64 rows and 4 probes distances of runs of it are about 0.08; a single probe has no halves."""
    a = operator_of(np.diag(np.geomspace(1e-3, 10, 64)))
    runs = [run.spectrum(a, steps=20, probes=4, seed=seed) for seed in range(4)]
    floor, apart = noise_floor(runs), jensen_shannon(runs)
    assert 0 < apart[np.triu_indices(4, 1)].mean() < floor.mean() < 0.3
    assert np.isnan(noise_floor([run.spectrum(a, steps=5, probes=1)])).all()


def test_names_are_looked_up():
    a = matrix([1.0, 2.0])
    found = block_spectra(operator_of(a), rows_of(a, [0, 1]), steps=1, probes=1)
    assert found.names == ("b0", "b1")
    with pytest.raises(InputError, match="no block 'c'; there are b0, b1"):
        found["c"]
