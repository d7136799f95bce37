"""Folders of version 0.1.0, in data/, load, and their commands continue with them. They were written by:

tcam prepare list.csv --out store crop=[8,8,8] channels=null           (v0.nii.gz, v1.nii.gz and a missing file)
tcam fit v0.nii.gz --out fitted steps=20 channels=3 widths=[8]
tcam train-autodecoder fast data=store channels=4 widths=[8] plane_size=8 stride=2 steps=8 batch=2 ssim_weight=0 --out stage1
tcam export-latents stage1 --out latents
tcam train-diffusion tiny latents=latents network.base=4 network.head_channels=4 network.attention_levels=[] steps=4 batch=2
  evaluate_volumes=2 preview_steps=0 center=true --out stage2          (data/model is its folder model/)
tcam sample stage2 --out samples --n 1 --steps 2
tcam interpolate stage2 latents v0 v1 --out between --n 2 --steps 2

store-2 and store-3 are a store of v0.nii.gz with labels in v0-seg.nii.gz, in the formats 2, which has no labels, and 3.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from runs import tcam
from tcam_diff.autodecoder.encode import load_run
from tcam_diff.autodecoder.latents import LatentSet, LatentWriter
from tcam_diff.data.store import Store, StoreWriter
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.errors import UserError
from tcam_diff.evaluation.sets import read_set

CORNER = (-6.0199334, 9.6281231, -9.2373648)  # position in mm of the first voxel of the prepared volumes


@pytest.fixture
def data(tmp_path, monkeypatch):
    shutil.copytree(Path(__file__).parent / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    return tmp_path / "data"


def looks_like(path, shape, mean, std, corner=CORNER, codes=(0, 2)):
    """Check a NIfTI file with two channels."""
    image = nib.load(path)
    voxels = image.get_fdata()
    assert voxels.shape == (*shape, 2)
    np.testing.assert_allclose(voxels.mean((0, 1, 2)), mean, rtol=1e-3)
    np.testing.assert_allclose(voxels.std((0, 1, 2)), std, rtol=1e-2)
    np.testing.assert_allclose(image.affine[:3, 3], corner, rtol=1e-5)
    np.testing.assert_allclose(image.header.get_zooms(), (1, 1.5, 2, 1), rtol=1e-5)
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == codes
    assert image.header.get_xyzt_units() == ("mm", "sec")


def test_a_store(data):
    store = Store(data / "store")
    assert [(r.name, r.split, r.info.array_shape, r.dtype) for r in store.records] == [
        ("v0", "train", (2, 8, 8, 8), "uint8"), ("v1", "train", (2, 8, 8, 8), "uint8"),
    ]  # fmt: skip
    for record, mean in zip(store.records, (46.390625, 43.1171875), strict=True):
        store.verify(record)
        np.testing.assert_allclose(store.volume(record).mean((1, 2, 3)), (mean, 127.5))
        np.testing.assert_allclose(record.info.affine[:3, 3], CORNER, rtol=1e-6)
    np.testing.assert_allclose(store.records[1].info.intensity, [(0.0452967, 91.4524307), (37.3512115, 62.6487885)], rtol=1e-6)


def test_stores_of_later_formats(data):
    """The volume is that of format 1, with codes and units beside it; format 3 has its labels, on the volume's grid."""
    first, second, third = (Store(data / f"store{n}") for n in ("", "-2", "-3"))
    for store in (second, third):
        (record,) = store.records
        store.verify(record)
        np.testing.assert_array_equal(store.volume(record), first.volume(first.records[0]))
        assert (record.info.codes, record.info.units) == ((2, 3), ("mm", "sec"))
    assert (second.label_names, third.label_names) == ({}, {1: "label 1", 4: "label 4"})
    labels, value = third.labels(third.records[0]), third.volume(third.records[0])[0].astype(int)
    assert np.bincount(labels.ravel()).tolist() == [128, 288, 0, 0, 96]
    assert value[labels == 0].max() <= value[labels > 0].min()
    assert value[labels == 1].max() <= value[labels == 4].min()
    with pytest.raises(UserError, match=r"store-2: v0 has no labels.*earlier version"):
        second.labels(second.records[0])


def test_a_store_is_continued(data):
    store = Store(data / "store")
    writer = StoreWriter(data / "store", store.config)
    assert [writer.find(r.name, r.sources) for r in store.records] == store.records
    with pytest.raises(UserError, match="prepared differently"):
        StoreWriter(data / "store", store.config | {"dtype": "float16"})
    assert "2 of 2 cases match their checksums" in tcam("check-data", data / "store")


def test_a_fitted_volume(data):
    tcam("decode", data / "fitted", "--out", data / "x.nii.gz", "-q")
    looks_like(data / "x.nii.gz", (10, 8, 12), (32.7475, 48.5488), (3.304, 1.07565), (-7, 11, -13), (2, 3))
    again = ("fit", data / "v0.nii.gz", "--out", data / "fitted", "steps=1")
    assert "already contains a fitted volume" in tcam(*again, "-q", fails=True)


def test_a_training_run(data):
    run = load_run(data / "stage1")
    assert (run.step, run.objects) == (8, ["v0", "v1"])
    fitted = LatentSet(data / "latents")
    assert torch.equal(run.decoder.state_dict()["0.weight"], fitted.decoder().state_dict()["0.weight"])
    resume = ("train-autodecoder", data / "stage1" / "config.yaml", "--out", data / "stage1", "--resume", "auto", "-q")
    tcam(*resume)
    assert "began with" in tcam(*resume, "channels=5", fails=True)


def test_a_latent_set(data):
    latents = LatentSet(data / "latents")
    assert [(e.name, e.split, e.info.array_shape, e.steps, round(e.psnr, 3)) for e in latents.entries] == [
        ("v0", "train", (2, 8, 8, 8), 8, 9.633), ("v1", "train", (2, 8, 8, 8), 8, 9.26),
    ]  # fmt: skip
    for entry in latents.entries:
        latents.verify(entry)
    means = [float(p.abs().mean()) for p in latents.planes(latents.entries[1])]
    assert means == pytest.approx([0.8204538, 0.8003851, 0.8264606], rel=1e-5)
    tcam("decode", data / "latents", "--volume", "v1", "--out", data / "x.nii.gz", "-q")
    looks_like(data / "x.nii.gz", (8, 8, 8), (48.9778, 48.2866), (2.50264, 0.84717))


def test_a_latent_set_is_continued(data):
    latents, records = LatentSet(data / "latents"), Store(data / "store").records
    writer = LatentWriter(data / "latents", latents.config, latents.decoder(), latents.index["provenance"])
    for entry, record in zip(latents.entries, records, strict=True):
        existing = writer.find(record)
        assert existing is not None
        assert (existing.name, existing.psnr, existing.info) == (entry.name, entry.psnr, entry.info)


def test_a_model_with_a_sample_and_an_interpolation(data):
    """The model is recognised as that of the sample and the interpolation, so both are kept."""
    model = TriplaneDiffusion.load(data / "model")
    assert (model.geometry.texels, model.geometry.info.array_shape) == ((8, 8, 8), (2, 8, 8, 8))
    sidecar = data / "samples" / "sample-0000_seed0_heun2.json"
    before = sidecar.read_bytes()
    assert json.loads(before)["model"] == model.identity
    kept = ("sample", data / "model", "--n", 1, "--steps", 2, "--compute-dtype", "float32")
    assert "1 already exist" in tcam(*kept, "--out", data / "samples")
    assert sidecar.read_bytes() == before
    command = ("interpolate", data / "model", data / "latents", "v0", "v1", "--out", data / "between", "--n", 2, "-q")
    tcam(*command, "--steps", 2)
    assert "of another interpolation" in tcam(*command, "--steps", 3, fails=True)
    tcam(*kept, "--out", data / "new", "-q")
    for folder in ("samples", "new"):
        looks_like(data / folder / "sample-0000_seed0_heun2.nii.gz", (8, 8, 8), (47.90738, 48.24784), (2.32757, 0.81221))


def test_samples_are_read_in_the_unit_range(data):
    unit = read_set(data / "samples", lambda v: v).volumes
    assert unit.shape == (1, 2, 8, 8, 8)
    np.testing.assert_allclose(unit.mean((0, 2, 3, 4)), (0.53193, 0.43013), rtol=1e-3)
