"""What block-diagonal products get right: a dense matrix, the coupling map, and the laws that the study rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import matrix, operator_of

import jaxhess
from jaxhess.errors import InputError
from jaxhess.structure.fidelity import Fidelity, block_fidelity
from jaxhess.vectors import random_key

A = matrix([5.0, -3.0, 1.0, 0.5, -0.2, 0.1])
PARTS = ((0, 1, 2), (3,), (4, 5))
V = np.array([1.0, -0.5, 2.0, 0.3, -1.5, 0.7])


def three_blocks() -> jaxhess.Blocks:
    names = {f"matrix[{k}]": f"block {b}" for b, part in enumerate(PARTS) for k in part}
    rows = jaxhess.Blocks.by(operator_of(A).shape_dtype, "matrices").split("*", axis=0)
    return rows.merged(lambda name: next(block for row, block in names.items() if name.endswith(row[6:])))


def along(v: np.ndarray, numbers: list[int] | None = None) -> Fidelity:
    return block_fidelity(operator_of(A), three_blocks(), jnp.asarray(v, jnp.float32), numbers)


def test_errors_and_cosines_are_those_of_the_dense_matrix():
    own = np.zeros_like(V)
    for part in map(list, PARTS):
        own[part] = A[np.ix_(part, part)] @ V[part]
    full = A @ V
    places = [*map(list, PARTS), list(range(6))]
    found = along(V)
    for b, part in enumerate(places):
        y, d = full[part], own[part]
        error, cosine = np.linalg.norm(y - d) / np.linalg.norm(y), y @ d / np.linalg.norm(y) / np.linalg.norm(d)
        # Sums of few products in float32.
        assert found.error[b] == pytest.approx(error, rel=1e-5)
        assert found.cosine[b] == pytest.approx(cosine, abs=1e-5)
        assert found.excess[b] == pytest.approx(error**2 + cosine**2 - 1, abs=1e-5)
        o = y - d
        assert found.alignment[b] == pytest.approx(o @ d / np.linalg.norm(o) / np.linalg.norm(d), abs=1e-5)


def test_turning_the_sign_of_a_block_turns_that_of_what_others_contribute():
    """So that an error above 1 is as likely as the one below 1 which the turned probe has."""
    for b, part in enumerate(map(list, PARTS)):
        turned = -V
        turned[part] = V[part]
        before, after = along(V), along(turned)
        assert after.alignment[b] == pytest.approx(-before.alignment[b], abs=1e-5)
        assert abs(before.alignment[b]) > 0.01
        assert min(before.error[b], after.error[b]) < 1


def test_blocks_left_out_are_not_known_and_neither_is_the_whole():
    found, everything = along(V, [1]), along(V)
    np.testing.assert_array_equal(np.isnan(found.error), [True, False, True, True])
    assert found.error[1] == everything.error[1]
    with pytest.raises(InputError, match="no block 3"):
        along(V, [3])


def test_of_a_matrix_it_is_that_of_the_coupling_map():
    operator, blocks = operator_of(A), three_blocks()
    mapped = jaxhess.coupling_map(operator, blocks, probes=1, seed=3)
    v = jaxhess.random_probe(jax.random.fold_in(random_key(3), 0), operator.shape_dtype)
    found = block_fidelity(operator, blocks, v)
    np.testing.assert_allclose(found.error[:3], mapped.fidelity_error[:, 0], rtol=1e-4)
    np.testing.assert_allclose(found.cosine[:3], mapped.fidelity_cosine[:, 0], atol=1e-5)
    assert found.error[3] == pytest.approx(mapped.whole_error[0], rel=1e-5)
    assert found.cosine[3] == pytest.approx(mapped.whole_cosine[0], abs=1e-5)
