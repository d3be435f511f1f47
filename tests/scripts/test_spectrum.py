"""The main command: a run folder that reads back, and one sentence for every bad input."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import run_command

import convert
from jaxhess import Checkpoint, Spectrum, make_mesh
from jaxhess.command import one_sentence
from jaxhess.data import TokenBatch
from jaxhess.operators.facts import describe
from jaxhess.slq.record import operator_record
from scripts import spectrum as script

remat_choice = sys.modules[script.choose_remat.__module__]

TINY = Path(script.Options().model)
QUICK = [
    "--seq-len",
    "16",
    "--sequences",
    "4",
    "--microbatch",
    "4",
    "--steps",
    "3",
    "--probes",
    "2",
    "--mesh",
    "fsdp=8",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with eigenpairs, which take no second Lanczos run."""
    out, started = tmp_path_factory.mktemp("run") / "out", []
    several = ["--sequences", "16", "--microbatch", "8", "--sample", "random"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxhess.krylov.eigenpairs.start_lanczos", lambda *args: started.append(args))
        run_command(script, *QUICK, *several, "--eigenpairs", "1", "--eigenpair-steps", "3", "--out", str(out))
    assert not started
    return out


def test_run_folder_is_complete_and_reads_back(finished):
    assert {p.name for p in finished.iterdir()} == {
        "spectrum.npz",
        "spectrum.json",
        "density.png",
        "distribution.png",
        "stem.png",
        "report.html",
        "manifest.json",
        "eigenvectors",
    }
    arrays = np.load(finished / "spectrum.npz")
    for name in ("ritz_values", "weights", "residual_bounds", "alphas", "betas"):
        assert arrays[name].shape == (2, 3)
        assert np.isfinite(arrays[name]).all()
    np.testing.assert_allclose(arrays["weights"].sum(axis=1), 1, rtol=1e-12)
    result = Spectrum.load(finished)
    assert result.dim == 1305344
    np.testing.assert_array_equal(result.alphas, arrays["alphas"])


def test_record_tells_how_the_numbers_were_made(finished):
    record = json.loads((finished / "spectrum.json").read_text())
    assert record["info"] == {}
    run, job = record["run"], record["run"]["job"]
    assert job["options"]["steps"] == run["lanczos"]["steps"] == 3
    assert job["mesh"]["axes"] == {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    assert len(job["data"]["fingerprint"]) == 64
    assert 2 < run["inputs"]["loss"] < 7.6  # nats per token; log(2000) = 7.6 is no knowledge at all
    assert run["inputs"]["count"] == 16 * 16
    assert run["inputs"]["parameters"]
    assert {"jax", "jaxlib", "python"} <= set(job["versions"])
    assert run["program"]["bytes_per_device"]["arguments"] > 0
    assert run["operator"]["kind"] == "Hessian"
    assert run["operator"]["dtypes"] == ["float32"]
    assert run["operator"]["matmul_precision"] == "float32"
    assert run["noise"]["reference"] == "Hessian in float64"
    assert 0 < run["noise"]["relative_error"]["random"] < 1e-5
    assert "Noise of the products" in (finished / "report.html").read_text()


def test_a_finished_run_is_not_overwritten_unless_told_to(finished, capsys):
    before = (finished / "spectrum.npz").read_bytes()
    with pytest.raises(SystemExit) as caught:
        run_command(script, *QUICK, "--out", str(finished), "--seed", "1")
    assert caught.value.code == 2
    assert "overwrite" in capsys.readouterr().err
    assert (finished / "spectrum.npz").read_bytes() == before


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_an_unusable_run_folder_is_refused_before_the_work(tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        run_command(script, *QUICK, "--out", str(tmp_path / "file" / below), "--model", "not/read")
    assert caught.value.code == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_exhausted_memory_keeps_its_error_and_says_what_helps():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught, one_sentence():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    assert "--microbatch" in caught.value.__notes__[0]


def test_an_error_that_nobody_expects_keeps_its_class():
    with pytest.raises(ValueError, match="a defect") as caught, one_sentence():
        raise ValueError("a defect")
    assert caught.type is ValueError


def broken_model(folder: Path, change) -> str:
    shutil.copytree(TINY, folder / "model")
    change(folder / "model")
    return str(folder / "model")


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def rename_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


def poison(model: Path) -> None:
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-4:] = np.float32(np.nan).tobytes()
    (model / "model.safetensors").write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, ["model.safetensors"]),
        (rename_architecture, ["mamba", "the nearest that is supported is llama"]),
        (poison, ["NaN"]),
        (lambda model: (model / "model.safetensors").unlink(), ["safetensors"]),
        (lambda model: (model / "config.json").unlink(), ["config.json"]),
        (lambda model: (model / "tokenizer.json").unlink(), ["tokenizer"]),
    ],
    ids=["truncated", "architecture", "nan", "no weights", "no config", "no tokenizer"],
)
def test_a_broken_checkpoint_is_refused_in_one_sentence(tmp_path, capsys, change, words):
    refused(capsys, tmp_path, words, "--model", broken_model(tmp_path, change))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mesh", "fsdp=3"], ["fsdp=3", "8"]),
        (["--steps", "0"], ["steps", "at least 1"]),
        (["--probes", "0"], ["probes", "at least 1"]),
        (["--microbatch", "0"], ["microbatch", "at least 1"]),
        (["--sequences", "100000"], ["100000", "sample.txt"]),
        (["--seq-len", "0"], ["seq_len"]),
        (["--model", "no/such/folder"], ["no/such/folder"]),
        (["--data", "nowhere.txt"], ["nowhere.txt"]),
        (["--steps", "10000000"], ["re-orthogonalisation", "GB"]),
        (["--data", "hub:"], ["hub:"]),
        (["--restrict", "atention"], ["atention", "layers/attention/query/kernel"]),
        (["--layers", "4"], ["layers 0 to 3"]),
        (["--layers", "one"], ["list of layers"]),
        (["--layers", "-3-2"], ["from a lower to a higher layer"]),
        (["--hvp", "linearized", "--residual-gb", "nan"], ["--residual-gb nan", "positive"]),
        (["--layers", "2-9"], ["within 0 to 3"]),
        (["--restrict", "embed", "--layers", "0"], ["matches no parameter inside a layer"]),
        (
            ["--operator", "gauss-newton", "--hvp", "linearized"],
            ["--hvp linearized works only with --operator hessian"],
        ),
        (["--hvp", "finite-difference", "--step", "nan"], ["--step nan", "positive"]),
        (["--operator", "monte-carlo-fisher", "--fisher-samples", "0"], ["fisher-samples", "at least 1"]),
        (["--hvp", "linearized", "--residual-gb", "0.001"], ["Linearising", "0.001 GB are allowed"]),
        (["--logit-chunk", "0"], ["logit_chunk", "at least 1"]),
        (["--matmul-precision", "tf32", "--dtype", "bfloat16"], ["matmul_precision tf32", "computes in bfloat16"]),
        (["--reorthogonalize", "1"], ["re-orthogonalisation 1", "'full'"]),
        (["--data", "random", "--seed", "-1"], ["seed", "2^32"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_bad_option_is_refused_in_one_sentence(tmp_path, capsys, arguments, words):
    refused(capsys, tmp_path, words, *arguments)


@pytest.mark.parametrize(("text", "words"), [("", ["empty"]), ("import os\n", ["17", "text.txt"])])
def test_text_shorter_than_one_block_is_refused_in_one_sentence(tmp_path, capsys, text, words):
    (tmp_path / "text.txt").write_text(text)
    refused(capsys, tmp_path, words, "--data", str(tmp_path / "text.txt"))


@pytest.mark.study
def test_a_block_by_linearised_products(tmp_path):
    block = ["--restrict", "attention", "--layers", "0,-1", "--no-audit"]
    run_command(script, *QUICK, *block, "--hvp", "linearized", "--out", str(tmp_path / "linearized"))
    linearized = Spectrum.load(tmp_path / "linearized")
    assert linearized.dim == 2 * (4 * 128 * 128 + 4 * 128)  # of two layers the attention's matrices and biases
    assert linearized.matrix_name == "loss Hessian, block attention in layers 0,3"
    assert linearized.run.operator.details["residual_bytes_per_device"] > 0
    assert linearized.run.noise is None


def test_eigenpairs_come_from_the_basis_of_the_spectrum(finished):
    """Into one folder, with one report."""
    found = Spectrum.load(finished)
    assert found.run.eigenpairs.values[0] in found.ritz_values[0]
    assert found.run.sampling.population > 1000
    assert found.run.sampling.sequences == 16
    assert found.run.eigenpairs.data[0].error > 0
    assert found.trace().data.error > 0
    report = (finished / "report.html").read_text()
    for words in ("Beyond these sequences", "more sequences", "eigenvalue"):
        assert words in report
    assert {path.name for path in finished.parent.iterdir()} == {"out"}
    assert not (finished / script.UNFINISHED).exists()


@pytest.mark.slow
def test_a_run_that_stopped_among_its_eigenpairs_is_ended_by_resume(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = [*QUICK, "--no-audit", "--out", str(out), "--eigenpairs", "1", "--eigenpair-steps", "3"]
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise OSError("the machine went away")

        patch.setattr(script.jaxhess, "leading_eigenpairs", fail)
        with pytest.raises(OSError, match="went away"):
            run_command(script, *options)
    before = Spectrum.load(out)  # the spectrum was written before
    assert (out / script.UNFINISHED).exists()
    with pytest.raises(SystemExit):
        run_command(script, *options)
    assert "holds an unfinished run: resume it (--resume" in capsys.readouterr().err
    for change, words in (
        ("--seed 1", "options.seed is 1 here and 0"),
        ("--matmul-precision tf32", "is tf32 here and"),
    ):
        with pytest.raises(SystemExit):
            run_command(script, *options, "--resume", *change.split())
        assert words in capsys.readouterr().err
    run_command(script, *options, "--resume")
    after = Spectrum.load(out)
    np.testing.assert_array_equal(after.alphas, before.alphas)
    assert not (out / script.UNFINISHED).exists()
    assert len(after.run.eigenpairs.values) == 1
    assert (out / script.EIGENVECTORS / "eigenpairs.npz").exists()


@pytest.mark.slow
def test_a_resumed_run_computes_again_what_it_did_before(tmp_path, monkeypatch, capsys):
    """Bit for bit: also where by now something else would be chosen."""
    options = [*QUICK, "--no-audit", "--probes", "1", "--checkpoint-every", "1"]
    run_command(script, *options, "--out", str(tmp_path / "whole"))
    assert "compute attention's scores again (--remat attention)" in " ".join(capsys.readouterr().out.split())
    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:

        def fail(_, progress):
            if progress.step == 2:
                raise OSError("the machine went away")

        patch.setattr(script.ProgressBar, "show", fail)
        with pytest.raises(OSError, match="went away"):
            run_command(script, *options, "--out", out)
    monkeypatch.setattr(remat_choice, "available_bytes", lambda _: 1e6)
    run_command(script, *options, "--out", out, "--resume")
    assert "(--remat attention): as in the run that is resumed." in " ".join(capsys.readouterr().out.split())
    whole, resumed = Spectrum.load(tmp_path / "whole"), Spectrum.load(out)
    np.testing.assert_array_equal(resumed.alphas, whole.alphas)
    assert resumed.run.job.options["remat"] == "auto"
    assert resumed.run.job.model.config["remat"] == whole.run.job.model.config["remat"] == "attention"


@pytest.mark.parametrize(
    ("options", "free", "chosen", "words"),
    [
        ({}, 1e9, "attention", "1 GB free on each device"),
        ({}, 1e6, True, "0.001 GB free"),
        ({}, np.inf, "attention", "GB free"),  # not known: the host's memory
        ({"remat": "feed-forward"}, 1e6, "feed-forward", "as asked for"),
        ({"hvp": "linearized"}, 1e9, False, "linearised products keep one pass"),
        ({"operator": "gauss-newton", "batch_size": 4}, 1e9, "attention", "by the plan"),
        ({"hvp": "finite-difference", "dtype": "bfloat16"}, 1e9, True, "no plan"),
    ],
)
def test_what_is_computed_again_is_what_does_not_fit(options, free, chosen, words, monkeypatch, capsys):
    monkeypatch.setattr(remat_choice, "available_bytes", lambda _: free)
    options = script.Options(**options)
    config = script.read_config(options)
    checkpoint = Checkpoint("not/there")
    found = remat_choice.choose_remat(options, config, make_mesh("fsdp=8"), checkpoint, script.terminal())
    assert found.remat == chosen
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--resume", "--resume needs --out"),
        ("--resume --checkpoint-every 0 --out x", "contradict each other"),
        ("--checkpoint-every -1", "--checkpoint-every -1"),
        ("--eigenpairs 101", "--eigenpairs 101 must be from 0"),
        ("--eigenpairs 1 --eigenpair-tolerance 2", "--eigenpair-tolerance 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        run_command(script, *QUICK, *arguments.split())
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "kind", "fields"),
    [
        ({"operator": "gauss-newton"}, "GaussNewton", {}),
        (
            {"operator": "empirical-fisher", "restrict": ("norm",)},
            "EmpiricalFisher",
            {"restriction": {"patterns": ["norm"], "layers": None}},
        ),
        ({"operator": "monte-carlo-fisher", "fisher_samples": 2}, "MonteCarloFisher", {}),
        ({"hvp": "finite-difference", "step": 1e-2, "step_per": "unit"}, "FiniteDifferenceHessian", {}),
        ({"compute_dtype": "bfloat16"}, "Hessian", {"dtypes": ["bfloat16", "float32"]}),
        ({"matmul_precision": "tf32"}, "Hessian", {"matmul_precision": "tf32", "matmul_emulated": True}),
    ],
)
def test_options_choose_the_operator(options, kind, fields, capsys):
    options = script.Options(**options)
    model = convert.load(TINY).configured(dtype=options.compute_dtype or "float32")
    batch = TokenBatch(jnp.ones((2, 5), jnp.int32), jnp.ones((2, 4)))
    operator = script.build(options, model, [batch], script.terminal())
    described = describe(operator)
    assert {"kind": kind, **fields}.items() <= described.items()
    assert ("no tf32 products: they are emulated" in " ".join(capsys.readouterr().out.split())) == (
        operator.matmul_precision == "tf32"
    )
    assert operator_record(described).matmul_precision == described.get("matmul_precision")
    if kind == "FiniteDifferenceHessian":
        assert (operator.step, operator.per) == (1e-2, "unit")
    if kind == "MonteCarloFisher":
        assert operator.drawn[0].stacked.shape == (1, 2, 4, 2)


def refused(capsys, folder: Path, words: list[str], *arguments: str) -> None:
    out = folder / "out"
    with pytest.raises(SystemExit) as caught:
        run_command(script, *QUICK, *arguments, "--no-audit", "--out", str(out))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert not out.exists()
