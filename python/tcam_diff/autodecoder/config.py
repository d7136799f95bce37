"""Configurations of stage 1: what ``tcam fit``, ``tcam train-autodecoder`` and ``tcam encode`` minimise, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tcam_diff.config import Config
from tcam_diff.training.config import Count, OptimiserConfig, Rate, RunConfig

Weight = Annotated[float, Field(ge=0)]


class ObjectiveConfig(OptimiserConfig):
    """Model, loss and optimisation. Defaults are those of algorithm.md section 0, the paper's where it says one."""

    channels: Annotated[int, Field(ge=1, le=256, description="C of the planes")] = 42
    plane_size: Annotated[
        int | tuple[int, int, int] | None, Field(description="texels along x, y, z; null: half the volume's voxels")
    ] = None
    widths: Annotated[list[Annotated[int, Field(ge=1, le=256)]], Field(max_length=5)] = Field(default=[128, 128, 128, 128])
    activation: Literal["relu", "leaky_relu", "silu", "softplus", "tanh"] = "relu"
    output_activation: Literal["sigmoid", "clamp", "none"] = "sigmoid"
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"],
        Field(description="auto: bfloat16 where the machine multiplies it; float64: parameters too"),
    ] = "auto"
    norm: Annotated[
        Literal["plane", "texel", "channel", "triplane", "none"],
        Field(description="what RMSNorm has unit energy of (equation 6 leaves it open)"),
    ] = "plane"

    region: Annotated[
        Literal["volume", "box", "slices", "lattice"],
        Field(description="voxels of a visit: all, a random box, random slices, every stride-th along each axis"),
    ] = "volume"
    voxels_per_step: Annotated[int, Field(ge=1, description="of a box")] = 2**18
    slices: Annotated[int, Field(ge=1, description="along each axis")] = 2
    stride: Annotated[int, Field(ge=1, le=16, description="of a lattice")] = 4

    lr_planes: Rate = 3e-5
    lr_decoder: Rate = 3e-5
    plane_init_std: Annotated[float, Field(gt=0)] = 1e-3
    grad_clip: Annotated[float, Field(gt=0, description="norm; each object's planes and the decoder separately")] = 1.0

    loss: Literal["smooth_l1", "l1", "mse"] = "smooth_l1"
    beta: Annotated[float, Field(gt=0, description="of smooth_l1")] = 0.3
    tv: Annotated[
        Literal["l1_mean", "l2_mean", "rms", "nfd_sum"], Field(description="of the normalised planes' differences")
    ] = "l1_mean"
    tv_weight: Weight = 1e-3
    ssim_weight: Annotated[float, Field(ge=0, description="of 1 - SSIM of random slices")] = 0.0
    perceptual_weight: Annotated[float, Field(ge=0, description="of LPIPS (SqueezeNet) of random slices; the paper: 1e-2")] = (
        0.0
    )
    perceptual_weights: Annotated[
        str | None, Field(description="file with torchvision's squeezenet1_1 weights; null: fetched by torchvision")
    ] = None
    feature_slices: Annotated[int, Field(ge=1, description="along each axis, for SSIM and LPIPS")] = 1
    noise_std: Annotated[float, Field(ge=0, description="C of equation 7")] = 0.32
    noise_mode: Annotated[
        Literal["point", "texel"],
        Field(description="of every voxel's features, as the paper has it, or of the planes' texels, which costs nothing"),
    ] = "texel"
    noise_free_fraction: Annotated[float, Field(ge=0, le=1, description="of the last steps")] = 0.0


class FitConfig(ObjectiveConfig):
    """One volume's planes and decoder."""

    kind = "fit"

    intensity: Annotated[
        Literal["minmax", "percentile"], Field(description="what maps to [0, 1]; percentile: 0 to 99.5, clipped")
    ] = "minmax"


class TrainConfig(ObjectiveConfig, RunConfig):
    """One decoder, and planes for every volume of a store."""

    kind = "train"
    changeable = RunConfig.changeable | {"data", "tables", "prefetch", "evaluate_objects"}

    data: Annotated[str, Field(description="a folder that `tcam prepare` wrote")]
    split: str = "train"
    objects: Annotated[int | None, Field(ge=1, description="the first so many of the split; null: all")] = None
    batch: Annotated[
        int,
        Field(ge=1, description="objects of a step, one after another: their gradients accumulate, their memory does not"),
    ] = 1
    inner_steps: Annotated[int, Field(ge=1, description="steps with the same objects before the next are read")] = 1
    shared_init: Annotated[bool, Field(description="all objects start from the same small planes")] = True
    tables: Annotated[
        Literal["auto", "device", "host", "disk"],
        Field(description="where planes and their Adam moments live; auto: the fastest that they fit in"),
    ] = "auto"
    ema_decay: Annotated[float, Field(ge=0, lt=1, description="of the decoder's average, with warm-up")] = 0.999
    prefetch: Annotated[int, Field(ge=0, description="steps whose voxels are read ahead; 0: none")] = 2
    evaluate_objects: Annotated[Count, Field(description="of an evaluation on the way")] = 8


class EncodeConfig(Config):
    """How planes of new volumes are found under a frozen decoder; the rest is as the decoder was trained."""

    kind = "encode"

    steps: Count = 1000
    batch: Annotated[int, Field(ge=1, description="volumes at a time")] = 16
    lr: Annotated[float, Field(gt=0, description="of planes of unit energy; decays to 0")] = 5e-2
    region: Literal["volume", "box", "slices", "lattice"] | None = None
    voxels_per_step: Count | None = None
    slices: Count | None = None
    stride: Annotated[int | None, Field(ge=1, le=16)] = None
    noise_free_fraction: Annotated[float, Field(ge=0, le=1, description="of the last steps")] = 0.1
    check_every: Annotated[Count, Field(description="steps")] = 100
    plateau_db: Annotated[
        float, Field(ge=0, description="less gain than this at three checks in a row ends a volume; 0: never")
    ] = 0.02
    init: Annotated[Literal["mean", "start"], Field(description="the mean of the training planes, or where those started")] = (
        "mean"
    )
    seed: Annotated[int, Field(ge=0)] = 0
