"""Small classifiers with a penalty, trained to a minimum in float64, and again without each of their examples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from jaxhess.errors import InputError
from scripts.training.images import CLASSES, Source, load_images

Array = npt.NDArray[np.float64]

CONVERGED = 1e-9
"""Norm of the objective's gradient at which a minimum is reached; float64 allows 1e-14."""
NEWTON_STEPS = 200
ADAM_STEPS = 600


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model of pooled images.

    Attributes:
        name: In tables.
        hidden: Neurons of its hidden layer; None: there is none, and the objective is convex.
        pooled: Pixels along a side of the squares that are averaged: 8 x 8 pixels become (8 / pooled)^2 features.
    """

    name: str
    hidden: int | None
    pooled: int

    def initial(self, seed: int) -> Any:
        """Random parameters in float64; zeros where the objective is convex."""
        features, random = (8 // self.pooled) ** 2, np.random.default_rng(seed)
        if self.hidden is None:
            return {"out": {"bias": jnp.zeros(CLASSES), "kernel": jnp.zeros((features, CLASSES))}}
        up, down = (
            random.normal(size=(a, b)) / np.sqrt(a) for a, b in ((features, self.hidden), (self.hidden, CLASSES))
        )
        return {
            "hidden": {"bias": jnp.zeros(self.hidden), "kernel": jnp.asarray(up)},
            "out": {"bias": jnp.zeros(CLASSES), "kernel": jnp.asarray(down)},
        }

    def images(self, source: Source, seed: int, train: int, test: int) -> tuple[Any, Any]:
        """(inputs, labels) to train on and to test with, float64, another draw for every seed.

        Raises:
            InputError: There are not as many.
        """
        images, labels = load_images(source, 1797 if source == "digits" else train + test, seed)
        if train + test > len(labels):
            raise InputError(f"There are {len(labels)} digits, and {train} + {test} are asked for.")
        order = np.random.default_rng(seed).permutation(len(labels))[: train + test]
        side = 8 // self.pooled
        pooled = np.asarray(images, np.float64)[order, ..., 0].reshape(-1, side, self.pooled, side, self.pooled)
        inputs, found = jnp.asarray(pooled.mean((2, 4)).reshape(len(order), -1)), jnp.asarray(np.asarray(labels)[order])
        return (inputs[:train], found[:train]), (inputs[train:], found[train:])


def logits(params: Any, inputs: jax.Array) -> jax.Array:
    """Of a classifier's parameters, computed in their dtype."""
    x = inputs.astype(params["out"]["kernel"].dtype)
    if "hidden" in params:
        x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


def losses(params: Any, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    """[n] cross-entropies."""
    inputs, labels = data
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, inputs), labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Retrained:
    """A minimum, and those without each example, the other examples keeping their weights 1 / n.

    Attributes:
        params: At the minimum with all examples.
        changes: [rows, tests] of every test image's loss. NaN where no minimum was reached.
        gradient: Norm of the objective's gradient at the minimum with all examples.
        smallest: Smallest eigenvalue of the Hessian of cross-entropy there, without the penalty.
        moved: [rows] distance of the parameters that leaving out an example caused, in that of the origin.
    """

    params: Any
    changes: Array
    gradient: float
    smallest: float
    moved: Array


def retrained(
    classifier: Classifier,
    train: Any,
    test: Any,
    penalty: float,
    seed: int,
    rows: npt.NDArray[np.int64],
    again: bool = False,
) -> Retrained:
    """Trains with all examples, then without each of them; 64-bit mode must be on.

    The objective is the mean cross-entropy plus penalty / 2 |params|^2. From random weights Adam leads to the
    neighbourhood of a minimum and Newton's method to it.

    Args:
        rows: Numbers of the examples that are left out, one at a time.
        again: Train without an example from the same random weights by the same steps, in place of from the minimum
            with all examples.

    Raises:
        InputError: No minimum was reached with all examples.
    """
    start, unravel = jax.flatten_util.ravel_pytree(classifier.initial(seed))
    objective = _Objective(unravel, train, penalty)
    everything = jnp.ones(len(train[1]))
    minimum, gradient = _newton(objective, _adam(objective, start, everything), everything)
    if not gradient <= CONVERGED:
        raise InputError(
            f"Training of {classifier.name} ended with a gradient of {gradient:.1g}: use a larger penalty."
        )
    hessian = _hessian(objective, minimum, everything)
    without = 1 - jnp.eye(len(train[1]))[jnp.asarray(rows)]
    if again:
        begun = jax.lax.map(lambda w: _adam(objective, start, w), without, batch_size=32)
    else:
        begun = jnp.broadcast_to(minimum, (len(without), len(minimum)))
    ends, norms = _ends(objective, begun, without, hessian)
    reached = np.asarray(norms) <= CONVERGED
    base = losses(unravel(minimum), test)
    changes = np.array(jax.lax.map(lambda theta: losses(unravel(theta), test) - base, ends))
    changes[~reached] = np.nan
    moved = np.linalg.norm(np.asarray(ends - minimum), axis=1)
    smallest = float(np.linalg.eigvalsh(np.asarray(hessian))[0]) - penalty
    return Retrained(unravel(minimum), changes, gradient, smallest, moved / float(jnp.linalg.norm(minimum)))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class _Objective:
    """sum_i w_i loss_i / n + penalty / 2 |theta|^2 of flat parameters."""

    unravel: Callable[[jax.Array], Any]
    data: Any
    penalty: float

    def __call__(self, theta: jax.Array, weights: jax.Array) -> jax.Array:
        mean = jnp.vdot(weights, losses(self.unravel(theta), self.data)) / len(weights)
        return mean + self.penalty / 2 * jnp.vdot(theta, theta)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.data, self.penalty), self.unravel

    @classmethod
    def tree_unflatten(cls, unravel: Any, children: Any) -> _Objective:
        return cls(unravel, *children)


@jax.jit
def _adam(objective: _Objective, theta: jax.Array, weights: jax.Array) -> jax.Array:
    rule = optax.adam(optax.linear_schedule(0.05, 0.0, ADAM_STEPS))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        theta, state = carry
        updates, state = rule.update(jax.grad(objective)(theta, weights), state)
        return (theta + updates, state), None

    return jax.lax.scan(step, (theta, rule.init(theta)), None, ADAM_STEPS)[0][0]


_hessian = jax.jit(lambda objective, theta, weights: jax.hessian(objective)(theta, weights))
_value_and_gradient = jax.jit(lambda objective, theta, weights: jax.value_and_grad(objective)(theta, weights))


def _newton(objective: _Objective, theta: jax.Array, weights: jax.Array) -> tuple[jax.Array, float]:
    """A minimum and the gradient's norm there, by Newton's method with Levenberg-Marquardt damping."""
    damping = 1e-3
    value, gradient = _value_and_gradient(objective, theta, weights)
    for _ in range(NEWTON_STEPS):
        if float(jnp.linalg.norm(gradient)) <= CONVERGED:
            break
        hessian = np.asarray(_hessian(objective, theta, weights))
        lowest = float(np.linalg.eigvalsh(hessian)[0])
        shift = damping + max(0.0, -2 * lowest)
        new = theta - np.linalg.solve(hessian + shift * np.eye(len(hessian)), np.asarray(gradient))
        new_value, new_gradient = _value_and_gradient(objective, new, weights)
        if float(new_value) <= float(value) + 1e-14:
            theta, value, gradient, damping = new, new_value, new_gradient, damping / 10
        else:
            damping *= 10
    return theta, float(jnp.linalg.norm(gradient))


@functools.partial(jax.jit, static_argnames="steps")
def _ends(
    objective: _Objective, begun: jax.Array, weights: jax.Array, hessian: jax.Array, steps: int = 400
) -> tuple[jax.Array, jax.Array]:
    """[m, parameters] minima from these points with these weights, and the gradients' norms there.

    BFGS with the Hessian of all examples to start from; a step that makes the gradient grow is shortened.
    """

    def gradient(theta: jax.Array, w: jax.Array) -> jax.Array:
        return jax.grad(objective)(theta, w)

    def one(theta: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        def goes_on(state: Any) -> jax.Array:
            return (state[0] < steps) & (jnp.linalg.norm(state[2]) > CONVERGED)

        def step(state: Any) -> Any:
            k, theta, g, inverse, size = state
            s = -size * (inverse @ g)
            new = gradient(theta + s, w)
            y = new - g
            curved = s @ y
            by = inverse @ y
            updated = (
                inverse + ((curved + y @ by) * jnp.outer(s, s) / curved - jnp.outer(by, s) - jnp.outer(s, by)) / curved
            )
            taken = jnp.linalg.norm(new) < 2 * jnp.linalg.norm(g)
            inverse = jnp.where(curved > 0, updated, inverse)  # without positive curvature along s, as it was
            size = jnp.where(taken, jnp.minimum(1.0, 2 * size), size / 4)
            return k + 1, jnp.where(taken, theta + s, theta), jnp.where(taken, new, g), inverse, size

        start = (0, theta, gradient(theta, w), jnp.linalg.inv(hessian), jnp.float64(1))
        _, theta, g, _, _ = jax.lax.while_loop(goes_on, step, start)
        return theta, jnp.linalg.norm(g)

    return jax.lax.map(lambda pair: one(*pair), (begun, weights), batch_size=16)
