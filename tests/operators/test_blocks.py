"""A partition of parameters: every entry in one block, whatever the blocks are made by; products with all of them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import TINY, batch_of, matrix, operator_of, random_model, random_vector, relative, tokens

from jaxhess import BlockDiagonal, Blocks, FiniteDifferenceHessian, GaussNewton, Hessian, make_mesh
from jaxhess.errors import InputError
from jaxhess.models import abstract_params
from jaxhess.models.config_parts import ExpertsConfig
from jaxhess.operators.facts import describe

TINY = dataclasses.replace(TINY, qk_norm=False)  # or norms were in attention
PARAMS = abstract_params(TINY)
EXPERTS = dataclasses.replace(
    TINY, num_layers=3, experts=ExpertsConfig(4, 2, 5, layers=(False, True, True), shared_dim=3)
)
WORDS = ("attention", "mlp", "norm", "embed", "head")
LISTED = {"head": jnp.zeros((5, 4)), "layers": [{"b": jnp.zeros(()), "w": jnp.zeros((4, 4))} for _ in range(11)]}


def labels_of(blocks: Blocks) -> np.ndarray:
    """The block of every entry, in the order of `ravel_pytree`."""
    pairs = zip(blocks.labels, blocks.shapes, strict=True)
    return np.concatenate([np.broadcast_to(labels, shape).ravel() for labels, shape in pairs])


def flat(v) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(v)])


def rows_of(a: np.ndarray, groups: list[int]) -> Blocks:
    """Blocks of a matrix operator's rows."""
    rows = Blocks.by(operator_of(a).shape_dtype, "matrices").split("*", axis=0)
    return rows.merged(lambda name: f"b{groups[int(re.findall('[0-9]+', name)[-1])]}")


def test_names_are_those_of_the_model_in_its_order():
    assert Blocks.by(PARAMS, "layers").names == ("embed", "layers/0", "layers/1", "final_norm", "head")
    learned = abstract_params(dataclasses.replace(TINY, rope=None, tied_embeddings=True))
    assert Blocks.by(learned, "layers").names == ("embed", "layers/0", "layers/1", "final_norm")
    kinds = ("embedding", "query", "key", "value", "attention out", "gate", "up", "down", "norms", "head")
    assert Blocks.by(PARAMS, "kinds").names == kinds
    assert Blocks.by(LISTED, "layers").names == (*(f"layers/{k}" for k in range(11)), "head")
    assert Blocks.by({"conv": jnp.zeros(2), "out": {"w": jnp.zeros(2)}}, "layers").names == ("conv", "out")
    assert set(Blocks.by(PARAMS, *WORDS).names) == set(WORDS)
    of_layers = ("embed", "layers/0/*", "layers/1/*", "final_norm", "head")
    assert Blocks.by(PARAMS, *of_layers).sizes.tolist() == Blocks.by(PARAMS, "layers").sizes.tolist()


def test_layers_of_two_stacks_have_their_own_numbers():
    stacks = EXPERTS.stacks
    blocks = Blocks.by(abstract_params(EXPERTS), "layers", stacks=stacks)
    assert blocks.names == ("embed", "layers/0", "layers/1", "layers/2", "final_norm", "head")
    kinds = Blocks.by(abstract_params(EXPERTS), "kinds", stacks=stacks)
    assert {"experts", "router", "up"} < set(kinds.names)  # those of the shared expert and of dense layers are `up`


@pytest.mark.parametrize("by", [("layers",), ("kinds",), ("matrices",), ("heads",), WORDS], ids=" ".join)
def test_every_entry_is_in_one_block(by):
    blocks = Blocks.by(PARAMS, *by)
    labels = labels_of(blocks)
    np.testing.assert_array_equal(np.bincount(labels, minlength=len(blocks)), blocks.sizes)
    v = random_vector(PARAMS)
    parts = [flat(blocks.part(v, b)) for b in range(len(blocks))]
    np.testing.assert_array_equal(sum(parts), flat(v))
    for b, part in enumerate(parts):
        np.testing.assert_array_equal(part != 0, labels == b)
    assert not flat(blocks.part(v, len(blocks))).any()


def test_heads_and_rows_are_cut_where_they_are():
    heads = Blocks.by(PARAMS, "heads")
    query = random_vector(PARAMS)["layers"]["attention"]["query"]["kernel"]
    assert query.shape == (2, 4, 2, 4)  # layers, embed, heads, head_dim
    b = heads.names.index("layers/1/attention/query/kernel[1]")
    assert heads.sizes[b] == 16
    part = heads.part(random_vector(PARAMS), b)["layers"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(part[1, :, 1], query[1, :, 1])
    rows = Blocks.by(PARAMS, "layers").split("head", axis=0)
    assert rows.names[-9:] == tuple(f"head[{k}]" for k in range(9))
    assert rows.sizes[-1] == 4


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ((), "Blocks are made by"),
        (("attention", "bogus"), "No parameter matches 'bogus'; there are embed/kernel"),
        (("attention", "layers/*"), "layers/0/attention/.* is in two blocks, 'attention' and 'layers/\\*'"),
        (("attention", "mlp", "embed"), "final_norm/scale|layers/0.* and .* more is in no block"),
    ],
)
def test_what_is_no_partition_is_refused(by, message):
    with pytest.raises(InputError, match=message):
        Blocks.by(PARAMS, *by)


def test_other_vectors_axes_and_counts_are_refused():
    blocks = Blocks.by(PARAMS, "layers")
    with pytest.raises(InputError, match="of other vectors: of 12 arrays, and these have 11"):
        blocks.check(abstract_params(dataclasses.replace(TINY, tied_embeddings=True)))
    with pytest.raises(InputError, match="has 2 axes, and none with number 2"):
        blocks.split("head", axis=2)
    with pytest.raises(InputError, match="No parameter matches 'nothing'"):
        blocks.split("nothing", axis=0)
    with pytest.raises(InputError, match="at least 1 block"):
        BlockDiagonal(operator_of(np.eye(3)), rows_of(np.eye(3), [0, 0, 1]), together=0)
    with pytest.raises(InputError, match="of other vectors"):
        BlockDiagonal(operator_of(np.eye(3)), blocks)


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_norms_are_right_at_any_size_of_the_entries(size):
    """Squares of 1e-25 and 1e25 leave float32. A sum of up to 100 squares is within 100 roundings."""
    blocks = Blocks.by(PARAMS, "heads")
    v = jax.tree.map(lambda x: x * np.float32(size), random_vector(PARAMS))
    v["head"]["kernel"] = jnp.zeros_like(v["head"]["kernel"])
    labels, entries = labels_of(blocks), flat(v)
    expected = [np.linalg.norm(entries[labels == b]) for b in range(len(blocks))]
    np.testing.assert_allclose(jax.jit(blocks.norm)(v), expected, rtol=100 * 2**-24)


def test_an_operator_knows_the_numbers_of_its_layers():
    operator = hessian()
    assert Blocks.by(operator.restrict(layers=[1]), "layers").names == ("layers/1",)
    assert Blocks.by(2 * operator.restrict("mlp", layers=[-1]), "layers").names == ("layers/1",)
    model = random_model(EXPERTS)
    sparse = Hessian(model.loss(), model.params, [batch_of(tokens(2, 4, 9))])
    assert Blocks.by(sparse, "layers").names == Blocks.by(model.params, "layers", stacks=EXPERTS.stacks).names
    assert Blocks.by(sparse.restrict(layers=[0, 2]), "layers").names == ("layers/0", "layers/2")
    everything = ("dense_layers/*", "layers/*", "embed", "final_norm", "head")
    with pytest.raises(InputError, match="is in two blocks"):  # layers/0 is in dense_layers
        Blocks.by(sparse, *everything)
    assert len(Blocks.by(sparse, "dense_layers/*", "layers/[12]/*", "embed", "final_norm", "head")) == 5


def test_names_below_layers_that_are_no_stacks_stay_whole():
    params = {"layers": {"first": jnp.zeros((2, 3)), "second": jnp.zeros(4)}}
    assert Blocks.by(params, "matrices").names == ("layers/first", "layers/second")
    nested = {"model": {"layers": [jnp.zeros(1)] * 11}, "z": jnp.zeros(1)}
    assert Blocks.by(nested, "layers").names == ("z", *(f"model/layers/{k}" for k in range(11)))
    assert Blocks.by([jnp.zeros(2), jnp.zeros(3)], "kinds").names == ("0", "1")


def test_labels_have_no_axis_that_they_do_not_depend_on():
    kinds = Blocks.by(PARAMS, "kinds")
    assert {labels.size for labels in kinds.labels} == {1}
    layers = Blocks.by(PARAMS, "layers")
    assert {labels.shape for labels in layers.labels} == {(1, 1), (1,), (2, 1), (2, 1, 1), (2, 1, 1, 1)}


def test_equal_partitions_are_one_static_argument():
    assert Blocks.by(PARAMS, "layers") == Blocks.by(PARAMS, "layers") != Blocks.by(PARAMS, "kinds")
    assert hash(Blocks.by(PARAMS, "layers")) == hash(Blocks.by(PARAMS, "layers"))


@pytest.mark.parametrize("together", [None, 1, 2, 5])
def test_block_diagonal_products_are_those_of_the_masked_matrix(together):
    a, groups = matrix(np.linspace(-1, 2, 7)), [0, 1, 1, 0, 2, 2, 2]
    blocks = rows_of(a, groups)
    same = np.equal.outer(groups, groups)
    found = BlockDiagonal(operator_of(a), blocks, together).to_matrix()
    np.testing.assert_allclose(found, np.where(same, a, 0), atol=1e-6)


def hessian(kind=Hessian, mesh=None, **options):
    model = random_model(TINY, mesh)
    return kind(model.loss(), model.params, [batch_of(tokens(8, 6, 9))], **options)


@pytest.mark.parametrize("kind", [Hessian, pytest.param(FiniteDifferenceHessian, marks=pytest.mark.slow)])
def test_the_diagonal_blocks_of_curvature_are_those_of_the_restricted_operator(kind):
    """Exact products to float32's rounding; differences also to their own error at a step that each block measures."""
    operator = hessian(kind)
    v = random_vector(operator.shape_dtype)
    product = BlockDiagonal(operator, Blocks.by(PARAMS, *WORDS), 2) @ v
    block = operator.restrict("mlp")
    own = block @ block.restriction.take(v)
    assert relative(block.restriction.take(product), own) < (0.05 if kind is FiniteDifferenceHessian else 1e-4)


@pytest.mark.slow
def test_blocks_do_not_depend_on_the_mesh():
    mesh = make_mesh("fsdp=4,tensor=2")
    config = dataclasses.replace(TINY, vocab_size=16, embed_dim=8, num_kv_heads=2, mlp_dim=8)
    products = []
    for on in (None, mesh):
        model = random_model(config, on)
        operator = Hessian(model.loss(), model.params, [batch_of(tokens(8, 6, 16))])
        blocks = Blocks.by(operator.shape_dtype, "heads")
        products.append(BlockDiagonal(operator, blocks, 8) @ random_vector(operator.shape_dtype))
    assert relative(products[1], products[0]) < 1e-5


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_all_blocks_at_once_take_at_most_0_8_of_the_operations_of_one_product_after_the_other(kind):
    """Of a Hessian one primal pass of 2 and 6 for each of B tangents, where 8 B are needed, in units of a forward pass;
    of a Gauss-Newton matrix 1 (the primal pass alone) and 4 B, where 5 B are."""
    operator = hessian(kind)
    blocks = Blocks.by(PARAMS, "kinds")
    v = operator.shape_dtype

    def operations(operator) -> float:
        return jax.jit(lambda o, v: o.mv(v)).lower(operator, v).compile().cost_analysis()["flops"]

    share = operations(BlockDiagonal(operator, blocks)) / operations(operator) / len(blocks)
    print(f"\n{kind.__name__}, {len(blocks)} blocks: {share:.3f}")
    assert share <= (0.8 if kind is Hessian else 0.88)


def test_the_record_tells_partitions_apart_and_not_how_many_are_computed_together():
    a = matrix([1.0, 2.0, 3.0])
    described = [
        describe(BlockDiagonal(operator_of(a), rows_of(a, groups), together))
        for groups, together in (([0, 0, 1], None), ([0, 0, 1], 1), ([0, 1, 1], None))
    ]
    assert described[0] == described[1] != described[2]
    assert described[0]["operator"] == {"kind": "MatrixOperator"}
