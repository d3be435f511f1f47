"""The result of stochastic Lanczos quadrature against dense matrices of known spectrum."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hessenberg
from scipy.stats import norm
from scipy.stats import t as student
from small_models import diagonal_lanczos

from jaxhess import MatrixOperator
from jaxhess import spectrum as run_spectrum
from jaxhess.krylov.integrals import integral_bounds
from jaxhess.record import RunRecord
from jaxhess.slq.spectrum import Spectrum

EIGENVALUES = np.concatenate([np.random.default_rng(7).normal(size=50) * 0.1, [5.0, 2.0, 1.0, -0.7, -3.0]])


def _spectrum(probes, steps, eigenvalues=EIGENVALUES, seed=0, info=None):
    """Householder tridiagonalisation of Q diag(eigenvalues) Q' from e_1, Q uniform: Lanczos with uniform probes."""
    rng = np.random.default_rng(seed)
    alphas, betas = np.zeros((probes, steps)), np.zeros((probes, steps))
    for probe in range(probes):
        rotation, triangle = np.linalg.qr(rng.normal(size=(eigenvalues.size, eigenvalues.size)))
        rotation *= np.sign(np.diag(triangle))
        tridiagonal = hessenberg(rotation.T * eigenvalues @ rotation)
        alphas[probe] = np.diag(tridiagonal)[:steps]
        betas[probe] = np.abs(np.append(np.diag(tridiagonal, 1), 0.0))[:steps]
    return Spectrum(alphas, betas, np.full(probes, steps), eigenvalues.size, info or {})


def fields(estimate):
    return [estimate.value, estimate.standard_error, *estimate.interval()]


def _one_step(vector, eigenvalues):
    alpha = vector @ (eigenvalues * vector)
    return alpha, np.linalg.norm(eigenvalues * vector - alpha * vector)


def test_moments_agree_with_the_dense_traces_within_standard_errors():
    spectrum = _spectrum(probes=40, steps=3)
    for k in range(7):
        estimate = spectrum.moment(k)
        if k == 5:  # Odd, and its square is beyond degree 6.
            assert np.isnan(estimate.interval()).all()
            continue
        # A false alarm in 1e4 (normal) for each of the moments; k = 0 is exact.
        low, high = estimate.interval(0.9999)
        assert low - 1e-14 <= np.mean(EIGENVALUES**k) <= high + 1e-14
    assert 0 < spectrum.moment(1).standard_error < 0.1


def test_full_krylov_space_gives_each_probe_the_exact_quadratic_forms():
    spectrum = _spectrum(probes=1, steps=EIGENVALUES.size)
    np.testing.assert_allclose(spectrum.ritz_values[0], np.sort(EIGENVALUES), atol=1e-13)
    assert spectrum.broke_down.all()
    assert spectrum.exact_degree is None
    np.testing.assert_allclose(
        spectrum.moment(100).value, spectrum.weights[0] @ np.sort(EIGENVALUES) ** 100, rtol=1e-11
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_moment_of_degree_2m_is_exact_and_beyond_is_refused(steps):
    short, long = _spectrum(probes=3, steps=steps), _spectrum(probes=3, steps=20)
    for k in range(2 * steps + 1):
        np.testing.assert_allclose(short.moment(k).value, long.moment(k).value, rtol=1e-12, atol=1e-15)
        if 4 * k < 2 * steps:  # Up to there the error and its own error are moments that few steps know exactly.
            np.testing.assert_allclose(fields(short.moment(k)), fields(long.moment(k)), rtol=1e-10, atol=1e-15)
    with pytest.raises(ValueError, match=f"moment {2 * steps + 1} .* at least {steps + 1} steps"):
        short.moment(2 * steps + 1)
    with pytest.raises(ValueError, match="integer"):
        short.moment(-1)


def test_single_probe_error_is_the_spread_between_probes_on_the_sphere():
    rng = np.random.default_rng(3)
    eigenvalues = rng.normal(size=300) + 1
    vectors = rng.normal(size=(400, 300))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    coefficients = np.array([_one_step(vector, eigenvalues) for vector in vectors])
    single = [Spectrum([[a]], [[b]], [1], 300).trace() for a, b in coefficients]
    exact = np.sqrt(2 * 300 / 302 * (np.sum(eigenvalues**2) - np.sum(eigenvalues) ** 2 / 300))
    # The plug-in lacks a fraction 2/302 of the variance; 400 probes know their own std to 1/sqrt(800) = 3.5%.
    assert np.sqrt(np.mean([e.standard_error**2 for e in single])) == pytest.approx(exact, rel=0.02)
    assert np.std([e.value for e in single]) == pytest.approx(exact, rel=0.14)
    together = Spectrum(coefficients[:, :1], coefficients[:, 1:], np.ones(400, int), 300).trace()
    assert together.standard_error == pytest.approx(exact / 20, rel=0.14)


def test_single_probe_error_is_unknown_beyond_the_known_degree():
    spectrum = _spectrum(probes=1, steps=2)
    assert np.isfinite(spectrum.moment(2).standard_error)
    assert np.isnan(spectrum.moment(3).standard_error)


def test_frobenius_norm_and_trace_agree_with_the_dense_matrix_from_one_step_on():
    for steps in (1, 5):
        spectrum = _spectrum(probes=60, steps=steps, seed=steps)
        norm_, trace = spectrum.frobenius_norm(), spectrum.trace()
        assert abs(norm_.value - np.linalg.norm(EIGENVALUES)) < 4 * norm_.standard_error < norm_.value
        assert abs(trace.value - EIGENVALUES.sum()) < 4 * trace.standard_error
        squares = spectrum.alphas[:, 0] ** 2 + spectrum.betas[:, 0] ** 2
        # One step does not know fourth moments: the scatter of 60 probes, corrected for skew. More steps know them.
        c = 1 / (squares.mean() ** 2 / np.var(squares, ddof=1) - 1 / 60)
        scatter = squares.mean() * np.sqrt(c / 60)
        second, fourth = squares.mean(), max(spectrum.moment(2 * min(steps, 2)).value, squares.mean() ** 2)
        sphere = np.sqrt(2 * (fourth - second**2) / (57 * 60 - 2))
        expected = np.sqrt(55) / (2 * np.sqrt(second)) * (scatter if steps == 1 else sphere)
        assert norm_.standard_error == pytest.approx(expected, rel=1e-10)


def test_extremes_lie_within_their_bounds_of_an_eigenvalue():
    spectrum = _spectrum(probes=5, steps=7)
    smallest, largest = spectrum.extreme()
    for found, true, per_probe in (
        (smallest, -3.0, np.nanmin(spectrum.ritz_values, 1)),
        (largest, 5.0, np.nanmax(spectrum.ritz_values, 1)),
    ):
        assert abs(found.value - true) <= found.residual_bound + 1e-14
        assert found.spread == pytest.approx(np.std(per_probe, ddof=1))
    assert smallest.value == spectrum.ritz_values.min()
    assert largest.value == spectrum.ritz_values.max()
    assert np.isnan(_spectrum(1, 7).extreme().largest.spread)


def test_checks_hold_to_rounding_and_notice_wrong_weights():
    spectrum = _spectrum(probes=3, steps=10)
    assert max(spectrum.checks().values()) < 1e-13
    assert set(_spectrum(1, 1).checks()) == {"sum_weights", "first_moment"}
    spectrum.__dict__["weights"] = spectrum.weights * 1.01
    assert all(violation > 1e-4 for violation in spectrum.checks().values())
    assert spectrum.checks()["sum_weights"] == pytest.approx(0.01)


def test_breakdown_pads_and_ignores_what_lies_beyond():
    alphas, betas = np.array([[1.0, 2.0, 3.0], [1.0, 99.0, np.nan]]), np.array([[1.0, 1.0, 0.5], [0.0, -5.0, np.inf]])
    spectrum = Spectrum(alphas, betas, [3, 1], dim=9)
    assert spectrum.broke_down.tolist() == [False, True]
    assert np.isnan(spectrum.alphas[1, 1:]).all()
    assert np.isnan(spectrum.betas[1, 1:]).all()
    for field in (spectrum.ritz_values, spectrum.residual_bounds):
        assert np.isnan(field[1, 1:]).all()
        assert np.isfinite(field[0]).all()
    assert spectrum.weights[1].tolist() == [1, 0, 0]
    assert spectrum.ritz_values[1, 0] == 1
    assert spectrum.exact_degree == 6
    # The broken-down probe knows all moments, the other one e_1'T^6 e_1 with the next row of T, which degree 6 needs.
    extended = np.diag([1.0, 2.0, 3.0, 0.0]) + np.diag([1.0, 1.0, 0.5], 1) + np.diag([1.0, 1.0, 0.5], -1)
    assert spectrum.moment(6).value == pytest.approx((np.linalg.matrix_power(extended, 6)[0, 0] + 1) / 2)
    np.testing.assert_allclose(spectrum.density(points=50).mass.sum(1), 1, atol=1e-14)


@pytest.mark.parametrize("width", [None, 1e-9, 1e-3, 1.0, 1e2])
@pytest.mark.parametrize("axis", ["symlog", "linear"])
def test_mass_of_every_probe_is_one_at_any_width(axis, width):
    density = _spectrum(probes=3, steps=20).density(points=64, axis=axis, width=width)
    np.testing.assert_allclose(density.mass.sum(1), 1, atol=1e-14)
    assert (density.mass >= 0).all()
    assert np.sum(density.density * np.diff(density.edges)) == pytest.approx(1, abs=1e-13)


def test_mass_is_the_gaussian_mixture_in_the_axis_coordinate():
    spectrum = _spectrum(probes=2, steps=8)
    for axis, linthresh in (("linear", None), ("symlog", 0.3)):
        density = spectrum.density(points=30, axis=axis, width=0.2, linthresh=linthresh)
        forward = (lambda x: x) if axis == "linear" else lambda x: np.arcsinh(x / 0.3)
        edges, nodes = forward(density.edges), forward(spectrum.ritz_values)
        upto = (spectrum.weights[..., None] * norm.cdf((edges - nodes[..., None]) / 0.2)).sum(1)
        np.testing.assert_allclose(density.mass[:, 1:-1], np.diff(upto)[:, 1:-1], atol=1e-13)
        np.testing.assert_allclose(density.mass[:, 0], upto[:, 1], atol=1e-13)
        np.testing.assert_allclose(np.diff(edges), np.ptp(edges) / 30, rtol=1e-10)
        assert np.all((forward(density.centers) > edges[:-1]) & (forward(density.centers) < edges[1:]))


def test_grid_spans_the_extremes_of_all_probes():
    density = Spectrum([[-5.0], [1.0], [40.0]], [[0.0]] * 3, [1, 1, 1], 3).density()
    assert density.edges[0] < -5
    assert density.edges[-1] > 40


@pytest.mark.parametrize("axis", ["symlog", "linear"])
@pytest.mark.parametrize("factor", [1e-30, 1e-7, 1e30])
def test_density_is_equivariant_under_scaling(axis, factor):
    plain = _spectrum(probes=3, steps=12)
    scaled = Spectrum(plain.alphas * factor, plain.betas * factor, plain.sizes, plain.dim)
    one, other = plain.density(axis=axis), scaled.density(axis=axis)
    np.testing.assert_allclose(other.edges / factor, one.edges, rtol=1e-9, atol=1e-12)
    # Moving an edge by a rounding error moves mass by the density there.
    np.testing.assert_allclose(other.mass, one.mass, atol=1e-11)
    np.testing.assert_allclose(other.bounds, one.bounds, atol=1e-11)
    np.testing.assert_allclose(fields(scaled.trace()), fields(plain.trace().times(factor)), rtol=1e-10)
    np.testing.assert_allclose(
        fields(scaled.frobenius_norm()), fields(plain.frobenius_norm().times(factor)), rtol=1e-10
    )


@pytest.mark.parametrize("axis", ["symlog", "linear"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e-12, 1e20])
def test_a_spectrum_of_one_point_has_a_grid_around_it(axis, value):
    spectrum = Spectrum([[value, value], [value, value]], np.zeros((2, 2)), [1, 2], dim=4)
    density = spectrum.density(points=41, axis=axis)
    assert (np.diff(density.edges) > 0).all()
    np.testing.assert_allclose(density.mass.sum(1), 1, atol=1e-14)
    peak = density.mean.argmax()
    assert density.edges[peak] <= value <= density.edges[peak + 1]


def test_symlog_threshold_is_not_zero_when_most_eigenvalues_are():
    spectrum = _spectrum(probes=2, steps=3, eigenvalues=np.append(np.zeros(30), [1.0, 4.0]))
    exact_zeros = Spectrum([[0.0], [0.0], [2.0]], np.zeros((3, 1)), [1, 1, 1], dim=3)
    assert exact_zeros.density().linthresh == 2
    assert spectrum.density().linthresh >= np.finfo(np.float32).eps * spectrum.ritz_values.max()


@pytest.mark.parametrize(
    "arguments", [{"points": 0}, {"axis": "log"}, {"width": 0.0}, {"width": 1e3}, {"linthresh": -1.0}]
)
def test_density_refuses_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        _spectrum(1, 2).density(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphas": [1.0, 2.0]}, "probes, steps"),
        ({"betas": [[1.0]]}, "probes, steps"),
        ({"sizes": [1]}, "sizes"),
        ({"sizes": [0, 2]}, "sizes"),
        ({"sizes": [3, 2]}, "sizes"),
        ({"dim": 0}, "dim"),
        ({"alphas": [[1.0, 2.0], [1.0, np.nan]]}, "probe 1 step 1"),
        ({"betas": [[1.0, 2.0], [-1.0, 2.0]]}, "probe 1 step 0"),
        ({"rounding": 0.0}, "rounding"),
    ],
)
def test_bad_coefficients_are_refused_by_name(changes, message):
    good = {"alphas": [[1.0, 2.0]] * 2, "betas": [[1.0, 2.0]] * 2, "sizes": [2, 2], "dim": 5}
    Spectrum(**good)
    with pytest.raises(ValueError, match=message):
        Spectrum(**{**good, **changes})


INFO = {"loss": np.float32(2.5), "mesh": (2, 4), "bad": float("nan"), "nested": {"steps": np.int64(3)}}


def _refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_saved_spectrum_loads_equal_and_its_arrays_are_named(tmp_path):
    spectrum = _spectrum(probes=2, steps=4, info=INFO)
    spectrum.save(tmp_path / "run")
    loaded = Spectrum.load(tmp_path / "run")
    assert loaded == spectrum
    assert loaded.info == {"loss": 2.5, "mesh": [2, 4], "bad": None, "nested": {"steps": 3}}
    assert loaded != _spectrum(probes=2, steps=4, seed=1, info=INFO)
    assert loaded != _spectrum(probes=2, steps=4)
    with np.load(tmp_path / "run" / "spectrum.npz") as arrays:
        for name in (
            "ritz_values",
            "weights",
            "residual_bounds",
            "ghosts",
            "alphas",
            "betas",
            "sizes",
            "dim",
            "rounding",
        ):
            np.testing.assert_array_equal(arrays[name], getattr(spectrum, name))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("manifest.json", "spectrum.json", "spectrum.npz")
    ]


@pytest.mark.parametrize(("probes", "steps"), [(1, 1), (1, 3), (2, 1), (3, 4)])
def test_record_is_strict_json_with_null_for_the_unknown(tmp_path, probes, steps):
    spectrum = _spectrum(probes, steps, info=INFO)
    spectrum.save(tmp_path)
    record = json.loads((tmp_path / "spectrum.json").read_text(), parse_constant=_refuse_constant)
    assert record["format"] == "jaxhess-spectrum-1"
    assert record["summary"]["trace"]["value"] == pytest.approx(55 * spectrum.alphas[:, 0].mean())
    assert (record["summary"]["largest"]["spread"] is None) == (probes == 1)
    assert record["summary"]["exact_degree"] == 2 * steps
    assert sorted(record["summary"]["moments"]) == [str(k) for k in range(1, min(4, 2 * steps) + 1)]


def test_finished_run_is_not_overwritten_without_being_told(tmp_path):
    first, second = _spectrum(1, 2, seed=1), _spectrum(1, 2, seed=2)
    first.save(tmp_path)
    with pytest.raises(FileExistsError, match=tmp_path.name):
        second.save(tmp_path)
    assert Spectrum.load(tmp_path) == first
    second.save(tmp_path, overwrite=True)
    assert Spectrum.load(tmp_path) == second


def test_failed_write_leaves_the_finished_run_whole(tmp_path, monkeypatch):
    first = _spectrum(1, 2, seed=1)
    first.save(tmp_path / "run")

    def full_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full_disk)
        with pytest.raises(OSError, match="disks are full or read-only"):
            _spectrum(1, 2, seed=2).save(tmp_path / "run", overwrite=True)
    assert Spectrum.load(tmp_path / "run") == first
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_corrupt_or_foreign_folder_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Spectrum.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"spectrum\.json does not exist"):
        Spectrum.load(tmp_path)
    _spectrum(1, 2).save(tmp_path)
    record, arrays = tmp_path / "spectrum.json", tmp_path / "spectrum.npz"
    whole = arrays.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a zip"):
        arrays.write_bytes(content)
        with pytest.raises(ValueError, match=r"spectrum\.npz is corrupt"):
            Spectrum.load(tmp_path)
    arrays.unlink()
    with pytest.raises(FileNotFoundError, match=r"spectrum\.npz does not exist"):
        Spectrum.load(tmp_path)
    arrays.write_bytes(whole)
    for text in ("{", "[]", '{"format": "other"}'):
        record.write_text(text)
        with pytest.raises(ValueError, match=r"spectrum\.json is not a spectrum record"):
            Spectrum.load(tmp_path)


def test_folder_written_before_the_rounding_was_kept_is_a_float32_run(tmp_path):
    spectrum = _spectrum(probes=2, steps=4)
    spectrum.save(tmp_path)
    with np.load(tmp_path / "spectrum.npz") as arrays:
        kept = {name: arrays[name] for name in arrays if name not in ("rounding", "ghosts")}
    np.savez(tmp_path / "spectrum.npz", **kept)
    (tmp_path / "manifest.json").unlink()
    assert Spectrum.load(tmp_path) == spectrum
    assert spectrum.rounding == 2.0**-23
    double = Spectrum(spectrum.alphas, spectrum.betas, spectrum.sizes, spectrum.dim, rounding=2.0**-52)
    double.save(tmp_path, overwrite=True)
    assert Spectrum.load(tmp_path) == double != spectrum


def test_coefficients_cannot_be_changed_under_the_cached_quadrature():
    with pytest.raises(ValueError, match="read-only"):
        _spectrum(1, 2).alphas[0, 0] = 3.0


def _ghostly(probes=2, steps=80, **facts):
    eigenvalues = np.concatenate([np.random.default_rng(5).normal(size=300) * 1e-2, [-1.0, 2.0, 5.0, 10.0]])
    start = np.random.default_rng(0).normal(size=(probes, eigenvalues.size))
    coefficients = diagonal_lanczos(eigenvalues, start, steps, np.float32, orthogonal=False)
    return Spectrum(*coefficients, np.full(probes, steps), eigenvalues.size, **facts)


def test_ghosts_are_flagged_per_probe_and_clusters_keep_all_the_weight():
    spectrum = _ghostly()
    assert spectrum.ghosts.shape == spectrum.alphas.shape
    assert spectrum.summary()["num_ghosts"] == spectrum.ghosts.sum() > 50
    for probe in range(2):
        clusters = spectrum.clusters(probe)
        outliers = (np.abs(clusters.values) > 0.1) & ~clusters.spurious
        np.testing.assert_allclose(clusters.values[outliers], [-1, 2, 5, 10], atol=2e-5)
        assert clusters.weights.sum() == pytest.approx(1, abs=1e-14)
        assert (~spectrum.ghosts[probe]).sum() == (~clusters.spurious).sum()
    double = Spectrum(spectrum.alphas, spectrum.betas, spectrum.sizes, spectrum.dim, rounding=2.0**-52)
    assert double.ghosts.sum() < spectrum.ghosts.sum()
    short = Spectrum(spectrum.alphas, spectrum.betas, [80, 40], spectrum.dim)
    assert not short.ghosts[1, 40:].any()


@pytest.mark.parametrize(
    ("run", "flagged"),
    [
        ({}, True),
        ({"reorthogonalize": "none"}, True),
        ({"reorthogonalize": 10, "orthogonality": [1e-6, 1e-6]}, True),  # of a window, not of all vectors
        ({"reorthogonalize": "full"}, False),
        ({"reorthogonalize": "full", "orthogonality": [1e-6, np.nan]}, False),
        ({"reorthogonalize": "full", "orthogonality": [0.5, 0.5]}, True),
    ],
)
def test_vectors_that_are_known_to_be_independent_leave_no_ghosts(run, flagged):
    spectrum = _ghostly(run=RunRecord(**run))
    assert spectrum.ghosts.any(1).tolist() == [flagged, flagged]
    assert (spectrum.clusters(0).copies.max() > 1) == flagged


def test_full_reorthogonalisation_counts_close_eigenvalues_that_rounding_alone_would_merge():
    eigenvalues = np.concatenate([np.linspace(0, 1e-6, 20), [1.0]])
    start = np.random.default_rng(0).normal(size=(1, 21))
    coefficients = diagonal_lanczos(eigenvalues, start, 21)
    plain = Spectrum(*coefficients, [21], 21)
    full = Spectrum(*coefficients, [21], 21, run=RunRecord(reorthogonalize="full"))
    assert plain.clusters(0).copies.tolist() == [20, 1]
    assert full.clusters(0).copies.tolist() == [1] * 21
    np.testing.assert_allclose(full.clusters(0).values, eigenvalues, atol=1e-14)


def test_distribution_bounds_contain_each_probe_and_narrow_with_steps():
    n = EIGENVALUES.size
    start = np.random.default_rng(2).normal(size=(3, n))
    order = np.argsort(EIGENVALUES)
    masses = (start**2 / (start**2).sum(1, keepdims=True))[:, order]
    x = np.sort(np.concatenate([EIGENVALUES, EIGENVALUES - 1e-3, [-9, 9]]))
    true = np.array([[m[EIGENVALUES[order] <= y].sum() for y in x] for m in masses])
    widths = []
    for steps in (2, 8, 30):
        coefficients = diagonal_lanczos(EIGENVALUES, start, steps)
        spectrum = Spectrum(*coefficients, [steps] * 3, n, rounding=2.0**-52)
        lower, upper = spectrum.distribution_bounds(x)
        assert lower.shape == upper.shape == (3, x.size)
        assert (lower <= true + 1e-12).all()
        assert (true <= upper + 1e-12).all()
        widths.append((upper - lower).mean())
    assert widths[0] > widths[1] > widths[2]
    # Nothing is left to bound where the Krylov space was exhausted: away from eigenvalues both are the measure.
    alphas, betas = diagonal_lanczos(EIGENVALUES, start, n)
    betas[:, -1] = 0
    clear = np.abs(x[:, None] - EIGENVALUES).min(1) > 1e-10
    for bound in Spectrum(alphas, betas, [n] * 3, n, rounding=2.0**-52).distribution_bounds(x[clear]):
        np.testing.assert_allclose(bound, true[:, clear], atol=1e-10)
    with pytest.raises(ValueError, match="one-dimensional"):
        spectrum.distribution_bounds(0.0)


def test_trace_functions_of_polynomials_are_the_moments():
    spectrum = dataclasses.replace(_spectrum(probes=4, steps=12), rounding=2.0**-52)
    for k in range(1, 6):
        found, moment = spectrum.trace_function(lambda theta, k=k: theta**k), spectrum.moment(k).times(spectrum.dim)
        assert found.value == pytest.approx(moment.value, rel=1e-9)
        assert found.standard_error == pytest.approx(moment.standard_error, rel=1e-9)
        # Polynomials leave nothing open but rounding, of sums of up to as many terms as points in all gaps.
        np.testing.assert_allclose(found.bounds, moment.value, atol=1e-9 * 55 * 5.0**k)
    assert spectrum.trace_function(np.ones_like).value == pytest.approx(spectrum.dim)
    assert spectrum.trace_function(np.ones_like).standard_error == pytest.approx(0, abs=1e-10)


def test_trace_functions_are_exact_where_the_krylov_space_is_exhausted():
    # Over all starts e_i, i = 1..n, the mean of the probes is the exact trace divided by n.
    n = EIGENVALUES.size
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    alphas, betas = diagonal_lanczos(EIGENVALUES, rotation, n)
    betas[:, -1] = 0
    spectrum = Spectrum(alphas, betas, np.full(n, n), n)
    assert spectrum.trace_function(np.cos).value == pytest.approx(np.cos(EIGENVALUES).sum(), rel=1e-12)
    assert spectrum.log_determinant(4.0).value == pytest.approx(np.log(EIGENVALUES + 4).sum(), rel=1e-12)


def test_trace_function_refuses_what_is_not_finite_or_not_vectorised():
    spectrum = _spectrum(probes=2, steps=6)
    with pytest.raises(ValueError, match=r"f is nan at the Ritz value -"):
        spectrum.trace_function(np.sqrt)
    with pytest.raises(ValueError, match="vectorised"):
        spectrum.trace_function(lambda theta: 1.0)


def test_log_determinant_refuses_a_shift_that_is_too_small_and_names_one_that_is_right():
    spectrum = _spectrum(probes=2, steps=20)
    with pytest.raises(ValueError, match=r"smallest Ritz value is -3\.0") as caught:
        spectrum.log_determinant(1.0)
    right = float(str(caught.value).split("above ")[1])
    assert 3 - 1e-12 < right < 3.001
    assert np.isfinite(spectrum.log_determinant(1.001 * right).value)


def test_error_has_as_many_degrees_of_freedom_as_probes_where_one_eigenvalue_dominates_and_many_for_a_bulk():
    rng = np.random.default_rng(0)
    bulk, alone = rng.normal(size=400) + 1, np.append(rng.normal(size=399) * 1e-3, 50.0)
    for eigenvalues, least, most in ((bulk, 200, np.inf), (alone, 4, 20)):
        spectrum = Spectrum(*diagonal_lanczos(eigenvalues, rng.normal(size=(4, 400)), 10), [10] * 4, 400)
        variance = spectrum.moment(2).value - spectrum.moment(1).value ** 2
        plain = 400 * np.sqrt(2 * variance / (402 * 4 - 2))
        trace = spectrum.trace()
        assert trace.standard_error == pytest.approx(plain)
        assert least <= trace.freedom <= most
        half = student.ppf(0.975, trace.freedom) * plain
        np.testing.assert_allclose(trace.interval(), [trace.value - half, trace.value + half])


def test_random_signs_on_a_diagonal_matrix_have_no_error_and_say_so():
    n = EIGENVALUES.size
    start = np.random.default_rng(0).choice([-1.0, 1.0], (4, n))
    coefficients = diagonal_lanczos(EIGENVALUES, start, 10)
    signs = Spectrum(*coefficients, [10] * 4, n, run=RunRecord(distribution="rademacher"))
    assert signs.trace().standard_error < 1e-10
    assert signs.trace().value == pytest.approx(EIGENVALUES.sum(), abs=1e-10)


def _masses(values, multiplicities, probes, seed=0):
    """[probes, values] unnormalised mass that normal probes have on eigenvalues which occur so often."""
    return np.random.default_rng(seed).chisquare(multiplicities, (probes, values.size))


def _llm_like(dim=10**8, seed=1):
    """Different eigenvalues and how often each occurs: 30 outliers over 4 decades, some negative, others near zero."""
    outliers = np.geomspace(1e-2, 1e2, 30) * np.where(np.arange(30) % 4 == 1, -1, 1)
    bulk = 3e-5 * np.random.default_rng(seed).normal(size=400)
    return np.append(bulk, outliers), np.append(np.full(400, (dim - 30) // 400), np.ones(30, int))


def test_interval_of_a_trace_function_holds_the_truth_that_few_steps_do_not_see():
    values, multiplicities = _llm_like()
    mass = _masses(values, multiplicities, 4)
    coefficients = diagonal_lanczos(values, np.sqrt(mass), 20)
    spectrum = Spectrum(*coefficients, [20] * 4, int(multiplicities.sum()), rounding=2.0**-52)
    found, truth = spectrum.trace_function(np.abs), multiplicities @ np.abs(values)
    assert abs(found.value - truth) > 4 * found.standard_error  # the sampling error alone would not do
    low, high = found.interval()
    assert low <= truth <= high
    assert found.bounds[0] <= found.value <= found.bounds[1]
    # A smooth function leaves nothing open, at any depth between the steps.
    smooth = spectrum.trace_function(lambda x: np.log(x + 200))
    assert np.ptp(smooth.bounds) < 1e-9 * smooth.value


@pytest.mark.parametrize(
    "f",
    [np.abs, np.tanh, lambda x: np.exp(-50 * x), lambda x: np.sin(40 * x), lambda x: (x > 0.3) * 1.0, np.cbrt],
    ids=["abs", "tanh", "exp", "sin", "step", "cbrt"],
)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_bounds_of_trace_functions_hold_for_each_probe_and_narrow_with_steps(f, steps):
    masses = np.random.default_rng(2).normal(size=(5, EIGENVALUES.size)) ** 2
    values = EIGENVALUES.size * (masses / masses.sum(1, keepdims=True)) @ f(EIGENVALUES)

    def bounds(count):
        coefficients = diagonal_lanczos(EIGENVALUES, np.sqrt(masses), count)
        return [
            # The ends are certain once the extremes have converged; before, they are given.
            _with_ends(Spectrum(a[None], b[None], [count], EIGENVALUES.size, rounding=2.0**-52))
            .trace_function(f)
            .bounds
            for a, b in zip(*coefficients, strict=True)
        ]

    few, more = np.array(bounds(steps)), np.array(bounds(2 * steps))
    slack = 1e-9 * np.abs(values).max()
    assert (few[:, 0] - slack <= values).all()
    assert (values <= few[:, 1] + slack).all()
    # (Of a function that oscillates faster than the steps resolve, nothing but its size is known.)
    assert f(np.pi / 80) == 1 or np.ptp(more, axis=1).mean() <= np.ptp(few, axis=1).mean() + slack


def _with_ends(spectrum):
    spectrum.__dict__["_ends"] = (EIGENVALUES.min(), EIGENVALUES.max())
    return spectrum


def test_trace_function_is_unbounded_where_the_function_may_not_be_finite_and_exact_after_breakdown():
    spectrum = _spectrum(probes=2, steps=6, eigenvalues=EIGENVALUES + 3.0001)
    found = spectrum.trace_function(np.log)
    assert found.bounds[0] == -np.inf
    assert str(found).endswith("(error not known)")
    json.dumps(spectrum.summary(), allow_nan=False)
    exhausted = dataclasses.replace(_spectrum(probes=2, steps=EIGENVALUES.size), rounding=2.0**-52)
    assert exhausted.trace_function(np.abs).bounds is None


@pytest.mark.parametrize("steps", [4, 16])
@pytest.mark.parametrize("kind", ["LLM-like", "semi-definite"])
def test_bands_of_distribution_and_density_hold_the_operator_s_own(kind, steps):
    values, multiplicities = _llm_like(10**6)
    if kind == "semi-definite":
        values = np.where(np.arange(values.size) < 400, 0.0, np.abs(values))
    share = multiplicities / multiplicities.sum()
    inside, narrower = [], []
    for seed in range(10):
        coefficients = diagonal_lanczos(values, np.sqrt(_masses(values, multiplicities, 2, seed)), steps)
        spectrum = Spectrum(*coefficients, [steps] * 2, int(multiplicities.sum()))
        density = spectrum.density(points=100)
        assert density.reflected == (kind == "semi-definite")
        grid = _forward(density.edges, density)
        upto = norm.cdf((grid - _forward(values, density)[:, None]) / density.width)
        if density.reflected:
            upto = upto - norm.cdf((-grid - _forward(values, density)[:, None]) / density.width)
        upto[:, 0], upto[:, -1] = 0.0, 1.0
        truth = share @ np.diff(upto) / np.diff(density.edges)
        low, high = density.band
        inside.append(((low <= truth * (1 + 1e-9)) & (truth <= high * (1 + 1e-9))).mean())
        x = np.sort(np.append(values, np.linspace(-101, 101, 50)))
        true = np.array([share[values <= y].sum() for y in x])
        low, high = spectrum.distribution_interval(x)
        inside.append(((low <= true + 1e-12) & (true <= high + 1e-12)).mean())
        certain = [bound.mean(0) for bound in spectrum.distribution_bounds(x)]
        narrower.append((low <= certain[0]).all() and (certain[1] <= high + 1e-15).all())
    assert min(inside) >= 0.9
    assert all(narrower)


def _forward(x, density):
    return np.arcsinh(x / density.linthresh)


def test_half_of_a_semidefinite_spectrum_is_not_drawn_below_zero():
    values = np.append(np.zeros(90), np.linspace(0.1, 5, 10))
    coefficients = diagonal_lanczos(values, np.random.default_rng(0).normal(size=(3, 100)), 8)
    density = Spectrum(*coefficients, [8] * 3, 100).density()
    assert density.edges[0] == 0
    np.testing.assert_allclose(density.mass.sum(1), 1, atol=1e-14)
    assert not _spectrum(probes=2, steps=8).density().reflected
    assert Spectrum(*coefficients, [8] * 3, 100).density(axis="linear").edges[0] == 0


def _of_diagonal(eigenvalues, **options):
    return run_spectrum(MatrixOperator(jnp.diag(jnp.asarray(eigenvalues, jnp.float32))), **options)


def test_after_a_breakdown_the_spectrum_is_known_up_to_the_slack_only():
    eigenvalues = np.append(np.geomspace(1e-3, 0.1, 199), 1e6)
    found = _of_diagonal(eigenvalues, steps=30, probes=8, seed=1)
    assert found.broke_down.all()  # float32 does not resolve the 199 beside a million
    step = found.trace_function(lambda x: (x > 0.01) * 1.0)
    low, high = step.interval()
    assert low <= (eigenvalues > 0.01).sum() <= high
    assert step.bounds[0] < (eigenvalues > 0.01).sum() < step.bounds[1]
    # Within the slack of the smallest Ritz value the logarithm need not exist.
    assert np.isnan(found.log_determinant(1e-3).interval()).all()
    low, high = found.log_determinant(100.0).interval()
    assert low <= np.log(eigenvalues + 100).sum() <= high
    density = found.density()
    grid = _forward(density.edges, density)
    upto = norm.cdf((grid - _forward(eigenvalues, density)[:, None]) / density.width)
    if density.reflected:
        upto = upto - norm.cdf((-grid - _forward(eigenvalues, density)[:, None]) / density.width)
    upto[:, 0], upto[:, -1] = 0.0, 1.0
    truth = np.diff(upto).mean(0) / np.diff(density.edges)
    low, high = density.band
    outside = (truth < low * (1 - 1e-9)) | (truth > high * (1 + 1e-9))
    assert (truth * np.diff(density.edges))[outside].sum() < 1e-9


def test_one_step_does_not_know_the_error_of_a_trace_function_but_that_of_the_trace():
    found = _of_diagonal([-5.0, -4.0, -1.0], steps=1, probes=1)
    assert str(found.trace_function(np.abs)).endswith("(error not known)")
    assert found.trace().freedom == 1  # the fewest possible, for one step does not know the fourth moment
    low, high = found.trace().interval()
    assert low <= -10 <= high
    low, high = _of_diagonal([-5.0, -4.0, -1.0], steps=2, probes=1).trace_function(np.abs).interval()
    assert low <= 10 <= high


def test_bounds_of_a_polynomial_are_those_of_a_matrix_within_the_slack():
    # An operator within 0.01 of the one whose measure has these nodes: that measure moved by as much.
    nodes, weights, slack = np.array([-1.0, 0.5, 2.0]), np.array([0.2, 0.5, 0.3]), 0.01
    for f in (lambda x: x, lambda x: x**3, lambda x: x**2):
        for exhausted in (False, True):
            low, high = integral_bounds(f, nodes, weights, (-1.5, 3.0), slack, exhausted)
            for moved in (nodes - slack, nodes + slack, nodes + slack * np.sign(nodes), nodes - slack * np.sign(nodes)):
                assert low - 1e-12 <= weights @ f(moved) <= high + 1e-12
            assert high - low < 1
    low, high = integral_bounds(lambda x: x, nodes, weights, (-1.5, 3.0), 0.0)
    assert high - low < 1e-12
