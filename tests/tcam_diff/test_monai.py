"""MONAI: its inferer drives our models, its bundles run them."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import torch
from runs import sampler, tcam


def test_monais_inferer_draws_our_samples(model):
    from monai.inferers import LatentDiffusionInferer
    from tcam_diff.diffusion.interop import ArcScheduler, Autoencoder, Network, latent_shape

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
    from monai.inferers import LatentDiffusionInferer
    from tcam_diff.autodecoder.config import EncodeConfig
    from tcam_diff.diffusion.interop import ArcScheduler, Autoencoder, Network, latent_shape

    encoding = EncodeConfig(steps=300, init="start", check_every=100, region="volume")
    autoencoder = Autoencoder(model, encoding=encoding)
    latent = autoencoder.encode_stage_2_inputs(truth[None])
    assert float((autoencoder.decode_stage_2_outputs(latent)[0] - truth).square().mean().sqrt()) < 0.05
    noise = torch.randn(1, *latent_shape(model))
    inferer = LatentDiffusionInferer(ArcScheduler())
    prediction = inferer(truth[None], autoencoder, Network(model), noise, torch.tensor([500]))
    assert prediction.shape == (1, 24, 8, 8)


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
