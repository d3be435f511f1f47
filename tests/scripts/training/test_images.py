"""Images of digits: what stands in for them, and one sentence where their package is missing."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxhess.errors import InputError
from scripts.training.images import ConvNet, VisionTransformer, load_images
from scripts.training.small_decoder import byte_batch, byte_config


def test_prototypes_are_standardised_and_can_be_told_apart():
    images, labels = load_images("prototypes", 400)
    assert images.shape == (400, 8, 8, 1)
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.var()) - 1) < 1e-4
    flat, found = np.asarray(images).reshape(400, -1), np.asarray(labels)
    centres = np.array([flat[found == k].mean(0) for k in range(10)])
    nearest = ((flat[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == found).mean() > 0.9


def test_a_missing_package_and_too_many_images_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"scikit-learn, which is not installed: pip install 'jaxhess\[digits\]'"):
        load_images("digits", 10)


def test_digits():
    pytest.importorskip("sklearn")
    images, labels = load_images("digits", 20)
    assert images.shape == (20, 8, 8, 1)
    assert labels[:10].tolist() == list(range(10))
    with pytest.raises(InputError, match="There are 1797 digits"):
        load_images("digits", 1798)


def test_a_patch_is_a_square_of_the_image():
    model = VisionTransformer(8, nnx.Rngs(0))
    seen = []
    model.patches = lambda x: seen.append(x) or jnp.zeros((*x.shape[:-1], 8))
    model(jnp.arange(64.0).reshape(1, 8, 8, 1))
    assert seen[0][0, 0].tolist() == [0, 1, 8, 9]
    assert seen[0][0, 5].tolist() == [18, 19, 26, 27]


def test_the_networks_give_logits_of_ten_classes():
    images = jnp.ones((3, 8, 8, 1))
    assert ConvNet(4, nnx.Rngs(0))(images).shape == (3, 10)


def test_bytes_of_a_text(tmp_path):
    (tmp_path / "text").write_bytes(b"abcdefgh")
    batch = byte_batch(tmp_path / "text", 3, 2)
    assert batch.tokens.tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]
    for path, sentence in ((tmp_path / "text", "has 8 bytes; 3 sequences"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(InputError, match=sentence):
            byte_batch(path, 3, 3)
    with pytest.raises(InputError, match="multiple of 8 times"):
        byte_config(20, 1, 2, 8)
