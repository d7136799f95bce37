"""Configurations of the rivals. Presets name the source of their settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tcam_diff.config import Config
from tcam_diff.training.config import Count, Rate, RunConfig

Weight = Annotated[float, Field(ge=0)]
Channels = Annotated[int, Field(ge=1, le=2048)]
Products = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Field(description="type of the products; auto: bfloat16 if the machine multiplies it"),
]


class CompressionConfig(RunConfig):
    """Network that compresses volumes: MONAI's AutoencoderKL (vae-gan) or VQVAE (vq-gan), with patch discriminators."""

    kind = "baseline"
    changeable = RunConfig.changeable | {"data", "evaluate_volumes"}

    model: Literal["vae-gan", "vq-gan"]
    data: Annotated[str, Field(description="store of `tcam prepare`")]
    split: str = "train"
    channels: Annotated[
        list[Channels],
        Field(
            min_length=1, description="channels of the levels; vae-gan: each but the first halves the axes; vq-gan: each does"
        ),
    ]
    res_blocks: Annotated[int, Field(ge=1, le=8, description="residual blocks of a level")] = 2
    norm_groups: Annotated[int, Field(ge=1, description="groups of a group normalisation (vae-gan)")] = 32
    latent_channels: Annotated[Channels, Field(description="channels of the latents")]
    codes: Annotated[int, Field(ge=2, description="entries of the code book (vq-gan)")] = 16384
    discriminator_channels: Annotated[Channels, Field(description="channels of the discriminators' first layer")] = 32
    discriminator_layers: Annotated[int, Field(ge=1, le=5)] = 3

    batch: Count = 2
    lr: Rate = 1e-4
    lr_discriminator: Rate = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1, description="beta1 of Adam")] = 0.9
    grad_clip: Annotated[float | None, Field(gt=0, description="largest gradient norm; null: not limited")] = None
    reconstruction_weight: Annotated[float, Field(gt=0, description="weight of the mean absolute error")] = 1.0
    kl_weight: Annotated[Weight, Field(description="weight of the Kullback-Leibler divergence (vae-gan)")] = 1e-7
    adversarial: Literal["least_squares", "hinge"] = "least_squares"
    adversarial_weight: Annotated[Weight, Field(description="weight of the discriminators of volumes and of slices")] = 0.01
    adversarial_start: Annotated[int, Field(ge=0, description="step from which the discriminators take part")] = 0
    slice_discriminator: Annotated[bool, Field(description="also a discriminator of random slices")] = False
    feature_weight: Annotated[Weight, Field(description="weight of matching the discriminators' features")] = 0.0
    perceptual_weight: Annotated[Weight, Field(description="weight of LPIPS (SqueezeNet) of random slices")] = 0.0
    perceptual_weights: Annotated[str | None, Field(description="file with torchvision's squeezenet1_1 weights")] = None
    compute_dtype: Products = "auto"
    evaluate_volumes: Annotated[Count, Field(description="volumes of an evaluation during training")] = 8

    @model_validator(mode="after")
    def _groups(self) -> CompressionConfig:
        if self.model == "vae-gan" and any(c % self.norm_groups for c in self.channels):
            raise ValueError(f"norm_groups: expected a divisor of all channels {self.channels}, got {self.norm_groups}")
        return self

    @property
    def fold(self) -> int:
        """Number by which each axis is divided."""
        return int(2 ** (len(self.channels) - (self.model == "vae-gan")))


class LatentDiffusionConfig(RunConfig):
    """Diffusion of the latents of a compression network, by MONAI's DiffusionModelUNet."""

    kind = "ldm"
    changeable = RunConfig.changeable | {"autoencoder", "data"}

    autoencoder: Annotated[str, Field(description="run of `tcam baseline train vae-gan` or vq-gan")]
    data: Annotated[str | None, Field(description="store of `tcam prepare`; null: that of the autoencoder")] = None
    channels: Annotated[list[Channels], Field(min_length=1, description="channels of the levels")]
    attention_levels: Annotated[list[Annotated[int, Field(ge=0)]], Field(description="levels with attention; 0: the finest")]
    head_channels: Annotated[int, Field(ge=1, description="channels of an attention head")] = 64
    res_blocks: Annotated[int, Field(ge=1, le=8)] = 2
    norm_groups: Annotated[int, Field(ge=1)] = 32
    batch: Count = 4
    lr: Rate = 1e-5
    ema_decay: Annotated[float, Field(ge=0, lt=1, description="decay of the average used for sampling; 0: none")] = 0.0
    loss: Literal["l1", "mse"] = "mse"
    timesteps: Annotated[Count, Field(description="timesteps of the noise schedule")] = 1000
    noise: Annotated[Literal["scaled_linear_beta", "cosine"], Field(description="noise schedule")] = "scaled_linear_beta"
    sampler: Literal["ddim", "ddpm"] = "ddim"
    sampler_steps: Annotated[Count, Field(description="steps of ddim; ddpm takes all timesteps")] = 50
    compute_dtype: Products = "auto"

    @model_validator(mode="after")
    def _divisors(self) -> LatentDiffusionConfig:
        last = len(self.channels) - 1
        for i, c in enumerate(self.channels):
            if c % self.norm_groups:
                raise ValueError(f"norm_groups: expected a divisor of all channels {self.channels}, got {self.norm_groups}")
            if i in (*self.attention_levels, last) and c % self.head_channels:
                raise ValueError(f"head_channels: expected a divisor of {c} (level {i}), got {self.head_channels}")
        if any(i > last for i in self.attention_levels):
            raise ValueError(f"attention_levels: expected 0 to {last}, got {self.attention_levels}")
        return self


class GaussianConfig(Config):
    """Gaussian with the mean and the covariance of the planes of a latent set (algorithm.md section 11)."""

    kind = "gaussian"

    latents: Annotated[str, Field(description="latent set of `tcam export-latents` or `tcam encode`")]
    directions: Annotated[int | None, Field(ge=1, description="most principal directions to keep; null: all")] = None
