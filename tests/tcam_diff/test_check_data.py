"""Layouts of data sets, their checks, and reasons for refusal."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from tcam_diff.data.check import check_case, check_cases, differences
from tcam_diff.data.nifti import read_header, scan_voxels
from tcam_diff.data.sources import Case, find_cases
from tcam_diff.errors import UserError

AFFINE = np.diag([1.5, 1.0, 2.0, 1.0])


def write(path, data=None, affine=AFFINE, dtype=np.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(0).random((6, 5, 4)) if data is None else data
    nib.save(nib.Nifti1Image(np.asarray(data, dtype), affine), path)
    return path


def labels(path, values=(0, 1, 3), shape=(6, 5, 4), dtype=np.uint8):
    return write(path, np.resize(np.asarray(values), shape), dtype=dtype)


# ---- layouts -------------------------------------------------------------------------------------


def test_a_decathlon_folder(tmp_path):
    for i in range(2):
        write(tmp_path / "imagesTr" / f"a_{i}.nii.gz"), labels(tmp_path / "labelsTr" / f"a_{i}.nii.gz")
    write(tmp_path / "imagesTs" / "b.nii.gz")
    training = [{"image": f"./imagesTr/a_{i}.nii.gz", "label": f"./labelsTr/a_{i}.nii.gz"} for i in range(2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": training, "test": ["./imagesTs/b.nii.gz"]}))
    data = find_cases(tmp_path)
    assert (data.layout, [c.name for c in data.in_split("train")], len(data.in_split("test"))) == (
        "Decathlon",
        ["a_0", "a_1"],
        1,
    )
    reports = list(check_cases(data.cases, jobs=2))
    assert [r.problem for r in reports] == [""] * 3
    assert reports[0].labels == [0, 1, 3]
    assert reports[2].labels is None
    assert (reports[0].shape, reports[0].spacing, reports[0].orientation) == ((6, 5, 4), (1.5, 1.0, 2.0), "RAS")


def test_a_datalist_with_a_file_for_each_channel(tmp_path):
    for name in ("flair", "t1"):
        write(tmp_path / "x" / f"{name}.nii.gz")
    datalist = {"validation": [{"image": ["x/flair.nii.gz", "x/t1.nii.gz"], "name": "first"}]}
    (tmp_path / "list.json").write_text(json.dumps(datalist))
    (case,) = find_cases(tmp_path / "list.json").cases
    assert (case.name, case.split, len(case.images)) == ("first", "validation", 2)
    assert check_case(case).channels == 2


@pytest.mark.parametrize("names", [("_flair", "_t1", "_t1ce", "_t2", "_seg"), ("-t2f", "-t1n", "-t1c", "-t2w", "-seg")])
def test_brats_folders(tmp_path, names):
    for name in names[:4]:
        write(tmp_path / "BraTS_1" / f"BraTS_1{name}.nii.gz", np.full((6, 5, 4), names.index(name)))
    labels(tmp_path / "BraTS_1" / f"BraTS_1{names[4]}.nii.gz")
    write(tmp_path / "BraTS_2" / f"BraTS_2{names[0]}.nii.gz")
    data = find_cases(tmp_path)
    assert data.layout == "BraTS"
    first, second = check_cases(data.cases)
    assert (first.channels, first.low, first.high, first.problem) == (4, 0, 3, "")
    order = [float(nib.load(p).get_fdata().max()) for p in data.cases[0].images]
    assert order == [0, 1, 2, 3]  # FLAIR, T1w, T1gd, T2w, as in the Decathlon
    assert "BraTS_2_t1.nii.gz: no such file" in second.problem


def test_a_table_and_a_flat_folder(tmp_path):
    for i in range(3):
        write(tmp_path / "scans" / f"s{i}.nii.gz")
    write(tmp_path / "scans" / "s3.nii")
    assert [c.name for c in find_cases(tmp_path / "scans").cases] == ["s0", "s1", "s2", "s3"]
    table = tmp_path / "table.csv"
    table.write_text("image,split,name\nscans/s0.nii.gz,train,\nscans/s1.nii.gz;scans/s2.nii.gz,test,pair\n")
    cases = find_cases(table).cases
    assert [(c.name, c.split, len(c.images)) for c in cases] == [("s0", "train", 1), ("pair", "test", 2)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", r"a\.json.*JSON"),
        ("a.json", "[1]", r"a\.json.*object.*list"),
        ("a.json", '{"training": 3}', r"training: expected a list.*int"),
        ("a.json", '{"training": [{"label": "x"}]}', r'training\[0\].*"image"'),
        ("a.json", '{"training": [{"image": "x.nii", "label": 3}]}', r"training\[0\]: label.*3"),
        ("a.json", "{}", r"no case"),
        ("a.csv", "picture\nx.nii\n", r"a\.csv.*column image.*picture"),
        ("a.csv", "image,split\nx.nii,dev\n", r"line 2: split.*train.*'dev'"),
        ("a.csv", "image\nx/a.nii\ny/a.nii\n", r"two cases are called 'a'.*x/a.nii.*y/a.nii"),
        ("a.txt", "", r"a\.txt.*Decathlon"),
    ],
)
def test_other_layouts_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        find_cases(tmp_path / name)


def test_empty_folders_dicom_and_nothing(tmp_path):
    with pytest.raises(UserError, match="no case found"):
        find_cases(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        find_cases(tmp_path / "gone")
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_bytes(b"")
    (report,) = check_cases(find_cases(tmp_path).cases)
    assert "1.dcm: not a readable DICOM file" in report.problem


# ---- faults ---------------------------------------------------------------------------------------


def damaged(path, change):
    """Change the unpacked bytes of a gzip file."""
    raw = bytearray(gzip.decompress(write(path).read_bytes()))
    change(raw)
    path.write_bytes(gzip.compress(bytes(raw)))


def checksum(path):
    packed = bytearray(write(path).read_bytes())
    packed[-6] ^= 1
    path.write_bytes(packed)


def put(at, values, dtype):
    def change(raw):
        raw[at : at + np.asarray(values, dtype).nbytes] = np.asarray(values, dtype).tobytes()

    return lambda path: damaged(path, change)


FAULTS = {
    "nan": (lambda p: write(p, np.full((6, 5, 4), np.nan)), "120 voxels are NaN"),
    "singular": (put(280, [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], "<f4"), "singular"),
    "spacing": (put(80, [0.0], "<f4"), "positive spacings"),
    "sizes": (put(42, [0], "<i2"), "at least one voxel"),
    "claims": (put(42, [32000, 32000, 32000], "<i2"), "more than the .* allowed"),
    "checksum": (checksum, "damaged gzip"),
    "short": (lambda p: damaged(p, lambda raw: raw.__delitem__(slice(-40, None))), "truncated"),
    "long": (lambda p: damaged(p, lambda raw: raw.extend(bytes(3 << 20))), "more than the"),
    "complex": (lambda p: nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.complex64), AFFINE), p), "real voxels"),
    "text": (lambda p: p.write_text("not an image"), "not a readable NIfTI"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_fault_is_reported_and_does_not_stop_the_check(tmp_path, fault):
    make, message = FAULTS[fault]
    bad, good = tmp_path / "bad.nii.gz", write(tmp_path / "good.nii.gz")
    make(bad)
    first, second = check_cases([Case("bad", (bad,)), Case("good", (good,))], max_voxels=10**6)
    assert str(bad) in first.problem
    assert re.search(message, first.problem), first.problem
    assert second.problem == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: labels(p, shape=(6, 5, 5)), r"\(6, 5, 4\).*\(6, 5, 5\)"),
        (lambda p: write(p, np.zeros((6, 5, 4)), np.diag([1.5, 1.0, 2.5, 1])), "affine"),
        (lambda p: labels(p, (0, 0.5), dtype=np.float32), "expected labels.*0.5"),
        (lambda p: labels(p, (0, -1), dtype=np.int16), "expected labels.*-1"),
        (lambda p: write(p, np.arange(120).reshape(6, 5, 4) + 200, dtype=np.int16), "expected labels.*255, got 200"),
        (lambda p: labels(p, range(300), (6, 5, 10), np.int16), r"\(6, 5, 4\).*\(6, 5, 10\)"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, make, message):
    image, label = write(tmp_path / "a.nii.gz"), tmp_path / "seg.nii.gz"
    make(label)
    assert re.search(message, check_case(Case("a", (image,), label)).problem)


def test_more_values_than_labels_can_have(tmp_path):
    noise = np.random.default_rng(0).random((8, 8, 8))
    image, label = write(tmp_path / "a.nii.gz", noise), write(tmp_path / "l.nii.gz", noise)
    assert "expected labels 0, 1, 2, ..., 255, got more than 256 values" in check_case(Case("a", (image,), label)).problem


def test_labels_of_held_out_cases_are_found(tmp_path):
    """labelsTs/NAME belongs to a test case of a Decathlon folder, and labelsTs/CASE to one of an nnU-Net folder."""
    decathlon, nnunet = tmp_path / "decathlon", tmp_path / "nnunet"
    write(decathlon / "imagesTs" / "b.nii.gz"), write(decathlon / "imagesTs" / "c.nii.gz")
    want = labels(decathlon / "labelsTs" / "b.nii.gz")
    (decathlon / "dataset.json").write_text(json.dumps({"training": [], "test": ["imagesTs/b.nii.gz", "imagesTs/c.nii.gz"]}))
    assert [c.label for c in find_cases(decathlon).cases] == [want, None]
    for part in ("Tr", "Ts"):
        write(nnunet / f"images{part}" / f"case{part}_0000.nii.gz"), labels(nnunet / f"labels{part}" / f"case{part}.nii.gz")
    (nnunet / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "edema": 1, "whole": [1, 2]}}))
    data = find_cases(nnunet)
    assert [(c.name, c.label, c.split) for c in data.cases] == [
        ("caseTr", nnunet / "labelsTr" / "caseTr.nii.gz", "train"), ("caseTs", nnunet / "labelsTs" / "caseTs.nii.gz", "test"),
    ]  # fmt: skip
    assert data.label_names == {1: "ED"}


def test_oddities_are_reported(tmp_path):
    image, label = write(tmp_path / "a.nii.gz", np.full((6, 5, 4), 3)), labels(tmp_path / "seg.nii.gz", (0,))
    report = check_case(Case("a", (image,), label))
    assert report.problem == ""
    assert report.notes == ["every voxel is 3", "no voxel has a label"]
    other = check_case(Case("b", (write(tmp_path / "b.nii.gz", np.ones((7, 5, 4))),)))
    assert differences([report, other]) == ["shape differs: 6 x 5 x 4 (1), 7 x 5 x 4 (1)"]


def test_a_scan_equals_numpy_in_bounded_memory(tmp_path):
    data = np.random.default_rng(1).integers(-900, 3000, (200, 210, 220)).astype(np.int16)
    image = nib.Nifti1Image(data, AFFINE)
    image.header.set_slope_inter(0.5, -7)
    for name in ("a.nii.gz", "a.nii"):
        nib.save(image, tmp_path / name)
        header = read_header(tmp_path / name)
        tracemalloc.start()
        scan = scan_voxels(header)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        want = np.asarray(nib.load(tmp_path / name).dataobj)
        assert (scan.low, scan.high, scan.not_finite, scan.values) == (want.min(), want.max(), 0, None)
        assert peak < 48 << 20 < want.size * 8
    scan = scan_voxels(read_header(labels(tmp_path / "l.nii.gz", (0, 2, 5))))
    assert scan.values == (0, 2, 5)


def test_the_command(tmp_path):
    write(tmp_path / "scans" / "good.nii.gz")
    (tmp_path / "scans" / "bad.nii.gz").write_text("no")
    command = [
        sys.executable,
        "-m",
        "tcam_diff.cli",
        "check-data",
        str(tmp_path / "scans"),
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILS bad [train]" in done.stdout
    assert "1 of 2 cases can be used" in done.stdout
    reports = json.loads((tmp_path / "out.json").read_text())
    assert [bool(r["problem"]) for r in reports] == [True, False]
    assert reports[1]["shape"] == [6, 5, 4]
