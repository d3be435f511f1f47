"""Short trainings of small models: the same steps with several optimizers, learning rates and seeds, compared."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from jaxhess.errors import InputError
from jaxhess.krylov.errors import student_factor

Array = npt.NDArray[np.float64]
Loss = Callable[[Any, Any], tuple[jax.Array, jax.Array]]
Optimizer = Callable[[optax.Schedule], optax.GradientTransformation]
"""From a learning rate, a function of the step. It is static in compiled programs: pass the same object again."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingTask:
    """A model, its loss and its data.

    Attributes:
        name: In tables.
        loss: `loss(params, batch)` -> (sum, count).
        initial: The parameters of a seed.
        data: Arrays whose leading axis is that of the examples.
        batch: Examples of a step, drawn with replacement; None: all of them at every step.
    """

    name: str
    loss: Loss
    initial: Callable[[int], Any]
    data: Any
    batch: int | None = None

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(jax.tree.leaves(self.data)[0])

    def order(self, steps: int, seed: int) -> jax.Array:
        """[steps, batch] the examples of each step, the same for every optimizer."""
        if self.batch is None:
            return jnp.broadcast_to(jnp.arange(self.examples), (steps, self.examples))
        numbers = np.random.default_rng(seed).integers(0, self.examples, (steps, self.batch))
        return jnp.asarray(numbers.astype(np.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """Losses of one optimizer after all steps.

    Attributes:
        rates: Learning rates, ascending.
        losses: [rates, seeds] mean loss over all data at the end; infinite where a run diverged.
        params: For every rate and seed the parameters at the end.
    """

    rates: tuple[float, ...]
    losses: Array
    params: list[list[Any]] = dataclasses.field(repr=False)

    @property
    def best(self) -> int:
        """The number of the rate whose loss, the mean over seeds, is least."""
        return int(np.argmin(self.losses.mean(1)))

    @property
    def at_an_end(self) -> bool:
        """Whether the best rate is the smallest or the largest, so that one beyond could be better."""
        return self.best in (0, len(self.rates) - 1)

    def at(self, rate: float) -> Array:
        """[seeds] losses with this rate."""
        return self.losses[self.rates.index(rate)]


def sweep(
    problem: TrainingTask, optimizer: Optimizer, rates: Sequence[float], seeds: Sequence[int], steps: int
) -> Sweep:
    """Trains from every seed with every learning rate.

    A seed gives the initial parameters and the order of the data: runs of the same seed differ by the optimizer alone.
    The learning rate rises over the first tenth of the steps and then falls linearly to zero.
    """
    ascending = tuple(sorted(rates))
    starts = [problem.initial(seed) for seed in seeds]
    ends: list[list[Any]] = []
    for rate in ascending:
        ends.append([])
        for seed, start in zip(seeds, starts, strict=True):
            order = problem.order(steps, seed)
            ends[-1].append(_descend(start, problem.data, order, rate, loss=problem.loss, optimizer=optimizer))
    losses = np.array([[mean_loss(problem, params) for params in row] for row in ends])
    return Sweep(ascending, np.where(np.isfinite(losses), losses, np.inf), ends)


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"))
def _descend(
    params: Any, data: Any, order: jax.Array, rate: float | jax.Array, *, loss: Loss, optimizer: Optimizer
) -> Any:
    """The parameters after a step for every row of `order`."""
    steps = len(order)
    warm = max(1, steps // 10)

    def schedule(count: Any) -> jax.Array:
        return rate * jnp.minimum((count + 1) / warm, (steps - count) / (steps - warm + 1))

    transformation = optimizer(schedule)

    def mean(params: Any, batch: Any) -> jax.Array:
        total, count = loss(params, batch)
        return total / count

    def step(carry: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        gradient = jax.grad(mean)(params, jax.tree.map(lambda x: x[rows], data))
        updates, state = transformation.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, transformation.init(params)), order)[0][0]


def mean_loss(problem: TrainingTask, params: Any) -> float:
    """Over all data."""
    total, count = _loss(params, problem.data, loss=problem.loss)
    return float(total) / float(count)


@functools.partial(jax.jit, static_argnames="loss")
def _loss(params: Any, data: Any, *, loss: Loss) -> tuple[jax.Array, jax.Array]:
    return loss(params, data)


def over_seeds(values: npt.ArrayLike) -> tuple[float, float]:
    """The mean of independent values, and half the width of its 95% interval (Student's t); infinite values: NaN, 0.

    Examples:
        >>> from scripts.training.short_runs import over_seeds
        >>> mean, error = over_seeds([1.0, 2.0, 3.0])
        >>> mean, round(error, 2)  # 4.30 standard errors
        (2.0, 2.48)

    Raises:
        InputError: There are less than two: their scatter is not known.
    """
    found = np.asarray(values, float)
    if found.size < 2:
        raise InputError("An error over seeds needs two seeds or more.")
    if not np.isfinite(found).all():
        return math.nan, 0.0
    return float(found.mean()), student_factor(found.size - 1, 0.95) * float(found.std(ddof=1)) / math.sqrt(found.size)


def check_runs(seeds: int, steps: int, *rates: Sequence[float]) -> None:
    """Raises InputError where options make no comparison."""
    if seeds < 2:
        raise InputError(f"--seeds {seeds}: an error over seeds needs two or more.")
    if steps < 10:
        raise InputError(f"--steps {steps}: at least 10 are needed.")
    if any(not row or min(row) <= 0 or not math.isfinite(max(row)) for row in rates):
        raise InputError("Learning rates are positive numbers, at least one for each optimizer.")


def sgd(rate: optax.Schedule) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum 0.9."""
    return optax.sgd(rate, momentum=0.9)


def adam(rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam with decay rates 0.9 and 0.99, the latter lower than usual because runs are short."""
    return optax.adam(rate, b1=0.9, b2=0.99)


def missed(slower: npt.ArrayLike, faster: npt.ArrayLike, initial: npt.ArrayLike) -> Array:
    """The share of the faster optimizer's reduction of the loss that the slower one misses, seed by seed.

    (slower - faster) / (initial - faster): 0 if both end at the same loss, 1 if the slower one has learnt nothing.
    Unlike a ratio of losses it does not depend on what part of the loss no model can reduce.
    """
    a, b, start = (np.asarray(x, float) for x in (slower, faster, initial))
    return (a - b) / (start - b)
