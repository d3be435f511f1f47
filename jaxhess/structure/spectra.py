"""The spectra of all diagonal blocks of an operator, in one run, and how far apart they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxhess.distributed.memory import most_that_fit
from jaxhess.errors import InputError
from jaxhess.krylov.lanczos import compile_segment
from jaxhess.krylov.products import check_count, wide_shape_dtype
from jaxhess.krylov.state import abstract_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.block_diagonal import BlockDiagonal
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.facts import shares_work
from jaxhess.slq.checkpoint import Checkpoint
from jaxhess.slq.lanczos_runs import Progress
from jaxhess.slq.run import RunOptions, run_lanczos
from jaxhess.slq.spectrum import Spectrum
from jaxhess.vectors import Distribution

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockSpectra:
    """The spectrum of every diagonal block.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.arange(1.0, 7.0)))
        >>> rows = jaxhess.Blocks.by(A.shape_dtype, "matrices").split("*", axis=0)
        >>> halves = rows.merged(lambda name: "low" if name in ("[0]", "[1]", "[2]") else "high")
        >>> found = jaxhess.block_spectra(A, halves, steps=3, probes=1)
        >>> found.names, [round(float(spectrum.ritz_values.max()), 3) for spectrum in found.spectra]
        (('low', 'high'), [3.0, 6.0])

    Attributes:
        names: Of the blocks.
        spectra: Of each, with everything that `jaxhess.Spectrum` knows: trace, extremes, density, errors.
    """

    names: tuple[str, ...]
    spectra: tuple[Spectrum, ...]

    def __getitem__(self, name: str) -> Spectrum:
        """The spectrum of the block of this name."""
        if name not in self.names:
            raise InputError(f"There is no block {name!r}; there are {', '.join(map(str, self.names))}.")
        return self.spectra[self.names.index(name)]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """[B] rows of each block."""
        return np.array([spectrum.dim for spectrum in self.spectra])

    @property
    def alphas(self) -> Array:
        """[B, probes, steps] diagonals of T; NaN beyond the size of a run."""
        return np.array([spectrum.alphas for spectrum in self.spectra])

    @property
    def betas(self) -> Array:
        """[B, probes, steps] norms after each step; NaN beyond the size of a run."""
        return np.array([spectrum.betas for spectrum in self.spectra])


def block_spectra(
    operator: LinearOperator,
    blocks: Blocks,
    *,
    steps: int = 40,
    probes: int = 4,
    seed: int = 0,
    storage: Storage = Storage(),
    together: int | None = None,
    distribution: Distribution = "normal",
    checkpoint: Checkpoint | None = None,
    callback: Callable[[Progress], None] | None = None,
    info: dict[str, Any] | None = None,
) -> BlockSpectra:
    """The spectra of all diagonal blocks of a symmetric operator, by Lanczos in every block at once.

    A step is one product for every block (`BlockDiagonal`), which share the primal pass of a loss's derivatives. The
    Lanczos vectors of all blocks are the parts of one vector, and take the memory of a single run; products take that
    of two vectors for each of the blocks computed at once. Each block's spectrum is that of `jaxhess.spectrum` of the
    restricted operator, with other probes. Probes come one after the other.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
        >>> H = jaxhess.Hessian(lambda p, x: jnp.sum(x * p["a"] ** 2) + jnp.sum(p["b"] ** 3), params, [jnp.ones(2)])
        >>> found = jaxhess.block_spectra(H, jaxhess.Blocks.by(params, "matrices"), steps=3, probes=1)
        >>> round(found["a"].trace().value, 3), round(found["b"].trace().value, 3)
        (4.0, 18.0)

    Args:
        operator: Symmetric.
        blocks: Of its vectors.
        steps: Lanczos steps per probe and block; a block of fewer rows ends sooner.
        probes: Independent random probes; two or more give standard errors across them.
        seed: Of the probes.
        storage: What is kept of the Lanczos vectors; in float32 or wider.
        together: Blocks whose products are computed at once; None: as many as fit into what memory is left. A run that
            is resumed keeps its own.
        distribution: Of the probes' entries.
        checkpoint: Where the unfinished run is saved, and whether to resume it.
        callback: Called on the host after each compiled segment.
        info: Anything to keep with each spectrum; no number depends on it.

    Raises:
        InputError: An option is out of range; the blocks are those of other vectors; vectors in 16 bits or a basis in
            the host's memory are asked for; the checkpoint is of another run; the loss or a product is not finite.
        Interrupted: SIGTERM came; the state is saved (only with `checkpoint`).
    """
    blocks.check(operator.shape_dtype)
    if storage.basis_memory == "host":
        raise InputError("A basis in the host's memory is that of whole vectors: keep that of blocks on the devices.")
    if storage.vector_dtype is None:  # vectors like parameters in 16 bits are kept in float32
        wide = {str(x.dtype) for x in jax.tree.leaves(wide_shape_dtype(operator))}
        vector_dtype: Any = wide.pop() if len(wide) == 1 else "float64"
        storage = dataclasses.replace(storage, vector_dtype=vector_dtype)
    kept = abstract_lanczos(operator.shape_dtype, steps, storage, blocks=blocks)
    if together is None and checkpoint is not None and checkpoint.resume:
        together = checkpoint.known().get("together")  # another number would round otherwise
    if together is None:

        def program(k: int) -> jax.stages.Compiled:
            return compile_segment(BlockDiagonal(operator, blocks, k), kept)

        sharing = len(blocks) if shares_work(operator) else 1
        together = most_that_fit(program, sharing, lambda _: jax.tree.leaves(kept))
    check_count("together", together, 1, "blocks whose products are computed at once")
    if checkpoint is not None:
        checkpoint = dataclasses.replace(checkpoint, identity={**checkpoint.identity, "together": together})
    diagonal = BlockDiagonal(operator, blocks, together)
    options = RunOptions(steps, probes, seed, storage, 1, distribution, checkpoint, callback)
    run, record = run_lanczos(diagonal, options, blocks)
    spectra = []
    for b, size in enumerate(blocks.sizes):
        rows = slice(b, None, len(blocks))
        lanczos = dataclasses.replace(record.lanczos, orthogonality=tuple(run.orthogonality[rows].tolist()))
        spectra.append(
            Spectrum(
                alphas=run.alphas[rows],
                betas=run.betas[rows],
                step_errors=run.step_errors[rows],
                sizes=run.sizes[rows],
                dim=int(size),
                run=dataclasses.replace(record, lanczos=lanczos),
                info=info or {},
            )
        )
    return BlockSpectra(blocks.names, tuple(spectra))
