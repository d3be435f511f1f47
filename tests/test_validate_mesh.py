"""Training on a mesh follows training on one device; a mesh that sums wrongly is found in the first step."""

import json

import jax
import pytest
from checkpoints import write_checkpoint

from scripts import validate_mesh as script


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, "llama", num_hidden_layers=1)
    return {
        "model": str(folder), "data": "random", "mesh": "fsdp=4,tensor=2", "seq_len": 8, "batch": 8, "train_steps": 2,
        "spectrum_every": 1, "steps": 3, "out": folder / "mesh.json",
    }  # fmt: skip


@pytest.mark.slow
def test_losses_gradients_and_spectra_on_a_mesh_are_those_of_one_device(options, monkeypatch):
    assert script.run(script.Options(**options))
    rows = json.loads(options["out"].read_text())["rows"]
    assert [row["quantity"] for row in rows] == [
        "loss, step 0", "gradient, step 0", "loss, step 1", "gradient, step 1",
        "spectrum 0: largest", "spectrum 0: density", "spectrum 1: largest", "spectrum 1: density",
    ]  # fmt: skip
    assert max(row["apart"] for row in rows) < 1e-4

    # A gradient that a mesh forgets to reduce is scaled; the training goes another way from the second step on.
    step = script.training_step

    def wrong(operator, state, *, optimizer):
        value, gradient, params, state = step(operator, state, optimizer=optimizer)
        if jax.tree.leaves(params)[0].sharding.num_devices > 1:
            params = jax.tree.map(lambda x: 1.001 * x, params)
        return value, gradient, params, state

    monkeypatch.setattr(script, "training_step", wrong)
    assert not script.run(script.Options(**options))
    rows = json.loads(options["out"].read_text())["rows"]
    assert next(row["quantity"] for row in rows if not row["agrees"]) == "loss, step 1"


def test_a_mesh_of_one_device_is_refused(options, monkeypatch):
    monkeypatch.setattr(script.jaxhess, "make_mesh", lambda axes: jax.sharding.Mesh(jax.devices()[:1], ("fsdp",)))
    with pytest.raises(ValueError, match="one device"):
        script.run(script.Options(**options))
