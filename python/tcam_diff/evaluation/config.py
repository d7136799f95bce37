"""Configurations of the evaluation: the critic, and the feature network of FID and MMD."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tcam_diff.config import Config
from tcam_diff.training.config import Count, Rate, RunConfig


class CriticConfig(Config):
    """Critic and its training. Defaults are those of the released protocol, with a shuffled split and unscaled volumes."""

    kind = "critic"

    size: Annotated[int, Field(ge=16, le=512, description="voxels along each axis after resampling: 8 times a power of 2")] = (
        128
    )
    ndim: Annotated[Literal[2, 3], Field(description="3: volumes; 2: their middle axial slices")] = 3
    width: Annotated[int | None, Field(ge=4, description="channels of the first layer; null: size / 2, 32 to 128")] = None
    epochs: Count = 200
    batch: Count = 4
    lr: Rate = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    grad_clip: Annotated[float, Field(gt=0, description="largest gradient norm")] = 1.0
    constraint: Annotated[
        Literal["penalty", "clip"],
        Field(description="gradient penalty, or clipped weights, with which only ratios of distances are meaningful"),
    ] = "penalty"
    penalty: Annotated[float, Field(ge=0, description="weight lambda of the gradient penalty")] = 30.0
    clip: Annotated[float, Field(gt=0, description="largest absolute weight with constraint=clip")] = 0.01
    train_share: Annotated[float, Field(gt=0, lt=1, description="share of every set for training; the rest is scored")] = 0.6
    tolerance: Annotated[float, Field(gt=0, description="largest deviation from 1 of a valid epoch's gradient norm")] = 0.2
    window: Annotated[int, Field(ge=2, description="epochs with a steady distance before an early stop")] = 10
    device: str = "auto"


class FeaturesConfig(RunConfig):
    """Autoencoder whose encoder gives features."""

    kind = "features"
    changeable = RunConfig.changeable | {"data"}

    data: Annotated[str, Field(description="store of `tcam prepare`")]
    split: str = "train"
    size: Annotated[int, Field(ge=16, le=512, description="most voxels along each axis, after resampling")] = 64
    channels: Annotated[
        list[Annotated[int, Field(ge=1, le=1024)]],
        Field(min_length=1, max_length=6, description="channels of the layers, each of half the resolution of the one before"),
    ] = Field(default=[8, 16, 32, 32])
    batch: Count = 8
    steps: Count = 600
    lr: Rate = 2e-3
    schedule: Literal["constant", "cosine"] = "cosine"
