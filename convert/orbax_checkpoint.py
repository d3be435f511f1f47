"""Our own checkpoints: parameters in Orbax's format, and beside them the decoder's configuration.

model.json      the DecoderConfig
params/         Orbax
config.json     of the Hugging Face checkpoint it came from
tokenizer files
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from convert.configs import hugging_face_config, read_json
from convert.destination import appearing
from convert.tokenizer import add_tokenizer
from jaxhess.models import DecoderConfig, LanguageModel, abstract_params, model_shardings

MODEL, PARAMS = "model.json", "params"
FORMAT = "jaxhess-model-1"


def is_orbax(directory: Path) -> bool:
    """Whether this directory is one of ours."""
    return (directory / MODEL).is_file()


def save(
    model: LanguageModel,
    directory: str | Path,
    *,
    hf_config: dict[str, Any] | None = None,
    tokenizer_source: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes `model` as an Orbax checkpoint, which `convert.load` reads onto any mesh; arguments as for `export`."""
    with appearing(Path(directory), overwrite) as partial:
        write_orbax(model, partial, hf_config)
        add_tokenizer(tokenizer_source, partial)


def write_orbax(model: LanguageModel, directory: Path, hf_config: dict[str, Any] | None) -> None:
    """Configurations and parameters in an existing directory; without `hf_config` one is made."""
    import orbax.checkpoint as ocp

    hf_config = hugging_face_config(model.config) if hf_config is None else hf_config
    # Orbax would copy all arrays to the host before it writes one: let no more than two at a time be on their way.
    limit = max(2**28, 2 * max(_local_bytes(array) for array in jax.tree.leaves(model.params)) + 1)
    inner = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=limit, save_device_host_concurrent_bytes=limit)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=inner)) as checkpointer:
        checkpointer.save(directory.absolute() / PARAMS, args=ocp.args.PyTreeSave(model.params))
    record = {"format": FORMAT, "config": model.config.to_dict()}
    (directory / MODEL).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")


def _local_bytes(array: jax.Array) -> int:
    return sum(shard.data.nbytes for shard in array.addressable_shards)


def restore(directory: Path, mesh: Mesh | None, dtype: str | None) -> LanguageModel:
    """The model in a directory that `write_orbax` filled, on any mesh and in any dtype (None: the one it was saved in).

    Raises:
        ValueError: The files are damaged or of another format.
    """
    import orbax.checkpoint as ocp

    config = saved_config(directory, dtype)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract_params(config),
        parameter_shardings(config, mesh),
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(directory.absolute() / PARAMS, target)
    except Exception as error:  # tensorstore's and Orbax's errors share no class
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{directory / PARAMS} is damaged or does not fit {MODEL}: {reason}") from None
    return LanguageModel(config, params, mesh)


def saved_config(directory: Path, dtype: str | None = None) -> DecoderConfig:
    """The decoder in a directory of ours, computing in `dtype` (None: in that of its weights)."""
    record = read_json(directory / MODEL)
    if record.get("format") != FORMAT:
        raise ValueError(f"{directory / MODEL} has format {record.get('format')!r}; this version reads {FORMAT!r}.")
    config = DecoderConfig.from_dict(record["config"])
    return dataclasses.replace(config, dtype=dtype or config.dtype)


def parameter_shardings(config: DecoderConfig, mesh: Mesh | None) -> Any:
    """Sharding of every parameter; without a mesh all on the first device."""
    if mesh is not None:
        return model_shardings(config, mesh)
    single: Sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: single, abstract_params(config))
