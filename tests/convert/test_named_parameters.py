"""Parameters and directions under the names of `transformers`: loaded into PyTorch they mean the same."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import DEFAULTS, VOCAB, torch, write_checkpoint
from safetensors.torch import load_file
from small_models import batch_of, run_command, tokens

import convert
import jaxhess
from convert.named_parameters import layers_module, tensors_by_name
from jaxhess.errors import InputError
from jaxhess.operators.restriction import restriction
from jaxhess.slq.job import CommandRecord, Model
from jaxhess.slq.record import EigenpairRecord, OperatorRecord, RunRecord
from scripts import export as script
from scripts.validation import torch_reference
from scripts.validation.float64 import in_float64


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", DEFAULTS)
def test_names_shapes_and_values_are_those_of_named_parameters(family, tied, tmp_path):
    reference = write_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    model = convert.load(tmp_path)
    found = tensors_by_name(model.params, model.config)
    saved = {name: p for name, p in reference.named_buffers() if name in reference.state_dict()}
    expected = {name: p.detach().numpy() for name, p in [*reference.named_parameters(), *saved.items()]}
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    order = [int(name.split(".layers.")[1].split(".")[0]) for name in found if ".layers." in name]
    assert order == sorted(order)
    assert len(reference.get_submodule(layers_module(model.config))) == 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The torch model, the batch, and the exported eigenvectors, by way of a run folder and the command."""
    folder = tmp_path_factory.mktemp("model")
    reference = write_checkpoint(folder, "gpt_neox")
    model = convert.load(folder)
    ids = tokens(4, 12, VOCAB)
    operator = jaxhess.Hessian(model.loss(), model.params, [batch_of(ids)])
    pairs = jaxhess.leading_eigenpairs(operator, 2, steps=40)
    run = folder / "run"
    result = jaxhess.Spectrum(
        np.ones((1, 2)),
        np.ones((1, 2)),
        np.array([2]),
        operator.dim,
        run=RunRecord(
            eigenpairs=EigenpairRecord(tuple(pairs.values.tolist()), tuple(pairs.residuals.tolist())),
            job=CommandRecord(model=Model("gpt_neox", model.num_params, model.config.to_dict())),
        ),
    )
    result.save(run)
    pairs.save(run / "eigenvectors")
    run_command(script, str(run))
    return reference, ids, pairs, run, model


@pytest.mark.slow
def test_the_loss_along_an_exported_eigenvector_bends_by_its_eigenvalue(exported):
    """(L(theta + e v) + L(theta - e v) - 2 L(theta)) / e^2 is v'Hv up to e^2 and rounding: in float64, 1e-5."""
    reference, ids, pairs, run, _ = exported
    vectors = load_file(run / "eigenvectors.safetensors")
    batches = [torch_reference.Batch(torch.from_numpy(ids).long(), torch.ones(4, 12))]
    e = 1e-3
    for k, value in enumerate(pairs.values):
        assert np.isclose(float(sum((vectors[n][k] ** 2).sum() for n, _ in reference.named_parameters())), 1, atol=1e-5)
        losses = []
        for step in (e, 0, -e):
            with in_float64(reference) as moved, torch.no_grad():
                for name, p in moved.named_parameters():
                    p += step * vectors[name][k].double()
                losses.append(torch_reference.loss_sum(moved, batches[0]).item() / 48)
        bend = (losses[0] + losses[2] - 2 * losses[1]) / e**2
        assert bend == pytest.approx(value, rel=1e-3)
        assert float(vectors["eigenvalues"][k]) == value


def test_export_writes_csv_and_json_that_read_back(exported):
    run = exported[3]
    assert jaxhess.Spectrum.load(run / "quadrature.json") == jaxhess.Spectrum.load(run)
    found = jaxhess.Spectrum.load(run / "spectrum.csv", dim=10)
    np.testing.assert_allclose(found.ritz_values, jaxhess.Spectrum.load(run).ritz_values)


def test_eigenpairs_read_back(exported):
    _, _, pairs, run, _ = exported
    found = jaxhess.Eigenpairs.load(run / "eigenvectors")
    np.testing.assert_array_equal(found.values, pairs.values)
    jax.tree.map(np.testing.assert_array_equal, found.vectors, jax.device_get(pairs.vectors))
    with pytest.raises(InputError, match="no eigenpairs"):
        jaxhess.Eigenpairs.load(run)


@pytest.mark.parametrize("in_words", [False, True])
@pytest.mark.parametrize(("patterns", "layers"), [(("mlp",), [1]), (("head", "final_norm"), None), ((), [0])])
def test_directions_of_a_block_are_zero_elsewhere(exported, tmp_path: Path, patterns, layers, in_words):
    """Also of a block that earlier versions recorded in words."""
    pairs, run, model = exported[2], exported[3], exported[4]
    block = restriction(model.params, patterns, layers)
    some = [block.take(jax.tree.map(lambda x, k=k: x[k], pairs.vectors)) for k in range(2)]
    cut = dataclasses.replace(pairs, vectors=jax.tree.map(lambda *x: np.stack(x), *some))
    source = jaxhess.Spectrum.load(run)
    recorded = str(block) if in_words else block.block
    operator = OperatorRecord("Hessian", restriction=recorded)
    dataclasses.replace(source, run=dataclasses.replace(source.run, operator=operator)).save(tmp_path)
    cut.save(tmp_path / "eigenvectors")
    run_command(script, str(tmp_path))
    found, whole = (load_file(folder / "eigenvectors.safetensors") for folder in (tmp_path, run))
    assert set(found) == set(whole)
    ones, zeros = (jax.tree.map(f, model.params) for f in (jnp.ones_like, jnp.zeros_like))
    free = block.insert(block.take(ones), zeros)
    for name, mask in tensors_by_name(free, model.config).items():
        np.testing.assert_array_equal(found[name], whole[name].numpy() * mask, err_msg=name)


def test_directions_of_an_unknown_block_are_refused_before_anything_is_written(exported, tmp_path: Path, capsys):
    pairs, run = exported[2], exported[3]
    jaxhess.Spectrum.load(run).save(tmp_path / "run")
    some = {**pairs.vectors, "layers": jax.tree.map(lambda x: x[:, :1], pairs.vectors["layers"])}
    dataclasses.replace(pairs, vectors=some).save(tmp_path / "run" / "eigenvectors")
    with pytest.raises(SystemExit):
        run_command(script, str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    assert "not like the parameters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_is_exported_elsewhere_and_what_is_there_stays(exported, tmp_path: Path, capsys):
    """A file's own folder is not a place to write to; nor does a file have eigenvectors beside it."""
    (tmp_path / "spectrum.csv").write_text((exported[3] / "spectrum.csv").read_text())
    (tmp_path / "quadrature.json").write_text((exported[3] / "quadrature.json").read_text())
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    source = str(tmp_path / "quadrature.json")
    for arguments, message in [
        ((source,), "--out"),
        ((source, "--out", str(tmp_path)), "is what is to be exported"),
        ((source, "--out", str(tmp_path), "--overwrite"), "is what is to be exported"),
        ((str(exported[3]), "--out", str(tmp_path)), "was not written by an earlier run"),
        ((str(exported[3]), "--out", str(tmp_path), "--overwrite"), "was not written by an earlier run"),
    ]:
        with pytest.raises(SystemExit):
            run_command(script, *arguments)
        assert message in capsys.readouterr().err
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before
    run_command(script, source, "--out", str(tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*before, "manifest.json"}
    run_command(script, source, "--out", str(tmp_path / "out"), "--overwrite")
