"""Second moments of PyTorch's optimisers: in the places of their weights, and the spectrum that optax's state gives."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import VOCAB, torch, write_checkpoint
from small_models import batch_of, relative, tokens
from transformers.trainer_pt_utils import get_parameter_names

import convert
import jaxhess
from jaxhess.errors import InputError
from jaxhess.operators.restriction import leaf_name

PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Of `Trainer.get_decay_parameter_names` in transformers 5.24, whose import takes seconds."""


def trained(model, order="plain", steps=3, dtype=None, **options):
    """A few steps of AdamW on random tokens, of parameters in this order; the optimiser."""
    model.train().to(dtype or torch.float32)
    named = list(model.named_parameters())
    if order == "names":  # shuffled: only the names tell
        groups = [{"params": named[::-1][::2]}, {"params": named[::-1][1::2]}]
    elif order == "trainer":
        decayed = get_parameter_names(model, [torch.nn.LayerNorm], PATTERNS)
        groups = [
            {"params": [p for n, p in named if (n in decayed) == yes], "weight_decay": yes / 10} for yes in (1, 0)
        ]
    else:
        groups = model.parameters()
    optimizer = torch.optim.AdamW(groups, **{"lr": 1e-3, "betas": (0.8, 0.97), "eps": 1e-6, **options})
    ids = torch.from_numpy(tokens(2 * steps, 8, VOCAB)).long().split(2)
    for batch in ids:
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    return optimizer


def moments_as_parameters(reference, optimizer, folder, key="exp_avg_sq"):
    """The second moments as a tree of ours, by way of a checkpoint whose weights they are."""
    held = copy.deepcopy(reference)
    with torch.no_grad():
        for mine, theirs in zip(held.parameters(), reference.parameters(), strict=True):
            mine.copy_(optimizer.state[theirs][key])
    held.save_pretrained(folder)
    return convert.load(folder).params


def close(found, expected, tolerance=2e-6):
    """Roundings of float32: of the moment as stored, a quotient, a root and a sum."""
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, err_msg=leaf_name(path))


@pytest.mark.parametrize(
    ("family", "order"),
    [
        pytest.param("phi3", "names", marks=pytest.mark.slow),
        pytest.param("gpt2", "trainer", marks=pytest.mark.slow),
        pytest.param("gemma2", "trainer", marks=pytest.mark.study),
        pytest.param("mixtral", "plain", marks=pytest.mark.study),
    ],
)
def test_moments_go_where_their_weights_go(family, order, tmp_path):
    reference = write_checkpoint(tmp_path / "model", family)
    optimizer = trained(reference, order)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model = convert.load(tmp_path / "model")
    found = convert.load_preconditioner(tmp_path, model)
    nu = moments_as_parameters(reference, optimizer, tmp_path / "moments")
    close(found.diagonal, jax.tree.map(lambda v: jnp.sqrt(v / (1 - 0.97**3)) + 1e-6, nu))
    assert (found.learning_rate, found.b1) == (1e-3, 0.8)
    plain = convert.load_preconditioner(tmp_path / "optimizer.pt", model, eps=0.5, bias_correction=False)
    close(plain.diagonal, jax.tree.map(lambda v: jnp.sqrt(v) + 0.5, nu))


@pytest.mark.slow
def test_amsgrad_divides_by_the_largest_moment(tmp_path):
    reference = write_checkpoint(tmp_path / "model", "llama")
    optimizer = trained(reference, amsgrad=True)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    largest = moments_as_parameters(reference, optimizer, tmp_path / "moments", "max_exp_avg_sq")
    found = convert.load_preconditioner(tmp_path, convert.load(tmp_path / "model"))
    close(found.diagonal, jax.tree.map(lambda v: jnp.sqrt(v / (1 - 0.97**3)) + 1e-6, largest))


@pytest.mark.slow
def test_what_is_no_parameter_in_pytorch_is_left_as_it_is(tmp_path):
    """DeepSeek-V3's bias that chooses experts is a buffer there; its curvature is zero."""
    reference = write_checkpoint(tmp_path / "model", "deepseek_v3", num_hidden_layers=2)
    torch.save(trained(reference).state_dict(), tmp_path / "optimizer.pt")
    found = convert.load_preconditioner(tmp_path, convert.load(tmp_path / "model")).diagonal
    named = {leaf_name(path): x for path, x in jax.tree.leaves_with_path(found)}
    (bias,) = (x for name, x in named.items() if name.endswith("selection_bias"))
    assert (bias == 1).all()


@pytest.mark.parametrize(
    ("family", "order"), [("llama", "trainer"), pytest.param("gpt_neox", "plain", marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("float64")
def test_the_spectrum_is_that_of_the_same_state_in_optax(family, order, tmp_path):
    """In float64, after steps of torch's AdamW; Lanczos runs, and the dense matrix by `jax.hessian`."""
    reference = write_checkpoint(tmp_path / "model", family, hidden_size=8, intermediate_size=8, num_attention_heads=2,
                                 num_hidden_layers=1)  # fmt: skip
    optimizer = trained(reference, order, dtype=torch.float64)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    reference.save_pretrained(tmp_path / "model")
    model = convert.load(tmp_path / "model", dtype="float64")
    nu = moments_as_parameters(reference, optimizer, tmp_path / "moments")
    assert {x.dtype.name for x in jax.tree.leaves(nu)} == {"float64"}
    adam = optax.ScaleByAdamState(count=jnp.array(3), mu=jax.tree.map(jnp.zeros_like, nu), nu=nu)
    in_optax = jaxhess.adam_preconditioner((optax.EmptyState(), (adam,)), model.params, b2=0.97, eps=1e-6)
    in_torch = convert.load_preconditioner(tmp_path, model).diagonal
    assert relative(in_torch, in_optax) < 1e-14  # a quotient, a root and a sum in float64
    H = jaxhess.Hessian(model.loss(), model.params, [batch_of(tokens(2, 8, VOCAB))])
    theirs, ours = (jaxhess.spectrum(H.preconditioned(d), steps=6, probes=1) for d in (in_torch, in_optax))
    np.testing.assert_allclose(theirs.alphas, ours.alphas, rtol=1e-10)
    np.testing.assert_allclose(theirs.betas, ours.betas, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_file_of_the_trainer_itself_is_read(family, tmp_path):
    from transformers import Trainer, TrainingArguments

    reference = write_checkpoint(tmp_path / "model", family)
    ids = torch.from_numpy(tokens(8, 8, VOCAB)).long()
    options = {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(
        str(tmp_path / "run"), adam_beta2=0.97, adam_epsilon=1e-6, weight_decay=0.1, **options
    )
    trainer = Trainer(reference, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in ids])
    trainer.train()
    nu = moments_as_parameters(reference, trainer.optimizer.optimizer, tmp_path / "moments")
    found = convert.load_preconditioner(tmp_path / "run" / "checkpoint-2", convert.load(tmp_path / "model"))
    close(found.diagonal, jax.tree.map(lambda v: jnp.sqrt(v / (1 - 0.97**2)) + 1e-6, nu))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model of ours and the state of its optimiser."""
    folder = tmp_path_factory.mktemp("llama")
    reference = write_checkpoint(folder, "llama")
    return convert.load(folder), trained(reference, "trainer").state_dict(), reference


def broken(state, change):
    """A copy of a state, changed."""
    state = copy.deepcopy(state)
    change(state)
    return state


def wider_amsgrad(state):
    for group in state["param_groups"]:
        group["amsgrad"] = True
    for own in state["state"].values():
        own["max_exp_avg_sq"] = torch.ones(500, 500, dtype=own["exp_avg_sq"].dtype)


def first(state):
    return state["state"][0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: first(s).update(exp_avg_sq=-first(s)["exp_avg_sq"]), "model.embed_tokens.weight in"),
        (lambda s: first(s)["exp_avg_sq"].view(-1)[3].fill_(float("nan")), "holds NaN or infinite values"),
        (lambda s: first(s).pop("exp_avg_sq"), "no second moment of model.embed_tokens.weight (exp_avg_sq)"),
        (lambda s: s["state"].pop(1), "no second moment of model.layers.0.self_attn.q_proj.weight"),
        (lambda s: first(s).update(step=torch.tensor(0.0)), "step 0.0 for"),
        (lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)), "betas"),
        (lambda s: s["param_groups"][0].update(eps=None), "eps None"),
        (lambda s: (first(s)["exp_avg_sq"].zero_(), s["param_groups"][0].update(eps=0.0)), "has a zero, and eps is 0"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "3 groups of parameters without names"),
        (lambda s: s["param_groups"][0]["params"].pop(), "where the model has"),
        (lambda s: s.pop("param_groups"), "no state and param_groups"),
        (lambda s: s["param_groups"][0].pop("params"), "a group has no params"),
        (lambda s: first(s).update(exp_avg_sq=first(s)["exp_avg_sq"].to_sparse()), "is sparse_coo"),
        (
            lambda s: s["param_groups"][0].pop("amsgrad"),
            "whose groups have amsgrad; these have not",
        ),  # as of NAdam and RAdam
        (lambda s: wider_amsgrad(s), "(max_exp_avg_sq) has shape [500, 500], the parameter"),
    ],
)
def test_a_state_that_cannot_be_used_is_refused(change, sentence, llama, tmp_path):
    model, state, _ = llama
    torch.save(broken(state, change), tmp_path / "optimizer.pt")
    with pytest.raises(InputError) as refused:
        convert.load_preconditioner(tmp_path, model)
    assert sentence in str(refused.value)


def test_the_state_of_another_model_is_refused_with_its_first_tensor(llama, tmp_path):
    model, _, _ = llama
    wider = write_checkpoint(tmp_path / "wider", "llama", intermediate_size=32)
    torch.save(trained(wider).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"mlp.gate_proj.weight has shape \[32, 16\], the parameter \[24, 16\]"):
        convert.load_preconditioner(tmp_path, model)
    deeper = write_checkpoint(tmp_path / "deeper", "llama", num_hidden_layers=3)
    torch.save(trained(deeper, "names").state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"it has a parameter \"?lm_head.weight|model.layers.2"):
        convert.load_preconditioner(tmp_path, model)


def test_files_that_are_no_states_are_refused(llama, tmp_path):
    model, _, reference = llama

    class Code:
        def __reduce__(self):
            return (print, ("code of the file ran",))

    torch.save({"state": Code(), "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="other things than tensors"):
        convert.load_preconditioner(tmp_path, model)
    momentum = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    momentum.step()
    torch.save(momentum.state_dict(), tmp_path / "sgd.pt")
    with pytest.raises(InputError, match="not the state of Adam"):
        convert.load_preconditioner(tmp_path / "sgd.pt", model)
    with pytest.raises(InputError, match="There is no file"):
        convert.load_preconditioner(tmp_path / "none.pt", model)
    with pytest.raises(InputError, match="eps -1"):
        convert.load_preconditioner(tmp_path, model, eps=-1)


def test_an_npz_holds_the_diagonal_itself_and_lies_like_the_parameters(llama, tmp_path):
    model, _, _ = llama
    arrays = {leaf_name(p): np.full(x.shape, 2.0, "float32") for p, x in jax.tree.leaves_with_path(model.params)}
    np.savez(tmp_path / "d.npz", **arrays)
    mesh = jaxhess.make_mesh("fsdp=2", jax.devices()[:2])
    sharded = convert.load(llama_folder(model, tmp_path), mesh=mesh)
    found = convert.load_preconditioner(tmp_path / "d.npz", sharded).diagonal
    for x, like in zip(jax.tree.leaves(found), jax.tree.leaves(sharded.params), strict=True):
        assert x.sharding == like.sharding
        assert (x == 2).all()
    for change, sentence in [
        ({"embed/kernel": np.ones(3, "float32")}, "embed/kernel is float32 \\[3\\], the parameter has shape"),
        ({"other": np.ones(3, "float32")}, "it has 'other'"),
    ]:
        np.savez(tmp_path / "e.npz", **{**arrays, **change})
        with pytest.raises(InputError, match=sentence):
            convert.load_preconditioner(tmp_path / "e.npz", model)
    arrays.pop("embed/kernel")
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(InputError, match="no embed/kernel"):
        convert.load_preconditioner(tmp_path / "e.npz", model)
    with pytest.raises(InputError, match="no options for it"):
        convert.load_preconditioner(tmp_path / "d.npz", model, eps=0.0)


def llama_folder(model, folder):
    convert.export(dataclasses.replace(model), folder / "exported")
    return folder / "exported"
