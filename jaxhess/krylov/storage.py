"""What a Lanczos run keeps: which vectors, where, and in what dtypes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxhess.errors import InputError

Reorthogonalize = Literal["none", "full"] | int
BasisMemory = Literal["device", "host"]
VectorDtype = Literal["float32", "bfloat16", "float16", "float64"]
ScalarDtype = Literal["float32", "float64"]


@dataclasses.dataclass(frozen=True)
class Storage:
    """What a Lanczos run keeps, with defaults for whoever has the memory; `docs/numerics.md` says what each costs.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> jaxhess.Storage(reorthogonalize=8, basis_dtype=jnp.bfloat16).basis_dtype
        'bfloat16'

    Attributes:
        reorthogonalize: Which vectors are kept, beside the last two, to make every new one orthogonal to. "full": all
            of them (steps x parameters of memory); there are no ghosts. "none": none. A number r, at least 2: the last
            r, the window of arXiv 2602.00816.
        vector_dtype: Storage of the last two Lanczos vectors; None: as the operator's vectors.
        basis_dtype: Storage of the vectors kept for re-orthogonalisation; None: as the last two. bfloat16 halves them.
        basis_memory: Where the kept vectors are stored: on the "device", or in pinned memory of the "host"; then probes
            advance one at a time.
        scalar_dtype: Dtype of alphas and betas, and of the inner products and norms that they are. Never narrower than
            the vectors.

    Dtypes may be given as anything that `jax.numpy.dtype` takes; names are kept.

    Raises:
        InputError: An attribute has none of these values.
    """

    reorthogonalize: Reorthogonalize = "full"
    vector_dtype: VectorDtype | None = None
    basis_dtype: VectorDtype | None = None
    basis_memory: BasisMemory = "device"
    scalar_dtype: ScalarDtype = "float32"

    def __post_init__(self) -> None:
        kept = self.reorthogonalize
        window = isinstance(kept, int) and not isinstance(kept, bool) and kept >= 2
        if not window and kept not in get_args(get_args(Reorthogonalize)[0]):
            raise InputError(
                f"Unknown re-orthogonalisation {kept!r}; it is 'none', 'full' or a window, the number of last vectors, "
                "at least 2."
            )
        if self.basis_memory not in get_args(BasisMemory):
            raise InputError(f"basis_memory is {self.basis_memory!r}; it is 'device' or 'host'.")
        for name in ("vector_dtype", "basis_dtype"):
            object.__setattr__(self, name, _dtype_name(name, getattr(self, name), VectorDtype, optional=True))
        object.__setattr__(self, "scalar_dtype", _dtype_name("scalar_dtype", self.scalar_dtype, ScalarDtype))

    def check_available(self) -> None:
        """Raises InputError for a dtype that JAX, as it is configured now, would narrow."""
        for name in ("vector_dtype", "basis_dtype", "scalar_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
                raise InputError(f"{name} {dtype} needs JAX in 64-bit mode: set JAX_ENABLE_X64=1 before starting.")


def _dtype_name(field: str, dtype: Any, known: Any, optional: bool = False) -> str | None:
    if dtype is None and optional:
        return None
    try:
        name = str(jnp.dtype(dtype)) if dtype is not None else "None"
    except TypeError:
        name = repr(dtype)
    if name not in get_args(known):
        raise InputError(f"{field} is {name}; it is one of {', '.join(get_args(known))}.")
    return name
