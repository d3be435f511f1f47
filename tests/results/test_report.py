"""Figures and the HTML report."""

import base64
import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from known_spectra import run_record
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jaxhess.operators.audit import Noise, NoiseAlong
from jaxhess.operators.restriction import Selection
from jaxhess.results.figures import density_figure, distribution_figure, stem_figure
from jaxhess.results.report import report_files, write_report
from jaxhess.slq.job import CommandRecord, Model
from jaxhess.slq.random_matrix import LimitLaw
from jaxhess.slq.record import EigenpairRecord, Inputs, OperatorRecord, RunRecord
from jaxhess.slq.spectrum import Spectrum

INFO = {
    "loss": 3.25,
    "command": "spectrum run",
    "model": {"name": "<script>alert('x')</script> & co", "sizes": {"layers": 12}},
    "timings": [1.5, None],
    "empty": {},
}

RUN = RunRecord(inputs=Inputs(loss=3.25))


def _spectrum(probes=3, steps=12, scale=1.0, shift=0.0, info=INFO, seed=0, run=RUN):
    """A tridiagonal with a bulk and outliers over decades of both signs; not from a matrix, as plots do not care."""
    rng = np.random.default_rng(seed)
    alphas = np.geomspace(1e-4, 1e2, steps) * rng.choice([-1, 1], (probes, steps)) * scale + shift
    betas = np.geomspace(1e-6, 1e-1, steps) * rng.uniform(0.5, 1, (probes, steps)) * scale
    return Spectrum(alphas, betas, np.full(probes, steps), 10**6, info, run=run)


CASES = {
    "LLM-like": _spectrum(),
    "one probe": _spectrum(probes=1),
    "one step": _spectrum(steps=1),
    "many probes": _spectrum(probes=12, steps=4),
    "tiny": _spectrum(scale=1e-11),
    "huge": _spectrum(scale=1e20),
    "far from zero": _spectrum(scale=1e-5, shift=1.0),
    "many parameters": Spectrum([[0.1, 2.0, 0.3]], [[1.0, 1.0, 1.0]], [3], 10**12),
    "more than float64 counts": Spectrum([[0.1, 2.0, 0.3]], [[1.0, 1.0, 1.0]], [3], 10**20),
    "zero": Spectrum([[0.0]], [[0.0]], [1], 1),
    "broken down": Spectrum([[1.0, 2.0], [3.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [2, 1], 5),
}


class _Balance(HTMLParser):
    """Raises when a tag closes another one than the last opened; collects text and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def _read(folder):
    parser = _Balance()
    page = (folder / "report.html").read_text(encoding="utf-8")
    parser.feed(page)
    assert parser.open == []
    return page, parser


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["symlog", "linear", "stem", "distribution"])
def test_tick_labels_do_not_overlap(case, kind):
    draw = {"stem": stem_figure, "distribution": distribution_figure}.get(kind, lambda s: density_figure(s, kind))
    figure = draw(CASES[case])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
        low, high = sorted(axis.get_view_interval())
        labels = [
            label
            for label, place in zip(axis.get_ticklabels(), axis.get_majorticklocs(), strict=True)
            if label.get_text() and low <= place <= high
        ]
        boxes = sorted(tuple(np.asarray(label.get_window_extent(canvas.get_renderer()))[:, side]) for label in labels)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(boxes))
        if side == 0:
            assert len(boxes) >= 3
            assert len({label.get_text() for label in labels}) == len(labels)


@pytest.mark.parametrize("probes", [1, 3])
def test_density_figure_has_the_band_of_quadrature_and_sampling_error(probes):
    spectrum = _spectrum(probes=probes)
    (band,) = density_figure(spectrum).axes[0].collections
    corners = band.get_paths()[0].vertices[:, 1]
    _, high = spectrum.density().band
    assert np.isin(high[high > corners.min()], corners).all()


def test_drawn_density_is_the_spectrum_s():
    spectrum = _spectrum()
    line = density_figure(spectrum).axes[0].lines[0]
    density = spectrum.density()
    np.testing.assert_array_equal(line.get_xdata(), density.centers)
    shown = density.density > line.get_ydata().min()
    assert shown.sum() > 50
    np.testing.assert_array_equal(line.get_ydata()[shown], density.density[shown])


def test_a_law_is_drawn_over_the_density_and_its_atom_is_named():
    spectrum = _spectrum()
    density = spectrum.density()
    law = LimitLaw(density.centers, 2 * density.density, np.cumsum(density.mean), atom=0.5)
    (drawn,) = [line for line in density_figure(spectrum, overlay=law).axes[0].lines if line.get_linestyle() == "--"]
    np.testing.assert_array_equal(drawn.get_xdata(), law.x)
    shown = law.density > drawn.get_ydata().min()
    assert shown.sum() > 50
    np.testing.assert_array_equal(drawn.get_ydata()[shown], law.density[shown])
    assert drawn.get_label() == "limit law, and 0.5 of all at zero"


def test_stem_figure_draws_every_ritz_value_and_the_share_of_one_eigenvalue():
    spectrum = _spectrum()
    axes = stem_figure(spectrum).axes[0]
    drawn = np.array([line.get_xydata() for line in axes.lines[: spectrum.num_probes]])
    np.testing.assert_array_equal(drawn[..., 0], spectrum.ritz_values)
    np.testing.assert_array_equal(drawn[..., 1], spectrum.weights)
    (share,) = [line for line in axes.lines if "one eigenvalue" in line.get_label()]
    assert share.get_ydata()[0] == 1e-6
    assert axes.get_ylim()[0] < 1e-6


def test_stem_figure_says_how_many_values_are_below_the_axis():
    spectrum = _spectrum()
    axes = stem_figure(spectrum).axes[0]
    hidden = int((spectrum.weights < axes.get_ylim()[0]).sum())
    assert hidden > 0
    assert f"{hidden} Ritz values" in axes.get_title()


def test_ghosts_are_hollow_over_dots_of_their_probe():
    spectrum = _ghostly()
    axes = stem_figure(spectrum).axes[0]
    dots, hollow = axes.lines[:2], axes.lines[2:4]
    for probe in range(2):
        flags = spectrum.ghosts[probe]
        assert flags.sum() > 20
        drawn = hollow[probe]
        np.testing.assert_array_equal(drawn.get_xdata(), spectrum.ritz_values[probe, flags])
        np.testing.assert_array_equal(drawn.get_ydata(), spectrum.weights[probe, flags])
        assert drawn.get_markerfacecolor() == "white"
        np.testing.assert_array_equal(drawn.get_markeredgecolor(), dots[probe].get_color())
    assert "hollow: ghosts" in [text.get_text() for text in axes.get_legend().get_texts()]
    none = stem_figure(CASES["broken down"]).axes[0]
    assert not any("ghosts" in text.get_text() for text in none.get_legend().get_texts())


def test_ticks_under_the_density_leave_ghosts_out():
    spectrum = _ghostly()
    (ticks,) = [line for line in density_figure(spectrum).axes[0].lines if "outside" in line.get_label()]
    drawn = np.isin(spectrum.ritz_values, ticks.get_xdata())
    assert not (drawn & spectrum.ghosts).any()
    assert drawn.sum() == ticks.get_xdata().size >= 8
    assert {-1, 2, 5, 10} <= set(np.round(ticks.get_xdata(), 4))


def _ghostly(run=None):
    """Lanczos without re-orthogonalisation, in float32, on a bulk and outliers: many copies."""
    rng = np.random.default_rng(0)
    diagonal = np.append(rng.normal(size=500) * 1e-2, [-1.0, 2.0, 5.0, 10.0]).astype(np.float32)
    alphas, betas = np.zeros((2, 80)), np.zeros((2, 80))
    for probe in range(2):
        q = rng.normal(size=diagonal.size).astype(np.float32)
        q, previous, beta = q / np.linalg.norm(q), np.zeros_like(q), np.float32(0)
        for step in range(80):
            w = diagonal * q - beta * previous
            alphas[probe, step] = alpha = w @ q
            w -= np.float32(alpha) * q
            betas[probe, step] = beta = np.linalg.norm(w)
            previous, q = q, w / beta
    return Spectrum(alphas, betas, [80, 80], diagonal.size, run=run or RunRecord())


@pytest.mark.parametrize("case", ["LLM-like", "one probe", "many probes", "broken down"])
def test_distribution_figure_draws_the_mean_inside_its_bounds(case):
    spectrum = CASES[case]
    axes = distribution_figure(spectrum).axes[0]
    x, y = axes.lines[0].get_data()
    mean = np.mean(
        [(w[:, None] * (t[:, None] <= x)).sum(0) for t, w in zip(spectrum.ritz_values, spectrum.weights, strict=True)],
        0,
    )
    low, high = axes.get_ylim()
    assert low == pytest.approx(0.1 / spectrum.dim)
    shown = (mean > low) & (mean < high)
    assert shown.any()
    np.testing.assert_allclose(y[shown], mean[shown], rtol=1e-9, atol=1e-14)
    lower, upper = (bound.mean(0) for bound in spectrum.distribution_bounds(x))
    floor = low / 10
    for band, bounds in zip(axes.collections, ((lower, upper), spectrum.distribution_interval(x)), strict=True):
        corners = band.get_paths()[0].vertices[:, 1]
        for bound in bounds:
            assert np.isin(np.clip(bound, floor, 1 - floor), corners).all()
    assert (np.clip(lower, floor, 1 - floor) <= y + 1e-13).all()
    assert (y <= np.clip(upper, floor, 1 - floor) + 1e-13).all()


def test_plot_is_the_density_figure_and_shows_in_a_notebook():
    figure = _spectrum().plot(axis="linear")
    assert figure.axes[0].get_xscale() == "linear"
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_figures_leave_pyplot_alone():
    program = "import sys, jaxhess.results.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_report_embeds_its_plots_and_needs_nothing_else(tmp_path):
    write_report(tmp_path, _spectrum())
    page, parser = _read(tmp_path)
    assert len(parser.sources) == 3
    for source, name in zip(parser.sources, ("distribution.png", "density.png", "stem.png"), strict=True):
        image = base64.b64decode(re.fullmatch("data:image/png;base64,(.*)", source).group(1), validate=True)
        assert image.startswith(b"\x89PNG")
        assert image == (tmp_path / name).read_bytes()
    assert "http" not in page
    assert "url(" not in page


def test_report_escapes_and_shows_all_of_info(tmp_path):
    write_report(tmp_path, _spectrum())
    page, parser = _read(tmp_path)
    assert "<script" not in page
    for text in (INFO["model"]["name"], "model.sizes.layers", "12", "spectrum run", "3.25", "[1.5, null]"):
        assert text in parser.texts


@pytest.mark.parametrize("case", ["LLM-like", "one probe", "one step", "zero", "broken down"])
def test_report_states_the_extremes_and_prints_no_nan(tmp_path, case):
    spectrum = CASES[case]
    write_report(tmp_path, spectrum)
    _, parser = _read(tmp_path)
    row = parser.texts.index("largest Ritz value")
    stated = float(parser.texts[row + 1].replace("\N{MINUS SIGN}", "-"))
    assert stated == pytest.approx(spectrum.extreme().largest.value, rel=1e-5)
    assert not re.search(r"\bnan\b|\binf\b", " ".join(parser.texts))
    assert ("probes' own values" in " ".join(parser.texts)) == (spectrum.num_probes > 1)


def test_a_new_run_takes_the_old_report_with_it(tmp_path):
    CASES["one step"].save(tmp_path)
    write_report(tmp_path, CASES["one step"])
    assert len(list(tmp_path.iterdir())) == 7
    CASES["one step"].save(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"spectrum.npz", "spectrum.json", "manifest.json"}


HOSTILE = "</title><script>alert(1)</script>"


@pytest.mark.parametrize(
    ("run", "info"),
    [
        (RunRecord(operator=OperatorRecord("Hessian", restriction=HOSTILE)), {}),
        (RunRecord(operator=OperatorRecord(HOSTILE, restriction=Selection((HOSTILE,)))), {}),
        (RunRecord(job=CommandRecord({"model": HOSTILE, HOSTILE: 1}, Model(HOSTILE, 1, {HOSTILE: HOSTILE}))), {}),
        (RunRecord(noise=Noise(0.5, None, HOSTILE, NoiseAlong(0.5, None))), {HOSTILE: {HOSTILE: [HOSTILE]}}),
    ],
)
def test_no_text_of_a_record_becomes_markup(tmp_path, run, info):
    write_report(tmp_path, _spectrum(run=run, info=info))
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert page.count("</title>") == 1


def test_a_restriction_is_no_mathematics(tmp_path):
    operator = OperatorRecord("Hessian", restriction=Selection((r"$\frac{$",)))
    write_report(tmp_path, _spectrum(run=RunRecord(operator=operator)))


def _row(texts, first):
    return texts[texts.index(first) :]


def test_report_counts_ghosts_per_probe_and_lists_outliers_with_their_copies(tmp_path):
    spectrum = _ghostly(run_record("none", (0.98, None)))
    write_report(tmp_path, spectrum)
    _, parser = _read(tmp_path)
    texts = [text for text in parser.texts if text.strip()]
    head = _row(texts, "Ghosts")
    assert head[6] == "loss of orthogonality, largest |Q'Q − I|"
    for probe, lost in ((0, "0.98"), (1, "not measured")):
        clusters = spectrum.clusters(probe)
        flagged, spurious = spectrum.ghosts[probe].sum(), clusters.spurious.sum()
        row = head[7 + 6 * probe :][:6]
        assert row == [str(probe + 1), "80", str(flagged - spurious), str(spurious), str(80 - flagged), lost]
    outliers = _row(texts, "Outliers with their copies merged")[6:]
    assert outliers[0] == "1"
    assert float(outliers[1]) == pytest.approx(10, abs=1e-4)
    largest = spectrum.clusters(0).values.argmax()
    assert outliers[2] == str(spectrum.clusters(0).copies[largest])
    assert float(outliers[4]) == pytest.approx(504 * spectrum.clusters(0).weights[largest], rel=0.05)


def test_report_of_independent_vectors_has_no_ghosts(tmp_path):
    write_report(tmp_path, _ghostly(run_record("full", (1e-6, 1e-6))))
    _, parser = _read(tmp_path)
    assert any("No Ritz value is taken" in text for text in parser.texts)
    assert "1e−06" in parser.texts
    assert "Outliers with their copies merged" not in parser.texts


def test_report_shows_eigenpairs_with_their_residuals_if_the_run_has_any(tmp_path):
    pairs = EigenpairRecord((12.5, -3.25), (1.5e-4, None))
    write_report(tmp_path, _spectrum(run=RunRecord(eigenpairs=pairs)))
    _, parser = _read(tmp_path)
    texts = [text for text in parser.texts if text.strip()]
    assert _row(texts, "residual |Hv − value v| / |v|")[1:7] == ["1", "12.5", "0.00015", "2", "−3.25", "–"]
    write_report(tmp_path, _spectrum(info={"eigenpairs": "none"}), overwrite=True)
    _, parser = _read(tmp_path)
    assert "Eigenvectors" not in parser.texts


def test_report_says_what_is_not_known_and_where_smoothing_puts_mass(tmp_path):
    write_report(tmp_path, _spectrum())
    assert "drawn half above and half below" in " ".join((tmp_path / "report.html").read_text().split())
    semidefinite = Spectrum([[1.0, 2.0, 3.0]] * 2, [[1.0, 1.0, 0.5]] * 2, [3, 3], 10**6)
    write_report(tmp_path, semidefinite, overwrite=True)
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert "reflected at zero" in page
    assert semidefinite.density().edges[0] == 0


def test_the_report_says_which_probes_are_not_reliable():
    tridiagonal = (np.ones((2, 4)), np.ones((2, 4)), [4, 4], 10)
    pages = [
        report_files(Spectrum(*tridiagonal, run=run_record("full", measured)))["report.html"].decode()
        for measured in ((1e-6, 0.2), (1e-6, 1e-6))
    ]
    assert "Not reliable: the Lanczos vectors of probe 2 " in pages[0]
    assert "Not reliable" not in pages[1]
