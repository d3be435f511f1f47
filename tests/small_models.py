"""Small language models and operators on them, and scripts run in this process, for tests."""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhess import DecoderConfig, Hessian, LinearOperator, MatrixOperator, Microbatches
from jaxhess.data import TokenBatch
from jaxhess.models import LanguageModel, abstract_params, model_shardings
from jaxhess.pytrees import register_dataclass

TINY = DecoderConfig(
    vocab_size=9,
    embed_dim=4,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=5,
    max_positions=16,
    qk_norm=True,
    query_chunk=4,
)
SMALL = dataclasses.replace(TINY, vocab_size=101, embed_dim=32, head_dim=16, mlp_dim=64, query_chunk=64)


def tokens(sequences: int, length: int, vocab: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (sequences, length + 1)).astype(np.int32)


def batch_of(ids: np.ndarray, weights: np.ndarray | None = None) -> TokenBatch:
    if weights is None:
        weights = np.ones((ids.shape[0], ids.shape[1] - 1), np.float32)
    return TokenBatch(jnp.asarray(ids), jnp.asarray(weights))


def scaled_up(model: LanguageModel, factor: float = 10.0) -> LanguageModel:
    """Weights far from the origin: at initialisation curvature is all but constant."""
    return dataclasses.replace(model, params=jax.tree.map(lambda x: factor * x if x.ndim > 2 else x, model.params))


def random_model(config: DecoderConfig, mesh: jax.sharding.Mesh | None = None, factor: float = 10.0) -> LanguageModel:
    """`scaled_up` of what `initialize` makes, the same on every mesh.

    NumPy draws it, and vectors below: XLA would compile for a second at every new set of shapes.
    """
    numbers = np.random.default_rng(0)

    def draw(path, like: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key in ("scale", "bias"):
            return jnp.asarray(np.full(like.shape, path[-1].key == "scale", like.dtype))
        deviation = 0.02 * (factor if len(like.shape) > 2 else 1)
        return jnp.asarray((deviation * numbers.normal(size=like.shape)).astype(like.dtype))

    params = jax.tree_util.tree_map_with_path(draw, abstract_params(config))
    if mesh is not None:
        params = jax.device_put(params, model_shardings(config, mesh))
    return LanguageModel(config, params, mesh)


def random_vector(like: Any, seed: int = 1) -> Any:
    """Standard normal entries in the structure, dtypes and shardings of `like`; the same on every mesh."""
    numbers = np.random.default_rng((1, seed))

    def draw(leaf: Any) -> jax.Array:
        return jax.device_put(numbers.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, like)


def relative(x, y) -> float:
    """|x - y| / |y|, in float64."""
    x, y = (np.concatenate([np.asarray(e, np.float64).ravel() for e in jax.tree.leaves(z)]) for z in (x, y))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal(LinearOperator):
    """A diagonal matrix; its vectors are trees like its entries."""

    entries: Any

    def mv(self, v):
        return jax.tree.map(lambda d, x: (d * x).astype(x.dtype), self.entries, v)

    @property
    def shape_dtype(self):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.entries)


def language_operator(dtype: str = "float32", logit_chunk: int = 4096, **change) -> Hessian:
    config = dataclasses.replace(SMALL, dtype=dtype, **change)
    model = random_model(config)
    ids = tokens(8, 12, 101)
    stacked = TokenBatch(jnp.asarray(ids.reshape(2, 4, 13)), jnp.ones((2, 4, 12)))
    return Hessian(model.loss(logit_chunk), model.params, Microbatches(stacked))


def network_loss(params, batch):
    """Squared error of two scanned layers and a linear one, in the parameters' dtype, and the number of samples."""
    x, y = (e.astype(params["out"].dtype) for e in batch)
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
    return jnp.sum((h @ params["out"] - y) ** 2), len(x)


def network(dtype: str = "float32", sizes: tuple[int, ...] = (4, 4), **options) -> Hessian:
    """The Hessian of `network_loss` on batches of these sizes, for laws that hold for any loss: a decoder's product
    takes several times as long to compile.
    """
    numbers = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray((numbers.normal(size=shape) / 4).astype(dtype))

    params = {"layers": draw(2, 16, 16), "out": draw(16, 5)}
    return Hessian(network_loss, params, [(4 * draw(n, 16), 4 * draw(n, 5)) for n in sizes], **options)


def run_command(script: ModuleType, *arguments: str) -> None:
    """The script's `main` with these arguments."""
    previous, sys.argv = sys.argv, [script.__name__, *arguments]
    try:
        script.main()
    finally:
        sys.argv = previous


def check_refused(capsys: pytest.CaptureFixture, script: ModuleType, out: Path, sentence: str, *arguments: str) -> None:
    """The script ends with status 2 and one line on stderr that has this sentence, and makes no folder `out`."""
    with pytest.raises(SystemExit) as ended:
        run_command(script, *arguments, "--out", str(out))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert not out.exists()


def matrix(eigenvalues, seed: int = 0) -> np.ndarray:
    """A dense symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    a = (q * np.asarray(eigenvalues)) @ q.T
    return (a + a.T) / 2


def operator_of(a: np.ndarray, dtype: str = "float32") -> MatrixOperator:
    return MatrixOperator(jnp.asarray(a, dtype))


def diagonal_lanczos(eigenvalues, start, steps, dtype=np.float64, orthogonal=True):
    """alphas and betas, each [runs, steps], of the diagonal matrix from each row of `start` [runs, n]."""
    diagonal, q = eigenvalues.astype(dtype), start.astype(dtype)
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    basis, beta, alphas, betas = [q], np.zeros(len(q), dtype), [], []
    for _ in range(steps):
        w = diagonal * basis[-1] - (beta[:, None] * basis[-2] if len(basis) > 1 else 0)
        alphas.append((w * basis[-1]).sum(1))
        w -= alphas[-1][:, None] * basis[-1]
        for b in 2 * basis if orthogonal else ():
            w -= (w * b).sum(1)[:, None] * b
        beta = np.linalg.norm(w, axis=1)
        betas.append(beta)
        basis.append(w / beta[:, None])
    return np.array(alphas, float).T, np.array(betas, float).T
