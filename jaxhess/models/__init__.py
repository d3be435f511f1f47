"""One configurable Flax NNX decoder for every supported architecture."""

from jaxhess.models.config import DecoderConfig, ExpertsConfig, LatentConfig, RopeConfig
from jaxhess.models.decoder import Decoder
from jaxhess.models.language_model import (
    LOGIT_CHUNK,
    LanguageModel,
    NextTokenLoss,
    Params,
    abstract_params,
    initialize,
    logical_axes,
    model_graph,
    model_shardings,
)

__all__ = [
    "LOGIT_CHUNK",
    "Decoder",
    "DecoderConfig",
    "ExpertsConfig",
    "LanguageModel",
    "LatentConfig",
    "NextTokenLoss",
    "Params",
    "RopeConfig",
    "abstract_params",
    "initialize",
    "logical_axes",
    "model_graph",
    "model_shardings",
]
