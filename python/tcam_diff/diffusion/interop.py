"""Adapters for MONAI: a scheduler and modules for its LatentDiffusionInferer, and bundles.

model = TriplaneDiffusion.load("run")
inferer = LatentDiffusionInferer(ArcScheduler("heun", variances=model.variances))
volumes = inferer.sample(torch.randn(2, *latent_shape(model)), Autoencoder(model), Network(model))
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.networks.schedulers.scheduler import NoiseSchedules, Scheduler
from torch import Tensor, nn

import tcam_ext
from tcam_diff.autodecoder.config import EncodeConfig
from tcam_diff.autodecoder.encode import Encoder, TrainedRun
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.prior import GaussianPrior
from tcam_diff.diffusion.process import TIMESTEPS, Estimate, mix
from tcam_diff.diffusion.solver import Draw, Solver, Steps, arc
from tcam_diff.errors import UserError
from tcam_diff.files import replacing, writable_folder, write_text
from tcam_diff.text import size_text

#: JSON schema of the metadata of bundles.
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


def latent_shape(model: TriplaneDiffusion) -> tuple[int, ...]:
    """Shape of a volume's latent: (3 C, rows, columns) with planes xy, yz, xz in this order, or (M,) if they differ in size."""
    sizes = set(model.geometry.sizes)
    return (3 * model.channels, *sizes.pop()) if len(sizes) == 1 else (model.length,)


def check_model(model: TriplaneDiffusion) -> None:
    """Raise UserError for a model from which MONAI's inferers cannot draw."""
    if model.spacings is not None or model.consistency:
        what = "depends on voxel sizes (spacing=true)" if model.spacings is not None else "is one of `tcam distill`"
        raise UserError(f"the model {what}, and MONAI's inferers cannot draw from it; take `tcam sample`")


class Network(nn.Module):
    """The network with MONAI's interface: noisy latents (B, N, ...) to (B, 2N, ...), noise first, then planes."""

    def __init__(self, model: TriplaneDiffusion) -> None:
        super().__init__()
        check_model(model)
        self.model = model

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """Estimate noise and planes.

        Args:
            x: noisy latents (B, N, ...).
            timesteps: (1,) or (B,) in [0, 1000].
            context: class numbers (B, ...), negative for no class, as MONAI's ``cfg_fill_value``; None: no classes.
        """
        labels = None
        if context is not None:
            labels = context.flatten().long()
            labels = torch.where(labels < 0, self.model.network.classes, labels)
        estimate = self.model.estimate(x.flatten(1), timesteps.to(x.device).expand(len(x)), labels)
        return estimate.view(len(x), 2 * x.shape[1], *x.shape[2:])


class Autoencoder(nn.Module):
    """Stage 1 with the interface of MONAI's autoencoders.

    Args:
        model: the model.
        size: voxels of decoded volumes; default: those of the training volumes.
        encoding: optimisation of planes; default: ``EncodeConfig(init="start")``.
    """

    def __init__(
        self, model: TriplaneDiffusion, size: Sequence[int] | None = None, encoding: EncodeConfig | None = None
    ) -> None:
        super().__init__()
        self.model, self.size, self.encoding = model, size, encoding or EncodeConfig(init="start")

    @torch.no_grad()
    def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
        """Decode latents to volumes (B, channels, H, W, D) in [0, 1]."""
        return self.model.decode(self.model.planes(z.flatten(1)), self.size)

    def encode_stage_2_inputs(self, x: Tensor) -> Tensor:
        """Encode volumes (B, channels, H, W, D) in [0, 1] by optimising planes under the frozen decoder."""
        run = TrainedRun(Path(), self.model.stage1, 0, self.model.decoder, [], [], "")
        h, w, d = x.shape[2:]
        with torch.enable_grad():
            encoder = Encoder(run, self.encoding, (h, w, d), x.device, len(self.model.geometry.info.label_maps))
            volumes = {f"{i}": v.detach().cpu().numpy().astype(np.float16) for i, v in enumerate(x)}
            encoded = encoder.encode(volumes)
        assert encoded is not None
        states = [self.model.state(encoded[name].planes) for name in volumes]
        return torch.cat(states).view(len(x), *latent_shape(self.model))


def physical(model: TriplaneDiffusion, volumes: Tensor, numbers: Sequence[int], seed: int) -> list[MetaTensor]:
    """Convert volumes (B, channels, H, W, D) in [0, 1] to MetaTensors in physical units with affines, for MONAI's SaveImage.

    Label maps are left out.
    """
    h, w, d = volumes.shape[2:]
    info = model.geometry.info.of_images().resized((h, w, d))
    return [
        MetaTensor(
            info.to_physical(volume[: info.channels]).cpu(),
            affine=torch.tensor(info.affine),
            meta={"filename_or_obj": f"sample-{i:04d}_seed{seed}"},
        )
        for i, volume in zip(numbers, volumes, strict=True)
    ]


@NoiseSchedules.add_def("quarter_circle", "sqrt(alpha_bar) = cos((t / T) pi/2)")
def _quarter_circle(num_train_timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Betas, alphas and cumulative alphas of the quarter circle, for MONAI's own schedulers."""
    eta = torch.arange(num_train_timesteps, dtype=torch.float64) / num_train_timesteps * (math.pi / 2)
    cumulative = eta.cos().square()
    cumulative[0] = 1 - 2**-20  # not 1: DDPMScheduler divides by 1 - cumulative[0]
    alphas = cumulative / cumulative.roll(1)  # cumulative[t] is the product of alphas[0] to alphas[t]
    alphas[0] = cumulative[0]
    return (1 - alphas).float(), alphas.float(), cumulative.float()


class ArcScheduler(Scheduler):
    """MONAI scheduler for networks with two heads: ``model_output`` (B, 2M, ...) is noise, then x0, of ``sample`` (B, M, ...).

    ``timesteps`` has one entry in [0, 1000], not always an integer, for each evaluation of the network. ``step`` must be called
    with them in order, since methods with several stages keep state between the calls. After the last one it starts again.

    Args:
        solver: method of :class:`~tcam_diff.diffusion.solver.Solver`.
        final, hot_k, churn, draw: other arguments of the solver.
        num_train_timesteps: timestep of pure noise.
        variances: smallest and largest variance of the latents' modes, as in ``TriplaneDiffusion.variances``, for the grid of
            :func:`~tcam_diff.diffusion.solver.arc`; None: equal intervals.
        prior: ``TriplaneDiffusion.prior``, for multirate.
    """

    def __init__(
        self,
        solver: str = "heun",
        final: str = "x0",
        hot_k: int = 2,
        churn: float = 1.0,
        draw: Draw = torch.randn_like,
        num_train_timesteps: int = TIMESTEPS,
        variances: tuple[float, float] | None = None,
        prior: GaussianPrior | None = None,
    ) -> None:
        super().__init__(num_train_timesteps, "quarter_circle")
        self.variances = variances
        self.solver = Solver(solver, final, hot_k, churn, draw, prior)
        self.set_timesteps(50)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, start: float = 1.0, stop: float = 0.0
    ) -> None:
        """Set the steps of the integration.

        Args:
            num_inference_steps: number of intervals.
            device: device of ``timesteps``.
            start, stop: ends in shares of the quarter circle; 1 is noise, 0 planes. From 0 to 1 sampling is inverted.
        """
        self.num_inference_steps = num_inference_steps
        self.etas = arc(num_inference_steps, start, stop, self.variances)
        self.visited = self.solver.evaluations(self.etas)
        scale = self.num_train_timesteps / (math.pi / 2)
        self.timesteps = torch.tensor(self.visited, dtype=torch.float64, device=device).mul(scale).float()
        self._steps: Steps | None = None
        self._index = 0

    def step(self, model_output: Tensor, timestep: Tensor | float, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Take an evaluation of the network.

        Args:
            model_output: (B, 2M, ...), noise, then x0.
            timestep: the next entry of ``timesteps``.
            sample: point (B, M, ...) of the evaluation.

        Returns:
            The point of the next evaluation, or the result after the last one, and the estimate of x0.

        Raises:
            ValueError: another timestep is next, or shapes do not fit.
        """
        if self._steps is None:
            self._steps = self.solver.steps(sample, self.etas)
            next(self._steps)
        eta = self.visited[self._index]
        if abs(float(timestep) / self.num_train_timesteps * math.pi / 2 - eta) > 1e-4:
            due = float(self.timesteps[self._index])
            raise ValueError(f"timestep: expected {due:.3f}, the next one, got {float(timestep):.3f}; see set_timesteps")
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"model_output: expected {2 * sample.shape[1]} channels (noise, x0) for {sample.shape[1]} of sample, got "
                f"{model_output.shape[1]}"
            )
        noise, x0 = model_output.chunk(2, 1)
        self._index += 1
        try:
            x, _ = self._steps.send(Estimate(sample, noise, x0, eta))
        except StopIteration as end:
            self._index, self._steps = 0, None
            x = end.value
        return x, x0

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """cos(eta) x0 + sin(eta) eps at timesteps (B,) in [0, 1000]."""
        return mix(original_samples, noise, timesteps.to(original_samples.device) * (TIMESTEPS / self.num_train_timesteps))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """dx/deta = cos(eta) eps - sin(eta) x0 on the arc from ``sample``, x0, to ``noise``."""
        return mix(noise, -sample, timesteps.to(sample.device) * (TIMESTEPS / self.num_train_timesteps))


INFERENCE: dict[str, Any] = {
    "imports": [
        "$import torch",
        "$from tcam_diff.diffusion.config import SampleConfig",
        "$from tcam_diff.diffusion.model import TriplaneDiffusion",
        "$from tcam_diff.diffusion.interop import latent_shape",
        "$from tcam_diff.diffusion.interop import physical",
        "$from tcam_diff.diffusion.sampling import Sampler",
    ],
    "bundle_root": ".",
    "output_dir": "$@bundle_root + '/eval'",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "count": 1,
    "first": 0,
    "seed": 0,
    "solver": "heun",
    "steps": 50,
    "size": None,
    "model": "$TriplaneDiffusion.load(@bundle_root + '/models', @device)",
    "network_def": {"_target_": "tcam_diff.diffusion.interop.Network", "model": "@model"},
    "autoencoder_def": {"_target_": "tcam_diff.diffusion.interop.Autoencoder", "model": "@model", "size": "@size"},
    "noise_scheduler": {
        "_target_": "tcam_diff.diffusion.interop.ArcScheduler",
        "solver": "@solver",
        "variances": "$@model.variances",
        "prior": "$@model.prior",
    },
    "set_timesteps": "$@noise_scheduler.set_timesteps(@steps)",
    "inferer": {"_target_": "LatentDiffusionInferer", "_requires_": "@set_timesteps", "scheduler": "@noise_scheduler"},
    "numbers": "$range(@first, @first + @count)",
    "noise": "$Sampler(@model, SampleConfig(seed=@seed)).noise(@numbers).view(-1, *latent_shape(@model))",
    "generated": "$@inferer.sample(@noise, @autoencoder_def, @network_def, @noise_scheduler, verbose=False)",
    "saver": {
        "_target_": "SaveImage",
        "output_dir": "@output_dir",
        "output_postfix": "",
        "separate_folder": False,
        "print_log": False,
        "resample": False,
    },
    "run": ["$[@saver(v) for v in physical(@model, @generated, @numbers, @seed)]"],
}


def export_bundle(model: TriplaneDiffusion, folder: Path, name: str, version: str = "0.1.0") -> None:
    """Write a MONAI bundle with configs, models and docs. To run, it needs this package and no other files.

    Raises UserError if the folder has other content.
    """
    check_model(model)
    metadata = folder / "configs" / "metadata.json"
    if folder.exists() and not metadata.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a bundle; choose another folder")
    for part in ("configs", "models", "docs"):
        writable_folder(folder / part)
    write_text(
        metadata, json.dumps(_metadata(model, name, version), indent=4)
    )  # first, because it marks the folder as a bundle
    model.save(folder / "models")
    state = {k: v.detach().cpu().contiguous() for k, v in model.network.state_dict().items()}
    with replacing(folder / "models" / "model.pt") as file:  # required by MONAI's specification
        torch.save(state, file)
    write_text(folder / "configs" / "inference.json", json.dumps(INFERENCE, indent=4))
    write_text(folder / "docs" / "README.md", _readme(model, name))


def _metadata(model: TriplaneDiffusion, name: str, version: str) -> dict[str, Any]:
    info, shape = model.geometry.info.of_images(), latent_shape(model)
    latent = {
        "type": "feature", "format": "latent", "modality": "n/a", "num_channels": shape[0], "spatial_shape": list(shape[1:]),
        "dtype": "float32", "value_range": [], "is_patch_data": False, "channel_def": {"0": "xy, yz, xz: C channels each"},
    }  # fmt: skip
    return {
        "schema": SCHEMA,
        "version": version,
        "changelog": {version: "exported by tcam export-bundle"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"tcam-ext": tcam_ext.__version__},
        "supported_apps": {},
        "name": name,
        "task": "Generation of 3D medical volumes",
        "description": "Triplane-aware cross-attention diffusion (TCAM-Diff, AAAI 2025): a diffusion model draws three "
        "feature planes, a small decoder makes a volume of them.",
        "authors": "see the model's owner",
        "copyright": "see the model's owner",
        "data_source": "see the model's owner",
        "data_type": "nibabel",
        "image_classes": f"{info.channels} channel(s), {info.shape} voxels",
        "intended_use": "Research only; not for clinical use",
        "references": ["Zhang, Ehinger, Drummond. TCAM-Diff: Triplane-Aware Cross-Attention Medical Diffusion Model. AAAI 25"],
        "network_data_format": {
            "inputs": {
                "x": latent,
                "timesteps": {
                    "type": "timesteps", "format": "timesteps", "modality": "n/a", "num_channels": 1, "spatial_shape": [],
                    "dtype": "float32", "value_range": [0, 1000], "is_patch_data": False, "channel_def": {"0": "t"},
                },
            },
            "outputs": {"pred": latent | {"num_channels": 2 * shape[0], "channel_def": {"0": "noise, then planes"}}},
        },
    }  # fmt: skip


def _readme(model: TriplaneDiffusion, name: str) -> str:
    info, provenance = model.geometry.info.of_images(), model.provenance
    millions = sum(p.numel() for p in model.network.parameters()) / 1e6
    return f"""# {name}

A diffusion model of triplanes (TCAM-Diff, AAAI 2025) with its decoder: {info.channels} channel(s),
{size_text(info.shape)} voxels, {millions:.2f} M parameters, trained on {provenance.get("volumes", "?")} volumes
for {provenance.get("step", "?")} steps.
Needs the package tcam-ext with its extras `train` and `bundle`.

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --count 4 --seed 0

writes NIfTI volumes with the affine and intensities of the training data into `eval`. `--solver`, `--steps` and
`--size "[256, 256, 256]"` are as for `tcam sample`, which also takes `models` as a model's folder.
"""
