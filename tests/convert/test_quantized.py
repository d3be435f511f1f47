"""MXFP4 and FP8: to the bit what `transformers` dequantizes to, in any slice, and errors that name the cause."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import torch, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import convert
from convert.named_parameters import tensors_by_name
from convert.quantized import dequantized
from convert.reference import reference_model
from convert.source import Source
from jaxhess.distributed.mesh import make_mesh
from jaxhess.errors import InputError

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
WEIGHT = "model.layers.0.mlp.gate_proj.weight"
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}}


def fp8(*block: int) -> dict[str, Any]:
    size = list(block) or None
    return {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}}


def view(folder: Path, tensors: dict[str, Any], hf_config: dict[str, Any]) -> Any:
    save_file(tensors, folder / "model.safetensors")
    return dequantized(Source(folder), hf_config)


def whole(source: Any, name: str) -> np.ndarray:
    return source.read(name, tuple(slice(0, n) for n in source.tensors[name].shape))


def assert_slices(source: Any, name: str, seed: int = 0) -> None:
    """Forty random slices against the whole."""
    rng, all_of_it = np.random.default_rng(seed), whole(source, name)
    for _ in range(40):
        bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in all_of_it.shape]
        slices = tuple(slice(int(a), int(b)) for a, b in bounds)
        np.testing.assert_array_equal(source.read(name, slices), all_of_it[slices])


def bits(x: Any) -> np.ndarray:
    x = x.contiguous() if torch.is_tensor(x) else np.ascontiguousarray(x)
    size = x.dtype.itemsize
    return x.view({2: torch.int16, 4: torch.int32}[size]).numpy() if torch.is_tensor(x) else x.view(f"int{8 * size}")


def packed(experts: int, outputs: int, groups: int, scales: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, outputs, groups, 16), np.uint8)
    blocks.flat[:256] = np.arange(256)  # every byte
    return {
        f"{EXPERTS}_blocks": torch.from_numpy(blocks),
        f"{EXPERTS}_scales": torch.from_numpy(rng.integers(*scales, (experts, outputs, groups), np.uint8)),
    }


def test_mxfp4_has_the_shape_and_bits_of_transformers(tmp_path: Path) -> None:
    """Scales from the smallest to the last with finite values, 6 x 2^125."""
    tensors = packed(3, 10, 4, (0, 253))
    tensors["other"] = torch.ones(2)
    source = view(tmp_path, tensors, MXFP4)
    assert set(source.tensors) == {EXPERTS, "other"}
    assert source.tensors[EXPERTS].shape == (3, 128, 10)
    assert source.tensors[EXPERTS].dtype == "bfloat16"
    expected = convert_moe_packed_tensors(tensors[f"{EXPERTS}_blocks"], tensors[f"{EXPERTS}_scales"])
    np.testing.assert_array_equal(bits(whole(source, EXPERTS)), bits(expected))
    assert_slices(source, EXPERTS)
    np.testing.assert_array_equal(whole(source, "other"), [1, 1])


def test_mxfp4_overflows_as_in_transformers(tmp_path: Path) -> None:
    tensors = packed(2, 16, 2, (253, 256))
    expected = convert_moe_packed_tensors(tensors[f"{EXPERTS}_blocks"], tensors[f"{EXPERTS}_scales"])
    np.testing.assert_array_equal(bits(whole(view(tmp_path, tensors, MXFP4), EXPERTS)), bits(expected))


def quantized(rows: int, columns: int, block: tuple[int, int], seed: int = 0, lead: tuple[int, ...] = ()) -> Any:
    """Random bytes without NaN, and scales of all sizes."""
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 127, (*lead, rows, columns), np.uint8) | rng.choice([0, 128], (*lead, rows, columns))
    stored.flat[:254] = np.delete(np.arange(256), [127, 255])[: stored.size]
    grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    scale = np.exp2(rng.uniform(-100, 100, grid)).astype(np.float32)
    weight = torch.from_numpy(stored.astype(np.uint8)).view(torch.float8_e4m3fn)
    return {WEIGHT: weight, f"{WEIGHT}_scale_inv": torch.from_numpy(scale)}


@pytest.mark.parametrize("lead", [(), (2,)])
def test_fp8_has_the_bits_of_transformers(lead: tuple[int, ...], tmp_path: Path) -> None:
    tensors = quantized(24, 32, (8, 16), lead=lead)
    source = view(tmp_path, tensors, fp8(8, 16))
    expected = Fp8Dequantize(None)._dequantize_one(tensors[WEIGHT], tensors[f"{WEIGHT}_scale_inv"], torch.float32)
    np.testing.assert_array_equal(bits(whole(source, WEIGHT)), bits(expected))
    assert_slices(source, WEIGHT)


@pytest.mark.parametrize(("rows", "columns"), [(23, 40), (8, 33), (3, 200)])
def test_fp8_blocks_at_the_ends_may_be_smaller(rows: int, columns: int, tmp_path: Path) -> None:
    """The loader of transformers takes its blocks from the grid and refuses these; its backward pass does not."""
    tensors = quantized(rows, columns, (8, 16))
    source = view(tmp_path, tensors, fp8(8, 16))
    expected = _dequantize_fp8_weight(tensors[WEIGHT], tensors[f"{WEIGHT}_scale_inv"], [8, 16], torch.float32)
    np.testing.assert_array_equal(bits(whole(source, WEIGHT)), bits(expected))
    assert_slices(source, WEIGHT)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_may_have_one_scale_for_all(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = quantized(8, 24, (8, 24)) | {f"{WEIGHT}_scale_inv": torch.full(shape, 0.3)}
    source = view(tmp_path, tensors, fp8())
    np.testing.assert_array_equal(whole(source, WEIGHT), (tensors[WEIGHT].float() * 0.3).numpy())
    assert_slices(source, WEIGHT)


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e8m0fnu", "uint8"])
def test_fp8_scales_may_be_of_other_kinds(kind: str, tmp_path: Path) -> None:
    tensors = quantized(16, 32, (8, 16))
    exponents = torch.arange(120, 124, dtype=torch.uint8).reshape(2, 2)
    scale = {"bfloat16": torch.rand(2, 2).bfloat16(), "uint8": exponents}.get(kind)
    tensors[f"{WEIGHT}_scale_inv"] = exponents.view(torch.float8_e8m0fnu) if scale is None else scale
    expected = Fp8Dequantize(None)._dequantize_one(tensors[WEIGHT], tensors[f"{WEIGHT}_scale_inv"], torch.float32)
    np.testing.assert_array_equal(bits(whole(view(tmp_path, tensors, fp8(8, 16)), WEIGHT)), bits(expected))


def write_fp8(folder: Path, family: str, **options: Any) -> None:
    """A checkpoint whose matrices inside the layers are FP8 in blocks of 8 x 4, the others bfloat16."""
    write_checkpoint(folder, family, **options)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].float().reshape(rows // 8, 8, columns // 4, 4)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fp8(8, 4), "dtype": "bfloat16"}))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write_fp8(tmp_path, "llama")
    return tmp_path


def test_experts_in_fp8_load_to_the_bits_of_transformers(tmp_path: Path) -> None:
    """Each in matrices of its own in the file, all in one in the memory of transformers."""
    pytest.importorskip("accelerate")
    write_fp8(tmp_path, "qwen3_moe", head_dim=8, moe_intermediate_size=16)
    model = convert.load(tmp_path)
    ours = tensors_by_name(model.params, model.config)
    for name, parameter in reference_model(tmp_path, "bfloat16").named_parameters():
        np.testing.assert_array_equal(bits(ours[name]), bits(parameter.detach()), err_msg=name)


def test_an_fp8_checkpoint_loads_to_the_bits_of_transformers_on_any_mesh_and_is_exported_plain(
    llama: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")  # transformers loads FP8 with it
    for dtype, mesh in ((None, None), ("float32", make_mesh("fsdp=4,tensor=2"))):
        model = convert.load(llama, mesh, dtype)
        assert model.config.dtype == (dtype or "bfloat16")
        ours = tensors_by_name(model.params, model.config)
        for name, parameter in reference_model(llama, model.config.dtype).named_parameters():
            np.testing.assert_array_equal(bits(ours[name]), bits(parameter.detach()), err_msg=name)
    assert convert.read_config(llama, "float32") == model.config

    raw = json.loads((llama / "config.json").read_text())
    kept = convert.load(llama)
    convert.export(kept, tmp_path / "plain", hf_config=raw)
    convert.save(kept, tmp_path / "orbax", hf_config=raw)
    for folder in (tmp_path / "plain", tmp_path / "orbax"):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        again = convert.load(folder)
        for name, values in tensors_by_name(again.params, again.config).items():
            np.testing.assert_array_equal(bits(values), bits(tensors_by_name(kept.params, kept.config)[name]))


def test_only_what_a_slice_needs_is_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    read_bytes = Source.read_bytes
    monkeypatch.setattr(Source, "read_bytes", lambda *a: asked.append(a[1:]) or read_bytes(*a))
    source = dequantized(Source(llama), fp8(8, 4))
    assert not asked
    source.read(WEIGHT, (slice(9, 11), slice(2, 7)))
    assert asked == [(WEIGHT, (slice(9, 11), slice(2, 7)))]


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def _with(name: str, tensor: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: tensor})


E4M3 = torch.zeros(8, 24).to(torch.float8_e4m3fn)
SPOILED: list[tuple[dict[str, Any], Callable[[dict[str, Any]], Any], str]] = [
    (MXFP4, _without(f"{EXPERTS}_scales"), f"Tensor {EXPERTS}_scales is missing from"),
    (MXFP4, _without(f"{EXPERTS}_blocks"), f"Tensor {EXPERTS}_blocks is missing from"),
    (MXFP4, _with(EXPERTS, torch.ones(2)), f"has a weight twice: {EXPERTS} and {EXPERTS}_blocks."),
    (MXFP4, _with(f"{EXPERTS}_scales", torch.ones(2, 16, 3).byte()), "has shape [2, 16, 3]; expected [2, 16, 2]"),
    (MXFP4, _with(f"{EXPERTS}_scales", torch.ones(2, 16, 2)), "is float32; scales must be U8."),
    (MXFP4, _with(f"{EXPERTS}_blocks", torch.ones(2, 16, 2, 8).byte()), "is U8 of shape [2, 16, 2, 8]; MXFP4 has U8"),
    (fp8(8, 8), _without(f"{WEIGHT}_scale_inv"), f"Tensor {WEIGHT}_scale_inv is missing from"),
    (fp8(8, 8), _without(WEIGHT), f"Tensor {WEIGHT} is missing from"),
    (fp8(8, 8), _with(WEIGHT, torch.ones(8, 24)), f"Tensor {WEIGHT} in model.safetensors has a scale"),
    (fp8(8, 6), lambda _: None, "has shape [1, 3]; expected [1, 4], a scale for each block."),
    (fp8(8, 8), _with(f"{WEIGHT}_scale_inv", torch.ones(1, 3).int()), "is I32; scales must be float32, bfloat16"),
    (fp8(8, 8), _with("norm.weight", E4M3[0].clone()), "Tensor norm.weight_scale_inv is missing from"),
    (fp8(0, 8), lambda _: None, "has weight_block_size [0, 8] in quantization_config; it must be two positive"),
    ({}, _with("a.qweight", torch.ones(2).int()), "Tensor a.qweight in model.safetensors is a packed one, as GPTQ and"),
]  # fmt: skip


@pytest.mark.parametrize(("hf_config", "spoil", "sentence"), SPOILED, ids=[repr(case[2]) for case in SPOILED])
def test_what_is_wrong_is_said_in_one_sentence(
    hf_config: dict[str, Any], spoil: Callable[[dict[str, Any]], Any], sentence: str, tmp_path: Path
) -> None:
    scale = torch.ones(1, 3)
    tensors = packed(2, 16, 2, (100, 120)) if hf_config == MXFP4 else {WEIGHT: E4M3, f"{WEIGHT}_scale_inv": scale}
    spoil(tensors)
    with pytest.raises(InputError, match=re.escape(sentence)):
        view(tmp_path, tensors, hf_config)


@pytest.mark.parametrize(
    ("method", "instead"),
    [
        ("gptq", "use the unquantized weights it was made from."),
        ("awq", "use the unquantized weights it was made from."),
        ("compressed-tensors", "use the unquantized weights it was made from."),
        ("bitsandbytes", "call model.dequantize() and save_pretrained, and use that."),
    ],
)
def test_other_methods_are_refused_by_name(method: str, instead: str, llama: Path) -> None:
    file = llama / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": method}}))
    for read in (convert.load, convert.read_config):
        with pytest.raises(InputError, match=re.escape(instead)) as caught:
            read(llama)
        assert f"is quantized (quantization_config: {method}), in a way that is not read" in str(caught.value)


def test_values_that_are_not_finite_are_refused_where_they_are_loaded(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors[f"{WEIGHT}_scale_inv"][0, 0] = float("inf")
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(InputError, match=rf"Tensor {re.escape(WEIGHT)} in .* holds NaN or infinite values"):
        convert.load(llama)
