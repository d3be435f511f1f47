"""Training on a mesh follows training on one device; a mesh that sums wrongly is found in the first step."""

import json

import jax
import pytest
from checkpoints import write_checkpoint

from jaxhess.errors import InputError
from scripts.validation import mesh as script


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, "llama", num_hidden_layers=1)
    return {
        "model": str(folder), "data": "random", "mesh": "fsdp=4,tensor=2", "seq_len": 8, "batch": 8, "train_steps": 2,
        "spectrum_every": 1, "steps": 3, "out": folder / "mesh.json", "overwrite": True,
    }  # fmt: skip


@pytest.mark.study
def test_losses_gradients_and_spectra_on_a_mesh_are_those_of_one_device(options, monkeypatch):
    assert script.run(script.Options(**options))
    rows = json.loads(options["out"].read_text())["rows"]
    assert [row["quantity"] for row in rows] == [
        "loss, step 0", "gradient, step 0", "loss, step 1", "gradient, step 1",
        "spectrum 0: largest", "spectrum 0: density", "spectrum 1: largest", "spectrum 1: density",
    ]  # fmt: skip
    assert max(row["apart"] for row in rows) < 1e-4

    # On the mesh, which comes last, every gradient is a thousandth too long.
    train, cast = script.train, script.cast

    def with_wrong_gradients(options, model, *rest):
        if model.mesh is not None:
            jax.clear_caches()
            monkeypatch.setattr(script, "cast", lambda *x: jax.tree.map(lambda g: 1.001 * g, cast(*x)))
        return train(options, model, *rest)

    monkeypatch.setattr(script, "train", with_wrong_gradients)
    assert not script.run(script.Options(**options))
    rows = json.loads(options["out"].read_text())["rows"]
    assert next(row["quantity"] for row in rows if not row["agrees"]) == "gradient, step 0"


def test_a_mesh_of_one_device_is_refused(options, monkeypatch):
    monkeypatch.setattr(script.jaxhess, "make_mesh", lambda axes: jax.sharding.Mesh(jax.devices()[:1], ("fsdp",)))
    with pytest.raises(ValueError, match="one device"):
        script.run(script.Options(**options))


def test_what_cannot_be_compared_or_saved_is_refused_at_the_door(options, tmp_path):
    """Below four sequences rounding would be measured by the same training, as zero: nothing would agree."""
    with pytest.raises(ValueError, match="at least 4"):
        script.run(script.Options(**{**options, "batch": 3}))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="was not written by this command"):
        script.run(script.Options(**{**options, "out": tmp_path / "file"}))
    with pytest.raises(InputError):
        script.run(script.Options(**{**options, "out": tmp_path / "file" / "mesh.json"}))
