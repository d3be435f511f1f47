"""Checkpoints with quantized weights, seen as the ones they were made from: plain names, plain shapes, slices.

`dequantized` wraps the tensors of a checkpoint. What is stored as blocks and scales appears as one tensor under the
name that the weight has in `transformers`; a slice of it is computed from the blocks that cover it, and no others are
read. Values are those that `transformers` dequantizes to, bit for bit.

MXFP4 (gpt-oss): a weight W of shape [..., inputs, outputs] is W_blocks, uint8 [..., outputs, inputs / 32, 16] with two
numbers of four bits in a byte (the lower four first), and W_scales, uint8 [..., outputs, inputs / 32], exponents biased
by 127. A number is (-1)^s 2^(e-1) (1 + m/2), or (-1)^s m/2 where e = 0, times 2^(scale - 127): OCP Microscaling Formats
v1.0, section 5. All are exact in bfloat16.

Block-wise FP8 (DeepSeek-V3): a weight W is float8_e4m3fn [..., rows, columns], and W_scale_inv [..., ceil(rows / r),
ceil(columns / c)] has the factor of each block of r x c values (arXiv 2412.19437, section 3.3.2); those at the ends may
be smaller. The product is one in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.json_files import shown
from convert.layout import Slices
from convert.source import Source, StoredTensor, TensorSource
from jaxhess.errors import InputError

KEY = "quantization_config"
READ = ("fp8", "mxfp4")
"""Values of `quant_method` that are read."""

FOUR_BIT_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_DEQUANTIZABLE = ("bitsandbytes", "higgs")
"""Methods whose weights `model.dequantize()` of transformers makes plain again."""

_SCALE_DTYPES = ("float32", "bfloat16", "float16", "U8", "F8_E8M0")
"""The last two are exponents, biased by 127."""

_CHUNK = 2**18
"""Values dequantized at a time: table and results stay in the cache, and the indices NumPy makes of them small."""


def quantization_method(hf_config: Mapping[str, Any], file: str | Path = "config.json") -> str | None:
    """How the weights of a checkpoint are quantized, by its raw `config.json`: one of `READ`, or None for not at all.

    Raises:
        InputError: In another way; the sentence names it and says what to do instead.
    """
    quantization = hf_config.get(KEY)
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if isinstance(quantization, dict) and method in READ:
        return str(method)
    instead = "use the unquantized weights it was made from"
    if method in _DEQUANTIZABLE:
        instead += ", or load it in transformers, call model.dequantize() and save_pretrained, and use that"
    raise InputError(
        f"{file} says the checkpoint is quantized ({KEY}: {shown(method).strip(chr(39))}), in a way that is not read "
        f"({' and '.join(READ)} are); {instead}."
    )


def unquantized(hf_config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` for the same model with plain weights."""
    return {key: value for key, value in hf_config.items() if key != KEY}


def dequantized(source: Source, hf_config: Mapping[str, Any], file: str | Path = "config.json") -> TensorSource:
    """The tensors of `source` as they are without quantization; `source` itself if its `config.json` says it has none.

    MXFP4 appears in bfloat16, which holds it exactly. FP8 appears in float32, from which the loader rounds once.

    Examples:
        >>> from pathlib import Path
        >>> from convert.source import Source
        >>> source = Source(Path("scripts/tiny"))
        >>> dequantized(source, {"model_type": "gpt_neox"}) is source
        True

    Args:
        source: The files' tensors.
        hf_config: The raw `config.json`.
        file: What errors call it.

    Raises:
        InputError: A method that is not read; blocks or scales are missing, or of a wrong shape or kind.
    """
    method = quantization_method(hf_config, file)
    if method is None:
        packed = next((name for name in source.tensors if name.endswith(".qweight")), None)
        if packed is not None:
            raise InputError(
                f"Tensor {packed} in {source.tensors[packed].file.name} is a packed one, as GPTQ and AWQ write them, "
                "which are not read: use the unquantized weights the checkpoint was made from."
            )
        return source
    return _Dequantized(source, *(_mxfp4(source) if method == "mxfp4" else _fp8(source, hf_config[KEY], file)))


class _Dequantized:
    """A `TensorSource` in which some tensors are replaced by others, each with a function that reads slices of it."""

    def __init__(
        self,
        source: Source,
        hidden: set[str],
        computed: dict[str, tuple[StoredTensor, Callable[[Slices], np.ndarray]]],
    ):
        self.directory = source.directory
        self._source = source
        self._computed = computed
        plain = {name: tensor for name, tensor in source.tensors.items() if name not in hidden}
        self.tensors: Mapping[str, StoredTensor] = plain | {name: tensor for name, (tensor, _) in computed.items()}

    def read(self, name: str, slices: Slices) -> np.ndarray:
        if name in self._computed:
            return self._computed[name][1](slices)
        return self._source.read(name, slices)


def _mxfp4(source: Source) -> tuple[set[str], dict[str, Any]]:
    """The names that hold MXFP4, and what they hold."""
    hidden: set[str] = set()
    computed: dict[str, Any] = {}
    for scales_name in (name for name in source.tensors if name.endswith("_scales")):
        blocks_name = scales_name.removesuffix("_scales") + "_blocks"
        if blocks_name not in source.tensors:
            raise InputError(f"Tensor {blocks_name} is missing from {source.directory}, but it has {scales_name}.")
    for blocks_name, blocks in source.tensors.items():
        if not blocks_name.endswith("_blocks"):
            continue
        name = blocks_name.removesuffix("_blocks")
        scales_name = f"{name}_scales"
        scales = _companion(source, blocks_name, scales_name)
        if name in source.tensors:
            raise InputError(f"{source.directory} has a weight twice: {name} and {blocks_name}.")
        if blocks.dtype != "U8" or len(blocks.shape) < 3 or blocks.shape[-1] != 16:
            raise InputError(
                f"Tensor {blocks_name} in {blocks.file.name} is {blocks.dtype} of shape {list(blocks.shape)}; MXFP4 "
                "has U8 of shape [..., outputs, groups, 16]."
            )
        _check_scales(scales_name, scales, blocks.shape[:-1], ("U8",))
        *lead, outputs, groups, _ = blocks.shape
        hidden |= {blocks_name, scales_name}
        computed[name] = (
            StoredTensor(blocks.file, (*lead, 32 * groups, outputs), "bfloat16"),
            functools.partial(_read_mxfp4, source, blocks_name, scales_name),
        )
    return hidden, computed


def _read_mxfp4(source: Source, blocks_name: str, scales_name: str, slices: Slices) -> np.ndarray:
    *lead, inputs, outputs = slices
    groups = slice(inputs.start // 32, -(-inputs.stop // 32))
    blocks = source.read_bytes(blocks_name, (*lead, outputs, groups, slice(0, 16)))
    scales = source.read_bytes(scales_name, (*lead, outputs, groups))
    rows, bytes_each = math.prod(blocks.shape[:-2]), 16 * blocks.shape[-2]
    pairs = np.empty((rows, bytes_each), np.uint32)
    every_byte, every_scale = blocks.reshape(rows, -1, 16), scales.reshape(rows, -1, 1)
    step = max(1, _CHUNK // max(bytes_each, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        index = every_scale[part].astype(np.uint16) << 8 | every_byte[part]
        np.take(_four_bit_pairs(), index.reshape(-1, bytes_each), out=pairs[part], mode="clip")
    first = 32 * groups.start
    values = pairs.view(ml_dtypes.bfloat16).reshape(*blocks.shape[:-2], 2 * bytes_each)
    return values[..., inputs.start - first : inputs.stop - first].swapaxes(-1, -2)


@functools.cache
def _four_bit_pairs() -> np.ndarray:
    """[scale * 256 + byte] -> the two numbers of the byte in bfloat16, as one uint32."""
    values = np.array(FOUR_BIT_VALUES, np.float32)
    byte = np.arange(256)
    numbers = np.stack([values[byte & 15], values[byte >> 4]], axis=-1)
    with np.errstate(over="ignore"):  # infinite: what loads it says where
        scaled = np.ldexp(numbers, np.arange(256)[:, None, None] - 127).astype(ml_dtypes.bfloat16)
    return scaled.view(np.uint32).reshape(-1)


def _fp8(source: Source, quantization: Mapping[str, Any], file: str | Path) -> tuple[set[str], dict[str, Any]]:
    """The names that hold FP8, and what they hold."""
    block = quantization.get("weight_block_size", [128, 128])
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise InputError(
            f"{file} has weight_block_size {shown(block)} in {KEY}; it must be two positive integers or null."
        )
    hidden = {name for name in source.tensors if name.endswith(".activation_scale")}  # of products in FP8, not of W
    computed: dict[str, Any] = {}
    for name, tensor in source.tensors.items():
        if name.endswith("_scale_inv"):
            weight = name.removesuffix("_scale_inv")
            if weight not in source.tensors:
                raise InputError(f"Tensor {weight} is missing from {source.directory}, but it has {name}.")
            if source.tensors[weight].dtype != "F8_E4M3":
                raise InputError(
                    f"Tensor {weight} in {tensor.file.name} has a scale ({name}), but it is "
                    f"{source.tensors[weight].dtype}; only F8_E4M3 has one."
                )
        if tensor.dtype != "F8_E4M3":
            continue
        scale_name = f"{name}_scale_inv"
        scale = _companion(source, name, scale_name)
        if len(tensor.shape) < 2:
            raise InputError(f"Tensor {name} in {tensor.file.name} is FP8 of shape {list(tensor.shape)}, not a matrix.")
        *lead, rows, columns = tensor.shape
        if block is None and math.prod(scale.shape) == 1:
            size, grid = (rows, columns), scale.shape
        else:
            size = (rows, columns) if block is None else (block[0], block[1])
            grid = (*lead, -(-rows // size[0]), -(-columns // size[1]))
        _check_scales(scale_name, scale, grid, _SCALE_DTYPES)
        hidden.add(scale_name)
        computed[name] = (
            StoredTensor(tensor.file, tensor.shape, "float32"),
            functools.partial(_read_fp8, source, name, scale_name, size),
        )
    return hidden, computed


def _read_fp8(source: Source, name: str, scale_name: str, size: tuple[int, int], slices: Slices) -> np.ndarray:
    *lead, rows, columns = slices
    stored = source.read_bytes(name, slices)
    values = np.empty(stored.shape, np.float32)
    flat_in, flat_out = stored.reshape(-1), values.reshape(-1)
    for start in range(0, stored.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        np.take(_eight_bit_values(), flat_in[part], out=flat_out[part], mode="clip")

    first, grid = rows.start // size[0], slice(columns.start // size[1], -(-columns.stop // size[1]))
    wanted = (*lead, slice(first, -(-rows.stop // size[0])), grid)
    of_row = np.repeat(_scales(source, scale_name, wanted), size[0], axis=-2)
    of_row = of_row[..., rows.start - first * size[0] :, :][..., : rows.stop - rows.start, :]
    for column in range(grid.start, grid.stop):  # at once it would take an array of scales as large as the values
        start = max(column * size[1] - columns.start, 0)
        stop = (column + 1) * size[1] - columns.start
        values[..., start:stop] *= of_row[..., column - grid.start, None]
    return values


def _scales(source: Source, name: str, slices: Slices) -> np.ndarray:
    """Factors in float32, [..., block rows, block columns]."""
    tensor = source.tensors[name]
    if math.prod(tensor.shape) == 1:  # one of the whole tensor, in any shape
        slices = tuple(slice(0, 1) for _ in tensor.shape)
    if tensor.dtype in ("U8", "F8_E8M0"):
        exponents = source.read_bytes(name, slices).astype(np.int32) - 127
        with np.errstate(over="ignore"):
            factors = np.ldexp(np.float32(1), exponents)
    else:
        factors = source.read(name, slices).astype(np.float32)
    return factors.reshape(1, 1) if factors.size == 1 else factors


@functools.cache
def _eight_bit_values() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _companion(source: Source, name: str, scale_name: str) -> StoredTensor:
    if scale_name not in source.tensors:
        raise InputError(f"Tensor {scale_name} is missing from {source.directory}: it has the scales of {name}.")
    return source.tensors[scale_name]


def _check_scales(name: str, scale: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if scale.shape != shape:
        raise InputError(
            f"Tensor {name} in {scale.file.name} has shape {list(scale.shape)}; expected {list(shape)}, a scale for "
            "each block."
        )
    if scale.dtype not in dtypes:
        raise InputError(f"Tensor {name} in {scale.file.name} is {scale.dtype}; scales must be {', '.join(dtypes)}.")
