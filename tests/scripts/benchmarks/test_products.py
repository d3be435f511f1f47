"""What the benchmark prints is what it measured, and products take the operations that are promised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxhess import make_mesh
from jaxhess.errors import InputError
from jaxhess.plan.hardware import peak_matmul_flops
from scripts.benchmarks import products as script

ROOT = Path(__file__).parents[3]
TINY = {
    "vocab_size": 64,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "mlp_dim": 64,
    "sequences": 2,
    "seq_len": 8,
    "steps": 3,
    "rounds": 2,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    with pytest.MonkeyPatch.context() as patch:  # one device: an eighth of the compilation
        patch.setattr(script.jaxhess, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))
        script.run(script.Options(**TINY, out=out))
    written = json.loads(out.read_text())
    assert written["parameters"] == 2 * 64 * 32 + 5 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert written["vector_work_share"] > 0
    return {row["name"]: row for row in written["rows"]}


@pytest.mark.study
def test_every_row_is_timed_in_every_round_and_counted(rows):
    assert len(rows) == 9
    for row in rows.values():
        assert len(row["times"]) == 2
        assert row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
        assert row["bytes_accessed"] > 0
        assert row["temporary_bytes"] >= 0
        assert "share_of_peak" not in row  # nobody says what a CPU's peak is


@pytest.mark.study
def test_errors_are_those_of_float32(rows):
    for name, row in rows.items():
        if "vectors only" in name:
            assert "error" not in row
        else:
            assert 0 < row["error"] < (0.1 if "finite" in name else 1e-5), name


@pytest.mark.study
def test_products_take_the_operations_that_their_mathematics_needs(rows):
    # In forward passes, the gradient being 3: 8, 2 + 6k for k at once, 6 from a stored primal pass, 2 gradients, and
    # for Gauss-Newton the states, their tangents and the transposed pass. XLA drops what does not depend on parameters.
    exact = rows["exact product"]["flops_per_gradient"]
    assert 8 / 3 <= exact <= 2.70
    assert rows["linearised product"]["flops_per_gradient"] == pytest.approx(2, rel=0.01)
    assert rows["finite-difference product"]["flops_per_gradient"] == pytest.approx(2, rel=0.01)
    assert rows["Gauss-Newton product"]["flops_per_gradient"] == pytest.approx(5 / 3, rel=0.01)
    assert rows["four exact products at once"]["flops_per_gradient"] <= 0.85 * 4 * exact
    assert rows["Lanczos, 3 steps, exact"]["flops_per_gradient"] == pytest.approx(3 * 4 * exact, rel=0.01)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"microbatch": 3}, ValueError, "--microbatch 3 must divide --sequences 2"),
        ({"rounds": 0}, ValueError, "--rounds is 0"),
        ({"embed_dim": 33}, ValueError, "not a multiple of --num-heads"),
        ({"peers": True}, ValueError, "--peers compares on one device"),
    ],
)
def test_bad_options_are_refused_before_any_work(change, error, sentence):
    with pytest.raises(error, match=sentence):
        script.run(script.Options(**(TINY | change)))


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="was not written by this command"):
            script.run(script.Options(**TINY, out=out, overwrite=overwrite))
    assert out.read_text() == "precious"


def test_peaks_are_known_by_device_and_dtype_or_not_at_all():
    assert peak_matmul_flops("NVIDIA A100-SXM4-40GB", "float32") == 19.5e12
    assert peak_matmul_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_matmul_flops("NVIDIA H200", "float64") is None
    assert peak_matmul_flops("cpu", "float32") is None


@pytest.mark.study
@pytest.mark.parametrize("timed", [False, True])
def test_operations_and_times_of_the_reference_model(tmp_path, timed):
    """Operations as promised; times only where nothing else runs, in a process of its own fully optimised."""
    out = tmp_path / "out.json"
    rounds, sequences = ("3", "4") if timed else ("1", "1")
    command = [sys.executable, "-m", script.__name__, "--rounds", rounds, "--steps", "4", "--out", str(out)]
    command += ["--sequences", sequences, "--lanczos-sequences", sequences]
    command += [] if timed else ["--no-reference"]
    environment = {**os.environ, **({"XLA_FLAGS": ""} if timed else {})}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    facts = json.loads(out.read_text())
    rows = {row["name"]: row for row in facts["rows"]}
    exact, four = rows["exact product"], rows["four exact products at once"]
    assert exact["flops_per_gradient"] <= 2.70
    assert rows["linearised product"]["flops_per_gradient"] <= 2.05
    assert rows["finite-difference product"]["flops_per_gradient"] <= 2.02
    assert four["matmul_flops"] <= 0.85 * 4 * exact["matmul_flops"]
    if timed:  # they follow the operations, with a fifth of slack for caches and memory bandwidth
        spent = {name: row["processor_seconds"] for name, row in rows.items()}
        for name in ("exact product", "linearised product", "finite-difference product"):
            assert spent[name] <= 1.2 * rows[name]["flops_per_gradient"] * spent["gradient"], name
        assert spent["Lanczos, 4 steps, linearised"] < spent["Lanczos, 4 steps, exact"]
    # Work on vectors is bandwidth, which others take: bytes say more than time. A step passes over 28 vectors.
    assert rows["Lanczos, 4 steps, vectors only"]["bytes_accessed"] < 4 * 32 * facts["vector_bytes"]
    assert not timed or max(rows[name]["error"] for name in ("exact product", "linearised product")) < 1e-5
