"""MONAI: its inferer drives our models, its bundles run them."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers import DiffusionInferer, LatentDiffusionInferer, SlidingWindowInferer
from runs import diffusion_config, make_latents, sampler, tcam
from tcam_diff.autodecoder.config import EncodeConfig
from tcam_diff.diffusion.guidance import ImageGuidance
from tcam_diff.diffusion.interop import INFERENCE, ArcScheduler, Autoencoder, Network, latent_shape, physical
from tcam_diff.diffusion.solver import METHODS
from tcam_diff.diffusion.train import DiffusionTraining
from tcam_diff.evaluation.metrics import mse, psnr, ssim3d
from tcam_diff.training.distributed import Distributed

import tcam_ext


def test_monais_inferer_draws_our_samples(model):
    s = sampler(model, steps=5)
    scheduler = ArcScheduler("heun")
    scheduler.set_timesteps(5)
    inferer = LatentDiffusionInferer(scheduler)
    noise = s.noise([4, 2]).view(2, *latent_shape(model))
    assert noise.shape == (2, 12, 8, 8)
    volumes = inferer.sample(noise, Autoencoder(model), Network(model), verbose=False)
    torch.testing.assert_close(volumes, model.decode(s.sample([4, 2])), rtol=0, atol=1e-4)
    context = torch.full((2, 1, 1), 1.0)
    guided = inferer.sample(noise, Autoencoder(model), Network(model), verbose=False, conditioning=context, cfg=2.0)
    ours = sampler(model, steps=5, guidance_scale=2.0).sample([4, 2], label=1)
    torch.testing.assert_close(guided, model.decode(ours), rtol=0, atol=1e-4)


def test_monais_inferer_trains_on_our_latents(model, truth):
    encoding = EncodeConfig(steps=300, init="start", check_every=100, region="volume")
    autoencoder = Autoencoder(model, encoding=encoding)
    latent = autoencoder.encode_stage_2_inputs(truth[None])
    assert float((autoencoder.decode_stage_2_outputs(latent)[0] - truth).square().mean().sqrt()) < 0.05
    noise = torch.randn(1, *latent_shape(model))
    inferer = LatentDiffusionInferer(ArcScheduler())
    prediction = inferer(truth[None], autoencoder, Network(model), noise, torch.tensor([500]))
    assert prediction.shape == (1, 24, 8, 8)


def plain(t):
    return t.as_subclass(torch.Tensor)


@pytest.mark.parametrize("solver", sorted(set(METHODS) - {"hot"}))  # hot draws noise
def test_inferers_take_metatensors(model, solver):
    """The results are those of plain tensors."""
    scheduler = ArcScheduler(solver)
    scheduler.set_timesteps(3)
    noise = sampler(model).noise([4, 2]).view(2, *latent_shape(model))
    context = torch.full((2, 1, 1), 1.0)
    modules = Autoencoder(model), Network(model)
    guided = {"conditioning": context, "cfg": 2.0, "verbose": False}
    want = LatentDiffusionInferer(scheduler).sample(noise, *modules, **guided)
    got = LatentDiffusionInferer(scheduler).sample(
        MetaTensor(noise), *modules, **guided | {"conditioning": MetaTensor(context)}
    )
    torch.testing.assert_close(plain(got), want)
    want = DiffusionInferer(scheduler).sample(noise, modules[1], scheduler, verbose=False)
    got = DiffusionInferer(scheduler).sample(MetaTensor(noise), modules[1], scheduler, verbose=False)
    torch.testing.assert_close(plain(got), want)


def test_a_bundle_of_a_model_with_a_prior_takes_every_solver(tmp_path):
    latents = make_latents(tmp_path / "latents", count=8)
    config = diffusion_config(latents, "prior=gaussian", "timesteps=spectrum", "center=true")
    model = DiffusionTraining(config, Distributed(), tmp_path).model(0)
    noise = sampler(model).noise([0]).view(1, *latent_shape(model))
    scheduler = ArcScheduler("multirate", variances=model.variances, prior=model.prior)
    scheduler.set_timesteps(3)
    got = DiffusionInferer(scheduler).sample(noise, Network(model), scheduler, verbose=False)
    want = sampler(model, solver="multirate", steps=3).integrate(noise.flatten(1), [0])
    torch.testing.assert_close(got.flatten(1), want, atol=1e-4, rtol=1e-4)
    assert INFERENCE["noise_scheduler"]["prior"] == "$@model.prior"


def test_training_by_inferers_takes_metatensors(model, truth):
    autoencoder = Autoencoder(model, encoding=EncodeConfig(steps=5, init="start", check_every=5, region="volume"))
    volume = MetaTensor(truth[None], affine=torch.diag(torch.tensor([1.0, 1.5, 2.0, 1.0])))
    noise, t = torch.randn(1, *latent_shape(model)), torch.tensor([500])
    for tensors in ((volume, MetaTensor(noise), t), (volume, MetaTensor(noise), MetaTensor(t))):
        predicted, wanted = (
            LatentDiffusionInferer(ArcScheduler())(v, autoencoder, Network(model), n, time)
            for v, n, time in (tensors, map(plain, tensors))
        )
        torch.testing.assert_close(plain(predicted), wanted)
    x = torch.randn_like(noise)
    predicted = DiffusionInferer(ArcScheduler())(MetaTensor(x), Network(model), MetaTensor(noise), t)
    torch.testing.assert_close(plain(predicted), DiffusionInferer(ArcScheduler())(x, Network(model), noise, t))
    assert plain(physical(model, volume, [3], 1)[0]).equal(physical(model, truth[None], [3], 1)[0])


def test_windows_of_metatensors_are_decoded():
    """MONAI's sliding windows over coordinates, which are also extra features."""
    decoder = tcam_ext.TriplaneDecoder(4, (8,), 2, extra_channels=3)
    planes = torch.randn(1, 3, 4, 7, 7, requires_grad=True)
    xyz = torch.rand(1, 3, 12, 10, 9) * 2 - 1

    def decode(window):
        at = window.movedim(1, -1)
        return decoder.points(planes.expand(len(window), *planes.shape[1:]), at, extra=at).movedim(-1, 1)

    want = decode(xyz)
    inferer = SlidingWindowInferer((6, 6, 6), sw_batch_size=3, overlap=0.25)
    got = inferer(MetaTensor(xyz), decode)
    torch.testing.assert_close(plain(got), want, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(plain(got).sum(), planes)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), planes)[0], rtol=1e-3, atol=1e-3)


def test_known_voxels_and_measures_take_metatensors(model, truth):
    s, mask = sampler(model, steps=2, solver="euler"), torch.ones_like(truth)
    guided = [ImageGuidance(t, m, iterations=3).bind(model) for t, m in ((truth, mask), (MetaTensor(truth), MetaTensor(mask)))]
    for got, want in zip(s.sample([0], correct=guided[1]), s.sample([0], correct=guided[0]), strict=True):
        torch.testing.assert_close(plain(got), want)
    other = (truth + 0.1 * torch.rand_like(truth)).clamp(0, 1)
    for measure in (mse, psnr, ssim3d):
        assert measure(MetaTensor(truth), MetaTensor(other)) == pytest.approx(measure(truth, other))


#: JSON schema of the mandatory keys of MONAI's bundle specification. The published schema needs network access.
SPECIFICATION = {
    "type": "object",
    "required": [
        "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task", "description",
        "authors", "copyright", "network_data_format",
    ],
    "properties": {
        "version": {"type": "string"},
        "changelog": {"type": "object"},
        "required_packages_version": {"type": "object"},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "additionalProperties": {"type": "object", "additionalProperties": {"$ref": "#/definitions/tensor"}},
        },
    },
    "definitions": {
        "tensor": {
            "type": "object",
            "required": [
                "type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def",
            ],
            "properties": {
                "num_channels": {"type": "integer"},
                "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
                "dtype": {"type": "string"},
                "value_range": {"type": "array", "items": {"type": "number"}},
                "is_patch_data": {"type": "boolean"},
                "channel_def": {"type": "object"},
            },
        }
    },
}  # fmt: skip


def test_a_bundle_is_verified_and_runs_alone(trained, model, tmp_path):
    bundle, schema = tmp_path / "bundle", tmp_path / "schema.json"
    tcam("export-bundle", trained, "--out", bundle)
    schema.write_text(json.dumps(SPECIFICATION))
    common = {"cwd": bundle, "check": True, "capture_output": True, "text": True}
    meta = bundle / "configs" / "metadata.json"
    command = [sys.executable, "-m", "monai.bundle"]
    subprocess.run([*command, "verify_metadata", "--meta_file", meta, "--filepath", schema], **common)
    run = [*command, "run", "--config_file", "configs/inference.json", "--count", "2", "--seed", "3", "--steps", "4"]
    subprocess.run(run, **common)
    names = sorted(p.name for p in (bundle / "eval").iterdir())
    assert names == ["sample-0000_seed3.nii.gz", "sample-0001_seed3.nii.gz"]
    image = nib.load(bundle / "eval" / names[1])
    lo, hi = model.geometry.info.intensity[0]
    want = lo + (hi - lo) * model.decode(sampler(model, steps=4, seed=3).sample([0, 1]))[1, 0]
    np.testing.assert_allclose(image.get_fdata(), want.numpy(), atol=0.1)
    np.testing.assert_allclose(image.affine, model.geometry.info.affine, atol=1e-5)
    tcam("export-bundle", trained, "--out", bundle)  # replaces a complete or incomplete bundle
    (tmp_path / "file").write_text("")
    (tmp_path / "project" / "docs").mkdir(parents=True)
    for place in (tmp_path / "file", tmp_path / "project"):
        assert "exists and is not a bundle" in tcam("export-bundle", trained, "--out", place, fails=True)


def test_a_model_loads_in_three_lines(trained):
    code = (
        "from tcam_diff.diffusion.model import TriplaneDiffusion\n"
        "from tcam_diff.diffusion.sampling import Sampler\n"
        f"model = TriplaneDiffusion.load({str(trained)!r})\n"
        "print(model.decode(Sampler(model).sample([0])).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[1, 1, 16, 16, 16]" in done.stdout
