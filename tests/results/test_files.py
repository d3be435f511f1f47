"""Run folders: written whole, read back equal, refused by name."""

import json

import numpy as np
import pytest
from known_spectra import (
    sampled,
)

from jaxhess.errors import InputError
from jaxhess.slq.spectrum import Spectrum

INFO = {"loss": np.float32(2.5), "mesh": (2, 4), "bad": float("nan"), "nested": {"steps": np.int64(3)}}


def _refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_saved_spectrum_loads_equal_and_its_arrays_are_named(tmp_path):
    spectrum = sampled(probes=2, steps=4, info=INFO)
    spectrum.save(tmp_path / "run")
    loaded = Spectrum.load(tmp_path / "run")
    assert loaded == spectrum
    assert loaded.info == {"loss": 2.5, "mesh": [2, 4], "bad": None, "nested": {"steps": 3}}
    assert loaded != sampled(probes=2, steps=4, seed=1, info=INFO)
    assert loaded != sampled(probes=2, steps=4)
    with np.load(tmp_path / "run" / "spectrum.npz") as arrays:
        for name in ("ritz_values", "weights", "residual_bounds", "ghosts", "alphas", "betas", "sizes", "dim"):
            np.testing.assert_array_equal(arrays[name], getattr(spectrum, name))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("manifest.json", "spectrum.json", "spectrum.npz")
    ]


@pytest.mark.parametrize(("probes", "steps"), [(1, 1), (1, 3), (2, 1), (3, 4)])
def test_record_is_strict_json_with_null_for_the_unknown(tmp_path, probes, steps):
    spectrum = sampled(probes, steps, info=INFO)
    spectrum.save(tmp_path)
    record = json.loads((tmp_path / "spectrum.json").read_text(), parse_constant=_refuse_constant)
    assert record["format"] == "jaxhess-spectrum-2"
    assert record["summary"]["trace"]["value"] == pytest.approx(55 * spectrum.alphas[:, 0].mean())
    assert (record["summary"]["largest"]["spread"] is None) == (probes == 1)
    assert record["summary"]["exact_degree"] == 2 * steps
    assert sorted(record["summary"]["moments"]) == [str(k) for k in range(1, min(4, 2 * steps) + 1)]


def test_finished_run_is_not_overwritten_without_being_told(tmp_path):
    first, second = sampled(1, 2, seed=1), sampled(1, 2, seed=2)
    first.save(tmp_path)
    with pytest.raises(InputError, match=tmp_path.name):
        second.save(tmp_path)
    assert Spectrum.load(tmp_path) == first
    second.save(tmp_path, overwrite=True)
    assert Spectrum.load(tmp_path) == second


def test_failed_write_leaves_the_finished_run_whole(tmp_path, monkeypatch):
    first = sampled(1, 2, seed=1)
    first.save(tmp_path / "run")

    def full_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full_disk)
        with pytest.raises(InputError, match="disks are full or read-only"):
            sampled(1, 2, seed=2).save(tmp_path / "run", overwrite=True)
    assert Spectrum.load(tmp_path / "run") == first
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_corrupt_or_foreign_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        Spectrum.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"spectrum\.json does not exist"):
        Spectrum.load(tmp_path)
    sampled(1, 2).save(tmp_path)
    record, arrays = tmp_path / "spectrum.json", tmp_path / "spectrum.npz"
    whole = arrays.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a zip"):
        arrays.write_bytes(content)
        with pytest.raises(ValueError, match=r"spectrum\.npz is corrupt"):
            Spectrum.load(tmp_path)
    arrays.unlink()
    with pytest.raises(InputError, match=r"spectrum\.npz does not exist"):
        Spectrum.load(tmp_path)
    arrays.write_bytes(whole)
    for text in ("{", "[]", '{"format": "other"}'):
        record.write_text(text)
        with pytest.raises(ValueError, match=r"spectrum\.json is not a spectrum record"):
            Spectrum.load(tmp_path)
