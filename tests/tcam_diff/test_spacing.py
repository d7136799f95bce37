"""Voxel sizes as a condition of stage 2."""

import json

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from runs import tcam
from tcam_diff.autodecoder.latents import LatentWriter
from tcam_diff.autodecoder.objective import make_decoder
from tcam_diff.autodecoder.planes import normalise, plane_sizes
from tcam_diff.data.store import Record
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.diffusion.distill import distill
from tcam_diff.diffusion.interop import Network
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.spacing import Spacings, of_volume, with_spacing
from tcam_diff.diffusion.train import train_diffusion
from tcam_diff.errors import UserError
from test_distill import config as distillation

COARSE, FINE = [2.0, 2.0, 3.0], [1.0, 1.0, 1.5]


def info(sizes, units="mm"):
    affine = np.diag([*np.array(sizes) * [-1, 1, 1], 1.0])
    affine[:3, 3] = 5, -7, 9
    return VolumeInfo(channels=1, shape=(16, 16, 16), affine=affine, units=(units, "sec"), intensity=[(-1000.0, 1000.0)])


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Planes with channels of one sign in fine volumes and of the other in coarse ones, and a little noise."""
    folder = tmp_path_factory.mktemp("set") / "latents"
    stage1 = runs.config(folder / "no-store", "channels=4", "plane_size=8", "widths=[8]")
    writer = LatentWriter(folder, stage1, make_decoder(stage1, 1), {"made": "for a test"})
    g = torch.Generator().manual_seed(0)
    pattern = [torch.randn(4, 1, 1, generator=g).expand(4, *s) for s in plane_sizes((8, 8, 8))]
    entries = []
    for i in range(12):
        planes = [(1 if i % 2 else -1) * p + 0.3 * torch.randn(p.shape, generator=g) for p in pattern]
        of = info(FINE if i % 2 else COARSE)
        record = Record(info=of, name=f"v{i}", split="train", dtype="uint8", sources=[], sha256=f"{i}")
        entries.append(writer.write(record, normalise([p[None] for p in planes]), 30.0, 100))
    writer.finish(entries)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, latents):
    out = tmp_path_factory.mktemp("spacing") / "run"
    changes = "spacing=true", "prior=unit", "steps=150", "lr=5e-3", "network.dropout=0", "evaluate_every=150", "schedule=cosine"
    changes = *changes, "network.norm_groups=2"
    train_diffusion(runs.diffusion_config(latents, *changes), out)
    return out


def test_sizes_are_standardised_logarithms():
    sizes = torch.tensor([[1.0, 1.0, 2.0], [2.0, 4.0, 2.0], [1.5, 0.5, 2.0]])
    spacings = Spacings(sizes)
    condition = spacings.condition(sizes)
    torch.testing.assert_close(condition.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(condition.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    half = spacings.condition(sizes * 2) - condition
    torch.testing.assert_close(half, (half[0])[None].expand(3, 3))
    drawn = spacings.drawn(range(50), 3)
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in sizes.tolist()}
    torch.testing.assert_close(spacings.drawn([7], 3)[0], drawn[7])
    for wrong in (torch.zeros(2, 3), torch.ones(0, 3), torch.ones(3, 2)):
        with pytest.raises(ValueError, match="spacings"):
            Spacings(wrong)


def test_a_volume_of_other_voxels_keeps_its_centre():
    for units, factor in (("mm", 1.0), ("meter", 1000.0)):
        old = info(COARSE, units)
        new = with_spacing(old, [n * factor for n in (0.5, 4.0, 3.0)])
        assert of_volume(new) == pytest.approx([0.5 * factor, 4.0 * factor, 3.0 * factor])
        centre = np.array([7.5, 7.5, 7.5, 1.0])
        np.testing.assert_allclose(new.affine @ centre, old.affine @ centre)
        assert new.shape == old.shape
        assert new.orientation == old.orientation


def test_samples_follow_their_voxel_sizes(trained, latents):
    """Samples of fine voxels have the signs of fine volumes, and those of coarse ones the others."""
    model = TriplaneDiffusion.load(trained)
    means = {}
    for name, sizes in (("fine", FINE), ("coarse", COARSE)):
        planes = runs.sampler(model, steps=10, spacing=tuple(sizes)).sample(range(8))
        means[name] = torch.cat([p.flatten(1) for p in planes], 1)
    similar = torch.nn.functional.cosine_similarity(means["fine"], means["coarse"].mean(0, keepdim=True))
    assert float(similar.max()) < -0.5
    sampler = runs.sampler(model, steps=10)
    own = torch.cat([p.flatten(1) for p in sampler.sample(range(8))], 1)
    fine = sampler.sizes(range(8))[:, 0] < 1.5
    assert 0 < int(fine.sum()) < 8
    along = torch.nn.functional.cosine_similarity(own, means["fine"].mean(0, keepdim=True))
    assert ((along > 0) == fine).all()


def test_files_have_the_voxel_sizes(trained, latents, tmp_path):
    tcam("sample", trained, "--n", 1, "--steps", 2, "--spacing", 0.7, 0.8, 0.9, "--out", tmp_path / "given", "-q")
    (file,) = (tmp_path / "given").glob("*.nii.gz")
    np.testing.assert_allclose(nib.load(file).header.get_zooms(), [0.7, 0.8, 0.9], rtol=1e-5)
    tcam("sample", trained, "--n", 6, "--steps", 2, "--out", tmp_path / "drawn", "-q")
    found = {tuple(np.round(nib.load(f).header.get_zooms(), 3).tolist()) for f in (tmp_path / "drawn").glob("*.nii.gz")}
    assert found == {tuple(FINE), tuple(COARSE)}
    details = json.loads(next((tmp_path / "drawn").glob("sample-0000*.json")).read_text())
    assert tuple(details["spacing"]) in found
    tcam("interpolate", trained, latents, "v0", "v1", "--n", 3, "--steps", 2, "--out", tmp_path / "between", "-q")
    middle = nib.load(tmp_path / "between" / "01-of-3.nii.gz").header.get_zooms()
    np.testing.assert_allclose(middle, np.sqrt(np.array(FINE) * COARSE), rtol=1e-5)


def test_a_distilled_model_depends_on_them(trained, tmp_path):
    distill(distillation(trained), tmp_path / "run")
    model = TriplaneDiffusion.load(tmp_path / "run")
    one, other = (
        runs.sampler(model, solver="consistency", steps=1, spacing=s).sample([0])[0] for s in ((1, 1, 1.5), (2, 2, 3))
    )
    assert not torch.equal(one, other)


def test_what_does_not_fit_is_refused(trained, latents, tmp_path):
    plain = runs.make_latents(tmp_path / "plain")
    runs.diffuse(plain, tmp_path / "run", ("steps=1", "evaluate_every=1", "preview_steps=0"))
    said = tcam("sample", tmp_path / "run", "--spacing", 1, 1, 1, "--out", tmp_path / "s", "-q", fails=True)
    assert "does not depend on voxel sizes" in said
    assert "spacing" in tcam("sample", trained, "--spacing", 1, 0, 1, "--out", tmp_path / "s", "-q", fails=True)
    with pytest.raises(UserError, match="depends on voxel sizes"):
        Network(TriplaneDiffusion.load(trained))
    model = TriplaneDiffusion.load(trained)
    with pytest.raises(ValueError, match="sizes: expected the voxel sizes"):
        runs.sampler(model).invert([torch.zeros(1, 4, 8, 8)] * 3)
    with pytest.warns(UserWarning, match="is far from the training volumes'"):
        runs.sampler(model, spacing=(70.0, 70.0, 100.0)).sample([0])
    with pytest.raises(ValueError, match="numbers: expected"):
        TriplaneDiffusion.load(trained).network([p[None] for p in torch.zeros(3, 4, 8, 8)], torch.zeros(1))
