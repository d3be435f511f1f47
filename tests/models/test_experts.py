"""A layer of experts is the weighted sum over all of them, others' weights at zero, for every kind of router."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import TINY, relative

from jaxhess import DecoderConfig, InputError, make_mesh
from jaxhess.models import ExpertsConfig, LatentConfig, initialize
from jaxhess.models.experts import Experts, Routing, balancing_loss, choose
from jaxhess.models.layers import gated

SIZES = {"num_experts": 8, "top_k": 3, "mlp_dim": 7}
V3 = {"scores": "sigmoid", "selection_bias": True, "groups": 4, "top_groups": 2, "group_score": "best two"}
ROUTERS = {
    "softmax": ({}, {}),
    "renormalized, one of several": ({"renormalized": True, "top_k": 1}, {}),
    "of the chosen, biases, clamped": ({"scores": "softmax of chosen", "router_bias": True, "bias": True},
                                       {"activation": "clamped_silu"}),
    "sigmoid, biased choice, groups by two, scaled": ({**V3, "scale": 2.5, "renormalized": True}, {}),
    "groups by one, shared": ({"groups": 4, "top_groups": 2, "shared_dim": 5}, {"mlp_bias": True}),
    "all, shared with a gate": ({"top_k": 8, "shared_dim": 5, "shared_gate": True}, {}),
}  # fmt: skip


def best(scores, count):
    """Ones at the largest `count` entries of the last axis."""
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1)
    return jnp.where(rank < count, 1.0, 0.0)


def reference(config, params, x):
    """Every expert for every token, from the parameters alone."""
    experts, router = config.experts, params["router"]
    logits = x @ router["kernel"] + router.get("bias", 0)
    scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}.get(experts.scores, lambda x: x)(logits)
    ranked = jax.lax.stop_gradient(scores + params.get("selection_bias", 0))
    if experts.groups > 1:
        grouped = ranked.reshape(*ranked.shape[:-1], experts.groups, -1)
        count = 1 if experts.group_score == "best" else 2
        taken = best(jnp.sort(grouped, axis=-1)[..., -count:].sum(-1), experts.top_groups)
        ranked = jnp.where(taken[..., None] == 1, grouped, -jnp.inf).reshape(ranked.shape)
    mask = best(ranked, experts.top_k)
    weights = mask * scores
    if experts.scores == "softmax of chosen":
        weights = mask * jnp.exp(scores) / jnp.sum(mask * jnp.exp(scores), axis=-1, keepdims=True)
    if experts.renormalized:
        weights = weights / weights.sum(-1, keepdims=True)

    def projected(name, x, axes):
        bias = params[name].get("bias", 0)
        return jnp.einsum(axes, x, params[name]["kernel"]) + bias

    gate, up = (projected(name, x, "btd,edf->btef") for name in ("gate", "up"))
    down = projected("down", gated(config.activation, gate, up), "btef,efd->bted")
    y = experts.scale * jnp.einsum("bte,bted->btd", weights, down)
    if "shared" in params:
        gate, up, down = (params["shared"][name] for name in ("gate", "up", "down"))
        hidden = jax.nn.silu(x @ gate["kernel"] + gate.get("bias", 0)) * (x @ up["kernel"] + up.get("bias", 0))
        shared = hidden @ down["kernel"] + down.get("bias", 0)
        y = y + (jax.nn.sigmoid(x @ params["shared_gate"]["kernel"]) if "shared_gate" in params else 1) * shared
    return y


def normal_like(tree, seed):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree)))
    numbers = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, jax.tree.leaves(tree), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(tree), numbers)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("router", "change"), ROUTERS.values(), ids=ROUTERS)
def test_value_gradient_and_exact_product_are_those_of_all_experts_for_all_tokens(router, change):
    experts = ExpertsConfig(**{**SIZES, **router})
    config = dataclasses.replace(TINY, dtype="float64", experts=experts, **change)
    graphdef, state = nnx.split(Experts(config, nnx.Rngs(0)))
    arrays = normal_like(nnx.to_pure_dict(state), 0), jax.random.normal(jax.random.key(1), (2, 9, config.embed_dim))
    change = normal_like(arrays, 2)

    def ours(params, x):
        return nnx.merge(graphdef, params)(x)[0]

    def derivatives(layer, arrays, change):
        def loss(arrays):
            y = layer(*arrays)
            return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape)))

        return layer(*arrays), *jax.jvp(jax.grad(loss), (arrays,), (change,))

    theirs = lambda params, x: reference(config, params, x)  # noqa: E731
    found, expected = (jax.jit(derivatives, static_argnums=0)(f, arrays, change) for f in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-12
    if experts.selection_bias:
        assert all((np.asarray(part[0]["selection_bias"]) == 0).all() for part in found[1:])


def chosen_by_hand(row, experts):
    """The set of experts of one token, and the smallest change of a score, or sum of scores, that changes it."""
    groups = np.array_split(np.arange(experts.num_experts), experts.groups)
    two = 2 if experts.group_score == "best two" else 1
    worth = [np.sort(row[g])[-two:].sum() for g in groups]
    taken = max(
        itertools.combinations(range(experts.groups), experts.top_groups), key=lambda c: sum(worth[i] for i in c)
    )
    inside = [e for i in taken for e in groups[i]]
    chosen = max(itertools.combinations(inside, experts.top_k), key=lambda c: sum(row[e] for e in c))
    rest = [row[e] for e in inside if e not in chosen]
    others = [w for i, w in enumerate(worth) if i not in taken]
    gaps = [min(row[e] for e in chosen) - max(rest)] if rest else []
    gaps += [min(worth[i] for i in taken) - max(others)] if others else []
    return set(chosen), min(gaps, default=np.inf)


@pytest.mark.parametrize(
    "router",
    [{}, {"top_k": 8}, {**V3}, {**V3, "top_k": 4}, {"groups": 2, "top_groups": 1}, {"groups": 8, "top_groups": 3}],
    ids=str,
)
def test_choice_and_margin_are_those_of_trying_all(router):
    experts = ExpertsConfig(**{**SIZES, **router})
    ranked = np.random.default_rng(0).normal(size=(6, 10, 8)).astype(np.float32)
    chosen, margin = jax.jit(choose, static_argnums=1)(ranked, experts)
    assert chosen.shape == (6, 10, experts.top_k)
    for row, places, gap in zip(ranked.reshape(-1, 8), chosen.reshape(-1, experts.top_k), margin.ravel(), strict=True):
        expected, smallest = chosen_by_hand(row, experts)
        assert {int(e) for e in places} == expected
        np.testing.assert_allclose(gap, smallest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_balancing_loss_and_its_gradient_are_those_of_transformers(masked):
    """Its attention mask says which tokens are read; our weights, which are predicted: here they are the same.

    Both sum some hundred float32 numbers of one sign, in other orders.
    """
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    numbers = np.random.default_rng(0)
    logits = numbers.normal(size=(2, 3, 7, 8)).astype(np.float32)
    weights = (numbers.uniform(size=(3, 7)) < 0.7) if masked else np.ones((3, 7), bool)

    def ours(logits):
        chosen = jax.lax.top_k(logits, 3)[1]
        return balancing_loss(Routing(logits, chosen, jnp.zeros(logits.shape[:-1])), jnp.asarray(weights, jnp.float32))

    layers = [torch.tensor(layer.reshape(-1, 8), requires_grad=True) for layer in logits]
    mask = torch.from_numpy(weights) if masked else None
    theirs = modeling.load_balancing_loss_func(tuple(layers), num_experts=8, top_k=3, attention_mask=mask)
    theirs.backward()
    value, gradient = jax.jit(jax.value_and_grad(ours))(logits)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    expected = np.stack([layer.grad.numpy() for layer in layers]).reshape(logits.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    even = Routing(jnp.zeros((1, 1, 8, 8)), jnp.arange(8).reshape(1, 1, 8, 1), jnp.zeros((1, 1, 8)))
    assert balancing_loss(even, jnp.ones((1, 8))) == 1  # k, with an even load


def test_experts_that_the_mesh_does_not_divide_are_refused_before_they_are_made():
    config = dataclasses.replace(TINY, experts=ExpertsConfig(num_experts=6, top_k=2, mlp_dim=7))
    with pytest.raises(ValueError, match=r"^6 experts cannot be divided over expert=4 of the mesh\.$"):
        initialize(config, jax.random.key(0), make_mesh("fsdp=2,expert=4"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scores": "tanh"}, "The router's scores are 'tanh'; known are softmax, sigmoid, softmax of chosen."),
        ({"group_score": "sum"}, "The groups' score is 'sum'; known are best and best two."),
        ({"top_k": 9}, "top_k=9 experts cannot be chosen from 8 of 8."),
        ({"groups": 3}, "8 experts cannot be chosen from 1 of 3 groups"),
        ({"groups": 8, "top_groups": 4, "group_score": "best two"}, "8 groups of one expert each have no best two."),
        ({"num_experts": 2**31}, "experts num_experts is 2147483648; it must be at least 1 and below 2^31."),
        ({"shared_gate": True}, "shared_dim is 0; it must be 0 or more, and positive with a shared gate."),
    ],
)
def test_routers_that_there_are_not_are_refused(change, sentence):
    with pytest.raises(ValueError) as caught:
        ExpertsConfig(**{**SIZES, **change})
    assert str(caught.value).startswith(sentence)


def test_experts_without_a_gate_are_refused():
    for change in ({"experts": ExpertsConfig(**SIZES)}, {"activation": "clamped_silu"}):
        with pytest.raises(ValueError, match="are for feed-forwards with a gate"):
            dataclasses.replace(TINY, gated_mlp=False, **change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"norms": "post"}, "norms is 'post'; it must be before, after or both"),
        ({"qk_norm": "head"}, "qk_norm is 'head'"),
        ({"attention": "fused", "attention_softcap": 30.0}, "no fused attention with a softcap"),
        ({"rope_layers": ("main", "sideways")}, "rope_layers must be main, local or none"),
        ({"shared_norm": True}, "side by side"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0"),
    ],
)
def test_variants_that_do_not_exist_are_refused_in_a_sentence(change, sentence):
    sizes = {"embed_dim": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 8}
    with pytest.raises(InputError, match=sentence):
        DecoderConfig(vocab_size=10, max_positions=8, **sizes, **change)


def test_numbers_out_of_range_are_refused_in_a_sentence():
    with pytest.raises(InputError, match="latent kv_rank is 0"):
        LatentConfig(kv_rank=0, value_dim=8)
    with pytest.raises(InputError, match="experts scale is nan"):
        ExpertsConfig(num_experts=4, top_k=2, mlp_dim=8, scale=float("nan"))
