"""Metadata of volumes: JSON, resizing, and conversion between physical units and [0, 1]."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tcam_diff.data.volume import Volume, VolumeInfo, VolumeRecord, is_singular, oriented

AFFINE = np.array([[0.9, 0.1, 0.3, -20.0], [-0.1, 1.8, 0.2, 7.0], [-0.2, 0.3, 2.9, 3.0], [0, 0, 0, 1]])


class Named(VolumeRecord):
    name: str


@pytest.fixture
def info():
    return VolumeInfo(
        channels=2, shape=(6, 5, 4), affine=AFFINE, codes=(1, 3), units=("micron", "msec"),
        intensity=[(-1000.0, 400.0), (0.0, 0.1)], source="x.nii.gz",
    )  # fmt: skip


def test_json_round_trip(info):
    assert VolumeInfo.model_validate(json.loads(json.dumps(info.model_dump(mode="json")))) == info
    named = Named(name="a", info=info)
    content = json.loads(json.dumps(named.model_dump(mode="json")))
    assert content == {"name": "a", **info.model_dump(mode="json")}  # on one level
    assert Named.model_validate(content) == named


def test_fields_missing_in_format_1_have_defaults(info):
    old = {"shape": [2, 6, 5, 4], "affine": AFFINE.tolist(), "intensity": [[-1000, 400], [0, 0.1]]}
    want = info.replaced(codes=(0, 2), units=("mm", "sec"), source="")
    assert VolumeInfo.model_validate(old) == want
    assert VolumeInfo.model_validate(old | {"shape": [6, 5, 4], "outputs": 2, "texels": [1, 1, 1]}) == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"affine": np.eye(3)}, "4 x 4"),
        ({"shape": (1, 2)}, "shape"),
        ({"channels": 0}, "channels"),
        ({"intensity": [(0.0, 1.0)]}, "each of 2 channels"),
        ({"units": ("mm",)}, "units"),
    ],
)
def test_a_record_is_checked(info, change, message):
    with pytest.raises(ValidationError, match=message):
        info.replaced(**change)


def test_another_size_has_the_same_field_of_view(info):
    other = info.resized((12, 10, 8))
    assert other == info.replaced(shape=(12, 10, 8), affine=other.affine)
    np.testing.assert_allclose(other.spacing, np.array(info.spacing) / 2)
    np.testing.assert_allclose(other.resized(info.shape).affine, info.affine, atol=1e-12)


def test_physical_and_unit_are_inverse(info):
    unit = torch.rand(3, *info.array_shape, generator=torch.Generator().manual_seed(0))
    physical = info.to_physical(unit)
    assert -1000 <= float(physical[:, 0].min()) < float(physical[:, 0].max()) <= 400
    for one, back in zip(unit, physical, strict=True):
        np.testing.assert_allclose(info.to_unit(back.numpy()), one, atol=1e-6)
    assert info.to_unit(np.full(info.array_shape, 1e6, np.float32)).max() == 1  # clipped


def test_a_reoriented_volume_keeps_its_position(info):
    data = np.arange(120, dtype=np.float32).reshape(1, 6, 5, 4)
    volume = Volume(data, info.replaced(channels=1, intensity=[]))
    turned = oriented(volume, np.diag([-1.0, -1.0, 1.0, 1.0])[[1, 0, 2, 3]])
    assert turned.info.shape == turned.data.shape[1:] == (5, 6, 4)
    at = np.array([4, 1, 2, 1])
    before = np.rint(np.linalg.inv(volume.info.affine) @ turned.info.affine @ at).astype(int)
    assert turned.data[0, 4, 1, 2] == data[(0, *before[:3])]


@pytest.mark.parametrize("size", [1e-39, 1e-50, 1e39])
def test_voxels_that_float32_cannot_hold_are_singular(size):
    """Headers would write them as 0 or infinite, which no reader accepts."""
    assert is_singular(np.diag([1.0, size, 1.0, 1.0]))
    assert not is_singular(np.diag([1.0, 1e-30, 1e30, 1.0]))
