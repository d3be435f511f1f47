"""The fidelity study: its differences, the noise they have, what explains it, and one sentence for every bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import check_refused, matrix, network, operator_of, run_command

import jaxhess
from jaxhess.results.study import Study
from jaxhess.structure.fidelity import Fidelity, full_and_own
from scripts.studies import fidelity as script
from scripts.studies.block_fidelity import products


def quadratic(w, a):
    """Gradient a^2 w: exact in bfloat16 for entries of a that are powers of two."""
    return jnp.sum((a * w.astype(jnp.float32)) ** 2) / 2


def test_the_published_tables_say_what_the_study_says_they_do():
    assert 1 + script.TABLE_6.excess == pytest.approx(1.0, abs=2e-3)  # figures of three digits
    assert 1 + script.TABLE_7.excess == pytest.approx(1.512, abs=1e-3)
    assert script.TABLE_7.below_one == pytest.approx(0.15**2 / (0.15**2 + 0.214**2))
    assert script.TABLE_6.below_one == 1


def test_a_difference_is_shifted_by_the_step_times_the_vector_or_by_one_length():
    w, batches = jnp.ones(4), [jnp.array([1.0, 2.0, 4.0, 0.5])]
    central = jaxhess.FiniteDifferenceHessian(quadratic, w, batches, step=1.0)
    v = jnp.array([3.0, 0.0, 4.0, 0.0])
    by_entry, same_length = (products.Difference(central, 0.25, same) for same in (False, True))
    assert float(by_entry.length(v)) == pytest.approx(0.25 * 5)
    assert float(same_length.length(v)) == pytest.approx(0.25 * 2)
    for difference in (by_entry, same_length):
        np.testing.assert_allclose(difference @ v, [3, 0, 64, 0], rtol=1e-6)


def test_what_narrow_weights_make_of_a_shift_is_no_noise():
    w, batches = jnp.array([1.0, 1.0, 0.01, -0.02], jnp.bfloat16), [jnp.array([1.0, 2.0, 4.0, 0.5])]
    v = jnp.array([1.0, -0.5, 2.0, 0.7])
    difference = products.Difference(jaxhess.FiniteDifferenceHessian(quadratic, w, batches, step=1.0), 1e-3)
    exact = jaxhess.Hessian(quadratic, w.astype(jnp.float32), batches)
    found = products.Realised(exact, difference) @ v
    # The gradient is linear in the weights and exact: all that a difference has is the shift that was made.
    np.testing.assert_allclose(difference @ v, found, rtol=1e-5)
    assert float(found[0]) == 0  # an entry of 1 does not move by 1e-3
    assert abs(float(found[2]) / (16 * 2) - 1) > 1e-3  # others are rounded


def test_noise_of_a_known_size_predicts_errors_that_were_not_used():
    numbers, probes, entries = np.random.default_rng(0), 6, 4000

    def draw(size: float) -> np.ndarray:
        return size * numbers.normal(size=(probes, entries))

    def fidelity(y: np.ndarray, d: np.ndarray) -> Fidelity:
        full, own, missed = (np.linalg.norm(x, axis=1) for x in (y, d, y - d))
        return Fidelity(*(x[:, None] for x in (full, own, missed, (y * d).sum(1) / full / own)))

    d, o, n_y, n_d = draw(1), draw(2), draw(3), draw(2)
    found, signal, noise = fidelity(d + o + n_y, d + n_d), fidelity(d + o, d), fidelity(n_y, n_d)
    predicted = products.Products("differences", found, signal, noise, 1e-3).predicted()
    assert predicted.error.shape == (probes, probes - 1, 1)
    # Inner products of independent vectors are 1/sqrt(4000) = 0.016 of their lengths; five of these deviations.
    np.testing.assert_allclose(predicted.error.mean(1), found.error, atol=0.08)
    np.testing.assert_allclose(predicted.excess.mean(1), found.excess, atol=0.08)
    assert found.error.min() > 1 > signal.error.max()  # 4 + 9 + 4 over 5 + 9, against 4 over 5
    assert found.alignment.max() < -0.1 < signal.alignment.min()


def test_all_eigenpairs_together_are_the_matrix():
    a = matrix([5.0, -3.0, 1.0, 0.5])
    operator, v = operator_of(a), jnp.array([1.0, -2.0, 0.5, 3.0])
    blocks = jaxhess.Blocks.by(operator.shape_dtype, "matrices").split("*", axis=0)
    values, vectors = np.linalg.eigh(a)
    leading = products.leading_part(blocks, jnp.asarray(vectors.T, jnp.float32), jnp.asarray(values, jnp.float32), v)
    for x, y in zip(leading, full_and_own(operator, blocks, v), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)  # of entries of order 10, in float32


def test_fine_tuning_lowers_the_loss():
    hessian = network()
    found = products.fine_tuned(hessian, 20, 1e-2)
    before, after = (float(jax.jit(type(h).value_and_gradient)(h)[0]) for h in (hessian, found))
    assert after < 0.9 * before


def test_exact_products_have_no_mark_of_noise_and_rounded_differences_have():
    hessian = network()
    blocks = jaxhess.Blocks.by(hessian.shape_dtype, "layers")
    layers = script.layers_of(blocks.names)
    assert [blocks.names[k] for k in layers] == ["layers/0", "layers/1"]
    options = products.ProductOptions(probes=16, steps=(3e-4,), dtypes=("bfloat16",), outliers=0, others=False)
    point = products.measured(options, "random", hessian, blocks, None)
    assert set(point.products) == {"exact", "differences 3e-4, bfloat16"}
    exact, differences = point.products.values()
    assert exact.found.error.shape == (16, 4)
    assert differences.noise is not None
    assert differences.signal is not None
    # The steps are as small as the spacing of the weights' bfloat16: the noise of d is larger than d.
    assert np.median((differences.noise.own / differences.signal.own)[:, layers]) > 1
    # By the symmetry the mean is zero for exact products, with a deviation of 0.2/sqrt(32); noise opposes d and o.
    marks = [x.found.alignment[:, layers].mean() for x in (exact, differences)]
    assert marks[0] > -0.15 > marks[1]
    claims = {claim.statement: claim for claim in script.claims([point], layers, layers[-1], "a network")}
    assert claims["Outliers can give such a table."].verdict == "does not hold"
    told = claims["Noise that knows nothing of the products explains the e² + c² - 1 of differences 3e-4, bfloat16."]
    assert told.verdict != "does not hold"
    assert all(len(table.rows[0]) == len(table.head) for table in script.tables([point], layers, blocks.names))
    assert script.figure([point], layers).axes


@pytest.mark.study
def test_the_folder_holds_a_study(tmp_path):
    small = ["--seq-len", "8", "--probes", "4", "--steps", "1e-4", "--dtypes", "bfloat16", "--fine-tune", "5"]
    chosen = ["--outliers", "0", "--no-others", "--mesh", "fsdp=1", "--layers", "0", "3"]
    run_command(script, *small, *chosen, "--out", str(tmp_path / "out"))
    found = Study.load(tmp_path / "out")
    assert [point["name"] for point in found.record["points"]] == ["trained", "fine-tuned"]
    assert len(found.figures[0].png) > 10_000
    assert found.record["points"][1]["loss"] < found.record["points"][0]["loss"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--probes 3", "at least 4 are needed"),
        ("--steps 0", "not a positive number"),
        ("--fine-tune -1", "0 or more are needed"),
        ("--outliers 70", "from 0 to --lanczos 60"),
        ("--layers 4 --mesh fsdp=1", "layers 0 to 3"),
        ("--model nowhere/none", "nowhere/none"),
        ("--data nowhere.txt", "nowhere.txt"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    check_refused(capsys, script, tmp_path / "out", sentence, *arguments.split())
