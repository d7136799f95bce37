"""Preprocessing of files to a store of volumes in [0, 1]."""

from __future__ import annotations

import json
import os

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCrop, Compose, Orientation, ScaleIntensityRangePercentiles, Spacing
from tcam_diff import config as configs
from tcam_diff.cli.app import app
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.prepare import prepare_cases, prepare_volume, split_cases
from tcam_diff.data.sources import Case, download_decathlon, find_cases
from tcam_diff.data.store import Store, one_shape
from tcam_diff.data.volume import Volume, VolumeInfo
from tcam_diff.errors import UserError
from typer.testing import CliRunner


def load(preset, *overrides):
    return PrepareConfig.load(preset, overrides)


def volume(shape=(20, 24, 16), channels=1, spacing=(1.0, 1.0, 1.0), flip=False, seed=0):
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 1, shape[0])[:, None, None] + np.linspace(0, 2, shape[1])[:, None] + np.linspace(0, 4, shape[2])
    data = (100 * x + rng.normal(size=(channels, *shape))).astype(np.float32)
    affine = np.diag([*(-s if flip else s for s in spacing), 1.0])
    affine[:3, 3] = (5, -7, 11)
    return Volume(data, VolumeInfo(channels=channels, shape=shape, affine=affine, codes=(1, 1), source="memory"))


def write(path, v):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.moveaxis(v.data, 0, -1)
    image = nib.Nifti1Image(data[..., 0] if data.shape[-1] == 1 else data, v.info.affine)
    image.set_qform(v.info.affine, code=1)
    image.header.set_xyzt_units("mm", "msec")
    nib.save(image, path)


def test_brats_is_the_authors_chain_of_monai_transforms():
    """The preset equals the chain of algorithm.md section 8, written with MONAI."""
    v = volume((60, 56, 40), 4, (1.2, 1.0, 1.5), flip=True)
    got, info = prepare_volume(v, load("brats-flair-128", "crop=[32, 40, 24]"))
    theirs = Compose([
        Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))), Spacing(pixdim=(1, 1, 1), mode="bilinear"),
        CenterSpatialCrop((32, 40, 24)), ScaleIntensityRangePercentiles(0, 99.5, 0, 1, clip=True),
    ])(MetaTensor(torch.from_numpy(v.data[:1]), affine=torch.tensor(v.info.affine)))  # fmt: skip
    assert got.shape == (1, 32, 40, 24)
    np.testing.assert_allclose(got, theirs.numpy(), atol=1e-5)
    np.testing.assert_allclose(info.affine, theirs.affine.numpy())
    (lo, hi) = info.intensity[0]
    assert lo < hi < v.data.max()


def test_every_channel_has_percentiles_of_its_own():
    v = volume(channels=2)
    v.data[1] *= 50
    got, info = prepare_volume(v, load("brats-4ch-128", "crop=[8, 8, 8]"))
    assert got.shape[0] == 2
    assert got[0].max() == got[1].max() == 1
    assert info.intensity[1][1] > 20 * info.intensity[0][1]


def test_ct_is_windowed_and_resized_and_goes_back_to_hu():
    v = volume((20, 24, 16))
    v.data -= 150
    got, info = prepare_volume(v, load("colon-512", "resize=[40, 24, 16]"))
    assert info.intensity == [(-30.0, 165.82)]
    assert got.shape == (1, 40, 24, 16)
    assert got.min() == 0
    assert got.max() == 1
    assert np.linalg.norm(info.affine[:3, 0]) == pytest.approx(0.5)  # twice the voxels, half the spacing
    lo, hi = info.intensity[0]
    np.testing.assert_allclose(lo + (hi - lo) * got[0, 0, 12, 8], np.clip(v.data[0, 0, 12, 8], lo, hi), atol=3)


def test_a_crop_that_is_too_large_is_filled_with_zeros():
    got, _ = prepare_volume(volume((20, 24, 16)), load("cohort", "crop=[32, 24, 20]"))
    assert got.shape == (1, 32, 24, 20)
    assert (got[:, 0] == 0).all()


@pytest.mark.parametrize("preset", configs.presets("prepare"))
def test_presets(preset):
    config = load(preset)
    assert PrepareConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("windw=[0, 1]", "windw: no such key; did you mean window"),
        ("window=[0, 1]", "window or percentiles, one"),
        ("percentiles=[99, 1]", "lower first"),
        ("percentiles=[0, 101]", "0 to 100"),
        ("orientation=XYZ", "orientation"),
        ("crop=[0, 1, 1]", "crop"),
        ("dtype=float64", "dtype"),
    ],
)
def test_bad_configuration(override, message):
    with pytest.raises(UserError, match=message):
        load("cohort", override)


def test_split_monai_is_that_of_monai(tmp_path):
    """The split equals that of DecathlonDataset on a task folder without images."""
    from monai.apps import DecathlonDataset

    folder = tmp_path / "Task01_BrainTumour"
    folder.mkdir()
    listed = [{"image": f"./imagesTr/BRATS_{i:03d}.nii.gz", "label": f"./labelsTr/BRATS_{i:03d}.nii.gz"} for i in range(484)]
    keys = ("name", "description", "reference", "licence", "tensorImageSize", "modality", "labels")
    described = dict.fromkeys((*keys, "numTraining", "numTest"), "") | {"training": listed, "test": []}
    (folder / "dataset.json").write_text(json.dumps(described))
    theirs = DecathlonDataset(tmp_path, "Task01_BrainTumour", "validation", cache_num=0, progress=False, num_workers=0)
    want = {os.path.basename(d["image"]).removesuffix(".nii.gz") for d in theirs.data}
    ours = split_cases(find_cases(folder).cases, load("brats-flair-128", "split=monai"))
    assert {c.name for c in ours if c.split == "validation"} == want
    assert len(want) == 96
    assert sum(c.split == "train" for c in ours) == 388
    assert sum(c.split == "train" for c in split_cases(ours, load("brats-flair-128"))) == 388


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        write(tmp_path / "in" / f"c{i}.nii.gz", volume(seed=i))
    return tmp_path / "in"


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_a_store_serves_what_was_prepared(folder, tmp_path, dtype):
    config = load("cohort", f"dtype={dtype}")
    records = list(prepare_cases(find_cases(folder).cases, tmp_path / "store", config))
    assert [r.name for r in records] == [f"c{i}" for i in range(5)]
    store = Store(tmp_path / "store")
    for i, record in enumerate(store.in_split("train")):
        store.verify(record)
        want, info = prepare_volume(volume(seed=i), config)
        array = store.volume(record)
        assert isinstance(array, np.memmap)
        assert array.dtype == dtype
        part = array[:, 3:7, :, 5].astype(np.float32) / (255 if dtype == "uint8" else 1)
        np.testing.assert_allclose(part, want[:, 3:7, :, 5], atol=0.5 / 255 + 1e-6 if dtype == "uint8" else 5e-4)
        np.testing.assert_allclose(record.info.affine, info.affine)
        np.testing.assert_allclose(record.info.intensity, info.intensity)
        assert (record.info.codes, record.info.units) == ((1, 2), ("mm", "msec"))  # those of the file
    assert one_shape(store.folder, store.records) == (1, 20, 24, 16)


def test_a_bad_file_does_not_stop_the_others(folder, tmp_path):
    (folder / "c2.nii.gz").write_bytes((folder / "c2.nii.gz").read_bytes()[:3000])
    records = list(prepare_cases(find_cases(folder).cases, tmp_path / "store", load("cohort"), jobs=2))
    assert [bool(r.problem) for r in records] == [False, False, True, False, False]
    assert "c2.nii.gz" in records[2].problem
    store = Store(tmp_path / "store")
    assert len(store.records) == 4
    assert json.loads((tmp_path / "store" / "store.json").read_text())["failed"][0]["name"] == "c2"


def test_an_interrupted_run_continues(folder, tmp_path, monkeypatch):
    cases, out, config = find_cases(folder).cases, tmp_path / "store", load("cohort")
    steps = prepare_cases(cases, out, config)
    next(steps), next(steps)
    steps.close()  # killed after two
    with pytest.raises(UserError, match=r"store\.json is missing"):
        Store(out)
    before = {p.name: p.stat().st_mtime_ns for p in (out / "cases").glob("*.npy")}
    list(prepare_cases(cases, out, config))
    after = {p.name: p.stat().st_mtime_ns for p in (out / "cases").glob("*.npy")}
    assert len(after) == 5
    assert all(after[n] == t for n, t in before.items())
    write(folder / "c0.nii.gz", volume(seed=77))  # changed sources are prepared again
    list(prepare_cases(cases, out, config))
    changed = [n for n, t in after.items() if (out / "cases" / n).stat().st_mtime_ns != t]
    assert changed == ["c0.npy"]
    with pytest.raises(UserError, match="prepared differently"):
        list(prepare_cases(cases, out, load("cohort", "percentiles=[1, 99]")))


def test_damage_to_a_store_is_named(folder, tmp_path):
    out = tmp_path / "store"
    list(prepare_cases(find_cases(folder).cases, out, load("cohort")))
    array = out / "cases" / "c1.npy"
    data = bytearray(array.read_bytes())
    data[-1] ^= 1
    array.write_bytes(data)
    store = Store(out)
    store.verify(store.records[0])
    with pytest.raises(UserError, match=r"c1\.npy: changed or damaged"):
        store.verify(store.records[1])
    said = CliRunner().invoke(app, ["check-data", str(out)])
    assert said.exit_code == 1
    assert "4 of 5 cases match their checksums" in said.output
    array.write_bytes(data[:200])
    with pytest.raises(UserError, match=r"c1\.npy"):
        Store(out).volume(store.records[1])
    with pytest.raises(UserError, match=r"no case of the split 'test'; it has train \(5\)"):
        store.in_split("test")


def test_names_that_would_leave_the_folder(tmp_path):
    write(tmp_path / "x.nii.gz", volume())
    case = Case("../x", (tmp_path / "x.nii.gz",))
    with pytest.raises(UserError, match="becomes a file name"):
        list(prepare_cases([case], tmp_path / "store", load("cohort")))


def test_download_says_what_to_do(tmp_path, monkeypatch):
    import monai.apps

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(monai.apps, "download_and_extract", unreachable)
    with pytest.raises(UserError, match=r"no route to host.*leave --download out"):
        download_decathlon(tmp_path / "Task01_BrainTumour")
    with pytest.raises(UserError, match="Task10_Colon"):
        download_decathlon(tmp_path / "Task99")
