"""Files as people have them: units, two forms of one place, small voxels, names, layouts, unusual intensities, full disks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from tcam_diff.autodecoder import artefact
from tcam_diff.autodecoder.config import FitConfig
from tcam_diff.autodecoder.decode import decode_to_file
from tcam_diff.autodecoder.fit import fit_volume
from tcam_diff.data.check import check_case
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.nifti import Quantiser, read_header, read_volume, write_volume
from tcam_diff.data.prepare import prepare_cases, prepare_volume
from tcam_diff.data.sources import find_cases
from tcam_diff.data.volume import VolumeInfo, intensity_range
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.errors import UserError
from tcam_diff.evaluation.compare import compare_volumes

TINY = ["channels=4", "widths=[8]", "steps=2"]


def save(path, data, affine=None, units="mm", **forms):
    image = nib.Nifti1Image(data, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units(units, "sec")
    for name, (matrix, code) in forms.items():
        getattr(image, f"set_{name}")(matrix, code)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


# ---- geometry ----------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "mm"), [("mm", 1), ("micron", 1e-3), ("meter", 1e3)])
def test_lengths_are_read_in_mm(tmp_path, units, mm):
    info = read_header(save(tmp_path / "a.nii", noise(4, 5, 6), np.diag([2.0, 3, 4, 1]), units)).info
    assert info.units[0] == "mm"
    np.testing.assert_allclose(info.spacing, np.multiply([2, 3, 4], mm))


def test_unknown_units_are_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tcam_diff.data.nifti._said_units", False)
    path = save(tmp_path / "a.nii", noise(4, 5, 6), units="unknown")
    with pytest.warns(UserWarning, match=r"a\.nii: its units are unknown; this and other such files are taken to be in mm"):
        read_header(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_header(path)


def test_a_command_prints_a_warning_as_one_line(tmp_path):
    nib.save(nib.Nifti1Image(noise(12, 12, 12), np.eye(4)), tmp_path / "a.nii")
    command = [sys.executable, "-m", "tcam_diff.cli", "compare", "a.nii", "a.nii", "--out", "out.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == "tcam: warning: a.nii: its units are unknown; this and other such files are taken to be in mm\n"


@pytest.mark.parametrize("size", [8e-5, 1.0, 1e4])
def test_no_size_of_a_voxel_is_singular_or_the_same_as_another(tmp_path, size):
    image = save(tmp_path / "a.nii", noise(12, 12, 12), np.diag([size] * 3 + [1]))
    for scale, same in ((1.0, True), (1.0005, True), (0.8, False)):
        label = save(tmp_path / "l.nii", np.ones((12, 12, 12), np.uint8), np.diag([size * scale] * 3 + [1]))
        (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": image.name, "label": label.name}]}))
        (case,) = find_cases(tmp_path / "list.json").cases
        assert (check_case(case).problem == "") == same, (size, scale)


def rotated(angle, spacing, origin):
    c, s = np.cos(angle), np.sin(angle)
    affine = np.diag([*spacing, 1.0])
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * spacing
    affine[:3, 3] = origin
    return affine


SCANNER = rotated(0.3, (1, 1, 2), (-9, 7, 30))
TEMPLATE = np.array([[-1.1, 0.05, 0, 80], [0.02, 1.2, 0.1, -110], [0, -0.1, 2.3, -70], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("size", [(12, 10, 8), (24, 5, 11)])
def test_both_forms_survive_fit_and_decode_at_any_size(tmp_path, size):
    """A scan registered to a template has two places: the scanner's and the template's."""
    source = save(tmp_path / "a.nii", noise(12, 10, 8), qform=(SCANNER, 1), sform=(TEMPLATE, 4))
    result, info = fit_volume(read_volume(source), FitConfig.load("fast", TINY))
    artefact.save(tmp_path / "fit", result, info)
    decode_to_file(artefact.load(tmp_path / "fit"), tmp_path / "b.nii", size)
    image = nib.load(tmp_path / "b.nii")
    step = VolumeInfo(channels=1, shape=(12, 10, 8), affine=np.eye(4)).resized(size).affine
    for form, matrix, code in ((image.get_qform, SCANNER, 1), (image.get_sform, TEMPLATE, 4)):
        got, got_code = form(coded=True)
        np.testing.assert_allclose(got, matrix @ step, atol=1e-4)
        assert got_code == code


def test_a_qform_that_cannot_hold_the_place_is_not_claimed(tmp_path):
    """An affine with shear, as of a tilted gantry, under the scanner's code."""
    sheared = np.array([[1.0, 0, 0, 0], [0, 1, 0.5, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    info = VolumeInfo(channels=1, shape=(3, 4, 5), affine=sheared, codes=(1, 1), intensity=[(0.0, 1.0)])
    write_volume(tmp_path / "a.nii", iter([noise(1, 3, 4, 5)]), info, Quantiser("float32", 0, 1))
    image = nib.load(tmp_path / "a.nii")
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (0, 1)
    np.testing.assert_allclose(image.affine, sheared)


def test_what_is_written_is_where_simpleitk_finds_it(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    for number, spacing in enumerate(((0.4, 0.4, 5.0), (0.007, 0.007, 0.009))):
        path = tmp_path / f"{number}.nii.gz"
        info = VolumeInfo(
            channels=1, shape=(6, 5, 4), affine=rotated(0.7, spacing, (-33, 21, 99)), codes=(1, 1), intensity=[(0, 1)]
        )
        info = info.resized((12, 3, 9))
        write_volume(path, iter([noise(1, 12, 3, 9)]), info, Quantiser("float32", 0, 1))
        at = np.multiply(sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint((11, 2, 8)), [-1, -1, 1])
        np.testing.assert_allclose(at, (info.affine @ [11, 2, 8, 1])[:3], atol=1e-4)


def test_compare_turns_volumes_by_their_affines(tmp_path):
    image = nib.Nifti1Image(noise(12, 13, 14), np.diag([-1.0, -1, 2, 1]))
    nib.save(image, tmp_path / "a.nii")
    nib.save(nib.as_closest_canonical(image), tmp_path / "b.nii")
    assert compare_volumes(read_volume(tmp_path / "a.nii"), read_volume(tmp_path / "b.nii"))["mse"] == 0
    elsewhere = read_volume(save(tmp_path / "c.nii", noise(12, 13, 14), np.diag([-1.0, -1, 2.5, 1])))
    with pytest.raises(UserError, match=r"c\.nii: its affine is not that of .*a\.nii"):
        compare_volumes(read_volume(tmp_path / "a.nii"), elsewhere)


def test_a_spacing_that_makes_too_many_voxels_is_refused_before_it_does(tmp_path):
    volume = read_volume(save(tmp_path / "a.nii", noise(20, 20, 20)))
    config = PrepareConfig.load("pancreas-256", ["spacing=[0.0001, 0.0001, 0.0001]"])
    with pytest.raises(UserError, match=r"a\.nii: spacing 0\.0001 x .* makes 8000000000000000 voxels of its 1 x 1 x 1 mm"):
        prepare_volume(volume, config)


# ---- intensities -------------------------------------------------------------------------


def test_vessels_keep_their_levels():
    data = np.zeros((1, 24, 24, 24), np.float32)
    data.reshape(-1)[np.random.default_rng(0).choice(data.size, 40, replace=False)] = np.linspace(100, 1000, 40)
    with pytest.warns(UserWarning, match=r"v\.nii: channel 0: only 0\.29 % of the voxels are above 0"):
        ((lo, hi),) = intensity_range(data, 0, 99.5, "v.nii")
    assert len(np.unique(data.clip(lo, hi))) > 35


def test_a_usual_volume_keeps_its_percentiles():
    data = noise(1, 20, 20, 20) * (noise(1, 20, 20, 20, seed=1) > 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((lo, hi),) = intensity_range(data, 0, 99.5)
    assert (lo, hi) == (0, pytest.approx(np.percentile(data, 99.5)))


def test_channels_of_unlike_range_are_not_flattened_by_one_slope(tmp_path):
    data = np.stack([noise(12, 12, 12), 5000 * noise(12, 12, 12)], -1)
    result, info = fit_volume(read_volume(save(tmp_path / "a.nii", data)), FitConfig.load("fast", TINY))
    artefact.save(tmp_path / "fit", result, info)
    fitted = artefact.load(tmp_path / "fit")
    with pytest.raises(UserError, match=r"channel 0 \(.* would keep 0 levels of uint8 beside the other channels"):
        decode_to_file(fitted, tmp_path / "b.nii", (12, 12, 12), "uint8")
    assert not (tmp_path / "b.nii").exists()
    decode_to_file(fitted, tmp_path / "b.nii", (12, 12, 12), "float32")


# ---- names and layouts -------------------------------------------------------------------


def test_names_in_capitals(tmp_path):
    image = save(tmp_path / "a.nii.gz", noise(4, 5, 6))
    image.rename(tmp_path / "A.NII.GZ")
    (case,) = find_cases(tmp_path).cases
    assert (case.name, check_case(case).problem) == ("A", "")
    assert read_volume(tmp_path / "A.NII.GZ").info.shape == (4, 5, 6)


def test_a_name_that_is_no_text(tmp_path):
    os.rename(save(tmp_path / "a.nii", noise(12, 12, 12)), os.fsencode(tmp_path) + b"/caf\xe9.nii")
    save(tmp_path / "z.nii", noise(12, 12, 12))
    config = PrepareConfig.load("cohort", [])
    records = list(prepare_cases(find_cases(tmp_path).cases, tmp_path / "store", config))
    assert [r.problem for r in records] == ["", ""]


def test_hidden_files_are_no_cases(tmp_path):
    for name in ("flair", "t1", "t1ce", "t2", "seg"):
        save(tmp_path / "B1" / f"B1_{name}.nii.gz", np.ones((4, 4, 4), np.int16))
        (tmp_path / "B1" / f"._B1_{name}.nii.gz").write_bytes(b"\0\5\x16\7" + bytes(99))
    (case,) = find_cases(tmp_path).cases
    assert check_case(case).problem == ""


def test_tables_with_a_byte_order_mark(tmp_path):
    save(tmp_path / "a.nii", noise(4, 5, 6))
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfimage,name\na.nii,first\n")
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"training": [{"image": "a.nii"}]}).encode())
    assert [c.name for c in find_cases(tmp_path / "t.csv").cases] == ["first"]
    assert [c.name for c in find_cases(tmp_path / "t.json").cases] == ["a"]


def test_nnunet_folders(tmp_path):
    for case in ("p1", "p2"):
        for channel in range(2):
            save(tmp_path / "d" / "imagesTr" / f"{case}_{channel:04d}.nii.gz", noise(4, 5, 6))
        save(tmp_path / "d" / "labelsTr" / f"{case}.nii.gz", np.ones((4, 5, 6), np.uint8))
    save(tmp_path / "d" / "imagesTs" / "p3_0000.nii.gz", noise(4, 5, 6))
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}, "numTraining": 2}))
    source = find_cases(tmp_path / "d")
    assert source.layout == "nnU-Net"
    assert [(c.name, len(c.images), c.label is None, c.split) for c in source.cases] == [
        ("p1", 2, False, "train"), ("p2", 2, False, "train"), ("p3", 1, True, "test"),
    ]  # fmt: skip
    assert [check_case(c).channels for c in source.cases] == [2, 2, 1]
    assert [len(c.images) for c in find_cases(tmp_path / "d" / "imagesTr").cases] == [2, 2]


def test_numbered_volumes_are_cases_of_their_own(tmp_path):
    for number in range(3):
        save(tmp_path / f"scan_{number:04d}.nii", noise(4, 5, 6))
    assert [c.name for c in find_cases(tmp_path).cases] == ["scan_0000", "scan_0001", "scan_0002"]


# ---- the machine's faults ----------------------------------------------------------------


def test_a_fit_that_cannot_be_written_is_kept_elsewhere(tmp_path, monkeypatch):
    result, info = fit_volume(read_volume(save(tmp_path / "a.nii", noise(12, 12, 12))), FitConfig.load("fast", TINY))
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spare"))
    (tmp_path / "spare").mkdir()
    with pytest.raises(UserError, match=r"fit: cannot be written: Not a directory; the fitted volume is in .*spare") as error:
        artefact.save_somewhere(tmp_path / "file" / "fit", result, info)
    kept = artefact.load(str(error.value).rpartition(" ")[2])
    assert all(torch.equal(a, b) for a, b in zip(kept.planes, result.planes, strict=True))


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    info = VolumeInfo(channels=1, shape=(3, 4, 5), affine=np.eye(4), intensity=[(0.0, 1.0)])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_volume(tmp_path / "a.nii", iter([noise(1, 3, 4, 5)]), info, Quantiser("float32", 0, 1))
    assert error.value.filename == str(tmp_path / "a.nii")
    assert list(tmp_path.iterdir()) == []


# ---- damaged lists of files, configurations and folders ---------------------------------------


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\nb", "\ud800", "a/" + "y" * 256])
def test_what_cannot_be_a_path_is_refused(tmp_path, name):
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": name}]}))
    with pytest.raises(UserError, match=r"list\.json: training\[0\]: expected a path, got "):
        find_cases(tmp_path / "list.json")


def test_brackets_without_end_are_refused(tmp_path):
    (tmp_path / "list.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"list\.json: not a readable JSON file: "):
        find_cases(tmp_path / "list.json")


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"steps: \xff\n", "not YAML: "),
        (b"steps: [1\nlr: 2\n", "not YAML: line "),
        (BOMB.encode(), "aliases"),
        (b"steps: &a [*a]\n", "aliases"),
        (b"steps: " + b"[" * 5000, "too many brackets"),
        (b"steps: 2001-99-99\n", "a value cannot be read: month must be in 1..12"),
        (b"steps: !!int ''\n", "a value cannot be read: "),
        (b"steps: !!bool maybe\n", "a value cannot be read: "),
        (b"steps: yes\n", "steps: value error, expected numbers, got True"),
        (b"plane_size: [4, 4, yes]\n", "plane_size"),
        (b"beta: .inf\n", "beta: input should be a finite number, got inf"),
        (b"steps: [" + b"1, " * 500 + b"]\n", "steps: "),
        (b'"a\\n\\nb": 1\n', "a b: no such key"),
        (b"- 3\n", "expected keys and values, got list"),
    ],
)
def test_a_damaged_configuration_is_refused_in_one_short_line(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        FitConfig.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 500


def test_a_key_beside_a_file_that_has_a_value_in_its_place(tmp_path):
    (tmp_path / "c.yaml").write_text("latents: x\nnetwork: 3\n")
    with pytest.raises(UserError, match=r"^network: expected keys and values, got 3"):
        DiffusionConfig.load(tmp_path / "c.yaml", ["network.base=8"])
    with pytest.raises(UserError, match=r"^steps: a value|^steps: not YAML"):
        FitConfig.load("fast", ["steps=!!int ''"])


@pytest.mark.parametrize(
    "change",
    [
        {"affine": np.zeros((4, 4))}, {"affine": np.diag([1.0, 1, np.nan, 1])}, {"affine": [{}]}, {"shape": (0, 1, 1)},
        {"intensity": [(0.0, float("inf"))]}, {"units": ("miles", "sec")}, {"qform": np.zeros((4, 4))},
    ],
)  # fmt: skip
def test_metadata_that_describe_no_volume_are_refused(change):
    with pytest.raises(ValueError):  # noqa: PT011  # pydantic's, with the field
        VolumeInfo(**{"channels": 1, "shape": (1, 1, 1), "affine": np.eye(4)} | change)


def fitted(tmp_path):
    result, info = fit_volume(read_volume(save(tmp_path / "a.nii", noise(6, 5, 4))), FitConfig.load("fast", TINY))
    artefact.save(tmp_path / "fit", result, info)
    return tmp_path / "fit"


def rewrite(folder, name, change):
    """Change the tensors of a file, and its checksum with them."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / name)), folder / name)
    index = json.loads((folder / "manifest.json").read_text())
    index["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("planes.safetensors", lambda t: t | {"xy": t["xy"][:, :, 1:].contiguous()}),
        ("planes.safetensors", lambda t: t | {"yz": t["yz"][0]}),
        ("planes.safetensors", lambda t: t | {"xz": t["xz"].long()}),
        ("planes.safetensors", lambda t: {"xy": t["xy"]}),
        ("planes.safetensors", lambda t: t | {"xy": t["xy"] * float("nan")}),
        ("decoder.safetensors", lambda t: t | {"0.weight": t["0.weight"][:, 1:].contiguous()}),
    ],
)
def test_tensors_that_do_not_fit_one_another_are_refused_under_a_right_checksum(tmp_path, name, change):
    folder = fitted(tmp_path)
    rewrite(folder, name, change)
    with pytest.raises(UserError, match=f"{name}: damaged: .*; fit the volume again"):
        artefact.load(folder)


@pytest.mark.parametrize("change", [{"intensity": []}, {"channels": 10**9}, {"affine": [[0] * 4] * 4}])
def test_an_index_that_does_not_describe_its_files_is_refused(tmp_path, change):
    folder = fitted(tmp_path)
    index = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(index | {"tcam": index["tcam"] | change}))
    with pytest.raises(UserError, match=r"manifest\.json: damaged: .*; fit the volume again"):
        artefact.load(folder)
