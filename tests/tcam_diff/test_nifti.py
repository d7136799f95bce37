"""NIfTI files: checks beyond those of nibabel, and streamed writing that keeps the geometry and never wraps integers."""

from __future__ import annotations

import gzip
import resource
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tcam_diff.data import nifti
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.errors import UserError

OBLIQUE = np.array([[0.9, 0.1, 0.3, -20.0], [-0.1, 1.8, 0.2, 7.0], [-0.2, 0.3, 2.9, 3.0], [0, 0, 0, 1]])


def save(path, data, affine=OBLIQUE, **header):
    image = nib.Nifti1Image(data, affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def patch(path, offset, raw):
    """Overwrite bytes of an uncompressed file, for headers that nibabel does not write."""
    data = bytearray(path.read_bytes())
    data[offset : offset + len(raw)] = raw
    path.write_bytes(bytes(data))
    return path


@pytest.fixture
def good(tmp_path):
    return save(tmp_path / "good.nii", np.arange(6 * 5 * 4, dtype=np.float32).reshape(6, 5, 4))


def refuse(path, message, **options):
    with pytest.raises(UserError) as caught:
        nifti.read_volume(path, **options)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert message in str(caught.value)


def test_reads_voxels_and_geometry(good):
    v = nifti.read_volume(good)
    assert v.data.shape == (1, 6, 5, 4)
    assert v.data[0, 5, 4, 3] == 119
    assert v.data[0, 1, 0, 0] == 20
    np.testing.assert_allclose(v.info.affine, OBLIQUE, atol=1e-5)


def test_reads_channels_and_scaling(tmp_path):
    data = np.random.default_rng(0).integers(-500, 500, (4, 5, 6, 3)).astype(np.int16)
    image = nib.Nifti1Image(data, OBLIQUE)
    image.header.set_slope_inter(0.5, -3)
    path = tmp_path / "scaled.nii.gz"
    nib.save(image, path)
    want = nib.load(path).get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(nifti.read_volume(path).data, np.moveaxis(want, -1, 0))


# ---- refused files ---------------------------------------------------------------------


def test_refuses_other_files(tmp_path):
    refuse(tmp_path / "absent.nii", "no such file")
    refuse(tmp_path, "folder")
    for name, content in (
        ("empty.nii", b""),
        ("text.nii.gz", b"hello"),
        ("short.nii", b"\x5c\x01\0\0" + b"\0" * 100),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        refuse(path, "empty" if not content else "not a readable NIfTI")


def test_refuses_ranks_and_sizes(tmp_path, good):
    refuse(save(tmp_path / "flat.nii", np.zeros((4, 5), np.float32)), "3D")
    refuse(save(tmp_path / "five.nii", np.zeros((4, 5, 6, 2, 2), np.float32)), "3D")
    refuse(patch(good, 42, struct.pack("<h", 0)), "at least one voxel")


def test_refuses_types_without_intensities(tmp_path):
    refuse(save(tmp_path / "complex.nii", np.zeros((4, 5, 6), np.complex64)), "complex64")
    rgb = np.zeros((4, 5, 6), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    refuse(save(tmp_path / "rgb.nii", rgb), "RGB")


def test_refuses_a_header_that_promises_terabytes(good):
    """A file of a few hundred bytes with a header of 32767^3 voxels is refused before any allocation."""
    patch(good, 42, struct.pack("<hhh", 32767, 32767, 32767))
    refuse(good, "more than")


def test_the_voxel_budget_is_an_argument(good):
    refuse(good, "--max-voxels", max_voxels=100)


def test_refuses_affines_and_spacings(tmp_path, good):
    flat = np.diag([1.0, 1, 0, 1])
    path = save(tmp_path / "singular.nii", np.zeros((4, 5, 6), np.float32))
    for row in range(3):
        patch(path, 280 + 16 * row, struct.pack("<4f", *flat[row]))
    refuse(path, "singular")
    refuse(
        patch(save(tmp_path / "nan.nii", np.zeros((4, 5, 6), np.float32)), 280, struct.pack("<f", np.nan)),
        "affine",
    )
    refuse(patch(good, 84, struct.pack("<f", 0.0)), "spacings")


def test_refuses_truncated_and_damaged_files(tmp_path):
    noise = np.random.default_rng(0).random((20, 20, 20), np.float32)
    whole = save(tmp_path / "whole.nii", noise).read_bytes()
    (tmp_path / "cut.nii").write_bytes(whole[:-7])
    refuse(tmp_path / "cut.nii", "truncated")
    packed = gzip.compress(whole)
    for name, content, message in (
        ("cut.nii.gz", packed[:-20], "damaged"),
        ("crc.nii.gz", packed[:-8] + b"\0\0\0\0" + packed[-4:], "damaged"),
        ("less.nii.gz", gzip.compress(whole[:-9]), "truncated"),
    ):
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, message)


def test_refuses_a_gzip_bomb_in_bounded_memory(tmp_path, good):
    """Reading stops just beyond the promised size if a gigabyte of zeros follows a small header."""
    path = tmp_path / "bomb.nii.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(good.read_bytes())
        for _ in range(256):
            out.write(bytes(1 << 22))
    script = (
        f"import resource; from pathlib import Path; from tcam_diff.data import nifti\n"
        f"before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: nifti.read_volume(Path({str(path)!r}))\n"
        f"except nifti.UserError as e: assert 'unpacks to more' in str(e)\n"
        f"else: raise SystemExit(1)\n"
        f"assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert resource.getpagesize()


def test_refuses_voxels_that_are_not_numbers(tmp_path):
    data = np.zeros((4, 5, 6), np.float32)
    data[1, 2, 3], data[0, 0, 0] = np.nan, np.inf
    refuse(save(tmp_path / "nan.nii.gz", data), "2 of 120 voxels")


# ---- writing ---------------------------------------------------------------------------


def unit(shape):
    return VolumeInfo(channels=1, shape=shape, affine=np.eye(4))


def slabs(data, thickness):
    for z in range(0, data.shape[3], thickness):
        yield data[..., z : z + thickness]


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("thickness", [1, 3, 50])
def test_what_is_written_in_slabs_reads_back_whole(tmp_path, name, channels, thickness):
    data = np.random.default_rng(0).standard_normal((channels, 5, 6, 7)).astype(np.float32)
    info = VolumeInfo(channels=channels, shape=(5, 6, 7), affine=OBLIQUE)
    nifti.write_volume(tmp_path / name, slabs(data, thickness), info, nifti.Quantiser("float32", 0, 1))
    back = nifti.read_volume(tmp_path / name)
    np.testing.assert_array_equal(back.data, data)
    np.testing.assert_allclose(back.info.affine, OBLIQUE, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [name]  # no temporary file is left


@pytest.mark.parametrize(("dtype", "steps"), [("uint8", 255), ("int16", 65535), ("uint16", 65535)])
@pytest.mark.parametrize(("lo", "hi"), [(0.0, 1.0), (-1024.0, 3071.0), (5.0, 5.0)])
def test_integers_keep_half_a_step_and_do_not_wrap(tmp_path, dtype, steps, lo, hi):
    data = np.linspace(lo, hi, 4 * 5 * 6, dtype=np.float32).reshape(1, 4, 5, 6)
    data[0, 0, 0, 0], data[0, 3, 4, 5] = lo - 1000, hi + 1000  # outside the range
    nifti.write_volume(tmp_path / "i.nii.gz", slabs(data, 2), unit((4, 5, 6)), nifti.Quantiser(dtype, lo, hi))
    assert nib.load(tmp_path / "i.nii.gz").get_data_dtype() == np.dtype(dtype)
    back = nifti.read_volume(tmp_path / "i.nii.gz").data
    step = (hi - lo) / steps
    if hi > lo:
        np.testing.assert_allclose(back, data.clip(lo, hi), atol=0.51 * step + 1e-6 * max(abs(lo), abs(hi)))
    assert back.ravel()[0] <= back.ravel()[1] <= back.ravel()[-1]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    (tmp_path / "old.nii.gz").write_bytes(b"precious")

    def broken():
        yield np.zeros((1, 4, 4, 2), np.float32)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        nifti.write_volume(tmp_path / "old.nii.gz", broken(), unit((4, 4, 4)), nifti.Quantiser("float32", 0, 1))
    assert (tmp_path / "old.nii.gz").read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_float16_is_refused():
    with pytest.raises(UserError, match="float16"):
        nifti.Quantiser("float16", 0, 1)


@pytest.mark.parametrize("new", [(12, 10, 8), (3, 5, 9)])
def test_a_resized_affine_keeps_the_field_of_view(new):
    """The corners of the outermost voxels keep their positions in space."""
    old = (6, 5, 4)
    affine = VolumeInfo(channels=1, shape=old, affine=OBLIQUE).resized(new).affine
    for corner in np.ndindex(2, 2, 2):
        before = OBLIQUE @ [*(np.array(corner) * old - 0.5), 1]
        after = affine @ [*(np.array(corner) * new - 0.5), 1]
        np.testing.assert_allclose(after, before, atol=1e-9)


def test_paths_are_checked(tmp_path):
    for bad in (tmp_path / "a.img", tmp_path / "absent" / "a.nii"):
        with pytest.raises(UserError):
            nifti.write_volume(Path(bad), iter(()), unit((1, 1, 1)), nifti.Quantiser("float32", 0, 1))


# ---- damaged headers -------------------------------------------------------------------


def patched(tmp_path, *changes):
    """A file with a qform and an sform, after some bytes of its header changed."""
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), OBLIQUE)
    image.set_qform(np.diag([1.0, 2, 3, 1]), 1)
    image.set_sform(OBLIQUE, 2)
    nib.save(image, tmp_path / "a.nii")
    for offset, raw in changes:
        patch(tmp_path / "a.nii", offset, raw)
    return tmp_path / "a.nii"


@pytest.mark.parametrize("code", [5, 7, 64, 255])
def test_units_without_a_meaning_are_unknown(tmp_path, code):
    nifti._said_units = True
    info = nifti.read_volume(patched(tmp_path, (123, bytes([code])))).info
    assert info.units == ("mm", "unknown")


@pytest.mark.parametrize("quaternion", [3e38, -3e38, np.inf, np.nan])
def test_a_qform_that_is_no_place_is_left_out(tmp_path, quaternion):
    """The sform says where the volume is, and no other matrix goes under the scanner's code."""
    info = nifti.read_volume(patched(tmp_path, (256, struct.pack("<f", quaternion)))).info
    assert (info.qform, info.codes) == (None, (0, 2))
    np.testing.assert_allclose(info.affine, OBLIQUE, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [[(280, struct.pack("<4f", 3e38, 3e38, 3e38, 0))], [(123, b"\x01"), (292, struct.pack("<f", 3e38))]]
)
def test_a_place_beyond_the_numbers_of_headers_is_refused(tmp_path, changes):
    refuse(patched(tmp_path, *changes), "affine")


def test_values_beyond_float32_are_not_finite_for_check_data_either(tmp_path):
    path = save(tmp_path / "a.nii", np.full((2, 3, 4), 1e39))
    refuse(path, "24 of 24 voxels")
    assert nifti.scan_voxels(nifti.read_header(path)).not_finite == 24
