"""Configurations of stage 1: ``tcam fit``, ``tcam train-autodecoder`` and ``tcam encode``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tcam_diff.config import Config
from tcam_diff.training.config import Count, OptimiserConfig, Rate, RunConfig

Weight = Annotated[float, Field(ge=0)]


class AutodecoderConfig(OptimiserConfig):
    """Model, loss and optimisation. Defaults are in algorithm.md section 0; they follow the paper where it gives a value."""

    channels: Annotated[int, Field(ge=1, le=256, description="channels C of the planes")] = 42
    plane_size: Annotated[
        int | tuple[int, int, int] | None, Field(description="texels along x, y, z; null: half the volume's voxels")
    ] = None
    widths: Annotated[list[Annotated[int, Field(ge=1, le=256)]], Field(max_length=5)] = Field(default=[128, 128, 128, 128])
    activation: Literal["relu", "leaky_relu", "silu", "softplus", "tanh"] = "relu"
    output_activation: Literal["sigmoid", "clamp", "none"] = "sigmoid"
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"],
        Field(
            description="type of the products; auto: bfloat16 on GPUs, and on CPUs that multiply it faster (AMD's); "
            "float64: also of the parameters"
        ),
    ] = "auto"
    norm: Annotated[
        Literal["plane", "texel", "channel", "triplane", "none"],
        Field(description="part of the planes that RMSNorm gives unit energy (equation 6 leaves it open)"),
    ] = "plane"

    region: Annotated[
        Literal["volume", "box", "slices", "lattice"],
        Field(description="voxels of a visit: all, a random box, random slices, or every stride-th along each axis"),
    ] = "volume"
    voxels_per_step: Annotated[int, Field(ge=1, description="voxels of a box")] = 2**18
    slices: Annotated[int, Field(ge=1, description="slices along each axis")] = 2
    stride: Annotated[int, Field(ge=1, le=16, description="stride of a lattice")] = 4

    lr_planes: Rate = 3e-5
    lr_decoder: Rate = 3e-5
    plane_init_std: Annotated[float, Field(gt=0)] = 1e-3
    grad_clip: Annotated[
        float, Field(gt=0, description="largest gradient norm, separate for each object's planes and the decoder")
    ] = 1.0

    loss: Literal["smooth_l1", "l1", "mse"] = "smooth_l1"
    beta: Annotated[float, Field(gt=0, description="beta of smooth_l1")] = 0.3
    tv: Annotated[
        Literal["l1_mean", "l2_mean", "rms", "nfd_sum"], Field(description="norm of the normalised planes' differences")
    ] = "l1_mean"
    tv_weight: Weight = 1e-3
    ssim_weight: Annotated[float, Field(ge=0, description="weight of 1 - SSIM of random slices")] = 0.0
    label_weight: Annotated[
        float, Field(ge=0, description="weight of cross-entropy and Dice loss of the volumes' label maps")
    ] = 0.0
    perceptual_weight: Annotated[
        float,
        Field(
            ge=0,
            description="weight of the perceptual distance (SqueezeNet) of random slices, summed over axes; the paper: 1e-2",
        ),
    ] = 0.0
    perceptual: Annotated[
        Literal["lpips", "eq4"],
        Field(description="LPIPS, or the plain sum over layers of the mean squared differences of features (equation 4)"),
    ] = "lpips"
    perceptual_weights: Annotated[
        str | None, Field(description="file with torchvision's squeezenet1_1 weights; null: torchvision downloads them")
    ] = None
    feature_slices: Annotated[int, Field(ge=1, description="slices along each axis for SSIM and LPIPS")] = 1
    feature_noise: Annotated[bool, Field(description="equation 7's noise on these slices, too, as in the paper")] = False
    noise_std: Annotated[float, Field(ge=0, description="C of equation 7")] = 0.32
    noise_mode: Annotated[
        Literal["point", "texel"],
        Field(description="noise on every voxel's features, as in the paper, or on the planes' texels, at almost no cost"),
    ] = "texel"
    noise_free_fraction: Annotated[float, Field(ge=0, le=1, description="share of the steps, at the end, without noise")] = 0.0


class FitConfig(AutodecoderConfig):
    """Fit of planes and decoder to one volume."""

    kind = "fit"

    intensity: Annotated[
        Literal["minmax", "percentile"], Field(description="range that maps to [0, 1]; percentile: 0 to 99.5, with clipping")
    ] = "minmax"


class TrainConfig(AutodecoderConfig, RunConfig):
    """Training of one decoder and of planes for every volume of a store."""

    kind = "train"
    changeable = RunConfig.changeable | {"data", "tables", "prefetch", "evaluate_objects", "evaluate_whole"}

    data: Annotated[str, Field(description="store of `tcam prepare`")]
    split: str = "train"
    objects: Annotated[int | None, Field(ge=1, description="number of volumes, from the first of the split; null: all")] = None
    batch: Annotated[
        int,
        Field(ge=1, description="objects per step, decoded one after another, so memory does not grow with it"),
    ] = 1
    inner_steps: Annotated[int, Field(ge=1, description="consecutive steps with the same objects")] = 1
    shared_init: Annotated[bool, Field(description="all objects start from the same small planes")] = True
    tables: Annotated[
        Literal["auto", "device", "host", "disk"],
        Field(description="memory for planes and their Adam moments; auto: the fastest in which they fit"),
    ] = "auto"
    ema_decay: Annotated[float, Field(ge=0, lt=1, description="decay of the decoder's average, with warm-up")] = 0.999
    prefetch: Annotated[int, Field(ge=0, description="steps for which voxels are read ahead")] = 2
    evaluate_objects: Annotated[Count, Field(description="objects of an evaluation during training")] = 8
    evaluate_whole: Annotated[bool, Field(description="evaluate whole volumes, not nine slices of each")] = False


class EncodeConfig(Config):
    """Optimisation of planes of new volumes under a frozen decoder. Other and null settings are those of its training."""

    kind = "encode"

    steps: Count = 1000
    batch: Annotated[int, Field(ge=1, description="volumes at a time")] = 16
    lr: Annotated[float, Field(gt=0, description="learning rate for planes of unit energy; decays to 0")] = 5e-2
    region: Literal["volume", "box", "slices", "lattice"] | None = None
    voxels_per_step: Count | None = None
    slices: Count | None = None
    stride: Annotated[int | None, Field(ge=1, le=16)] = None
    noise_free_fraction: Annotated[float, Field(ge=0, le=1, description="share of the steps, at the end, without noise")] = 0.1
    mean_weight: Annotated[
        float,
        Field(
            ge=0,
            description="weight of the mean square of the planes less the first ones (init), which keeps what the volume does "
            "not determine near these",
        ),
    ] = 0.0
    check_every: Annotated[Count, Field(description="steps between checks of the PSNR")] = 100
    plateau_db: Annotated[
        float, Field(ge=0, description="a volume ends after three checks in a row with less gain than this; 0: never")
    ] = 0.02
    init: Annotated[
        Literal["mean", "start"], Field(description="first planes: mean of the training planes, or their initial planes")
    ] = "mean"
    seed: Annotated[int, Field(ge=0)] = 0
