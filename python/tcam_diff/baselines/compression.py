"""Compression networks of the rivals: VAE-GAN and VQ-GAN, their training and their files.

baseline.json           format, configuration, metadata of the volumes, checksum
network.safetensors     the network, without discriminators
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.perceptual import Perceptual
from tcam_diff.baselines.config import CompressionConfig
from tcam_diff.data.store import Record, Store, one_shape, unit, volumes_digest
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.diffusion.data import typical
from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import mse, psnr_of_mse
from tcam_diff.files import writable_folder
from tcam_diff.folder import Folder, tensor_bytes
from tcam_diff.machine import products
from tcam_diff.text import size_text
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.loop import Outcome
from tcam_diff.training.networks import NetworksTask
from tcam_diff.training.rng import evenly, in_epochs, rng, seed_of
from tcam_diff.training.states import load_module

INDEX, NETWORK = "baseline.json", "network.safetensors"


def make_network(config: CompressionConfig, channels: int) -> Any:
    """Untrained network for volumes of so many channels. Its weights depend on the seed alone."""
    from monai.networks.nets import VQVAE, AutoencoderKL

    levels, widths = len(config.channels), config.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "network"))
        if config.model == "vae-gan":
            return AutoencoderKL(
                3, channels, channels, config.res_blocks, widths, [False] * levels, config.latent_channels, config.norm_groups,
                with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, include_fc=False,
            )  # fmt: skip
        return VQVAE(
            3, channels, channels, widths, config.res_blocks, widths, ((2, 4, 1, 1),) * levels, ((2, 4, 1, 1, 0),) * levels,
            config.codes, config.latent_channels, ddp_sync=False,
        )  # fmt: skip


@dataclass
class Compression:
    """A trained compression network. Volumes are (N, channels, H, W, D) in [0, 1]."""

    network: Any
    config: CompressionConfig
    info: VolumeInfo  # typical metadata of the training volumes

    @property
    def latents(self) -> int:
        """Numbers kept per volume; for vae-gan mean and deviation, as the paper counts."""
        h, w, d = self.latent_shape[1:]
        return (2 if self.config.model == "vae-gan" else 1) * self.config.latent_channels * h * w * d

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels and size of the latents."""
        h, w, d = (n // self.config.fold for n in self.info.shape)
        return self.config.latent_channels, h, w, d

    def autocast(self, device: torch.device) -> torch.autocast:
        """Context in which products have the configuration's type."""
        enabled = products(self.config.compute_dtype, device) == torch.bfloat16
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def encode(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents (N, channels, h, w, d); for vq-gan the latents before quantisation, and 0."""
        with self.autocast(volumes.device):
            if self.config.model == "vae-gan":
                mean, deviation = self.network.encode(volumes)
                return mean.float(), deviation.float()
            z = self.network.encode(volumes).float()
            return z, torch.zeros_like(z)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Volumes of latents, which vq-gan quantises first."""
        with self.autocast(latents.device):
            decoded: Tensor = self.network.decode_stage_2_outputs(latents)
        return decoded.float().clamp(0, 1)

    def reconstruct(self, volumes: Tensor) -> Tensor:
        """Volumes after compression."""
        return self.decode(self.encode(volumes)[0])

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Write the network. The index appears last."""
        index = {
            "config": self.config.model_copy(update={"data": Path(self.config.data).name}).model_dump(mode="json"),
            "info": self.info.model_dump(mode="json", exclude={"source"}),
            "latents": self.latents,
            "provenance": provenance | {"tcam_ext": tcam_ext.__version__},
        }
        writable_folder(folder)
        _folder(folder).write(index, {NETWORK: tensor_bytes(self.network.state_dict())})

    @staticmethod
    def load(folder: Path, device: torch.device | None = None) -> Compression:
        """Load a network. Raises UserError if it is missing or damaged."""
        files = _folder(folder)
        index = files.read()
        with files.reading():
            config = CompressionConfig.model_validate(index["config"])
            info = VolumeInfo.model_validate(index["info"])
            checksum = index["sha256"][NETWORK]
        network = make_network(config, info.channels)
        with files.reading(NETWORK):
            load_module(network, files.read_tensors(NETWORK, checksum))
        return Compression(network.eval().requires_grad_(False).to(device or "cpu"), config, info)

    @staticmethod
    def provenance(folder: Path) -> dict[str, Any]:
        """Origin of a network: digests of its data, steps, seconds and memory of its training."""
        files = _folder(folder)
        with files.reading():
            return dict(files.read()["provenance"])


def is_compression(path: Path) -> bool:
    """Whether a folder has a trained compression network."""
    return (path / INDEX).is_file()


class CompressionTraining(NetworksTask):
    """Training of a compression network against discriminators. Raises UserError if configuration and data do not fit."""

    def __init__(self, config: CompressionConfig, group: Distributed, folder: Path) -> None:
        self.store = Store(config.data)
        self.records = self.store.in_split(config.split)
        super().__init__(config, group, volumes_digest(self.records))
        self.config, self.folder = config, folder
        channels, *size = one_shape(self.store.folder, self.records)
        if any(n % config.fold for n in size):
            raise UserError(f"{config.data}: {size_text(size)} voxels; {config.model} needs multiples of {config.fold}")
        if config.batch > len(self.records):
            raise UserError(f"batch: expected at most the {len(self.records)} volumes of {config.data}, got {config.batch}")
        self.channels = channels
        self.network = make_network(config, channels).to(group.device)
        self.model = Compression(self.network, config, typical(self.records))
        self.modules["network"] = self.network
        self.adam("network", self.network, config.lr, config.beta1)
        if config.adversarial_weight:
            self._add_discriminator("volumes", 3)
            if config.slice_discriminator:
                self._add_discriminator("slices", 2)
        weights = config.perceptual_weights
        self.perceptual = Perceptual(weights).to(group.device) if config.perceptual_weight else None

    def _add_discriminator(self, name: str, dimensions: int) -> None:
        from monai.networks.nets import PatchDiscriminator

        c = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(c.seed, "discriminator", name))
            discriminator = PatchDiscriminator(
                dimensions, c.discriminator_channels, self.channels, num_layers_d=c.discriminator_layers, norm="INSTANCE"
            )
        self.modules[name] = discriminator.to(self.group.device)
        self.adam(name, discriminator, c.lr_discriminator, c.beta1)

    @property
    def parameters(self) -> int:
        """Number of parameters of the network, without discriminators."""
        return sum(p.numel() for p in self.network.parameters())

    def _batch(self, index: int) -> Tensor:
        c = self.config
        chosen = [self.records[in_epochs(index * c.batch + i, len(self.records), c.seed)] for i in range(c.batch)]
        return torch.stack([unit(torch.tensor(self.store.volume(r))) for r in chosen]).to(self.group.device)

    def step(self, index: int) -> dict[str, Tensor]:
        """Update the network, then the discriminators."""
        c, x = self.config, self._batch(index)
        self.network.train()
        with self.model.autocast(x.device):
            y, latent = self._forward(x, index)
        y = y.float()
        error = (y - x).abs().mean()
        values = {"error": error.detach(), "latent": latent.detach()}
        loss = c.reconstruction_weight * error + (c.kl_weight if c.model == "vae-gan" else 1) * latent
        if self.perceptual is not None:
            lpips = self.perceptual(*(_slices(v, index, c.seed).flatten(0, 1).unsqueeze(1) for v in (y, x)))
            values["perceptual"] = lpips.detach()
            loss = loss + c.perceptual_weight * lpips
        adversarial = "volumes" in self.modules and index >= c.adversarial_start
        if adversarial:
            for name, of in self._views(x, y, index):
                fool, match = self._generator_loss(name, *of)
                values[f"fool_{name}"] = fool.detach()
                loss = loss + c.adversarial_weight * fool + c.feature_weight * match
        self.update("network", loss, c.lr, index, c.grad_clip)
        if adversarial:
            for name, (real, fake) in self._views(x, y.detach(), index):
                judged = self._discriminator_loss(name, real, fake)
                self.update(name, judged, c.lr_discriminator, index, c.grad_clip)
                values[f"judge_{name}"] = judged.detach()
        return {"loss": loss.detach(), **values}

    def _forward(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Reconstruction, and the divergence (vae-gan) or the commitment and code losses (vq-gan)."""
        if self.config.model == "vq-gan":
            y, latent = self.network(x)
            return y, latent.float()
        mean, deviation = self.network.encode(x)
        noise = torch.randn(mean.shape, generator=rng(self.config.seed, "latent noise", index)).to(mean)
        m, s = mean.float(), deviation.float()
        divergence = 0.5 * (m.square() + s.square() - 2 * torch.log(s) - 1).sum((1, 2, 3, 4)).mean()
        return self.network.decode(mean + deviation * noise), divergence

    def _views(self, x: Tensor, y: Tensor, index: int) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """What each discriminator sees of originals and reconstructions."""
        yield "volumes", (x, y)
        if "slices" in self.modules:
            yield "slices", (_slices(x, index, self.config.seed), _slices(y, index, self.config.seed))

    def _generator_loss(self, name: str, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of not being taken for real, and mean difference of the discriminator's features."""
        judge = self.modules[name]
        with self.model.autocast(fake.device):
            of_fake = judge(fake)
            with torch.no_grad():
                of_real = judge(real) if self.config.feature_weight else []
        fool = self._adversarial()(of_fake[-1].float(), target_is_real=True, for_discriminator=False)
        match = [(f.float() - r.float()).abs().mean() for f, r in zip(of_fake[:-1], of_real[:-1], strict=False)]
        return fool, torch.stack(match).mean() if match else fool.new_zeros(())

    def _discriminator_loss(self, name: str, real: Tensor, fake: Tensor) -> Tensor:
        judge, loss = self.modules[name], self._adversarial()
        with self.model.autocast(fake.device):
            of_real, of_fake = judge(real)[-1], judge(fake)[-1]
        mean: Tensor = 0.5 * (
            loss(of_real.float(), target_is_real=True, for_discriminator=True)
            + loss(of_fake.float(), target_is_real=False, for_discriminator=True)
        )
        return mean

    def _adversarial(self) -> Any:
        from monai.losses import PatchAdversarialLoss

        return PatchAdversarialLoss(criterion=self.config.adversarial)

    def evaluate(self) -> dict[str, float]:
        """Mean PSNR of ``evaluate_volumes`` training volumes, evenly spread, and of as many others, if any."""
        self.network.eval()
        held_out = [r for r in self.store.records if r.split != self.config.split]
        metrics = {"psnr": self._psnr(self.records)}
        return metrics | ({"held_out_psnr": self._psnr(held_out)} if held_out else {})

    def _psnr(self, records: Sequence[Record]) -> float:
        errors = []
        for r in (records[i] for i in evenly(self.config.evaluate_volumes, len(records))):
            x = unit(torch.tensor(self.store.volume(r)))[None]
            got = self.model.reconstruct(x.to(self.group.device)).cpu()
            errors.append(psnr_of_mse(mse(got[:, : r.info.images], x[:, : r.info.images])))
        return sum(errors) / len(errors)

    def finish(self, outcome: Outcome) -> None:
        self.network.eval()
        self.model.save(
            self.folder,
            {
                "step": outcome.step,
                "seconds": outcome.seconds,
                "memory_gb": outcome.metrics.get("memory_gb"),
                "finished": not outcome.stopped,
                "data": self.data,
                "preprocessing": self.store.digest,
                "objects": [r.name for r in self.records],
            },
        )


def _slices(volumes: Tensor, index: int, seed: int) -> Tensor:
    """A random slice (N, channels, rows, columns) of each volume across a random axis, the same for originals and others."""
    generator = rng(seed, "slices", index)
    axis = 2 + int(torch.randint(3, (), generator=generator))
    numbers = torch.randint(volumes.shape[axis], (len(volumes),), generator=generator).tolist()
    return torch.stack([v.select(axis - 1, n) for v, n in zip(volumes, numbers, strict=True)])


def _folder(path: Path) -> Folder:
    return Folder(path, INDEX, "`tcam baseline train`", "train it again, or continue with --resume auto")
