"""What must hold of the `config.json` of a published model."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax

from convert.configs import decoder_config, hugging_face_config
from jaxhess.models import abstract_params


def check_published(config: dict[str, Any], billions: float) -> None:
    """It loads without a warning, has so many parameters, to the digits given, and is written back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = decoder_config(config)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(decoder)))
    digits = len(str(billions).partition(".")[2])
    assert round(count / 1e9, digits) == billions
    assert decoder_config(hugging_face_config(decoder)) == decoder
