"""What Adam divides by, from the state of an optimiser in optax."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.errors import InputError
from jaxhess.operators.restriction import leaf_name
from jaxhess.vectors import Vector


def adam_preconditioner(
    state: Any,
    params: Any,
    *,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    bias_correction: bool = True,
) -> Vector:
    """The diagonal D that Adam divides by, `sqrt(nu / (1 - b2^count) + eps_root) + eps`, a tree like the parameters.

    The eigenvalues of `H.preconditioned(D)` are the sharpness as Adam sees it: see `adam_threshold`. Formulas and names
    are those of optax (`scale_by_adam`); those of PyTorch's Adam and AdamW are the same with `eps_root=0`, and
    `convert.load_preconditioner` reads its files. Decoupled weight decay has no part in it. Where gradients were
    clipped, nu is that of clipped ones, and so is the step: eigenvalues of `D^-1 H` are then too large by that factor.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxhess, optax
        >>> params = {"w": jnp.zeros(2)}
        >>> optimizer = optax.chain(optax.clip_by_global_norm(100.0), optax.adamw(0.1))
        >>> _, state = optimizer.update({"w": jnp.array([3.0, -4.0])}, optimizer.init(params), params)
        >>> jaxhess.adam_preconditioner(state, params)["w"].round(4)  # after one step that of the gradient's size
        Array([3., 4.], dtype=float32)

    Args:
        state: Of any optimiser made with optax: chained, masked, for several groups of parameters
            (`optax.multi_transform`), or of `nnx.Optimizer`. Every parameter must have one second moment in it.
            (RAdam, NAdam, LAMB and Adamax keep such a state too, which cannot be told from Adam's; D is not what they
            divide by.)
        params: The parameters, or anything with their names and shapes.
        b2: Decay of the second moments in that training; the state does not hold it.
        eps: As in that training.
        eps_root: As in that training.
        bias_correction: Divide by `1 - b2^count`, as Adam does.

    Raises:
        InputError: There is no such state; a parameter has no second moment, two, one of another shape, or one with a
            negative or non-finite entry; a moment has no parameter; D would have a zero; an option is out of range. The
            message names the first parameter.
    """
    if not 0 <= b2 < 1 or not 0 <= eps < math.inf or not 0 <= eps_root < math.inf:
        raise InputError(
            f"b2 {b2}, eps {eps}, eps_root {eps_root}: 0 <= b2 < 1, and finite and not negative are right."
        )
    moments = _moments(state)
    found = []
    for path, like in jax.tree.flatten_with_path(params)[0]:
        name = leaf_name(path)
        if name not in moments:
            raise InputError(
                f"The optimizer's state has no second moment of {name}: it is of another model, or masked."
            )
        nu, count = moments.pop(name)
        if nu.shape != like.shape:
            raise InputError(
                f"The optimizer's state is of another model: the second moment of {name} has shape {list(nu.shape)}, "
                f"the parameter {list(like.shape)}."
            )
        correction = 1 - b2**count if bias_correction else 1.0
        if not correction > 0:
            raise InputError(f"The optimizer has made {count} steps: after none there are no second moments.")
        smallest, finite = (float(x) for x in _smallest(nu))
        if not finite or smallest < 0:
            wrong = f"a negative entry, {smallest:.3g}" if finite else "entries that are NaN or infinite"
            raise InputError(f"The second moment of {name} has {wrong}: it is a mean of squares.")
        if smallest + eps + eps_root == 0:
            raise InputError(f"The second moment of {name} has a zero, and eps is 0: nothing can be divided by it.")
        found.append(_denominator(nu, correction, eps, eps_root))
    if moments:
        raise InputError(f"The optimizer's state is of another model: it has a second moment of {next(iter(moments))}.")
    return jax.tree.unflatten(jax.tree.structure(params), found)


def adam_threshold(learning_rate: float, b1: float = 0.9, steps: int | None = None) -> float:
    """The eigenvalue of `D^-1 H` above which Adam with fixed D is unstable on a quadratic: `(2 + 2 b1)/((1 - b1) lr)`.

    38 / learning rate for b1 = 0.9. From Cohen et al., "Adaptive Gradient Methods at the Edge of Stability" (arXiv
    2207.14484, cited from its abstract and a summary); D is that of `adam_preconditioner`. `2 / lr` for b1 = 0 is
    gradient descent's.

    Examples:
        >>> import jaxhess
        >>> round(jaxhess.adam_threshold(1e-3)), jaxhess.adam_threshold(0.5, b1=0.0)
        (38000, 4.0)

    Args:
        learning_rate: Of the next step.
        b1: Decay of first moments.
        steps: That were made: after few of them Adam corrects the bias of its mean of gradients, divided by 1 -
            b1^steps, as a larger rate would. None: so many that there is none.

    Raises:
        InputError: The learning rate is not positive, b1 not from 0 to 1, or no step was made.
    """
    if not 0 < learning_rate < math.inf or not 0 <= b1 < 1:
        raise InputError(f"Learning rate {learning_rate}, b1 {b1}: a positive number, and 0 <= b1 < 1, are right.")
    if steps is not None and steps < 1:
        raise InputError(f"steps is {steps}; before the first one Adam has no threshold.")
    correction = 1.0 if steps is None else 1 - b1**steps
    return correction * (2 + 2 * b1) / ((1 - b1) * learning_rate)


def _moments(state: Any) -> dict[str, tuple[jax.Array, int]]:
    """Second moments with the steps that they are of, by the parameters' names.

    What is masked in one part of a state is an empty node there, without leaves.
    """

    def is_adam(x: Any) -> bool:
        return type(x).__name__ == "ScaleByAdamState"

    parts = [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]
    if not parts:
        raise InputError(
            "The optimizer's state holds no second moments of Adam: no part of it is a ScaleByAdamState (optax.adam, "
            "adamw)."
        )
    found: dict[str, tuple[jax.Array, int]] = {}
    for part in parts:
        count = int(np.asarray(jax.tree.leaves(part.count)[0]))  # of flax it is a variable
        for path, nu in jax.tree.flatten_with_path(part.nu)[0]:
            name = leaf_name(path)
            if name in found:
                raise InputError(
                    f"The optimizer's state has two second moments of {name}: give the part that is meant."
                )
            found[name] = (nu, count)
    return found


@jax.jit
def _smallest(nu: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(nu), jnp.isfinite(nu).all()


@jax.jit
def _denominator(nu: jax.Array, correction: float, eps: float, eps_root: float) -> jax.Array:
    wide = jnp.promote_types(nu.dtype, jnp.float32)
    over, outside, inside = (jnp.asarray(x, wide) for x in (correction, eps, eps_root))
    return jnp.sqrt(nu.astype(wide) / over + inside) + outside
