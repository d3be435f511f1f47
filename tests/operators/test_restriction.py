"""A restricted operator is the diagonal block of the whole one, for every operator of a loss."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import (
    SMALL,
    TINY,
    batch_of,
    language_operator,
    random_model,
    random_vector,
    relative,
    tokens,
)

from jaxhess import (
    EmpiricalFisher,
    FiniteDifferenceHessian,
    GaussNewton,
    Hessian,
    Microbatches,
    linearize,
    make_mesh,
    spectrum,
)
from jaxhess.data import TokenBatch
from jaxhess.distributed.mesh import batch_sharding
from jaxhess.models import abstract_params
from jaxhess.operators.restriction import Selection, restriction


def chosen(pattern, layers=None) -> dict[str, int]:
    """Leaf names and layer counts of a selection on the small model."""
    params = abstract_params(TINY)
    taken = restriction(params, pattern, layers).take(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape[0]
        for path, leaf in jax.tree.flatten_with_path(taken)[0]
    }


def test_names_select_what_they_say():
    assert set(chosen(["embed"])) == {"embed/kernel"}
    assert set(chosen(["layers/mlp/*"])) == {f"layers/mlp/{x}/kernel" for x in ("gate", "up", "down")}
    assert set(chosen(["mlp"])) == set(chosen(["layers/mlp/*"]))
    norms = {"final_norm", "layers/attention_norm", "layers/mlp_norm"}
    norms |= {"layers/attention/query_norm", "layers/attention/key_norm"}
    assert set(chosen(["norm"])) == {f"{name}/scale" for name in norms}
    assert set(chosen(["embed", "head"])) == {"embed/kernel", "head/kernel"}
    assert len(chosen([])) == len(jax.tree.leaves(abstract_params(TINY)))
    one = chosen(["attention"], layers=[-1])
    assert set(one) == set(chosen(["attention"]))
    assert set(one.values()) == {1}
    assert "embed/kernel" not in chosen([], layers=[0, 1])


@pytest.mark.parametrize(
    ("patterns", "layers", "sentence"),
    [
        (["atention"], None, r"No parameter matches 'atention'. Use .* these names: .*layers/attention/query/kernel"),
        ([], [2], "the model has layers 0 to 1"),
        (["embed"], [0], "'embed' matches no parameter inside a layer"),
        (["mlp", "head"], [0], "'head' matches no parameter inside a layer"),
        ([], [], "name at least one"),
        ([], [0.5], r"Layers \[0.5\]: the model has layers 0 to 1"),
    ],
)
def test_a_restriction_to_nothing_is_refused_in_a_sentence(patterns, layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        restriction(abstract_params(TINY), patterns, layers)


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [(Hessian, [(("mlp",), [1]), (("norm", "head"), None)]), (EmpiricalFisher, [(("embed", "value"), None)])],
)
def test_a_restricted_operator_is_the_diagonal_block(kind, blocks):
    with jax.enable_x64(True):
        config = dataclasses.replace(TINY, dtype="float64")
        model = random_model(config)
        operator = kind(model.loss(50), model.params, [batch_of(tokens(2, 7, config.vocab_size))])
        whole = np.asarray(operator.to_matrix())
        numbers = jax.flatten_util.ravel_pytree(model.params)[1](jnp.arange(whole.shape[0], dtype=jnp.float64))
        for patterns, layers in blocks:
            block = operator.restrict(*patterns, layers=layers)
            rows = np.asarray(jax.flatten_util.ravel_pytree(block.restriction.take(numbers))[0], int)
            assert block.dim == rows.size < whole.shape[0]
            expected = whole[np.ix_(rows, rows)]
            np.testing.assert_allclose(block.to_matrix(), expected, atol=1e-12 * np.abs(expected).max())


def test_layers_may_be_a_list():
    params = {"layers": [{"w": jnp.ones((2, 2))}, {"w": jnp.ones((4, 4))}], "head": jnp.ones(3)}
    taken = restriction(params, [], [-1]).take(params)
    assert [x.shape for x in jax.tree.leaves(taken)] == [(4, 4)]
    with pytest.raises(ValueError, match="layers 0 to 1"):
        restriction(params, [], [2])
    with pytest.raises(ValueError, match=r"'layers/1/\*' matches no parameter in layers \[0\]"):
        restriction(params, ["layers/1/*"], [0])
    with pytest.raises(ValueError, match="layers/b has 3 rows and the model 5 layers"):
        restriction({"layers": {"a": jnp.ones((5, 2)), "b": jnp.ones(3)}}, [], [0])
    graph = nnx.split(nnx.Dict(layers=nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))] * 1)), nnx.Param)[1]
    assert len(jax.tree.leaves(restriction(graph, ["layers/*/kernel"], [0]).take(graph))) == 1


@pytest.mark.study
def test_other_operators_restrict_alike():
    exact = language_operator(remat=False)
    batch = [jax.tree.map(lambda x: x[0], exact.batches[0].stacked)]
    exact = Hessian(exact.loss, exact.params, batch).restrict("attention", layers=[0])
    with jax.enable_x64(True):  # where the step's error is below everything, and the order of sums too
        wide = exact.in_dtype("float64")
        v = random_vector(wide.shape_dtype, 1)
        product = wide @ v
        assert relative(linearize(wide) @ v, product) < 1e-12
        difference = FiniteDifferenceHessian(exact.loss, exact.params, batch, step=1e-5, per="coordinate")
        difference = difference.in_dtype("float64").restrict("attention", layers=[0])
        assert relative(difference @ v, product) < 1e-5
    block = GaussNewton(exact.loss, exact.params, batch).restrict("attention", layers=[0])
    result = spectrum(block, steps=4, probes=1)
    assert result.run.operator.restriction == Selection(("attention",), (0,))
    assert result.dim == exact.dim
    assert result.ritz_values.min() > -1e-6 * result.ritz_values.max()
    with pytest.raises(ValueError, match="Restricted to attention in layers 0 already"):
        block.restrict("mlp")


@pytest.mark.slow
def test_a_restricted_spectrum_does_not_depend_on_the_mesh():
    ids = tokens(8, 12, 101)[None]
    results = []
    for mesh in (None, make_mesh("fsdp=4,tensor=2")):
        model = random_model(SMALL, mesh)
        batch = TokenBatch(jnp.asarray(ids), jnp.ones((1, 8, 12)))
        if mesh is not None:
            batch = jax.device_put(batch, batch_sharding(mesh, axis=1))
        block = Hessian(model.loss(4096), model.params, Microbatches(batch)).restrict("mlp", "value", layers=[1])
        if mesh is not None:
            specs = [leaf.sharding.spec for leaf in jax.tree.leaves(block.shape_dtype)]
            assert all("fsdp" in spec or "tensor" in spec for spec in specs)
        results.append(spectrum(block, steps=6, probes=1))
    alone, sharded = (r.ritz_values[:, [0, -1]] for r in results)
    np.testing.assert_allclose(sharded, alone, rtol=1e-4)


def test_what_is_fixed_is_not_differentiated():
    """The block of the output matrix needs no backward pass through the layers."""

    def flops(operator):
        v = random_vector(operator.shape_dtype, 0)
        return jax.jit(lambda op, x: op.mv(x)).lower(operator, v).compile().cost_analysis()["flops"]

    exact = language_operator(remat=False, num_layers=1)
    batch = [jax.tree.map(lambda x: x[0], exact.batches[0].stacked)]
    exact = Hessian(exact.loss, exact.params, batch)
    assert flops(exact.restrict("head")) < 0.5 * flops(exact)
