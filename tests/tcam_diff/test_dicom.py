"""DICOM series: the volume is what the slices say, whatever they are called; others are refused, naming their slices."""

from __future__ import annotations

import numpy as np
import pytest
from tcam_diff.data.check import check_cases
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.prepare import prepare_cases
from tcam_diff.data.readers import read_volume
from tcam_diff.data.sources import find_cases
from tcam_diff.data.store import Store
from tcam_diff.errors import UserError

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from tcam_diff.data import dicom  # noqa: E402

ORIGIN, SPACING = (10.0, -20.0, 30.0), (1.5, 2.0, 3.0)
VOXELS = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.float32)


def write_slice(file, pixels, position, *, slope=1.0, intercept=-1024.0, change=None, **tags):
    """One CT slice of (rows, columns) in HU."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(file)])
    s = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    s.SOPClassUID, s.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    s.SeriesInstanceUID, s.Modality = "1.2.3", "CT"
    s.Rows, s.Columns = pixels.shape
    s.PixelSpacing, s.ImageOrientationPatient = [SPACING[1], SPACING[0]], [1, 0, 0, 0, 1, 0]
    s.ImagePositionPatient = [f"{x:.6f}" for x in position]
    s.RescaleSlope, s.RescaleIntercept = slope, intercept
    s.BitsAllocated, s.BitsStored, s.HighBit, s.PixelRepresentation, s.SamplesPerPixel = 16, 16, 15, 0, 1
    s.PhotometricInterpretation = "MONOCHROME2"
    s.PixelData = np.rint((pixels - intercept) / slope).astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(s, name, value)
    if change is not None:
        change(s)
    file.parent.mkdir(parents=True, exist_ok=True)
    s.save_as(file, enforce_file_format=True)


def write_series(folder, data=VOXELS, step=(0.0, 0.0, SPACING[2]), names="{:03d}.dcm", order=None, **tags):
    """(columns, rows, slices) of HU as slices ``step`` apart; ``tags`` are functions of the slice's number."""
    for k in range(data.shape[2]) if order is None else order:
        position = np.add(ORIGIN, np.multiply(k, step))
        write_slice(folder / names.format(k), data[:, :, k].T, position, **{name: value(k) for name, value in tags.items()})


def write_enhanced(file, data=VOXELS, frames_said=None):
    """One file with a frame for each slice, in no order; what is shared is said once."""

    def item(**tags):
        made = Dataset()
        for name, value in tags.items():
            setattr(made, name, value)
        return made

    order = np.random.default_rng(1).permutation(data.shape[2]).tolist()

    def frames(s):
        del s.ImagePositionPatient, s.ImageOrientationPatient, s.PixelSpacing, s.RescaleSlope, s.RescaleIntercept
        s.NumberOfFrames = frames_said or len(order)
        s.PixelData = np.stack([data[:, :, k].T + 1024 for k in order]).astype("<u2").tobytes()
        s.SharedFunctionalGroupsSequence = [
            item(
                PixelMeasuresSequence=[item(PixelSpacing=[SPACING[1], SPACING[0]], SliceThickness=3)],
                PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
                PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-1024)],
            )
        ]
        s.PerFrameFunctionalGroupsSequence = [
            item(PlanePositionSequence=[item(ImagePositionPatient=[*ORIGIN[:2], ORIGIN[2] + 3 * k])]) for k in order
        ]

    write_slice(file, data[:, :, 0].T, ORIGIN, change=frames)


def assert_series(folder, data=VOXELS, step=(0.0, 0.0, SPACING[2]), atol=1e-5):
    """Voxel (i, j, k) has its value, at the place where its slice says it is."""
    volume = read_volume(folder)
    np.testing.assert_allclose(volume.data[0], data, atol=1e-3)
    for index in ((0, 0, 0), (5, 1, 2)):
        x, y, z = np.add(ORIGIN, [1.5 * index[0], 2 * index[1], 0]) + np.multiply(index[2], step)
        np.testing.assert_allclose((volume.info.affine @ [*index, 1])[:3], [-x, -y, z], atol=atol)  # right, anterior, superior
    assert volume.info == dicom.read_header(folder).info


def problem(folder):
    with pytest.raises(UserError) as error:
        dicom.read_header(folder)
    return str(error.value)


def test_a_series_is_the_volume_that_its_slices_are(tmp_path):
    write_series(tmp_path / "ct" / "patient1")
    write_series(tmp_path / "ct" / "patient2" / "a", VOXELS + 1)
    listed = find_cases(tmp_path / "ct")
    assert (listed.layout, [c.name for c in listed.cases]) == ("DICOM", ["patient1", "patient2-a"])
    first, second = check_cases(listed.cases)
    assert (first.problem, first.shape, first.orientation, second.low) == ("", (6, 5, 4), "LPS", float(VOXELS.min()) + 1)
    assert_series(tmp_path / "ct" / "patient1")
    records = list(prepare_cases(listed.cases, tmp_path / "store", PrepareConfig.load("colon-512", ["resize=[8, 8, 8]"])))
    assert [r.problem for r in records] == ["", ""]
    assert Store(tmp_path / "store").records[0].info.array_shape == (1, 8, 8, 8)


@pytest.mark.parametrize("numbers", [lambda k: 4 - k, lambda k: 7, lambda k: "", lambda k: [4, 2, 1, 3][k]])
def test_instance_numbers_mean_nothing(tmp_path, numbers):
    write_series(tmp_path / "a", InstanceNumber=numbers)
    assert_series(tmp_path / "a")


@pytest.mark.parametrize("names", ["{:03d}", "IM{:d}.IMA", "{:d}.DCM", "{:d}.dcm"])
@pytest.mark.parametrize("folder", ["plain", "a[1] * of ?"])
def test_any_name_of_a_file_and_of_a_folder(tmp_path, names, folder):
    write_series(tmp_path / "data" / folder, names=names)
    write_series(tmp_path / "data" / "a1  of x", VOXELS + 1)  # that a pattern would match
    assert_series(tmp_path / "data" / folder)
    assert len(find_cases(tmp_path / "data").cases) == 2


def test_slices_with_and_without_an_ending_are_one_series(tmp_path):
    write_series(tmp_path / "a", order=(0, 2))
    write_series(tmp_path / "a", names="{:d}", order=(1, 3))
    assert_series(tmp_path / "a")


def test_what_lies_beside_a_series_does_not_spoil_it(tmp_path):
    write_series(tmp_path / "d" / "a")
    ghost = b"\x00\x05\x16\x07" + bytes(200)
    (tmp_path / "d" / "a" / "._000.dcm").write_bytes(ghost)
    (tmp_path / "d" / "a" / "notes.txt").write_text("read me")
    (tmp_path / "d" / "__MACOSX" / "a").mkdir(parents=True)
    (tmp_path / "d" / "__MACOSX" / "a" / "000.dcm").write_bytes(ghost)
    across = {"SeriesInstanceUID": "9.9", "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    write_slice(
        tmp_path / "d" / "a" / "scout.dcm", VOXELS[:, :, 0], (0, 0, 0), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **across
    )

    def no_image(s):
        del s.Rows, s.Columns, s.PixelData
        s.Modality = "RTSTRUCT"

    write_slice(tmp_path / "d" / "a" / "structures.dcm", VOXELS[:, :, 0], (0, 0, 0), SeriesInstanceUID="8.8", change=no_image)
    (tmp_path / "d" / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(64))
    assert [c.name for c in find_cases(tmp_path / "d").cases] == ["a"]
    assert_series(tmp_path / "d" / "a")


def test_rounded_positions_are_one_series(tmp_path):
    data = np.random.default_rng(1).integers(0, 1000, (6, 5, 16)).astype(np.float32)
    for k in range(16):
        write_slice(tmp_path / "a" / f"{k}.dcm", data[:, :, k].T, (*ORIGIN[:2], round(ORIGIN[2] + 0.625 * k, 2)))
    assert_series(tmp_path / "a", data, (0, 0, 0.625), atol=0.005)


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    step = (0.0, 5 * np.tan(0.35), 5.0)
    write_series(tmp_path / "a", step=step)
    assert_series(tmp_path / "a", step=step)


def test_every_slice_has_its_own_slope(tmp_path):
    data = np.rint(VOXELS)
    write_series(tmp_path / "a", data, slope=lambda k: 1.0 / 2**k, intercept=lambda k: -1024.0 - k)
    assert_series(tmp_path / "a", data)


@pytest.mark.parametrize(
    ("tags", "order", "message"),
    [
        ({}, (0, 1, 3), "a slice is missing between 001.dcm and 003.dcm (gaps of 3 mm elsewhere)"),
        ({"ImagePositionPatient": lambda k: [0, 0, 3.0 * min(k, 2)]}, None, "slices at one position: 002.dcm, 003.dcm"),
        ({"ImagePositionPatient": lambda k: [30 * (k == 2), 0, 3.0 * k]}, None, "not on the line of the other slices: 002.dcm"),
        ({"PixelSpacing": lambda k: [2.0, 1.5 + 0.1 * (k == 1)]}, None, "001.dcm: other pixel spacings than the other slices"),
        ({"ImageOrientationPatient": lambda k: [1, 0, 0, 0, 1 - 0.01 * (k == 1), 0.141 * (k == 1)]}, None, "001.dcm: another"),
        ({"SeriesInstanceUID": lambda k: f"1.{k // 2}"}, None, "2 series (2 slices with 000.dcm, 2 slices with 002.dcm)"),
        ({"NumberOfFrames": lambda k: 3}, None, "000.dcm: a multi-frame file without a position for each frame; convert it"),
        ({"SamplesPerPixel": lambda k: 3}, None, "000.dcm: expected one value a pixel, got 3"),
        ({"PixelSpacing": lambda k: None}, None, "000.dcm: the slice lacks its geometry"),
        ({"PixelSpacing": lambda k: [0, 0]}, None, "singular"),
    ],
)  # fmt: skip
def test_what_is_no_volume_is_refused_by_name(tmp_path, tags, order, message):
    write_series(tmp_path / "a", order=order, **tags)
    assert message in problem(tmp_path / "a")


def test_damaged_files_are_named(tmp_path):
    write_series(tmp_path / "a")
    (tmp_path / "a" / "001.dcm").write_bytes(b"no")
    assert "001.dcm: not a readable DICOM file" in problem(tmp_path / "a")
    write_series(tmp_path / "b")
    whole = (tmp_path / "b" / "002.dcm").read_bytes()
    (tmp_path / "b" / "002.dcm").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"002\.dcm: the voxels cannot be read"):
        read_volume(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    assert "no DICOM image" in problem(tmp_path / "empty")


def test_a_missing_decoder_is_named_with_its_packages(tmp_path, monkeypatch):
    write_series(tmp_path / "a")
    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEG2000)
    if decoder.is_available:
        pytest.skip("a decoder for JPEG 2000 is installed")
    for file in dicom.files(tmp_path / "a"):
        s = pydicom.dcmread(file)
        s.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(64)])
        s.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000
        s.save_as(file)
    with pytest.raises(UserError, match=r"000\.dcm: the voxels cannot be read: .*pylibjpeg"):
        read_volume(tmp_path / "a")


def test_enhanced_multi_frame_files_are_read(tmp_path):
    write_enhanced(tmp_path / "a" / "enhanced.dcm")
    assert_series(tmp_path / "a")


def test_a_volume_of_simpleitk_is_ours(tmp_path):
    """An independent reader finds the same voxels at the same places."""
    sitk = pytest.importorskip("SimpleITK")
    write_series(tmp_path / "a", InstanceNumber=lambda k: k + 1)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "a")))
    image, ours = reader.Execute(), read_volume(tmp_path / "a")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), ours.data[0])
    for index in ((0, 0, 0), (5, 1, 2)):
        at = np.multiply(image.TransformIndexToPhysicalPoint(index), [-1, -1, 1])
        np.testing.assert_allclose((ours.info.affine @ [*index, 1])[:3], at, atol=1e-6)


@pytest.mark.parametrize(("tag", "old", "new"), [(b"\x28\x00\x10\x00", b"US", b"{U"), (b"\x28\x00\x02\x00", b"US", b"SC")])
def test_an_element_of_an_unknown_kind_is_refused_by_file(tmp_path, tag, old, new):
    """pydicom reads an element when it is asked for, and then raises NotImplementedError."""
    write_series(tmp_path / "a")
    path = tmp_path / "a" / "001.dcm"
    path.write_bytes(path.read_bytes().replace(tag + old, tag + new))
    assert "001.dcm: the slice lacks its geometry: " in problem(tmp_path / "a")


def test_odd_values_do_not_show_warnings_of_the_library(tmp_path, recwarn):
    write_series(tmp_path / "a")
    path = tmp_path / "a" / "001.dcm"
    path.write_bytes(path.read_bytes().replace(b"1.2.3", b"1.2.x"))
    assert "2 series" in problem(tmp_path / "a")
    assert not recwarn


def test_a_slice_that_ends_early_is_refused_and_not_left_out(tmp_path):
    """Without its last slice the series would be a sound, but shorter one."""
    write_series(tmp_path / "a")
    path = tmp_path / "a" / "003.dcm"
    whole = path.read_bytes()
    for end in range(132, whole.index(b"\x28\x00\x10\x00"), 16):
        path.write_bytes(whole[:end])
        assert "003.dcm: " in problem(tmp_path / "a")


def test_frames_without_a_position_are_not_left_out(tmp_path):
    write_enhanced(tmp_path / "a" / "enhanced.dcm", frames_said=5)
    assert "enhanced.dcm: the slice lacks its geometry: expected a position for each of 5 frames, got 4" in problem(
        tmp_path / "a"
    )
    write_series(tmp_path / "b")
    write_slice(tmp_path / "b" / "003.dcm", VOXELS[:, :, 3].T, np.add(ORIGIN, [0, 0, 9]), PerFrameFunctionalGroupsSequence=[])
    assert "003.dcm: the slice lacks its geometry: expected a position for each of 1 frames, got 0" in problem(tmp_path / "b")
