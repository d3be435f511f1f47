"""Training lowers the loss and leaves a checkpoint; the committed model is whole, small and as good as recorded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

from convert import load, load_preconditioner, load_tokenizer
from jaxhess.data import read_blocks
from jaxhess.errors import InputError
from jaxhess.files.manifest import foreign
from scripts.training import tiny as script
from scripts.training.corpus import read_corpus

TINY = Path(__file__).parents[3] / "scripts" / "tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[script.Options, dict]:
    """A 20-step run on eight small files."""
    root = tmp_path_factory.mktemp("train")
    (root / "text").mkdir()
    for i in range(8):
        lines = [f"def function_{i}_{j}(x):\n    return x + {j}\n\n\n" for j in range(60)]
        (root / "text" / f"file_{i}.py").write_text("".join(lines))
    options = script.Options(
        out=root / "model",
        work=root / "work",
        text=root / "text",
        vocab_size=300,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        seq_len=32,
        batch=8,
        steps=20,
        evaluate_every=10,
        keep_every=8,
        sample_bytes=4000,
    )
    script.run(options)
    return options, json.loads((options.out / "loss_curve.json").read_text())


def test_twenty_steps_reduce_the_loss_on_held_out_files(trained) -> None:
    _, curve = trained
    points = curve["points"]
    assert [point["step"] for point in points] == [1, 10, 20]
    assert abs(points[0]["held_out"] - np.log(300)) < 0.2  # before training: uniform over the vocabulary
    assert points[-1]["held_out"] < points[0]["held_out"] - 1
    assert curve["held_out_loss"] < points[0]["held_out"] - 1


def test_the_exported_checkpoint_has_the_loss_of_the_trained_parameters(trained) -> None:
    options, _ = trained
    assert recorded_loss(options.out) == pytest.approx(loss_of(options.out), abs=1e-5)
    assert (options.out / "loss_curve.png").stat().st_size > 1000


def test_checkpoints_are_kept_with_the_learning_rate_of_their_step(trained) -> None:
    """A linear warm-up over one step, a cosine from 3e-3 to 3e-5 over the other 19; that of the next step is kept."""
    options, _ = trained
    folders = sorted((options.work / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000008", "step-000016", "step-000020"]
    for folder, step in zip(folders, (8, 16, 20), strict=True):
        state = json.loads((folder / "trainer_state.json").read_text())
        (entry,) = state["log_history"]
        assert state["global_step"] == entry["step"] == step
        cosine = (1 + np.cos(np.pi * (step - 1) / 19)) / 2
        assert entry["learning_rate"] == pytest.approx(3e-3 * (0.01 + 0.99 * cosine), rel=1e-5)
        assert foreign(folder) is None
    last, exported = (load(folder).params for folder in (folders[-1], options.out))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(exported), strict=True))
    assert load_tokenizer(folders[0])("def")["input_ids"] == load_tokenizer(options.out)("def")["input_ids"]


def test_what_adam_divides_by_is_kept_with_every_checkpoint(trained) -> None:
    """Adam's steps are nearly as long as the learning rate, so that |update| is |m| / D: D is positive, of the size of
    the gradient's, which clipping to norm 1 bounds: D^2 is a mean of squares of one step, or less."""
    options, _ = trained
    for folder in sorted((options.work / "checkpoints").iterdir()):
        model = load(folder)
        diagonal = load_preconditioner(folder / "preconditioner.npz", model).diagonal
        assert jax.tree.map(np.shape, diagonal) == jax.tree.map(np.shape, model.params)
        flat = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(diagonal)])
        assert flat.min() > 0
        assert 0 < np.square(flat).sum() <= 1 + 1e-3


def test_checkpoints_of_another_training_are_not_mixed_with_new_ones(trained, tmp_path) -> None:
    options, _ = trained
    other = dataclasses.replace(options, out=tmp_path / "model", keep_every=10)
    with pytest.raises(InputError, match="holds step-000008, which this training would not replace"):
        script.run(other)
    with pytest.raises(InputError, match="--keep-every -1 must be a number of steps"):
        script.run(dataclasses.replace(other, keep_every=-1))


def test_held_out_files_are_not_trained_on(trained) -> None:
    options, _ = trained
    corpus = read_corpus(options.text)
    assert list(corpus.held_out) == ["file_1.py"]
    assert sorted([*corpus.train, *corpus.held_out]) == [f"file_{i}.py" for i in range(8)]


def test_a_model_is_not_overwritten_without_being_told_to(trained) -> None:
    options, _ = trained
    before = (options.out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match="is not empty; --overwrite"):
        script.run(options)
    assert (options.out / "model.safetensors").stat().st_mtime_ns == before


def test_a_new_training_replaces_the_old_model_and_nothing_else(trained, tmp_path) -> None:
    options, _ = trained
    again = dataclasses.replace(options, trained=options.work, overwrite=True, out=tmp_path / "model")
    script.run(again)
    assert foreign(again.out) is None
    script.run(again)
    (again.out / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"holds thesis\.tex"):
        script.run(again)
    assert (again.out / "thesis.tex").read_text() == "mine"


def test_the_committed_model_can_be_made_again() -> None:
    """Its manifest lists every file as it is."""
    assert foreign(TINY) is None


def test_a_work_folder_without_parameters_is_refused(trained, tmp_path) -> None:
    options, _ = trained
    lacking = script.Options(out=tmp_path / "model", text=options.text, trained=tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, params\.npz"):
        script.run(lacking)
    assert not (tmp_path / "model").exists()


def test_the_committed_model_is_small_and_names_no_place_on_anyones_machine() -> None:
    files = [file for file in TINY.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8_000_000
    for name in ("sample.txt", "sample.json", "LICENSE-text", "tokenizer.json", "tokenizer_config.json", "config.json"):
        text = (TINY / name).read_text(encoding="utf-8")
        assert "/root" not in text
        assert "/home/" not in text


def test_the_committed_model_has_the_recorded_loss_on_its_excerpt() -> None:
    """Within 1e-3 nats: other CPUs sum in another order, and the trained model is far from chaotic."""
    assert loss_of(TINY) == pytest.approx(recorded_loss(TINY), abs=1e-3)


def test_the_committed_model_is_trained() -> None:
    curve = json.loads((TINY / "loss_curve.json").read_text())
    assert curve["held_out_loss"] < 0.7 * curve["held_out_unigram_entropy"]
    assert curve["points"][-1]["held_out"] < curve["points"][0]["held_out"] - 3


def test_transformers_loads_the_committed_model_with_the_same_loss_and_continues_text() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    blocks = sample_blocks(TINY, sequences=64)
    with torch.no_grad():
        tokens = torch.from_numpy(blocks.tokens).long()
        logits = model(tokens[:, :-1]).logits
        theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
        prompt = tokenizer("def __init__(self, name):\n        self.name =", return_tensors="pt")
        generated = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert theirs == pytest.approx(loss_of(TINY, sequences=64), abs=1e-4)
    assert "self.name = name\n" in tokenizer.decode(generated[0])


def test_the_command_documents_its_options(capsys) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(script.Options, args=["--help"])
    assert "Peak learning rate" in capsys.readouterr().out


def sample_blocks(folder: Path, sequences: int | None = None):
    """Blocks of the excerpt, tokenised as a user would."""
    tokenizer = load_tokenizer(folder)
    recorded = json.loads((folder / "sample.json").read_text())
    return read_blocks(
        folder / "sample.txt",
        seq_len=recorded["seq_len"],
        vocab_size=len(tokenizer),
        sequences=sequences,
        encode=lambda text: tokenizer(text)["input_ids"],
    )


def loss_of(folder: Path, sequences: int | None = None) -> float:
    """Mean loss of the checkpoint in `folder` on its excerpt."""
    blocks = sample_blocks(folder, sequences)
    if sequences is None:
        assert blocks.fingerprint() == json.loads((folder / "sample.json").read_text())["fingerprint"]
    model = load(folder)
    total, count = jax.jit(lambda params, batches: jax.lax.map(lambda b: model.loss()(params, b), batches))(
        model.params, blocks.microbatches(16)
    )
    return float(total.sum() / count.sum())


def recorded_loss(folder: Path) -> float:
    return json.loads((folder / "sample.json").read_text())["loss"]
