"""How blocks of parameters are coupled: the Frobenius norms of all blocks of an operator, from products with probes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxhess.distributed import processes
from jaxhess.distributed.memory import most_that_fit
from jaxhess.errors import InputError
from jaxhess.krylov.errors import Estimate, across_probes, of_forms, of_squares, relative_variance
from jaxhess.krylov.products import check_count, everywhere
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.block_diagonal import BlockDiagonal, over_blocks, own_and_all
from jaxhess.operators.block_names import in_model_order
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.facts import checksum, describe, non_finite, shares_work, validated
from jaxhess.slq.checkpoint import Checkpoint, Interrupted, Saver, termination
from jaxhess.structure.fidelity import lengths as fidelity_lengths
from jaxhess.structure.fidelity import of_lengths
from jaxhess.vectors import Distribution, Vector, random_key, random_probe, widen

Array = npt.NDArray[np.float64]

LARGEST = 2**24
"""Entries of a map over all probes: 128 MiB in memory, and three times as much in each save."""


@dataclasses.dataclass(frozen=True, eq=False)
class CouplingMap:
    """What random probes v, cut into their parts v_b on each block, say of the blocks H_ab of a symmetric operator.

    `E |(H v_b)_a|^2 = |H_ab|_F^2` for entries of mean 0 and variance 1. Both `|(H v_b)_a|^2` and `|(H v_a)_b|^2` are
    estimates of the same number, from different entries: their mean is taken.

    Examples:
        >>> import numpy as np, jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[3.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 2.0]]))
        >>> rows = jaxhess.Blocks.by(A.shape_dtype, "matrices").split("*", axis=0)
        >>> found = jaxhess.coupling_map(A, rows, probes=2, distribution="rademacher")
        >>> found.coupling  # blocks of a single entry: random signs are exact
        array([[3., 0., 1.],
               [0., 1., 0.],
               [1., 0., 2.]])
        >>> round(found.relative_error(np.eye(3, dtype=bool)).value, 3)  # of the diagonal: sqrt(2 / 16)
        0.354

    Attributes:
        names: Of the blocks.
        sizes: [B] their entries.
        lengths: [probes, B, B]; `lengths[p, a, b]` is |(H v_b)_a|.
        forms: [probes, B] v_b'H v_b.
        fidelity_error: [B, probes] |(Hv)_a - H_aa v_a| / |(Hv)_a|: what the block-diagonal part misses of a product
            (arXiv 2602.00816, block-diagonal fidelity); NaN where (Hv)_a is zero.
        fidelity_cosine: [B, probes] cosine of the angle between (Hv)_a and H_aa v_a; NaN where one of them is zero.
        whole_error, whole_cosine: [probes] the same of whole vectors.
        distribution: Of the probes' entries.
        form_squares: [probes, B] sums of |H_bb v_b|^2 over the finer blocks that were merged into one, from which the
            mean of `forms` has its error; empty: none were.
    """

    names: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    lengths: Array
    forms: Array
    fidelity_error: Array
    fidelity_cosine: Array
    whole_error: Array
    whole_cosine: Array
    distribution: Distribution = "normal"
    form_squares: Array = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))

    @functools.cached_property
    def _squares(self) -> tuple[float, Array]:
        """The largest length, and [probes, B, B] both estimates' mean of |H_ab|_F^2 over its square."""
        unit = float(self.lengths.max(initial=0.0)) or 1.0
        squares = (self.lengths / unit) ** 2
        return unit, (squares + squares.transpose(0, 2, 1)) / 2

    @property
    def coupling(self) -> Array:
        """[B, B] estimates of |H_ab|_F."""
        unit, squares = self._squares
        return unit * np.sqrt(squares.mean(0))

    @property
    def coupling_error(self) -> Array:
        """[B, B] standard errors of `coupling`; NaN for one probe.

        From the scatter over probes, as `jaxhess.frobenius_norm`. Off the diagonal a probe gives two values, of
        different entries, whose mean is taken first.
        """
        unit, squares = self._squares
        if len(squares) < 2:
            return np.full(squares.shape[1:], np.nan)
        # |H_ab| is the root of the squares' mean: by the delta method half of its relative error.
        return unit * np.sqrt(squares.mean(0) * relative_variance(squares) / len(squares)) / 2

    @property
    def relative(self) -> Array:
        """[B, B] |H_ab|_F / sqrt(|H_aa|_F |H_bb|_F); NaN where a diagonal block is zero."""
        coupling = self.coupling
        diagonal = np.sqrt(np.diag(coupling))
        with np.errstate(divide="ignore", invalid="ignore"):
            return coupling / diagonal / diagonal[:, None]

    def frobenius_norm(self) -> Estimate:
        """|H|_F, with its sampling error."""
        unit, squares = self._squares
        sums = squares.sum((1, 2))
        spread = of_squares(sums)
        value = math.sqrt(sums.mean())
        error = spread.error / (2 * value) if value > 0 else spread.error
        return Estimate(unit * value, unit * error, spread.freedom, positive=True)

    def relative_error(self, kept: npt.NDArray[np.bool_]) -> Estimate:
        """|H - S|_F / |H|_F of the approximation S that has the blocks for which `kept` [B, B] is true, others zero.

        The standard error is that of the delete-one jackknife over probes (Efron and Stein 1981); NaN for one probe.

        Raises:
            InputError: `kept` is not symmetric, or not of this shape.
        """
        _, squares = self._squares
        missed = np.where(self._pattern(kept), 0, squares).sum((1, 2))
        return _root_of_ratio(missed, squares.sum((1, 2)))

    def row_error(self, kept: npt.NDArray[np.bool_]) -> list[Estimate]:
        """The same of each block's rows: |(H - S)_a|_F / |H_a|_F, H_a the rows of block a; B estimates."""
        _, squares = self._squares
        missed = np.where(self._pattern(kept), 0, squares).sum(2)
        return [_root_of_ratio(m, s) for m, s in zip(missed.T, squares.sum(2).T, strict=True)]

    def trace(self) -> list[Estimate]:
        """The trace of each diagonal block, mean of v_b'H v_b, with its sampling error; B estimates."""
        own = self.form_squares if self.form_squares.size else self._own_squares
        found = []
        for forms, squares in zip(self.forms.T, own.T, strict=True):
            unit = float(squares.max(initial=0.0)) or 1.0
            # The variance of v'Av is 2 |A|_F^2 for normal entries, and less for signs.
            spread = of_forms(2 * float(squares.mean() / unit), squares / unit)
            if self.distribution == "rademacher":
                spread = across_probes(forms / math.sqrt(unit))
            found.append(Estimate(float(forms.mean()), math.sqrt(unit) * spread.error, spread.freedom))
        return found

    @property
    def _own_squares(self) -> Array:
        """[probes, B] |H_bb v_b|^2."""
        return np.diagonal(self.lengths, axis1=1, axis2=2) ** 2

    def merged(self, group: Callable[[str], str]) -> CouplingMap:
        """The map of coarser blocks, those that `group` gives one name; without fidelity, which is not known of them.

        |H_AB|_F^2 is the sum over blocks a in A and b in B. No product is needed.
        """
        groups = [group(name) for name in self.names]
        names = tuple(in_model_order(groups))
        member = np.array([[name == coarse for name in groups] for coarse in names], float)
        unit = float(self.lengths.max(initial=0.0)) or 1.0
        lengths = unit * np.sqrt(np.einsum("Aa,pab,Bb->pAB", member, (self.lengths / unit) ** 2, member, optimize=True))
        own = self.form_squares if self.form_squares.size else self._own_squares
        blocks, whole = np.full((len(names), len(self.forms)), np.nan), np.full(len(self.forms), np.nan)
        return dataclasses.replace(
            self,
            names=names,
            sizes=(member @ self.sizes).astype(np.int64),
            lengths=lengths,
            forms=self.forms @ member.T,
            form_squares=own @ member.T,
            fidelity_error=blocks,
            fidelity_cosine=blocks,
            whole_error=whole,
            whole_cosine=whole,
        )

    def _pattern(self, kept: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        found = np.asarray(kept, bool)
        count = len(self.names)
        if found.shape != (count, count) or (found != found.T).any():
            raise InputError(f"The kept blocks are a symmetric matrix of {count} x {count} truth values.")
        return found


class CouplingProgress(NamedTuple):
    """Probes done, of how many, and seconds since the start (or since it was resumed)."""

    done: int
    probes: int
    seconds: float


def coupling_map(
    operator: LinearOperator,
    blocks: Blocks,
    *,
    probes: int = 8,
    seed: int = 0,
    distribution: Distribution = "normal",
    together: int | None = None,
    checkpoint: Checkpoint | None = None,
    callback: Callable[[CouplingProgress], None] | None = None,
) -> CouplingMap:
    """How strongly all pairs of blocks of a symmetric operator are coupled, estimated from random probes.

    A probe takes a product for every block. They share the primal pass of a loss's derivatives, all of them or
    `together` at a time.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
        >>> H = jaxhess.Hessian(lambda p, x: jnp.sum(x * p["a"] * p["b"]), params, [jnp.ones(2)])
        >>> blocks = jaxhess.Blocks.by(params, "matrices")
        >>> jaxhess.coupling_map(H, blocks, probes=2, distribution="rademacher").coupling.round(3)
        array([[0.   , 1.414],
               [1.414, 0.   ]])

    Args:
        operator: Symmetric: Hessian, Gauss-Newton, Fisher or any other.
        blocks: Of its vectors.
        probes: Independent; two or more give sampling errors.
        seed: Of the probes: the same as those of `jaxhess.spectrum`, bit for bit on any mesh.
        distribution: Of the probes' entries. Random signs have the smaller variance.
        together: Blocks whose products are computed at once; None: as many as fit into what memory is left, or as in
            the run that is resumed.
        checkpoint: Where the unfinished map is saved, after every probe, and whether to resume it.
        callback: Called on the host after each probe.

    Raises:
        InputError: The blocks are those of other vectors, or too many for a map; an option is out of range; the loss or
            a product is not finite; the checkpoint is of another run.
        Interrupted: SIGTERM came; what was done is saved (only with `checkpoint`).
    """
    check_count("probes", probes, 1, "one probe is a product for every block")
    blocks.check(operator.shape_dtype)
    entries = probes * len(blocks) ** 2
    if entries > LARGEST:
        raise InputError(
            f"A map of {len(blocks):,} blocks from {probes} probes has {entries:.3g} entries, and {LARGEST:.1g} is the "
            "most: take coarser blocks (merged), or restrict the operator to some of them."
        )
    if together is not None:
        check_count("together", together, 1, "blocks whose products are computed at once")
    key = random_key(seed)
    identity = {
        "map": {"probes": probes, "seed": seed, "distribution": distribution},
        "operator": describe(BlockDiagonal(operator, blocks)),
        "inputs": validated(operator),
        "parameters": None if checkpoint is None else checksum(operator),
    }

    def program(k: int) -> jax.stages.Compiled:
        return _probe_parts.lower(operator, blocks, k, key, 0, distribution).compile()

    found: list[dict[str, Any]] = []
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        saver = None
        asked = threading.Event()
        if checkpoint is not None:
            saver = stack.enter_context(contextlib.closing(Saver(checkpoint, identity)))
            asked = stack.enter_context(termination())
            saved = saver.latest() or {}
            found, together = list(saved.get("probes", [])), together or saved.get("together")
        if together is None and len(found) < probes:
            sharing = len(blocks) if shares_work(operator) else 1
            together = most_that_fit(program, sharing, lambda _: jax.tree.leaves(operator.shape_dtype))
        for p in range(len(found), probes):
            drawn = _probe_parts(operator, blocks, together, key, p, distribution)
            values = [np.asarray(x, np.float64) for x in drawn]
            if not all(np.isfinite(x).all() for x in values):
                probe = random_probe(jax.random.fold_in(key, p), operator.shape_dtype, distribution)
                raise non_finite(f"A product with probe {p + 1}", operator, probe)
            found.append({name: x.tolist() for name, x in zip(_PARTS, values, strict=True)})
            if callback is not None:
                callback(CouplingProgress(p + 1, probes, time.perf_counter() - began))
            if saver is not None:
                stop = processes.any_says(asked.is_set())
                saver.save_or_warn(p + 1, {"probes": found, "together": together}, must=stop)
                if stop:
                    raise Interrupted(f"stopped by SIGTERM after probe {p + 1}; what was done is saved")
    lengths, forms, *parts = (np.array([probe[name] for probe in found]) for name in _PARTS)
    fidelity = of_lengths(*parts)
    return CouplingMap(
        blocks.names,
        blocks.sizes,
        lengths,
        forms,
        fidelity_error=fidelity.error[:, :-1].T,
        fidelity_cosine=fidelity.cosine[:, :-1].T,
        whole_error=fidelity.error[:, -1],
        whole_cosine=fidelity.cosine[:, -1],
        distribution=distribution,
    )


_PARTS = ("lengths", "forms", "full", "own", "missed", "inner")


@functools.partial(jax.jit, static_argnums=(1, 2, 5))
def _probe_parts(
    operator: LinearOperator,
    blocks: Blocks,
    together: int,
    key: jax.Array,
    number: int | jax.Array,
    distribution: Distribution,
) -> list[jax.Array]:
    """`_PARTS` of one probe: [B, B], and five times [B]."""
    v = widen(random_probe(jax.random.fold_in(key, number), operator.shape_dtype, distribution))

    def add(sums: Any, numbers: jax.Array, products: Vector) -> tuple[Any, Any]:
        lengths = jax.vmap(blocks.norm)(products)
        forms = jax.vmap(lambda product: blocks.dot(v, product))(products)
        return own_and_all(blocks, sums[0], sums[1], numbers, products), (lengths, forms)

    zeros = jax.tree.map(jnp.zeros_like, v)
    (own, everything), (lengths, forms) = over_blocks(operator, blocks, v, together, add, (zeros, zeros))
    count = len(blocks)
    lengths, forms = (x.reshape(-1, count)[:count] for x in (lengths, forms))
    values = [lengths.T, jnp.diagonal(forms), *fidelity_lengths(blocks, everything, own)]
    return [everywhere(operator, x) for x in values]


def _root_of_ratio(part: Array, whole: Array) -> Estimate:
    """sqrt(mean part / mean whole), at most 1, with its jackknife error."""
    if whole.sum() == 0:
        return Estimate(math.nan, math.nan, math.nan, positive=True)
    value = math.sqrt(part.sum() / whole.sum())
    if len(part) < 2:
        return Estimate(value, math.nan, math.nan, positive=True, most=1)
    left = np.sqrt((part.sum() - part).clip(0) / np.maximum(whole.sum() - whole, np.finfo(float).tiny))
    error = math.sqrt((len(part) - 1) / len(part) * ((left - left.mean()) ** 2).sum())
    return Estimate(value, error, len(part) - 1, positive=True, most=1)
