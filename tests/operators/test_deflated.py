"""An operator less its leading eigenpairs: eigenvalues become zero, others stay, and everything else is known of it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Diagonal, matrix, operator_of

from jaxhess import LowRank, MatrixOperator, audit, leading_eigenpairs
from jaxhess.errors import InputError
from jaxhess.operators.facts import checksum, describe
from jaxhess.operators.precision import exact_operator, product_dtypes
from jaxhess.slq.record import operator_record

EIGENVALUES = np.array([9.0, -7.0, 4.0, 2.0, 1.0, 0.5, -0.25])


def pairs_of(values, vectors):
    return types.SimpleNamespace(values=values, vectors=vectors)


def test_deflated_eigenvalues_become_zero_and_the_others_stay():
    with jax.enable_x64(True):
        a = matrix(EIGENVALUES)
        values, vectors = np.linalg.eigh(a)
        chosen = np.argsort(-np.abs(values))[:3]
        found = operator_of(a, "float64").deflated(pairs_of(values[chosen], jnp.asarray(vectors[:, chosen].T)))
        left = np.linalg.eigvalsh(found.to_matrix())
    # Products of sums of seven terms in float64: some eps of the norm, 9.
    np.testing.assert_allclose(left, np.sort([0, 0, 0, *EIGENVALUES[3:]]), atol=1e-13)


def test_a_tree_is_deflated_like_its_dense_matrix():
    numbers = np.random.default_rng(0)
    with jax.enable_x64(True):
        operator = Diagonal({"b": jnp.asarray(numbers.normal(size=2)), "w": jnp.asarray(numbers.normal(size=(3, 2)))})
        flat = numbers.normal(size=(2, 8))
        vectors = {"b": jnp.asarray(flat[:, :2]), "w": jnp.asarray(flat[:, 2:].reshape(2, 3, 2))}
        left = operator.deflated(pairs_of(np.array([3.0, -0.5]), vectors))
        diagonal, unravel = jax.flatten_util.ravel_pytree(operator.entries)
        found = [jax.flatten_util.ravel_pytree(left @ unravel(row))[0] for row in jnp.eye(8)]
    # Each entry is a sum of three products.
    np.testing.assert_allclose(found, np.diag(diagonal) - flat.T @ np.diag([3.0, -0.5]) @ flat, atol=1e-13)


def test_the_librarys_eigenpairs_leave_their_residuals():
    operator = operator_of(matrix(EIGENVALUES))
    pairs = leading_eigenpairs(operator, 2)
    left = operator.deflated(pairs)
    for k in range(2):
        length = float(jnp.linalg.norm(left @ pairs.vectors[k]))
        # |A q_i - theta_i q_i| and what is not orthogonal of the vectors, a few eps of float32 in seven entries.
        assert length <= pairs.residuals[k] + 9 * 20 * np.finfo(np.float32).eps
    np.testing.assert_allclose(leading_eigenpairs(left, 1).values, [4], rtol=1e-3)


def test_narrow_vectors_are_summed_wide():
    values = np.array([1.0, 1.0], np.float32)
    vectors = jnp.asarray([[256.0], [1.0]], jnp.bfloat16)
    found = LowRank(values, vectors) @ jnp.ones(1)  # in bfloat16 256^2 + 1 = 256^2
    assert float(found[0]) == 256**2 + 1
    assert LowRank(values, vectors).shape_dtype.dtype == jnp.bfloat16


def test_a_mesh_keeps_the_shardings_of_the_vectors():
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    vectors = {"w": jax.device_put(jnp.ones((2, 4)), cut)}
    like = LowRank(np.ones(2, np.float32), vectors).shape_dtype["w"]
    assert (like.shape, like.sharding.spec) == ((4,), jax.P("fsdp"))


def test_records_checksums_precision_and_audits_know_it():
    a = operator_of(matrix(EIGENVALUES))
    pairs = pairs_of(np.array([2.0, 1.0], np.float32), jnp.eye(2, 7))
    left = a.deflated(pairs)
    low_rank = {"kind": "LowRank", "rank": 2}
    assert describe(left) == {
        "kind": "SumOperator",
        "terms": [
            {"kind": "MatrixOperator"},
            {"kind": "ScaledOperator", "operator": low_rank, "factor": -1},
        ],
    }
    assert operator_record(low_rank).details == {"rank": 2}
    other = a.deflated(pairs_of(pairs.values, 2 * pairs.vectors))
    assert checksum(left) == checksum(a.deflated(pairs)) != checksum(other)
    assert product_dtypes(left) == ("float32",)
    with jax.enable_x64(True):
        wide = exact_operator(left, "float64")
        assert product_dtypes(wide) == ("float64",)
        expected = np.asarray(a.matrix, np.float64) - np.diag([2.0, 1.0, 0, 0, 0, 0, 0])
        np.testing.assert_allclose(wide.to_matrix(), expected, atol=1e-15)
    noise = audit(left)
    assert noise.reference == "SumOperator in float64"
    assert noise.relative_error.random < 100 * np.finfo(np.float32).eps


def test_other_values_compile_nothing_again():
    traced = []

    class Counting(LowRank):
        def mv(self, v):
            traced.append(1)
            return super().mv(v)

    jax.tree_util.register_dataclass(Counting, ["values", "vectors"], [])
    for k in range(1, 4):
        Counting(np.full(2, k, np.float32), k * jnp.eye(2)) @ jnp.ones(2)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        (3.0, "not by float"),
        (pairs_of(np.ones(2), jnp.ones((3, 7))), r"vectors has shape \(3, 7\); its first axis must be 2"),
        (pairs_of(np.ones(0), jnp.ones((0, 7))), "there must be at least one"),
        (pairs_of(np.ones((1, 1)), jnp.ones((1, 7))), "there must be at least one"),
        (pairs_of(np.ones(1), jnp.ones((1, 7), int)), "it must be floating point"),
        (pairs_of(np.ones(1), jnp.ones((1, 6))), r"it must be \(7,\)"),
    ],
)
def test_what_are_no_pairs_of_the_operator_is_refused(pairs, sentence):
    with pytest.raises(InputError, match=sentence):
        MatrixOperator(jnp.eye(7)).deflated(pairs)
