"""Dataclasses as pytrees whose structure says which class they are of."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def register_dataclass(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree: fields with `metadata={"static": True}` are static, all others data.

    As `jax.tree_util.register_dataclass`, but for one thing. In JAX 0.10 to 0.12 the structures of two classes that are
    registered by it compare equal if their static fields do, whatever the classes. A jitted function that had been
    called with a Hessian could then run its program for a Gauss-Newton matrix of the same loss: by chance, because the
    hashes of the two structures differ, but silently.

    Examples:
        >>> import dataclasses, jax
        >>> from jaxhess.pytrees import register_dataclass
        >>> A, B = (register_dataclass(dataclasses.make_dataclass(name, ["x"])) for name in "AB")
        >>> jax.tree.structure(A(1.0)) == jax.tree.structure(B(1.0))
        False
    """
    fields = [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    data = tuple(field.name for field in fields if not field.metadata.get("static"))
    static = tuple(field.name for field in fields if field.metadata.get("static"))

    def flatten(instance: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(instance, name) for name in data), tuple(getattr(instance, name) for name in static)

    def flatten_with_keys(instance: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, constants = flatten(instance)
        keys = map(jax.tree_util.GetAttrKey, data)
        return tuple(zip(keys, children, strict=True)), constants

    def unflatten(constants: tuple[Any, ...], children: Any) -> T:
        return cls(**dict(zip(data, children, strict=True)), **dict(zip(static, constants, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
