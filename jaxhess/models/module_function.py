"""A Flax NNX module as a pure function of its parameters, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxhess.errors import InputError


def module_function(module: nnx.Module) -> tuple[Callable[..., Any], nnx.State]:
    """`function(params, *args)` that is `module(*args)` with other parameters, and the module's own parameters.

    The module is copied and put into evaluation mode: dropout is off, and norms take their running statistics, which
    are held fixed. So the loss is a function of parameters and batch alone, which a Hessian needs.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from flax import nnx
        >>> function, params = jaxhess.module_function(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        >>> batch = jnp.ones((2, 4)), jnp.array([0, 1])
        >>> jaxhess.GaussNewton(jaxhess.SoftmaxCrossEntropy(function), params, [batch]).dim
        15

    Args:
        module: Variables of other kinds than `nnx.Param` are constants of the function, and of the programs that are
            compiled from it: they should be small, as statistics are.

    Raises:
        InputError: There is no `nnx.Param`; or, when the function is called, the module draws random numbers or updates
            a variable although it is in evaluation mode.
    """
    copy = nnx.clone(module)
    copy.eval()
    graph, *states = nnx.split(copy, nnx.Param, ...)
    params, rest = states
    if not jax.tree.leaves(params):
        raise InputError(f"This {type(module).__name__} has no nnx.Param: there is nothing to differentiate by.")

    def function(params: Any, *args: Any, **kwargs: Any) -> Any:
        called = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))  # variables of its own, which it may update
        result = called(*args, **kwargs)
        _check_unchanged(rest, nnx.state(called, nnx.Not(nnx.Param)))
        return result

    return function, params


def _check_unchanged(before: nnx.State, after: nnx.State) -> None:
    """Raises InputError where a call has changed a variable that is no parameter."""
    given = dict(nnx.to_flat_state(before))
    for path, variable in nnx.to_flat_state(after):
        if path in given and variable.get_value() is given[path].get_value():
            continue
        name = ".".join(map(str, path))
        if isinstance(variable, nnx.RngState):
            raise InputError(
                f"The module draws random numbers ({name}), so that its loss is another at each call: turn dropout off "
                "(deterministic=True), or give the module fixed noise as data."
            )
        raise InputError(
            f"The module updates {name} ({type(variable).__name__}) when it is called: let norms use their running "
            "statistics (use_running_average=True)."
        )
