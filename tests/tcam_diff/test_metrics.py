"""SSIM, PSNR and pictures."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from tcam_diff.evaluation import metrics, picture


@pytest.mark.parametrize("slab", [1, 5, 100])
def test_ssim_equals_monais(slab):
    from monai.metrics import SSIMMetric

    a = torch.rand(2, 24, 20, 17)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    dense = SSIMMetric(spatial_dims=3, data_range=1.0, kernel_type="gaussian", win_size=11, kernel_sigma=1.5)
    assert metrics.ssim3d(a, b, slab) == pytest.approx(float(dense(a[None], b[None])), abs=1e-6)


def test_ms_ssim():
    """Equal to a dense window in float64, and near MONAI's value, whose variances are differences of squares in float32."""
    from monai.metrics import MultiScaleSSIMMetric

    a = torch.rand(2, 26, 22, 24)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    weights = [w / sum(metrics.SCALES[:2]) for w in metrics.SCALES[:2]]
    g = metrics.gaussian(11, 1.5)
    window, want, x, y = torch.einsum("i,j,k->ijk", g, g, g)[None, None], 1.0, a.double(), b.double()
    for scale, weight in enumerate(weights):
        mean_x, mean_y, xx, yy, xy = (
            torch.nn.functional.conv3d(v[:, None], window) for v in (x, y, x * x, y * y, x * y)
        )  # fmt: skip
        structure = (2 * (xy - mean_x * mean_y) + 9e-4) / (xx - mean_x**2 + yy - mean_y**2 + 9e-4)
        luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
        want *= float((structure * luminance if scale else structure).mean()) ** weight
        x, y = (torch.nn.functional.avg_pool3d(v.float(), 2).double() for v in (x, y))
    for slab in (5, 100):
        assert metrics.ms_ssim3d(a, b, slab) == pytest.approx(want, abs=1e-9)
    theirs = MultiScaleSSIMMetric(spatial_dims=3, weights=weights)(a[None], b[None])
    assert want == pytest.approx(float(theirs), abs=5e-5)
    assert [metrics.scales(n) for n in (10, 11, 21, 22, 175, 176, 1000)] == [0, 1, 1, 2, 4, 5, 5]
    with pytest.raises(ValueError, match="22"):
        metrics.ms_ssim3d(a[:, :, :21], b[:, :, :21])


def test_limits():
    a = torch.rand(1, 12, 13, 14)
    assert metrics.ssim3d(a, a) == pytest.approx(1, abs=1e-6)
    assert metrics.psnr(a, a) == math.inf
    assert metrics.psnr(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.1)) == pytest.approx(20)
    with pytest.raises(ValueError, match="11"):
        metrics.ssim3d(a[:, :10], a[:, :10])


def test_canonical_puts_anatomy_upright():
    """An image stored as anterior, left, inferior is reoriented to right, anterior, superior, with its spacings."""
    volume = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    ras = nib.Nifti1Image(volume, np.diag([1.0, 2, 3, 1]))
    lai = ras.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(ras.affine), nib.orientations.axcodes2ornt(("A", "L", "I")))
    )
    got, spacing = picture.canonical(np.asarray(lai.dataobj), lai.affine)
    np.testing.assert_array_equal(got, volume)
    assert spacing == (1, 2, 3)


def test_the_picture_is_drawn(tmp_path):
    a = np.random.default_rng(0).random((12, 14, 10)).astype(np.float32)
    picture.compare_picture(tmp_path / "p.png", a, a * 0.9, np.diag([1.0, 1, 2, 1]), ("a", "b"), "caption")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 1
