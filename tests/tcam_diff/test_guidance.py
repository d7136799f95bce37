"""Guidance: samples agree with known voxels, and the state is kept."""

from __future__ import annotations

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from runs import SIZE, sampler, tcam
from tcam_diff.diffusion.guidance import ImageGuidance, read_known
from tcam_diff.errors import UserError


@pytest.mark.parametrize("what", ["half", "coarse"])
def test_guided_samples_follow_known_voxels(model, truth, what):
    s = sampler(model, steps=20, solver="euler")
    if what == "half":
        mask = torch.zeros_like(truth)
        mask[:, :8] = 1
        guidance = ImageGuidance(truth, mask, noise=0.005, iterations=10)
    else:
        guidance = ImageGuidance(torch.nn.functional.avg_pool3d(truth, 4), factor=(4, 4, 4), noise=0.005, iterations=10)
    guided = guidance.bind(model)
    free, samples = s.sample([0, 1]), s.sample([0, 1], correct=guided)
    before, after = guided.misfit(free), guided.misfit(samples)
    assert float((after / before).max()) < 0.2
    assert float((samples[0][0] - samples[0][1]).square().mean()) > 1e-4  # unknown voxels still vary


def test_guidance_keeps_the_state(model, truth):
    """The noise changes with the planes, so that cos(eta) x0 + sin(eta) eps stays the same."""
    from tcam_diff.diffusion.process import Estimate

    x = sampler(model).noise([0])
    estimate = Estimate(x, torch.randn_like(x), torch.randn_like(x), 0.9)
    corrected = ImageGuidance(truth).bind(model)(estimate)
    torch.testing.assert_close(corrected.residual, estimate.residual, rtol=0, atol=1e-4)
    assert not torch.equal(corrected.x0, estimate.x0)


def test_guidance_approaches_the_minimum_near_known_voxels(model, truth):
    """Texels far from all known voxels change only by the common scale of the normalisation."""
    from tcam_diff.diffusion.process import Estimate, unpack

    mask = torch.zeros_like(truth)
    mask[:, :3, :3, :3] = 1
    eta = 1.4
    before = model.state([p[None] for p in (t[0] for t in sampler(model, seed=3, final="x").sample([0]))])
    estimate = Estimate(before, torch.randn_like(before), before, eta)

    def objective(z):
        guided = ImageGuidance(truth, mask).bind(model)
        return float(guided.misfit(model.planes(z)) / 0.02**2 + ((z - before) / math.sin(eta)).square().sum()) / 2

    few, many = (ImageGuidance(truth, mask, iterations=n).bind(model)(estimate).x0 for n in (5, 100))
    start, reached, least = objective(before), objective(few), objective(many)
    assert least <= reached < start
    assert reached - least < 0.1 * (start - least)
    for plane in unpack(few - before, model.channels, model.geometry.sizes):
        near, far = plane[..., :3, :3], plane[..., 5:, 5:]
        assert float(far.square().mean()) < 0.01 * float(near.square().mean())


def test_guided_samples_depend_on_their_numbers_alone(trained, model, truth, tmp_path):
    """The command draws them one at a time."""
    path = tmp_path / "known.nii.gz"
    lo, hi = model.geometry.info.intensity[0]
    nib.save(nib.Nifti1Image(lo + (hi - lo) * torch.nn.functional.avg_pool3d(truth, 4)[0].numpy(), np.eye(4)), path)
    command = ("sample", trained, "--steps", 3, "--known", path, "-q")
    tcam(*command, "--out", tmp_path / "all", "--n", 3, "--batch-size", 3)
    tcam(*command, "--out", tmp_path / "one", "--n", 1, "--first", 2)
    one = next((tmp_path / "one").glob("*.nii.gz"))
    assert one.read_bytes() == (tmp_path / "all" / one.name).read_bytes()


def test_unknown_voxels_do_not_matter(model, truth):
    mask = torch.zeros_like(truth)
    mask[:, 3:9, 5:11, 2:4] = 1
    other = torch.where(mask > 0, truth, torch.rand_like(truth))
    other[:, 0, 0, 0] = float("nan")
    planes = sampler(model).sample([0])
    a, b = (ImageGuidance(v, mask).bind(model) for v in (truth, other))
    assert a.box == [(3, 9), (5, 11), (2, 4)]
    assert torch.equal(a.misfit(planes), b.misfit(planes))
    whole = (model.decode(planes)[0] - truth) * mask
    torch.testing.assert_close(a.misfit(planes)[0], whole.square().sum(), rtol=1e-3, atol=1e-6)


def test_known_files(model, trained, truth, tmp_path):
    lo, hi = model.geometry.info.intensity[0]
    path, mask = tmp_path / "known.nii.gz", tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(lo + (hi - lo) * truth[0].numpy(), np.eye(4)), path)
    marked = np.zeros(SIZE, np.uint8)
    marked[:8] = 1
    nib.save(nib.Nifti1Image(marked, np.eye(4)), mask)
    guidance = read_known(model, path, mask)
    torch.testing.assert_close(guidance.known, truth, rtol=0, atol=1e-5)
    assert guidance.mask.sum() == 8 * 16 * 16
    out = tmp_path / "samples"
    tcam("sample", trained, "--out", out, "--n", 1, "--steps", 3, "--known", path, "--mask", mask, "-q")
    assert json.loads(next(out.glob("*.json")).read_text())["known"]["mask"] is not None
    nib.save(nib.Nifti1Image(np.zeros((5, 16, 16), np.float32), np.eye(4)), path)
    with pytest.raises(UserError, match=r"known\.nii\.gz: expected 1 channel"):
        read_known(model, path)
    nib.save(nib.Nifti1Image(np.ones((8, 4, 16), np.float32), np.eye(4)), path)
    assert read_known(model, path).factor == (2, 4, 1)
    with pytest.raises(UserError, match="numbers from 0 to 0"):
        read_known(model, path, channels="1")


def test_known_files_are_reoriented_to_the_model(model, truth, tmp_path):
    """A file with other axes and the same anatomy gives the same known voxels."""
    lo, hi = model.geometry.info.intensity[0]
    path, mask = tmp_path / "known.nii.gz", tmp_path / "mask.nii.gz"
    marked = np.zeros(SIZE, np.uint8)
    marked[:5, :, 2:] = 1
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    turned = affine.copy()  # x is flipped, y and z are swapped
    turned[0, 0], turned[0, 3] = -1.0, SIZE[0] - 1
    turned[1:3, 1:3] = [[0, 1], [1, 0]]
    for target, values in ((path, lo + (hi - lo) * truth[0].numpy()), (mask, marked)):
        nib.save(nib.Nifti1Image(values[::-1].transpose(0, 2, 1), turned), target)
    guidance = read_known(model, path, mask)
    torch.testing.assert_close(guidance.known, truth, rtol=0, atol=1e-5)
    assert torch.equal(guidance.mask[0] != 0, torch.from_numpy(marked != 0))
    scaled = read_known(model, path, intensity=(lo, lo + 2 * (hi - lo)))
    torch.testing.assert_close(scaled.known, truth / 2, rtol=0, atol=1e-5)
    nib.save(nib.Nifti1Image(marked, affine @ np.diag([1, 1, 1.5, 1])), mask)
    with pytest.raises(UserError, match=r"mask\.nii\.gz: its affine is not that of"):
        read_known(model, path, mask)
