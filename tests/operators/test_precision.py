"""Precision is what its name says: storage, computation, accumulation and vectors each in their own dtype."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Diagonal, language_operator, random_vector, relative

import convert
from jaxhess import (
    EmpiricalFisher,
    FiniteDifferenceHessian,
    GaussNewton,
    Hessian,
    Storage,
    start_lanczos,
)
from jaxhess.krylov import lanczos_segment
from jaxhess.operators.precision import product_dtypes
from jaxhess.vectors import basis_dot, dot


def first(operator):
    return [jax.tree.map(lambda x: x[0], operator.batches[0].stacked)]


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, EmpiricalFisher, FiniteDifferenceHessian])
def test_every_matrix_product_in_float32_asks_for_float32(kind):
    """TF32 is the default on recent GPUs; a product that asks for the highest precision does without."""
    base = language_operator(num_layers=1)
    operator = kind(base.loss, base.params, first(base))
    v = random_vector(operator.shape_dtype, 0)
    text = jax.jit(lambda op, x: op.mv(x)).lower(operator, v).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 10
    assert all(re.search(r"precision = \[HIGHEST, HIGHEST\]", line) for line in products)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_products_in_float32_on_a_gpu_are_float32(kind):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU here")
    base = language_operator()
    operator = kind(base.loss, base.params, base.batches)
    v = random_vector(operator.shape_dtype, 0)
    product = operator @ v
    with jax.enable_x64(True):
        wide = operator.in_dtype("float64") @ jax.tree.map(lambda x: x.astype("float64"), v)
        assert relative(product, wide) < 1e-5  # TF32 would err by 1e-3


def test_weights_stored_narrow_and_computed_wide_give_the_wide_product():
    stored = language_operator("bfloat16", num_layers=1)
    mixed = dataclasses.replace(stored, loss=stored.loss.in_dtype("float32"))
    assert product_dtypes(mixed) == ("bfloat16", "float32")
    v = jax.tree.map(lambda x: x.astype("float32"), random_vector(stored.shape_dtype, 1))
    wide = stored.in_dtype("float32") @ v
    # Each microbatch's product leaves in the parameters' dtype: rounded once, to 8 bits.
    assert relative(mixed @ v, wide) < 2**-8
    assert relative(stored @ v, wide) > 2 * relative(mixed @ v, wide)


def test_a_model_computed_otherwise_is_saved_as_it_is(tmp_path):
    model = convert.load("scripts/tiny").configured(dtype="bfloat16")
    convert.save(model, tmp_path / "saved")
    restored = convert.load(tmp_path / "saved")
    assert restored.config.dtype == restored.param_dtype == "float32"
    kernel = restored.params["embed"]["kernel"]
    np.testing.assert_array_equal(kernel, model.params["embed"]["kernel"])
    with pytest.raises(ValueError, match="num_layers is part of what the model is"):
        model.configured(num_layers=2)


def test_sums_over_microbatches_are_not_in_bfloat16():
    # 300 ones: in bfloat16 the sum would stop at 256.
    operator = Hessian(lambda p, b: 0.5 * b * p**2, jnp.bfloat16(1), [jnp.bfloat16(1)] * 300)
    assert float(operator @ jnp.bfloat16(1)) == 1


def test_sums_over_microbatches_can_be_in_float64():
    with jax.enable_x64(True):
        batches = [jnp.float32(x) for x in (1e8, 1, -1e8)]
        loss = lambda p, b: 0.5 * b * p**2  # noqa: E731
        products = [
            float(Hessian(loss, jnp.float32(1), batches, accumulation_dtype=dtype) @ jnp.float32(1))
            for dtype in ("float32", "float64")
        ]
    assert products == [0, np.float32(1 / 3)]


def test_alphas_and_betas_can_be_accumulated_in_float64():
    rng = np.random.default_rng(0)
    entries, probe = rng.normal(size=10**6).astype(np.float32), rng.normal(size=10**6).astype(np.float32)
    with jax.enable_x64(True):
        states = {
            dtype: lanczos_segment(
                Diagonal(jnp.asarray(entries)),
                start_lanczos([jnp.asarray(probe)], 1, Storage("none", scalar_dtype=dtype)),
                1,
            )
            for dtype in ("float32", "float64")
        }
        assert states["float32"].alphas.dtype == jnp.float32
        assert states["float64"].alphas.dtype == jnp.float64
        assert states["float64"].current.dtype == jnp.float32
        q = np.asarray(probe, np.float64) / np.linalg.norm(probe.astype(np.float64))
        exact = np.sum(entries * q**2)
        beta = np.linalg.norm(entries * q - exact * q)
        # What is left is the rounding of the stored vectors, which averages out: eps / sqrt(n) of the norm.
        assert abs(float(states["float64"].alphas[0, 0]) - exact) < 1e-9
        np.testing.assert_allclose(states["float64"].betas[0, 0], beta, rtol=1e-8)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Hessian(sum, jnp.ones(2), [jnp.ones(1)], accumulation_dtype="bfloat16"), "'float32' or 'float64'"),
        (lambda: Hessian(sum, jnp.ones(2), [jnp.ones(1)], accumulation_dtype="float64"), "JAX_ENABLE_X64"),
    ],
)
def test_what_cannot_be_accumulated_in_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.study
def test_sums_over_a_hundred_million_entries(capsys):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(10**8, dtype=np.float32) for _ in range(2))
    square, product = (float(np.dot(x.astype(np.float64), z)) for z in (x, y))
    a, b = jnp.asarray(x), jnp.asarray(y)
    lines = [
        f"float32 |x|^2: {float(dot(a, a)) / square - 1:.0e} relative",
        f"float32 <x, y>: {(float(dot(a, b)) - product) / square:.0e} of |x|^2",
        f"basis_dot of four: {float(basis_dot(jnp.stack([a, b, a, b]), a)[0]) / square - 1:.0e} relative",
    ]
    ten = a[: 10**7]
    naive = jnp.tensordot(jnp.stack([ten, b[: 10**7]] * 2), ten, axes=1, precision="highest")[0]
    true = float(np.dot(x[: 10**7].astype(np.float64), x[: 10**7]))
    lines.append(f"a matrix product of four with 1e7 entries: {float(naive) / true - 1:.0e} relative")
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert abs(float(dot(a, a)) / square - 1) < 1e-6
    assert abs(float(dot(a, b)) - product) < 1e-8 * square
    assert abs(float(basis_dot(jnp.stack([a, b, a, b]), a)[0]) / square - 1) < 1e-5
    with jax.enable_x64(True):
        assert abs(float(dot(a, a, "float64")) / square - 1) < 1e-11
