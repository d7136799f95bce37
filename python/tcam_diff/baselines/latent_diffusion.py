"""3D latent diffusion on a rival's compression network, of MONAI's network and schedulers.

ldm.json                format, configuration, scale of the latents, checksum
network.safetensors     network, averaged if ema_decay is above 0
autoencoder/            copy of the compression network
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tcam_ext
from tcam_diff.baselines.compression import Compression
from tcam_diff.baselines.config import LatentDiffusionConfig
from tcam_diff.config import read_settings
from tcam_diff.data.store import Store, one_shape, unit, volumes_digest
from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder
from tcam_diff.folder import Folder, tensor_bytes
from tcam_diff.machine import products
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.ema import update_average
from tcam_diff.training.loop import Outcome
from tcam_diff.training.networks import NetworksTask
from tcam_diff.training.rng import in_epochs, rng, seed_of
from tcam_diff.training.states import load_module

INDEX, NETWORK, AUTOENCODER = "ldm.json", "network.safetensors", "autoencoder"


def make_network(config: LatentDiffusionConfig, channels: int) -> Any:
    """Untrained network for latents of so many channels. Its weights depend on the seed alone."""
    from monai.networks.nets import DiffusionModelUNet

    attention = [i in config.attention_levels for i in range(len(config.channels))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "network"))
        return DiffusionModelUNet(
            3, channels, channels, config.res_blocks, config.channels, attention, config.norm_groups,
            num_head_channels=config.head_channels, include_fc=False,
        )  # fmt: skip


def scheduler(config: LatentDiffusionConfig, sampling: bool = False) -> Any:
    """MONAI's scheduler of training, or of sampling."""
    from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

    options: dict[str, Any] = {"num_train_timesteps": config.timesteps, "schedule": config.noise, "clip_sample": False}
    if config.noise == "scaled_linear_beta":
        options |= {"beta_start": 0.0015, "beta_end": 0.0195}
    made: Any = (DDIMScheduler if sampling and config.sampler == "ddim" else DDPMScheduler)(**options)
    if sampling:
        made.set_timesteps(config.sampler_steps if config.sampler == "ddim" else config.timesteps)
    return made


@dataclass
class LatentDiffusion:
    """A trained latent diffusion model. States are (latents - shift) * scale."""

    network: Any
    config: LatentDiffusionConfig
    compression: Compression
    shift: float
    scale: float

    def estimate(self, x: Tensor, t: Tensor) -> Tensor:
        """Estimate the noise in states."""
        enabled = products(self.config.compute_dtype, x.device) == torch.bfloat16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            noise: Tensor = self.network(x, t)
        return noise.float()

    @torch.no_grad()
    def sample(self, indices: Sequence[int], seed: int) -> Tensor:
        """Draw volumes (N, channels, H, W, D) in [0, 1]. Volume i depends on the seed and on i alone, but for rounding."""
        device, steps = next(self.network.parameters()).device, scheduler(self.config, sampling=True)
        shape = self.compression.latent_shape
        x = torch.stack([torch.randn(shape, generator=rng(seed, "sample", i)) for i in indices]).to(device)
        for t in steps.timesteps:
            noise = self.estimate(x, torch.full((len(x),), int(t), device=device))
            streams = [rng(seed, "sampler", i, int(t)) for i in indices]
            parts = [
                steps.step(noise[k : k + 1], int(t), x[k : k + 1], generator=g)[0] for k, g in enumerate(streams)
            ]  # one by one: each has its own random numbers
            x = torch.cat(parts)
        latents = x / self.scale + self.shift
        return torch.cat([self.compression.decode(z) for z in latents.split(1)])

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Write the model. The index appears last."""
        self.compression.save(folder / AUTOENCODER, {"copy": True})
        config = self.config.model_copy(update={"autoencoder": Path(self.config.autoencoder).name, "data": None})
        index = {
            "config": config.model_dump(mode="json"),
            "shift": self.shift,
            "scale": self.scale,
            "provenance": provenance | {"tcam_ext": tcam_ext.__version__},
        }
        writable_folder(folder)
        _folder(folder).write(index, {NETWORK: tensor_bytes(self.network.state_dict())})

    @staticmethod
    def load(folder: Path, device: torch.device | None = None) -> LatentDiffusion:
        """Load a model. Raises UserError if it is missing or damaged."""
        files = _folder(folder)
        index = files.read()
        with files.reading():
            config = LatentDiffusionConfig.model_validate(index["config"])
            shift, scale, checksum = float(index["shift"]), float(index["scale"]), index["sha256"][NETWORK]
        compression = Compression.load(folder / AUTOENCODER, device)
        network = make_network(config, compression.config.latent_channels)
        with files.reading(NETWORK):
            load_module(network, files.read_tensors(NETWORK, checksum))
        network = network.eval().requires_grad_(False).to(device or "cpu")
        return LatentDiffusion(network, config, compression, shift, scale)


def is_latent_diffusion(path: Path) -> bool:
    """Whether a folder has a latent diffusion model."""
    return (path / INDEX).is_file()


class LatentDiffusionTraining(NetworksTask):
    """Training of a latent diffusion model. Raises UserError if configuration and data do not fit."""

    score = "-evaluation_loss"

    def __init__(self, config: LatentDiffusionConfig, group: Distributed, folder: Path) -> None:
        compression = Compression.load(Path(config.autoencoder), group.device)
        store = Store(config.data or read_settings(Path(config.autoencoder) / "config.yaml")["data"])
        records = store.in_split(compression.config.split)
        super().__init__(config, group, volumes_digest(records))
        self.config, self.folder = config, folder
        if one_shape(store.folder, records)[1:] != compression.info.shape:
            raise UserError(f"data: {store.folder}: volumes of another shape than those of {config.autoencoder}")
        fold = 2 ** (len(config.channels) - 1)
        if any(n % fold for n in compression.latent_shape[1:]):
            raise UserError(f"channels: {len(config.channels)} levels need latents of multiples of {fold} along each axis, "
                            f"got {compression.latent_shape[1:]}")  # fmt: skip
        parts = [compression.encode(unit(torch.tensor(store.volume(r)))[None].to(group.device)) for r in records]
        self.mean, self.deviation = (torch.cat(p) for p in zip(*parts, strict=True))
        shift, scale = self._scaling(compression)
        self.network = make_network(config, compression.config.latent_channels).to(group.device)
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.model = LatentDiffusion(self.network, config, compression, shift, scale)
        self.modules = {"network": self.network, "average": self.average}
        self.adam("network", self.network, config.lr)
        self.schedule = scheduler(config)

    def _scaling(self, compression: Compression) -> tuple[float, float]:
        """Shift and scale of the latents: 1 / standard deviation, or the range of the code book to [-1, 1]."""
        if compression.config.model == "vae-gan":
            return 0.0, 1 / max(float(self.mean.std()), 1e-6)
        codes = compression.network.quantizer.quantizer.embedding.weight
        low, high = float(codes.min()), float(codes.max())
        return (low + high) / 2, 2 / max(high - low, 1e-6)

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(p.numel() for p in self.network.parameters())

    def _errors(self, model: LatentDiffusion, numbers: Sequence[int], stream: tuple[str | int, ...]) -> Tensor:
        c, device = self.config, self.group.device
        generator = rng(c.seed, *stream)
        mean, deviation = self.mean[list(numbers)], self.deviation[list(numbers)]
        z = mean + deviation * torch.randn(mean.shape, generator=generator).to(device)
        x0, noise = (z - model.shift) * model.scale, torch.randn(mean.shape, generator=generator).to(device)
        t = torch.randint(c.timesteps, (len(x0),), generator=generator).to(device)
        guess = model.estimate(self.schedule.add_noise(x0, noise, t), t)
        return F.l1_loss(guess, noise) if c.loss == "l1" else F.mse_loss(guess, noise)

    def step(self, index: int) -> dict[str, Tensor]:
        """Update the network once."""
        c = self.config
        numbers = [in_epochs(index * c.batch + i, len(self.mean), c.seed) for i in range(c.batch)]
        self.network.train()
        loss = self._errors(self.model, numbers, ("step", index))
        self.update("network", loss, c.lr, index)
        update_average(self.average, self.network, c.ema_decay, index)
        return {"loss": loss.detach()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss on training volumes with fixed timesteps and noise. It is no measure of other volumes."""
        numbers = range(min(16, len(self.mean)))
        model = LatentDiffusion(self.average, self.config, self.model.compression, self.model.shift, self.model.scale)
        return {"evaluation_loss": float(self._errors(model, numbers, ("evaluation",)))}

    def finish(self, outcome: Outcome) -> None:
        m = self.model
        provenance = {
            "step": outcome.step,
            "seconds": outcome.seconds,
            "memory_gb": outcome.metrics.get("memory_gb"),
            "finished": not outcome.stopped,
            "data": self.data,
        }
        LatentDiffusion(self.average, self.config, m.compression, m.shift, m.scale).save(self.folder, provenance)


def _folder(path: Path) -> Folder:
    return Folder(path, INDEX, "`tcam baseline train`", "train it again, or continue with --resume auto")
