"""Our own checkpoints: parameters in Orbax's format, and beside them the decoder's configuration.

model.json      the DecoderConfig
params/         Orbax
config.json     of the Hugging Face checkpoint it came from
tokenizer files
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from convert.configs import DTYPES, hugging_face_config
from convert.destination import appearing
from convert.json_files import read_json
from convert.quantized import unquantized
from convert.tokenizer import add_tokenizer
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.orbax import reading
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
    """Writes `model` as an Orbax checkpoint, which `convert.load` reads onto any mesh; arguments as for `export`.

    Examples:
        >>> import convert, tempfile
        >>> model = convert.load("scripts/tiny")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     convert.save(model, folder)
        ...     convert.load(folder, dtype="bfloat16").num_params == model.num_params
        True
    """
    with appearing(Path(directory), overwrite) as partial:
        write_orbax(model, partial, hf_config)
        processes.on_first(lambda: add_tokenizer(tokenizer_source, partial))


def write_orbax(model: LanguageModel, directory: Path, hf_config: dict[str, Any] | None) -> None:
    """Configurations and parameters in an existing directory; without `hf_config` one is made."""
    import orbax.checkpoint as ocp

    model = model.configured(dtype=model.param_dtype)  # what is saved is weights, not how someone computed with them
    hf_config = hugging_face_config(model.config) if hf_config is None else unquantized(hf_config)
    # Orbax would copy all arrays to the host before it writes one: let no more than two at a time be on their way.
    limit = max(2**28, 2 * max(_local_bytes(array) for array in jax.tree.leaves(model.params)) + 1)
    inner = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=limit, save_device_host_concurrent_bytes=limit)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(handler_impl=inner)) as checkpointer:
        checkpointer.save(directory.absolute() / PARAMS, args=ocp.args.PyTreeSave(model.params))
    record = {"format": FORMAT, "config": model.config.to_dict()}
    if processes.index() == 0:
        (directory / MODEL).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")


def _local_bytes(array: jax.Array) -> int:
    return sum(shard.data.nbytes for shard in array.addressable_shards)


def restore(directory: Path, mesh: Mesh | None, dtype: str | None) -> LanguageModel:
    """The model in a directory that `write_orbax` filled, on any mesh and in any dtype (None: the one it was saved in).

    Raises:
        InputError: The files are damaged, of another format, or hold other parameters than `model.json` describes.
    """
    import orbax.checkpoint as ocp

    config = saved_config(directory, dtype)
    if not (directory / PARAMS).is_dir():
        raise InputError(f"{directory} has no {PARAMS}, the directory of its weights.")
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract_params(config),
        parameter_shardings(config, mesh),
    )
    with reading(directory / PARAMS), ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(directory.absolute() / PARAMS).item_metadata
        difference = None if stored is None else _first_difference(stored.tree, target)
        params: Any = None if difference else checkpointer.restore(directory.absolute() / PARAMS, target)
    if difference:
        raise InputError(f"{directory / PARAMS} does not fit {MODEL}: {difference}.")
    return LanguageModel(config, params, mesh)


def _first_difference(stored: Any, expected: Any) -> str | None:
    """Where the stored parameters are not those expected, by name or shape; None: nowhere."""
    found, wanted = _shapes(stored), _shapes(expected)
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            return f"parameter {name} is missing"
        if name not in wanted:
            return f"parameter {name} has no place in the model"
        if found[name] != wanted[name]:
            return f"parameter {name} has shape {list(found[name])}; expected {list(wanted[name])}"
    return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def saved_config(directory: Path, dtype: str | None = None) -> DecoderConfig:
    """The decoder in a directory of ours, computing in `dtype` (None: in that of its weights).

    Raises:
        InputError: `model.json` is damaged, of another format, or does not describe a model of this version.
    """
    record = read_json(directory / MODEL)
    if record.get("format") != FORMAT:
        raise InputError(f"{directory / MODEL} has format {record.get('format')!r}; this version reads {FORMAT!r}.")
    try:
        reason = _misfit(record.get("config"), DecoderConfig, "config")
        if reason:
            raise InputError(reason)
        config = DecoderConfig.from_dict(record["config"])
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise InputError(f"{directory / MODEL} does not describe a model of this version: {reason}.") from error
    return dataclasses.replace(config, dtype=dtype or config.dtype)


def _misfit(data: Any, kind: Any, name: str) -> str | None:
    """Why JSON data are none of `kind`, a configuration class or the type of one of its fields; None: they are."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            return f"{name} is missing" if data is None else f"{name} is {_quoted(data)}"
        kinds = typing.get_type_hints(kind)
        unknown = sorted(data.keys() - kinds.keys())
        missing = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in data]
        if unknown or missing:
            return f"unknown field {unknown[0]}" if unknown else f"{missing[0]} is missing"
        return next((reason for key in data if (reason := _misfit(data[key], kinds[key], key))), None)
    options = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):  # the latter where one of them is a Literal
        if data is None and types.NoneType in options:
            return None
        reasons = [_misfit(data, option, name) for option in options if option is not types.NoneType]
        return None if None in reasons else reasons[0]
    if origin is Literal:
        fits = data in options
    elif origin is tuple:
        fits = isinstance(data, list) and all(type(x) is options[0] for x in data)
    else:
        fits = type(data) is kind or (kind is float and type(data) is int)
    if name == "dtype":
        fits = data in DTYPES
    return None if fits else f"{name} is {_quoted(data)}"


def _quoted(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 60 else f"{text[:60]}..."


def parameter_shardings(config: DecoderConfig, mesh: Mesh | None) -> Any:
    """Sharding of every parameter; without a mesh all on the first device."""
    if mesh is not None:
        return model_shardings(config, mesh)
    single: Sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: single, abstract_params(config))
