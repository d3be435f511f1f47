"""Laws of the exact Hessian operator, against dense float64 Hessians and torch-free closed forms."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import (
    SMALL,
    TINY,
    batch_of,
    language_operator,
    network,
    random_model,
    random_vector,
    relative,
    tokens,
)

from jaxhess import Hessian, MatrixOperator, Microbatches, Storage, make_mesh, spectrum, start_lanczos
from jaxhess.data import TokenBatch
from jaxhess.distributed.mesh import batch_sharding
from jaxhess.errors import InputError
from jaxhess.krylov import compile_segment
from jaxhess.operators.facts import validate
from jaxhess.operators.microbatches import as_groups
from jaxhess.plan.hlo import read_program
from jaxhess.vectors import dot, norm, size


def dense(operator: Hessian) -> np.ndarray:
    """The matrix of the loss's second derivatives, reverse over reverse, all sequences at once, no chunks."""
    flat, unravel = jax.flatten_util.ravel_pytree(operator.params)
    config = dataclasses.replace(operator.loss.config, remat=False, query_chunk=64)
    loss = dataclasses.replace(operator.loss, config=config, logit_chunk=10**6)
    batches = [jax.tree.map(lambda x, k=k: x[k], g.stacked) for g in operator.batches for k in range(len(g))]
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)

    def mean_loss(x):
        total, count = loss(unravel(x), batch)
        return total / count

    return np.asarray(jax.jit(jax.jacrev(jax.jacrev(mean_loss)))(flat))


def tiny_operator(**change) -> Hessian:
    config = dataclasses.replace(TINY, dtype="float64", **change)
    model = random_model(config)
    ids = tokens(3, 7, config.vocab_size)
    return Hessian(model.loss(logit_chunk=40), model.params, [batch_of(ids[:2]), batch_of(ids[2:])])


def check_against_dense(operator: Hessian) -> np.ndarray:
    """Entry by entry; returns the eigenvalues."""
    matrix = dense(operator)
    np.testing.assert_allclose(operator.to_matrix(), matrix, rtol=0, atol=1e-12 * np.abs(matrix).max())
    return np.linalg.eigvalsh(matrix)


@pytest.mark.usefixtures("float64")
def test_products_are_those_of_the_dense_hessian():
    operator = tiny_operator(
        tied_embeddings=True, num_layers=1, norm="layer", parallel_residual=True, gated_mlp=False, activation="gelu",
        qk_norm=False, mlp_bias=True, rope=None,
    )  # fmt: skip
    check_against_dense(operator)


@pytest.mark.usefixtures("float64")
def test_spectrum_is_that_of_the_dense_hessian():
    operator = tiny_operator(sliding_window=5)
    eigenvalues = check_against_dense(operator)
    result = spectrum(operator, steps=100, probes=1)
    np.testing.assert_allclose(
        result.ritz_values[0, [0, -1]], eigenvalues[[0, -1]], rtol=0, atol=1e-8 * np.abs(eigenvalues).max()
    )
    # Every Ritz value has an eigenvalue within its bound; rounding is 1e-16 of the norm, a hundred times over.
    distance = np.abs(eigenvalues[:, None] - result.ritz_values[0]).min(axis=0)
    assert (distance <= result.residual_bounds[0] + 1e-13 * np.abs(eigenvalues).max()).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_operator_is_linear_and_symmetric(dtype, tolerance):
    operator = language_operator(dtype)
    u, v = (random_vector(operator.shape_dtype, k) for k in (1, 2))
    hu, hv = operator @ u, operator @ v
    combined = operator @ jax.tree.map(lambda a, b: (2 * a - 3 * b).astype(a.dtype), u, v)
    expected = jax.tree.map(lambda a, b: 2 * a.astype("float32") - 3 * b.astype("float32"), hu, hv)
    assert relative(combined, expected) < tolerance
    assert abs(float(dot(u, hv) - dot(v, hu))) < tolerance * float(norm(u) * norm(hv))


def test_float32_agrees_with_float64():
    narrow = language_operator("float32")
    v = random_vector(narrow.shape_dtype, 1)
    product = narrow @ v
    with jax.enable_x64(True):
        wide = language_operator("float64")
        wide = dataclasses.replace(wide, params=jax.tree.map(lambda x: x.astype("float64"), narrow.params))
        exact = wide @ jax.tree.map(lambda x: x.astype("float64"), v)
        assert relative(product, exact) < 1e-5


# The next three are identities between two ways to sum the same terms. They are checked in float64, where a sum of the
# few thousand terms here rounds by at most 1e-12 in any order; float32 would leave a factor of two to what each
# processor's vector width makes of it.
@pytest.mark.usefixtures("float64")
def test_hessian_does_not_depend_on_microbatches_or_padding():
    operator = language_operator("float64")
    ids = tokens(8, 12, 101)
    weights = (np.random.default_rng(0).random((8, 12)) < 0.7).astype(np.float32)  # ragged labels
    weights[3] = 0  # a sequence that is all padding
    v = random_vector(operator.shape_dtype, 1)
    whole = dataclasses.replace(operator, batches=as_groups([batch_of(ids, weights)])) @ v
    cut = [batch_of(ids[i : i + 3], weights[i : i + 3]) for i in range(0, 8, 3)]
    assert relative(dataclasses.replace(operator, batches=as_groups(cut)) @ v, whole) < 1e-12

    scrambled = np.where(np.pad(weights, ((0, 0), (1, 0)), constant_values=1) == 0, 7, ids)
    trailing = np.cumsum(weights[:, ::-1], axis=1)[:, ::-1] == 0  # nothing behind counts: true padding
    padded = np.where(np.pad(trailing, ((0, 0), (1, 0))), scrambled, ids)
    assert relative(dataclasses.replace(operator, batches=as_groups([batch_of(padded, weights)])) @ v, whole) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "change",
    [
        {"remat": False},
        {"remat": "attention", "query_chunk": 5, "logit_chunk": 1000},
        {"remat": "feed-forward", "query_chunk": 1},
    ],
)
def test_hessian_does_not_depend_on_chunks_or_rematerialisation(change):
    operator = language_operator("float64")
    v = random_vector(operator.shape_dtype, 1)
    assert relative(language_operator("float64", **change) @ v, operator @ v) < 1e-12


def spectrum_on(axes):
    """Eight steps of two probes of a small model, on a mesh or on one device."""
    mesh = None if axes is None else make_mesh(axes)
    ids = tokens(16, 12, 101).reshape(2, 8, 13)
    model = random_model(SMALL, mesh)
    batch = TokenBatch(jnp.asarray(ids), jnp.ones((2, 8, 12)))
    if mesh is not None:
        batch = jax.device_put(batch, batch_sharding(mesh, axis=1))
    return spectrum(Hessian(model.loss(4096), model.params, Microbatches(batch)), steps=8, probes=2, batch_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data=2,fsdp=2,tensor=2"])
def test_spectrum_does_not_depend_on_the_mesh(axes):
    sharded, alone = (spectrum_on(a).ritz_values[:, [0, -1]] for a in (axes, None))
    np.testing.assert_allclose(sharded, alone, rtol=1e-4)


def test_a_loss_scaled_by_1e_minus_7_gives_the_scaled_spectrum():
    operator = network()
    scaled = dataclasses.replace(operator, loss=lambda p, b: (1e-7 * operator.loss(p, b)[0], operator.loss(p, b)[1]))
    plain, small = (spectrum(op, steps=10, probes=2, batch_size=1) for op in (operator, scaled))
    assert (plain.sizes == small.sizes).all()
    np.testing.assert_allclose(small.ritz_values[:, [0, -1]], 1e-7 * plain.ritz_values[:, [0, -1]], rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_batched_products_equal_single_ones():
    operator = language_operator("float64")
    probes = [random_vector(operator.shape_dtype, k) for k in range(3)]
    batched = jax.jit(jax.vmap(operator.mv))(jax.tree.map(lambda *x: jnp.stack(x), *probes))
    for k, probe in enumerate(probes):
        assert relative(jax.tree.map(lambda x, k=k: x[k], batched), operator @ probe) < 1e-12


def test_plain_functions_and_flax_models_work():
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)

    def mean_square(params, batch):
        inputs, targets = batch
        return jnp.mean(jnp.sum((inputs @ params["w"] - targets) ** 2, axis=1))

    operator = Hessian(mean_square, {"w": jnp.zeros((4, 3))}, [(x[:10], y[:10]), (x[10:], y[10:])])
    closed = np.kron(2 * x.T @ x / 20, np.eye(3))  # of mean |w'x - y|^2 for w [4, 3] in row-major order
    v = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_allclose(np.ravel((operator @ {"w": v})["w"]), closed @ v.ravel(), rtol=1e-5)

    graph, params = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    model_loss = lambda p, b: jnp.mean(jnp.sum((nnx.merge(graph, p)(b[0]) - b[1]) ** 2, axis=1))  # noqa: E731
    result = spectrum(Hessian(model_loss, params, [(x, y)]), steps=15, probes=2)
    design = np.hstack([x, np.ones((20, 1), np.float32)])
    largest = np.linalg.eigvalsh(2 * design.T @ design / 20)[-1]
    np.testing.assert_allclose(result.extreme().largest.value, largest, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: Hessian(sum, {"w": jnp.ones(2)}, []), ValueError, "batches is empty"),
        (lambda: Hessian(sum, {"w": jnp.ones(2)}, [None]), ValueError, "Batch 0 is None"),
        (lambda: Hessian(sum, {"w": jnp.ones(2)}, (1, 2)), TypeError, "pass a list of batches"),
        (lambda: Hessian(sum, {"w": jnp.arange(2)}, [1]), ValueError, r"Parameter \['w'\] has dtype int32"),
        (lambda: Hessian(sum, {}, [1]), ValueError, r"params is {}: there are no parameters in it"),
        (lambda: Hessian(sum, {"w": jnp.ones((0, 3))}, [1]), ValueError, r"\['w'\] has shape \(0, 3\), no entries"),
        (lambda: Hessian(sum, {"w": jnp.ones(2)}, Microbatches(jnp.ones(()))), ValueError, r"\(\): every array needs"),
        (lambda: Hessian(sum, {"w": jnp.ones(2)}, Microbatches(jnp.ones((0, 2)))), ValueError, "and at least 1"),
        (lambda: Hessian(sum, {"w": jnp.ones(2)}, Microbatches({})), ValueError, "shapes none at all"),
        (
            lambda: Hessian(sum, {"w": jnp.ones(2)}, (Microbatches((jnp.ones(2), jnp.ones(3))),)),
            ValueError,
            r"\(2,\), \(3,\): every array needs a leading axis .* as long as that of the others",
        ),
        (lambda: MatrixOperator(jnp.ones((0, 0))), ValueError, "square, with at least one row"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, b: (jnp.sum(p), {"aux": 1}),
        lambda p, b: (jnp.sum(p), 1, 2),
        lambda p, b: [jnp.sum(p), 1],
        lambda p, b: p,
        lambda p, b: None,
    ],
)
def test_a_loss_of_another_form_is_refused_in_a_sentence(loss):
    with pytest.raises(ValueError, match=r"it must return \(sum, count\)"):
        spectrum(Hessian(loss, jnp.ones(2), [jnp.ones(2)]), steps=1)


def test_a_vector_of_another_shape_is_refused_by_name():
    operator = Hessian(lambda p, b: jnp.sum(p["w"] ** 2 * b), {"w": jnp.ones(2)}, [jnp.ones(2)])
    with pytest.raises(ValueError, match=r"leaf \['w'\] has shape \(3,\); it must be \(2,\)"):
        operator @ {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="structure"):
        operator @ jnp.ones(2)
    with pytest.raises(ValueError, match=r"dtype int.*floating point"):
        operator @ {"w": np.ones(2, np.int32)}


def test_a_non_finite_loss_names_the_microbatch():
    operator = Hessian(lambda p, b: jnp.sum(p * b), jnp.ones(2), [jnp.ones(2), jnp.array([1.0, jnp.nan])])
    with pytest.raises(InputError, match="microbatch 1 is nan"):
        spectrum(operator, steps=2, probes=1)


def test_a_non_finite_product_names_the_microbatch():
    # A finite loss of infinite curvature: sqrt at 0.
    operator = Hessian(lambda p, b: jnp.sum(jnp.sqrt(p) * b), jnp.zeros(2), [jnp.zeros(2), jnp.ones(2)])
    with pytest.raises(InputError, match=r"step 1 of probe 1 is not finite: .*microbatch"):
        spectrum(operator, steps=2, probes=1)


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (lambda p, b: b - 2.0, r"count of microbatch 0 is -1\.0; it is a number .* not negative"),
        (lambda p, b: b / 0, "count of microbatch 0 is inf"),
        (lambda p, b: 0 * b, "count of the loss is 0 over all batches"),
        (lambda p, b: jnp.sum(jnp.square(p)), "count of the loss changes with the parameters"),
    ],
)
def test_a_count_that_is_none_is_refused_before_any_product(count, sentence):
    operator = Hessian(lambda p, b: (jnp.sum(p**4), count(p, b)), jnp.ones(2), [jnp.float32(1), jnp.float32(5)])
    with pytest.raises(ValueError, match=sentence):
        validate(operator)


def test_counts_of_other_kinds_are_taken():
    # Of the shape of the parameters, of labels that the model gets right, a whole number, and of fixed parameters.
    batch = jnp.array([3.0, -1.0])
    counts = (lambda p, b: p["w"].size, lambda p, b: jnp.sum(p["w"] * b > 0), lambda p, b: 2, lambda p, b: p["fixed"])
    for count in counts:
        loss = lambda p, b, count=count: (jnp.sum(p["w"] ** 2), count(p, b))  # noqa: E731
        operator = Hessian(loss, {"w": jnp.ones(2), "fixed": jnp.float32(2)}, [batch]).restrict("w")
        assert validate(operator)["count"] in (1, 2)


def test_operators_are_equal_to_themselves_and_hash():
    operator = language_operator()
    other = language_operator()
    for a, b in ((operator, other), (operator + other, operator + other), (MatrixOperator(jnp.eye(2)),) * 2):
        assert (a == b) == (a is b)
        assert len({a, b}) == 1 + (a is not b)
    assert operator.batches[0] != other.batches[0]
    assert operator.loss == other.loss  # static: what a program is compiled for is compared by value


def test_parameters_are_arguments_of_the_program_not_constants():
    operator = language_operator()
    v = random_vector(operator.shape_dtype, 1)
    text = jax.jit(lambda op, x: op.mv(x)).lower(operator, v).as_text()
    constants = re.findall(r"stablehlo.constant dense<[^>]*> : tensor<((?:\d+x)+)", text)
    largest = max(np.prod([int(n) for n in c.split("x") if n]) for c in constants if "dense" not in c)
    assert largest < 1000 < size(v)  # rotary frequencies and such; the smallest matrix has 2,048 entries


@pytest.mark.parametrize(
    ("axes", "shards"),
    [pytest.param("fsdp=8", 8, marks=pytest.mark.study), ("data=2,fsdp=2,tensor=2", 4)],
)
def test_compiled_program_holds_its_share_and_gathers_a_layer_at_a_time(axes, shards):
    config = dataclasses.replace(
        SMALL, num_layers=8, vocab_size=1001, embed_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=192
    )
    mesh = make_mesh(axes)
    model = random_model(config, mesh, factor=1)
    batch = TokenBatch(jnp.asarray(tokens(16, 8, 1001).reshape(2, 8, 9)), jnp.ones((2, 8, 8)))
    batch = jax.device_put(batch, batch_sharding(mesh, axis=1))
    operator = Hessian(model.loss(4096), model.params, Microbatches(batch))
    state = start_lanczos([random_vector(operator.shape_dtype, 0)], 6)
    compiled = compile_segment(operator, state)
    memory = compiled.memory_analysis()
    inputs, outputs = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in ((operator, state), state))
    # The batch is cut into eight even where parameters are cut into four: less than 0.1% here.
    np.testing.assert_allclose(memory.argument_size_in_bytes, inputs / shards, rtol=0.05)
    np.testing.assert_allclose(memory.output_size_in_bytes, outputs / shards, rtol=0.05)
    gathered = [
        np.prod(shape)
        for computation in read_program(compiled).computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "all-gather"
        for dtype, shape in instruction.arrays
        if dtype == "f32"
    ]
    # A layer's feed-forward matrix, and some 500 rows of the output matrix, which 4,096 logits of 8 tokens allow.
    assert 64 * 192 / mesh.shape["tensor"] <= max(gathered) <= 64 * 512


@pytest.mark.parametrize(
    ("axes", "reorthogonalize"), [(None, "none"), pytest.param("fsdp=8", "full", marks=pytest.mark.slow)]
)
def test_temporaries_are_the_product_and_one_accumulator(axes, reorthogonalize):
    # With several microbatches. The difference between two depths leaves out activations and the head.
    mesh = None if axes is None else make_mesh(axes)
    sizes = []
    for layers in (8, 24):
        config = dataclasses.replace(SMALL, num_layers=layers, embed_dim=128, mlp_dim=512, head_dim=64)
        model = random_model(config, mesh, factor=1)
        batch = TokenBatch(jnp.asarray(tokens(16, 2, 101).reshape(2, 8, 3)), jnp.ones((2, 8, 2)))
        if mesh is not None:
            batch = jax.device_put(batch, batch_sharding(mesh, axis=1))
        operator = Hessian(model.loss(4096), model.params, Microbatches(batch))
        state = start_lanczos([random_vector(operator.shape_dtype, 0)], 4, Storage(reorthogonalize))
        held = sum(x.nbytes for x in jax.tree.leaves(model.params)) / (1 if mesh is None else mesh.size)
        sizes.append((held, compile_segment(operator, state).memory_analysis().temp_size_in_bytes))
    (held, temporary), (held_deep, temporary_deep) = sizes
    assert (temporary_deep - temporary) / (held_deep - held) < 2.3
