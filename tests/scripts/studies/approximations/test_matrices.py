"""Structures are the matrices that their storage says: products, inverses and definiteness against dense ones."""

import numpy as np
import pytest
from scipy.linalg import block_diag

from scripts.studies.approximations.kronecker import Factors, LinearMap, nearest
from scripts.studies.approximations.matrices import BlockMatrix, KroneckerMatrix, MaskedMatrix, PlusEigenpairs
from scripts.studies.approximations.solve import iterations

NUMBERS = np.random.default_rng(0)
LABELS = np.array([0, 1, 0, 2, 1, 0, 3])


def positive(n: int) -> np.ndarray:
    root = NUMBERS.normal(size=(n, n))
    return root @ root.T


C = positive(7)
SAME_BLOCK = LABELS[:, None] == LABELS
BLOCKS = BlockMatrix.of(C, LABELS)
A, G = positive(2), positive(3)
MAP = LinearMap("w", np.array([[6, 0, 3], [1, 5, 2]]))
KRONECKER = KroneckerMatrix.of(C, [MAP], {"w": Factors(A, G)})
DIAGONAL_INPUTS = KroneckerMatrix.of(C, [MAP], {"w": Factors(np.diag(A), G)})
Q = NUMBERS.normal(size=(7, 2))
VALUES = np.array([2.0, 0.5])


def with_factors(a: np.ndarray) -> np.ndarray:
    dense = np.zeros((7, 7))
    places = MAP.places.ravel()
    dense[np.ix_(places, places)] = np.kron(a, G)
    dense[4, 4] = C[4, 4]
    return dense


EDGES = np.abs(np.arange(4)[:, None] - np.arange(4)) <= 1
MASKED = MaskedMatrix.of(C, LABELS, EDGES)
BAND = np.where(EDGES[LABELS[:, None], LABELS], C, 0)
LOW_RANK = (Q * VALUES) @ Q.T
CASES = {
    "blocks": (BLOCKS, np.where(SAME_BLOCK, C, 0), 9 + 4 + 1 + 1, 6 + 3 + 1 + 1),
    "diagonal": (BlockMatrix.of(C, np.arange(7)), np.diag(np.diag(C)), 7, 7),
    "band": (MASKED, BAND, 49 - 2 * (3 + 3 + 2), 4 + (49 - 16) // 2 - 1 + 1),
    "Kronecker": (KRONECKER, with_factors(A), 4 + 9 + 1, 3 + 6 + 1),
    "one-hot inputs": (DIAGONAL_INPUTS, with_factors(np.diag(np.diag(A))), 2 + 9 + 1, 2 + 6 + 1),
    "eigenpairs": (PlusEigenpairs(VALUES, Q), LOW_RANK, 16, 16),
    "eigenpairs and blocks": (PlusEigenpairs(VALUES, Q, BLOCKS), LOW_RANK + np.where(SAME_BLOCK, C, 0), 31, 27),
}


@pytest.mark.parametrize("name", CASES)
def test_a_structure_is_its_dense_matrix(name):
    structure, dense, storage, by_triangles = CASES[name]
    assert (structure.storage(), structure.storage(triangles=True)) == (storage, by_triangles)
    # Sums of a few products of numbers below 100, in float64.
    np.testing.assert_allclose(structure.product(np.eye(7)), dense, atol=1e-12)
    shift = 100.0  # all are positive definite with it
    inverse = structure.inverse(shift)
    np.testing.assert_allclose(inverse(dense + shift * np.eye(7)), np.eye(7), atol=1e-12)


@pytest.mark.parametrize("base", [None, BLOCKS])
def test_what_is_not_positive_definite_has_no_inverse(base):
    """Shifts on both sides of the dense matrix's own least eigenvalue, of values of both signs."""
    structure = PlusEigenpairs(np.array([-3.0, 0.5]), Q, base)
    least = np.linalg.eigvalsh(structure.product(np.eye(7)))[0]
    assert least < 0
    assert structure.inverse(-least * 0.999) is None
    assert structure.inverse(-least * 1.001) is not None
    assert BlockMatrix.of(-C, LABELS).inverse(0.0) is None
    assert KroneckerMatrix.of(C, [MAP], {"w": Factors(A, -G)}).inverse(1e-3) is None


def test_blocks_of_what_eigenpairs_leave():
    values, vectors = np.linalg.eigh(C)
    left = BlockMatrix.of(C, LABELS, (values[-2:], vectors[:, -2:])).product(np.eye(7))
    rest = C - (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
    np.testing.assert_allclose(left, np.where(SAME_BLOCK, rest, 0), atol=1e-12)


def test_the_nearest_factors_are_those_of_the_larger_term():
    """Of two Kronecker products whose factors are orthogonal, the longer one is nearest to their sum."""
    a, b = np.diag([1.0, 1.0]), np.array([[0.0, 1.0], [1.0, 0.0]])
    g, h = np.diag([2.0, 1.0, 1.0]), np.diag([0.0, 1.0, -1.0])
    dense = block_diag(3 * np.kron(a, g) + np.kron(b, h), 5.0)
    found = nearest(dense, [LinearMap("w", np.arange(6).reshape(2, 3))])["w"]
    np.testing.assert_allclose(np.kron(*found), 3 * np.kron(a, g), atol=1e-12)
    assert np.trace(found.inputs) > 0


def test_runs_end_when_their_residual_says_so():
    sides = NUMBERS.normal(size=(7, 3))
    shifted = C + np.eye(7)
    exact = np.linalg.inv(shifted)
    steps = iterations(shifted, sides, [np.array, lambda v: exact @ v], 1e-8, 50)
    assert (steps[1] == 1).all()
    assert (steps[0] > 1).all()
    assert (iterations(shifted, sides, [np.array], 1e-8, 2) == -1).all()
