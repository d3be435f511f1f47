"""The steps are those of the library's conjugate gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from small_models import Diagonal, matrix, operator_of

from jaxhess import conjugate_gradients
from scripts.studies.approximations.solve import iterations

TOLERANCE = 1e-6


def test_steps_are_those_of_the_library():
    a = matrix(np.geomspace(1, 1e3, 60)) + np.diag(np.geomspace(1e3, 1, 60))
    sides = np.random.default_rng(1).normal(size=(60, 2))
    diagonal = np.diag(a)
    ours = iterations(a, sides, [np.array, lambda v: v / diagonal[:, None]], TOLERANCE, 200)
    assert ours[0].min() > 10
    with jax.enable_x64(True):
        operator = operator_of(a, "float64")
        for row, preconditioner in zip(ours, (None, Diagonal(jnp.asarray(1 / diagonal))), strict=True):
            for steps, b in zip(row, sides.T, strict=True):
                found = conjugate_gradients(
                    operator, jnp.asarray(b), tolerance=TOLERANCE, max_steps=200, preconditioner=preconditioner
                )
                assert found.converged
                # Rounding may decide on which side of the tolerance a residual lies.
                assert abs(len(found.history) - 1 - steps) <= 1
