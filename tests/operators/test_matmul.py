"""Dot algorithms between float32 and bfloat16: against NumPy, against the exact product, through derivatives."""

import dataclasses
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import language_operator, network, random_vector, relative

from jaxhess import (
    EmpiricalFisher,
    FiniteDifferenceHessian,
    GaussNewton,
    Hessian,
    audit,
    linearize,
)
from jaxhess.operators.facts import describe
from jaxhess.operators.matmul import ALGORITHMS, MatmulPrecision, with_matmul_precision
from jaxhess.operators.precision import product_eps, unit_roundoff

NAMES = list(ALGORITHMS)


def truncated(x, bits):
    """x with so many significant bits, the others cut off: by powers of two, not by the bits of float32."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(np.ldexp(mantissa, bits)), exponent - bits)


def rounded(x, bits):
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)  # np.round: halves to even


def by_parts(name, a, b):
    """The product of float64 arrays with float32 entries, in float64, from parts as the algorithm's name says."""
    bits = 8 if "bf16" in name else 11
    count = 1 if name == "tf32" else 3 if name.endswith("x6") else 2

    def cut(x):
        parts = []
        for k in range(count):
            last = k and k == count - 1 and bits == 8
            parts.append(rounded(x, bits) if last else truncated(x, bits))
            x = x - parts[-1]
        return parts

    pairs = ((i, j) for i in range(count) for j in range(count) if i + j < count)
    left, right = cut(a), cut(b)
    return sum(left[i] @ right[j] for i, j in pairs)


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_is_the_sum_of_products_of_parts(name):
    a, b = normal(20, 300, seed=0), normal(300, 30, seed=1)
    found = np.asarray(jax.jit(with_matmul_precision(jnp.matmul, name))(a, b), np.float64)
    expected = by_parts(name, a.astype(np.float64), b.astype(np.float64))
    # Both have the same products of parts, which are exact; 300 of each of up to 6 kinds were added in float32.
    magnitude = np.abs(a).astype(np.float64) @ np.abs(b)
    assert (np.abs(found - expected) <= 306 * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_one_product_keeps_to_the_bound_and_comes_near_it(name):
    a, b = normal(100_000, 1, 1, seed=2), normal(100_000, 1, 1, seed=3)
    exact = a.astype(np.float64) * b
    error = np.abs(np.asarray(with_matmul_precision(jnp.matmul, name)(a, b)) / exact - 1).max()
    rounding = len(ALGORITHMS[name].terms) * 2.0**-24
    assert ALGORITHMS[name].error / 8 < error < ALGORITHMS[name].error + rounding


@pytest.mark.parametrize("name", ["bf16x6", "tf32x3", "bf16x3"])
def test_infinite_entries_stay_infinite(name):
    a = jnp.array([[jnp.inf, 1.0], [3e38, 1.0]], jnp.float32)
    found = with_matmul_precision(jnp.matmul, name)(a, jnp.ones((2, 1), jnp.float32))
    assert found[0, 0] == jnp.inf
    assert np.isclose(found[1, 0], 3e38)


def test_products_of_all_shapes():
    """Batched, over two axes, over none, and of numbers: against the product of the parts' sum, in float64."""
    a, b = normal(2, 3, 4, seed=4), normal(2, 3, 4, seed=5)
    for equation in ("bij,bij->b", "bij,bkj->bik", "bij,ckj->bcik", "bij,bij->", "bij,bij->bij", "bij,ckl->bcl"):
        product = with_matmul_precision(lambda x, y, e=equation: jnp.einsum(e, x, y), "bf16x6")
        exact = np.einsum(equation, a.astype(np.float64), b)
        np.testing.assert_allclose(product(a, b), exact, rtol=0, atol=30 * 2.0**-20)


def products_in(program):
    """The precision of every dot_general, as the lowered text has it."""
    lines = [line for line in program.as_text().splitlines() if "stablehlo.dot_general" in line]
    found = [re.search(r"algorithm = <[^>]*>", line) or re.search(r"precision = \[[^]]*\]", line) for line in lines]
    return [match[0] for match in found if match]


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, EmpiricalFisher, FiniteDifferenceHessian])
def test_every_product_of_an_operator_has_the_algorithm(kind):
    name, base = "bf16x3", language_operator(num_layers=1, logit_chunk=200)
    step = {"step": 1e-3} if kind is FiniteDifferenceHessian else {}
    operator = kind(base.loss, base.params, base.batches, matmul_precision=name, **step)
    plain = dataclasses.replace(operator, matmul_precision="float32")
    v = random_vector(operator.shape_dtype, 0)
    mv = jax.jit(lambda op, x: op.mv(x))
    native = products_in(mv.trace(operator, v).lower(lowering_platforms=("cuda",)))
    assert len(native) == len(products_in(mv.trace(plain, v).lower(lowering_platforms=("cuda",)))) > 10
    assert all("algorithm" in precision for precision in native)
    # Of a product of that form XLA forgets the algorithm when it cuts the program for several devices.
    text = mv.trace(operator, v).lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"dot_general %[\w#]+, %[\w#]+, contracting_dims = \[1\] x \[0\]", text)
    assert re.search(r"dot_general %[\w#]+, %[\w#]+, contracting_dims = \[1\] x \[1\]", text)
    emulated = mv.lower(operator, v)  # on the processor: float32 products of parts, and nothing else
    assert len(products_in(emulated)) == len(native)
    assert set(products_in(emulated)) == {"precision = [HIGHEST, HIGHEST]"}


@pytest.mark.parametrize("name", ["bf16x6", "tf32"])
def test_products_of_the_hessian_are_off_by_the_algorithms_error(name):
    """Linear, symmetric and near the exact product: no derivative of the cutting is taken."""
    base = network()
    operator = dataclasses.replace(base, matmul_precision=name)
    v = random_vector(operator.shape_dtype, 0)
    product = operator @ v
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype("float64"), v)
        exact = base.in_dtype("float64") @ wide
        error, own = relative(product, exact), relative(base @ v, exact)
    bound = ALGORITHMS[name].error
    assert error < own + 8 * bound
    assert ALGORITHMS[name].error < 2**-14 or error > 3 * own  # nearer to float32 the two errors are of one size
    both = jax.jit(jax.vmap(operator.mv))(jax.tree.map(lambda x: jnp.stack([x, x]), v))
    assert relative(jax.tree.map(lambda x: x[1], both), product) < own + 2 * bound
    assert relative(linearize(operator) @ v, product) < own + 2 * bound


def test_the_operator_says_its_precision_and_the_audit_measures_it():
    operator = network(matmul_precision="tf32")
    assert describe(operator)["matmul_precision"] == "tf32"
    assert describe(operator)["matmul_emulated"] is True
    assert describe(linearize(operator))["matmul_precision"] == "tf32"
    assert "matmul_precision" not in describe(network("bfloat16"))
    assert unit_roundoff(operator, operator.shape_dtype) == product_eps(2 * operator) == 2.0**-9
    assert operator.in_dtype("float32").matmul_precision == "float32"
    noise = audit(operator)
    assert noise.reference == "Hessian in float32"
    assert 1e-5 < noise.relative_error.random < 1e-2
    precise = audit(dataclasses.replace(operator, matmul_precision="bf16x6"))
    assert precise.reference == "Hessian in float64"
    assert precise.relative_error.random < 1e-5


def test_what_is_refused():
    base = language_operator(num_layers=1)
    fields = base.params, base.batches
    with pytest.raises(ValueError, match="one of float32, bf16x6, tf32x3, bf16x3, tf32"):
        Hessian(base.loss, *fields, matmul_precision="bf16")
    narrow = language_operator("bfloat16", num_layers=1)
    with pytest.raises(ValueError, match="computes in bfloat16: leave it at float32, or compute in float32"):
        Hessian(narrow.loss, *fields, matmul_precision="tf32")
    stored = Hessian(narrow.loss.in_dtype("float32"), narrow.params, base.batches, matmul_precision="tf32")
    assert stored.matmul_precision == "tf32"  # weights are stored narrow, products are float32
    assert set(get_args(MatmulPrecision)) == {"float32", *ALGORITHMS}
