"""Images of digits, and small classifiers of them: a convolutional network and a vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxhess
from jaxhess.errors import InputError
from scripts.training.short_runs import TrainingTask

CLASSES = 10
Source = Literal["digits", "prototypes"]


def load_images(source: Source, count: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Images [count, 8, 8, 1], entries of mean 0 and variance 1, and their labels [count] from 0 to 9.

    Args:
        source: `digits`: the first of scikit-learn's 1797 handwritten digits. `prototypes`: a random image for each
            class, with noise; needs no other package.
        count: Images taken.
        seed: Of the prototypes.

    Raises:
        InputError: scikit-learn is missing, or has less images.
    """
    if source == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise InputError(
                "The digits come with scikit-learn, which is not installed: pip install 'jaxhess[digits]', or take "
                "--images prototypes."
            ) from None
        images, labels = load_digits(return_X_y=True)
        if count > len(images):
            raise InputError(f"There are {len(images)} digits, and {count} are asked for.")
        images = images[:count]
    else:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, count)
        images = rng.normal(size=(CLASSES, 64))[labels] + rng.normal(size=(count, 64))
    images = (images - images.mean()) / images.std()
    return jnp.asarray(images.reshape(-1, 8, 8, 1), jnp.float32), jnp.asarray(labels[:count], jnp.int32)


class ConvNet(nnx.Module):
    """A classifier of images [B, 8, 8, 1]: five convolutions of one width and a linear layer; no norms, no biases."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        channels = (1, width, width, width, width)
        self.convs = nnx.List(
            nnx.Conv(c, width, (3, 3), strides=1 + k % 2, use_bias=False, kernel_init=init, rngs=rngs)
            for k, c in enumerate(channels)
        )
        self.head = nnx.Linear(4 * width, CLASSES, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for conv in self.convs:
            x = jax.nn.gelu(conv(x))
        return self.head(x.reshape(len(x), -1))


class EncoderLayer(nnx.Module):
    """Attention and feed-forward layer, each after a LayerNorm."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """A classifier of images [B, 8, 8, 1] in 16 patches of 2 x 2: two layers, the mean over patches, a linear layer."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.patches = nnx.Linear(4, width, use_bias=False, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (16, width)))
        self.layer0, self.layer1 = EncoderLayer(width, rngs), EncoderLayer(width, rngs)
        self.final_norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = self.patches(x) + self.positions[...]
        x = self.layer1(self.layer0(x))
        return self.head(self.final_norm(x).mean(axis=1))


def image_problem(
    name: str, make: Callable[[nnx.Rngs], nnx.Module], data: tuple[jax.Array, jax.Array], batch: int
) -> TrainingTask:
    """Training of a classifier of images from the random weights of a seed."""
    function, _ = jaxhess.module_function(make(nnx.Rngs(0)))
    loss = jaxhess.SoftmaxCrossEntropy(function)
    return TrainingTask(name, loss, lambda seed: jaxhess.module_function(make(nnx.Rngs(seed)))[1], data, batch)
