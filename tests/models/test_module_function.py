"""Models of one's own in Flax NNX, with the public API alone: spectra, blocks and Gauss-Newton matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxhess


class ConvNet(nnx.Module):
    """A classifier of images [B, 8, 8, 1] with batch statistics and dropout."""

    def __init__(self, classes: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 3, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(48, classes, rngs=rngs)

    def __call__(self, images, **mode):
        x = jax.nn.gelu(self.norm(self.conv(images), **mode))
        return self.head(self.dropout(x.reshape(len(x), -1)))


class Encoder(nnx.Module):
    """One layer of a transformer that sees all positions: of patches, or of tokens with some of them masked."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, dropout_rate=0.1, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """A classifier of images [B, 8, 8, 1] in four patches."""

    def __init__(self, classes: int, rngs: nnx.Rngs):
        self.patches = nnx.Conv(1, 6, (4, 4), strides=4, rngs=rngs)
        self.encoder = Encoder(6, rngs)
        self.head = nnx.Linear(6, classes, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        return self.head(self.encoder(x.reshape(len(x), -1, 6)).mean(axis=1))


class MaskedTokens(nnx.Module):
    """Logits [B, T, V] of tokens [B, T], some of which are the mask."""

    def __init__(self, vocab: int, rngs: nnx.Rngs):
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (vocab, 6)))
        self.encoder = Encoder(6, rngs)

    def __call__(self, tokens):
        return self.encoder(self.embed[tokens]) @ self.embed[...].T


def images_and_labels(classes=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 8, 8, 1)).astype(np.float32), rng.integers(0, classes, 6)


def masked_tokens():
    """Only masked places count."""
    rng = np.random.default_rng(0)
    tokens, masked = rng.integers(1, 7, (4, 5)), rng.random((4, 5)) < 0.4
    return np.where(masked, 0, tokens), tokens, masked.astype(np.float32)


MODELS = {
    "convolutional": (lambda: ConvNet(3, nnx.Rngs(0)), images_and_labels, "conv"),
    "vision transformer": (lambda: VisionTransformer(3, nnx.Rngs(0)), images_and_labels, "attention"),
    "masked tokens": (lambda: MaskedTokens(7, nnx.Rngs(0)), masked_tokens, "encoder/up/*"),
}


@pytest.mark.parametrize(
    "name", ["convolutional", "vision transformer", pytest.param("masked tokens", marks=pytest.mark.study)]
)
def test_spectra_blocks_and_gauss_newton_of_a_module(name):
    make, data, block = MODELS[name]
    with jax.enable_x64(True):
        function, params = jaxhess.module_function(make())
        params = jax.tree.map(lambda x: x.astype("float64"), params)
        batch = tuple(map(jnp.asarray, data()))
        loss = jaxhess.SoftmaxCrossEntropy(function)
        flat, unravel = jax.flatten_util.ravel_pytree(params)

        def mean(flat):
            logits, weights = function(unravel(flat), batch[0]), (batch[2] if len(batch) > 2 else jnp.ones(6))
            log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][..., None], -1)[..., 0]
            return -jnp.sum(weights * log_p) / jnp.sum(weights)

        def gauss_newton(flat):
            weights = batch[2].ravel() if len(batch) > 2 else jnp.ones(6)
            jacobian = jax.jacobian(lambda w: function(unravel(w), batch[0]))(flat)
            jacobian = jacobian.reshape(-1, *jacobian.shape[-2:])
            p = jax.nn.softmax(function(unravel(flat), batch[0])).reshape(jacobian.shape[:2])
            curved = jnp.einsum("nij,n->nij", jax.vmap(lambda q: jnp.diag(q) - jnp.outer(q, q))(p), weights)
            return jnp.einsum("nip,nij,njq->pq", jacobian, curved, jacobian) / jnp.sum(weights)

        v = jax.random.normal(jax.random.key(1), flat.shape)
        hessian, gauss = jax.jit(lambda f: (jax.hessian(mean)(f), gauss_newton(f)))(flat)
        for operator, dense in ((jaxhess.Hessian, hessian), (jaxhess.GaussNewton, gauss)):
            found = operator(loss, params, [batch])
            product = jax.flatten_util.ravel_pytree(found @ unravel(v))[0]
            np.testing.assert_allclose(product, dense @ v, rtol=0, atol=1e-11 * np.abs(dense @ v).max())
        H = jaxhess.Hessian(loss, params, [batch])
        part = H.restrict(block)
        assert 0 < part.dim < H.dim
        largest = jaxhess.spectrum(H, steps=12, probes=1).extreme().largest
        truth = np.linalg.eigvalsh(hessian)[-1]
        assert abs(largest.value - truth) <= largest.residual_bound + 1e-9 * truth


def test_what_is_random_or_moves_is_refused_in_a_sentence():
    images, labels = images_and_labels()
    function, params = jaxhess.module_function(ConvNet(3, nnx.Rngs(0)))
    training = jaxhess.SoftmaxCrossEntropy(lambda p, x: function(p, x, use_running_average=False))
    with pytest.raises(jaxhess.InputError, match=r"updates norm.(mean|var) \(BatchStat\).*use_running_average=True"):
        jaxhess.Hessian(training, params, [(images, labels)]) @ params

    class Noisy(nnx.Module):
        def __init__(self):
            self.linear, self.dropout = nnx.Linear(64, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))

        def __call__(self, images):
            return self.linear(self.dropout(images.reshape(len(images), -1), deterministic=False))

    function, params = jaxhess.module_function(Noisy())
    with pytest.raises(jaxhess.InputError, match=r"draws random numbers \(dropout.*deterministic=True"):
        jaxhess.Hessian(jaxhess.SoftmaxCrossEntropy(function), params, [(images, labels)]) @ params
    with pytest.raises(jaxhess.InputError, match=r"has no nnx\.Param"):
        jaxhess.module_function(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))


def test_batch_statistics_are_no_parameters():
    _, everything = nnx.split(ConvNet(3, nnx.Rngs(0)))
    statistics = nnx.filter_state(everything, (nnx.Param, nnx.BatchStat))
    with pytest.raises(jaxhess.InputError, match=r"norm/mean is a BatchStat.*nnx.split\(model, nnx.Param, ...\)"):
        jaxhess.Hessian(lambda p, b: jnp.sum(b), statistics, [jnp.ones(1)])
