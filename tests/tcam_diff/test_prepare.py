"""Preprocessing of files to a store of volumes in [0, 1]."""

from __future__ import annotations

import itertools
import json
import os
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCrop, Compose, Orientation, ScaleIntensityRangePercentiles, Spacing
from tcam_diff import config as configs
from tcam_diff.cli.app import app
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.prepare import prepare_cases, prepare_labels, prepare_volume, split_cases
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


# ---- labels --------------------------------------------------------------------------------------


def smooth(shape, affine, channels=1):
    """Volume of a smooth function of the position in mm, and labels by its thresholds."""
    info = VolumeInfo(channels=channels, shape=shape, affine=affine, source="memory")
    i = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mm = i @ affine[:3, :3].T + affine[:3, 3]
    value = (100 + 40 * np.sin(mm / 9).sum(-1) + 0.5 * mm[..., 0]).astype(np.float32)
    return Volume(np.repeat(value[None], channels, 0), info), (value > 90).astype(np.uint8) + 3 * (value > 130)


def turned(*spacing):
    """Affine with axes in the order y, z, x, two of them reversed, and these spacings."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, -spacing[2]], [-spacing[0], 0, 0], [0, spacing[1], 0]])
    affine[:3, 3] = (11, -7, 5)
    return affine


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("cohort", ()),
        ("cohort", ("orientation=null",)),
        ("cohort", ("orientation=LPI",)),
        ("cohort", ("crop=[16, 40, 18]",)),
        ("brats-flair-128", ("crop=[40, 24, 30]",)),
        ("cohort", ("spacing=[1.1, 0.9, 1.3]",)),
        ("cohort", ("resize=[45, 27, 31]",)),
        ("cohort", ("resize=[16, 13, 11]",)),
        ("cohort", ("spacing=[2, 1, 1]", "resize=[30, 30, 30]")),
    ],
)
def test_labels_stay_aligned_with_the_image(preset, changes):
    """Prepared labels are the thresholds of the prepared image, but for voxels beside a boundary."""
    config = load(preset, *changes, "percentiles=[0, 100]")
    v, labels = smooth((30, 26, 22), turned(1.0, 1.4, 1.2))
    got, info = prepare_volume(v, config)
    carried = prepare_labels(labels, v.info.affine, config)
    assert carried.shape == got.shape[1:]
    assert carried.dtype == np.uint8
    assert set(np.unique(carried)) <= {0, 1, 4}
    inside = prepare_labels(np.ones_like(labels), v.info.affine, config) == 1  # not added by a crop
    lo, hi = info.intensity[0]
    value = got[0] * (hi - lo) + lo
    want = (value > 90).astype(np.uint8) + 3 * (value > 130)
    beside = 20 if config.resize or config.spacing else 0.01  # change of the value over a voxel, at most
    sure = inside & (np.abs(value - 90) > beside) & (np.abs(value - 130) > beside)
    assert sure.sum() > 0.3 * inside.sum()
    np.testing.assert_array_equal(carried[sure], want[sure])
    off = (carried != want)[inside].mean()
    assert off < (0.065 if beside > 1 else 1e-6)
    for axis, step in itertools.product(range(3), (-1, 1)):  # a shift by a voxel makes it worse, equally in both directions
        assert (np.roll(carried, step, axis) != want)[inside].mean() > 2 * off


def test_the_grid_of_labels_is_kept_exactly():
    """Turning and cropping move labels without changing one; what a crop adds is background."""
    labels = np.random.default_rng(0).integers(1, 255, (6, 5, 4)).astype(np.uint8)
    np.testing.assert_array_equal(
        prepare_labels(labels, turned(1, 1, 1), load("cohort")), labels.transpose(2, 0, 1)[::-1, ::-1]
    )
    cropped = prepare_labels(labels, np.eye(4), load("cohort", "crop=[8, 5, 2]"))
    assert not cropped[0].any()
    assert not cropped[-1].any()
    np.testing.assert_array_equal(cropped[1:7], labels[:, :, 1:3])


@pytest.fixture
def labelled(tmp_path):
    """Decathlon folder of three training cases, of which the last has no labels, and a test case with labels in labelsTs."""
    folder = tmp_path / "task"
    for i, part in enumerate(("Tr", "Tr", "Tr", "Ts")):
        v, labels = smooth((12, 10, 8), turned(1, 1.5, 2 + 0.1 * i))
        write(folder / f"images{part}" / f"c{i}.nii.gz", v)
        if i != 2:
            write(folder / f"labels{part}" / f"c{i}.nii.gz", Volume(labels[None].astype(np.float32), v.info))
    training = [{"image": f"./imagesTr/c{i}.nii.gz", "label": f"./labelsTr/c{i}.nii.gz"} for i in range(2)]
    described = {
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "4": "enhancing tumour"},
        "training": [*training, {"image": "./imagesTr/c2.nii.gz"}],
        "test": ["./imagesTs/c3.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def prepared(folder, out, *overrides):
    data = find_cases(folder)
    return list(prepare_cases(data.cases, out, load("cohort", *overrides), names=data.label_names))


def test_a_store_keeps_labels(labelled, tmp_path):
    assert not any(r.problem for r in prepared(labelled, tmp_path / "store"))
    store = Store(tmp_path / "store")
    assert store.label_names == {1: "ED", 4: "ET"}
    assert [r.label_codes for r in store.records] == [[0, 1, 4], [0, 1, 4], [], [0, 1, 4]]
    for i in (0, 3):
        record = store.records[i]
        v, labels = smooth((12, 10, 8), turned(1, 1.5, 2 + 0.1 * i))
        got = store.labels(record)
        assert isinstance(got, np.memmap)
        assert not got.flags.writeable
        np.testing.assert_array_equal(got, prepare_labels(labels, v.info.affine, load("cohort")))
        assert got.shape == store.volume(record).shape[1:]
        store.verify(record)
    with pytest.raises(UserError, match=r"store: c2 has no labels.*tcam prepare"):
        store.labels(store.records[2])
    path = tmp_path / "store" / "labels" / "c0.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"labels/c0\.npy: changed or damaged"):
        store.verify(store.records[0])


def test_changed_or_lost_labels_are_prepared_again(labelled, tmp_path):
    out = tmp_path / "store"
    prepared(labelled, out)

    def again():
        times = {p: p.stat().st_mtime_ns for p in (out / "cases").glob("*.npy")}
        assert not any(r.problem for r in prepared(labelled, out))
        return sorted(p.name for p, t in times.items() if p.stat().st_mtime_ns != t)

    assert again() == []
    v, labels = smooth((12, 10, 8), turned(1, 1.5, 2))
    write(labelled / "labelsTr" / "c0.nii.gz", Volume(7.0 * (labels[None] > 0), v.info))
    assert again() == ["c0.npy"]
    assert Store(out).label_names == {1: "ED", 4: "ET", 7: "label 7"}
    (out / "labels" / "c1.npy").unlink()
    assert again() == ["c1.npy"]
    (labelled / "labelsTs" / "c3.nii.gz").unlink()
    assert again() == ["c3.npy"]
    assert sorted(p.name for p in (out / "labels").iterdir()) == ["c0.npy", "c1.npy"]


def test_a_case_whose_labels_were_not_finished_is_prepared_again(labelled, tmp_path, monkeypatch):
    """Killed between its arrays and its entry, a case has no entry, also where an earlier one stood."""
    out = tmp_path / "store"
    prepared(labelled, out)
    os.utime(labelled / "labelsTr" / "c0.nii.gz")
    with monkeypatch.context() as patch:
        patch.setattr("tcam_diff.data.store.write_text", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepared(labelled, out)
    assert not (out / "cases" / "c0.json").exists()
    assert not any(r.problem for r in prepared(labelled, out))
    Store(out).verify(Store(out).records[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, x: Volume(x[None, :-1], v.info), r"expected the .* voxels of c0\.nii\.gz"),
        (lambda v, x: Volume(x[None], v.info.replaced(affine=turned(1, 1.5, 3))), "its affine is not that of"),
        (lambda v, x: Volume(x[None] * 0.5, v.info), r"expected labels 0, 1, 2, \.\.\., 255, got 0, 0\.5, 2"),
        (lambda v, x: Volume(x[None] - 1, v.info), "expected labels .* got -1, 0, 3"),
        (lambda v, x: Volume(x[None] * 100, v.info), "expected labels .* got 0, 100, 400"),
        (lambda v, x: Volume(np.stack([x, x]), v.info), "expected one label per voxel, got 2 channels"),
        (lambda v, x: Volume(np.where(x[None] > 0, np.nan, 0), v.info), "NaN or infinite"),
        (None, "truncated|damaged"),
    ],
)
def test_bad_labels_fail_their_case_alone(labelled, tmp_path, change, message):
    path = labelled / "labelsTr" / "c0.nii.gz"
    if change is None:
        path.write_bytes(path.read_bytes()[:100])
    else:
        v, labels = smooth((12, 10, 8), turned(1, 1.5, 2))
        write(path, change(v, labels.astype(np.float32)))
    records = prepared(labelled, tmp_path / "store")
    assert [bool(r.problem) for r in records] == [True, False, False, False]
    assert "labelsTr/c0.nii.gz" in records[0].problem
    assert re.search(message, records[0].problem), records[0].problem


def test_prepare_names_the_labels_it_keeps(labelled, tmp_path):
    done = CliRunner().invoke(app, ["prepare", str(labelled), "--out", str(tmp_path / "store")])
    assert "labels of 3 cases: 1 ED, 4 ET" in done.output, done.output
