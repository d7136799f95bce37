"""Configurations of stage 2: what ``tcam train-diffusion`` trains, and how ``tcam sample`` integrates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tcam_diff.config import Config
from tcam_diff.training.config import Count, Rate, RunConfig

Method = Literal["euler", "frozen", "ddim", "midpoint", "heun", "rk4", "ab2", "hot"]


class NetworkConfig(Config):
    """The U-Net (algorithm.md section 4; the paper gives no sizes)."""

    weights: Annotated[
        Literal["independent", "shared", "concatenated"],
        Field(
            description="of the three planes: their own, as the paper has it; one set with a plane embedding; or one network "
            "that sees the planes as channels of one image (NFD; without cross-attention, planes of one size)"
        ),
    ] = "independent"
    base: Annotated[int, Field(ge=4, le=1024, description="channels of the first level")] = 96
    multipliers: Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=1, max_length=8)] = Field(
        default=[1, 2, 2, 2], description="of base; each level after the first has half the resolution"
    )
    blocks: Annotated[int, Field(ge=1, le=8, description="residual blocks of a level")] = 2
    attention_levels: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(description="levels with attention; 0: the finest")
    ] = Field(default=[2, 3])
    cross: Annotated[
        Literal["full", "axis", "none"],
        Field(
            description="attention to the other two planes: to all their texels, to the lines of the same coordinate, or none "
            "(the paper's ablation)"
        ),
    ] = "full"
    position: Annotated[
        Literal["axis", "none"],
        Field(description="encoding of attention's texels by the coordinates that planes share, or none"),
    ] = "axis"
    head_channels: Count = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    norm_groups: Annotated[int, Field(ge=1, description="of group normalisation, at most")] = 32
    execution: Annotated[
        Literal["grouped", "loop"], Field(description="planes of one size in one grouped convolution, or one after another")
    ] = "grouped"
    checkpointing: Annotated[bool, Field(description="recompute blocks in the backward pass: less memory, a third slower")] = (
        False
    )

    @model_validator(mode="after")
    def _levels(self) -> NetworkConfig:
        beyond = [i for i in self.attention_levels if i >= len(self.multipliers)]
        if beyond:
            raise ValueError(
                f"attention_levels: level {beyond[0]} of {len(self.multipliers)} (0 to {len(self.multipliers) - 1})"
            )
        return self


class DiffusionConfig(RunConfig):
    """Training. Defaults are those of algorithm.md 4.6, the paper's where it says one."""

    kind = "diffusion"
    changeable = RunConfig.changeable | {"latents", "validation", "compile", "evaluate_volumes", "preview_steps"}

    latents: Annotated[str, Field(description="a latent set (`tcam export-latents`, `tcam encode`)")]
    validation: Annotated[
        str | None, Field(description="a latent set of held-out volumes; null: losses of training volumes")
    ] = None
    labels: Annotated[str | None, Field(description="CSV with columns name and label: trains with classes; null: without")] = (
        None
    )
    latent_dtype: Annotated[Literal["float32", "bfloat16"], Field(description="of the planes in memory")] = "float32"
    center: Annotated[
        bool,
        Field(
            description="subtract the set's mean planes and divide by the rest's RMS: where much of the energy is in the mean "
            "(algorithm.md 6.5; the paper does not)"
        ),
    ] = False
    network: NetworkConfig = NetworkConfig()

    steps: Count = 100000
    batch: Annotated[int, Field(ge=1, description="volumes of a step, over all processes")] = 32
    accumulate: Annotated[int, Field(ge=1, description="parts that a process works through one after another in a step")] = 1
    lr: Rate = 3e-5
    grad_clip: Annotated[float, Field(gt=0, description="norm")] = 1.0
    noise_weight: Annotated[float, Field(gt=0, description="of the error of the noise in equation 9")] = 1.0
    image_weight: Annotated[float, Field(gt=0, description="of the error of the planes; the sampler needs both")] = 1.0
    timesteps: Annotated[
        Literal["stratified", "uniform", "integer", "antithetic"],
        Field(description="of a batch: one in each of its equal parts, independent, of 0 to 999, or pairs t, 999 - t"),
    ] = "stratified"
    flip: Annotated[
        list[Literal["x", "y", "z"]],
        Field(description="axes along which volumes are mirrored at random, exactly, by flipping their planes"),
    ] = Field(default=[])
    label_dropout: Annotated[
        float, Field(gt=0, le=1, description="share trained without its label: for samples without one, and for guidance")
    ] = 0.1
    ema_decay: Annotated[float, Field(ge=0, lt=1, description="of the average that samples are drawn from, with warm-up")] = (
        0.9999
    )
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"], Field(description="of the products; auto: bfloat16 on GPUs")
    ] = "auto"
    compile: Annotated[bool, Field(description="torch.compile of the network")] = False

    evaluate_volumes: Annotated[Count, Field(description="whose loss an evaluation takes")] = 64
    preview_steps: Annotated[int, Field(ge=0, description="of ab2 for the samples shown at evaluations; 0: none")] = 20


class SampleConfig(Config):
    """The integration from noise to planes (algorithm.md 2.2)."""

    solver: Method = "heun"
    steps: Annotated[Count, Field(description="intervals from pi/2 to 0; the default: 100 evaluations of the network")] = 50
    hot_k: Annotated[int, Field(ge=1, description="intervals that hot jumps ahead before noise is added")] = 2
    final: Annotated[
        Literal["x0", "x"], Field(description="what is decoded: the last estimate of the planes, or the integrated state")
    ] = "x0"
    guidance_scale: Annotated[float, Field(ge=0, description="of classifier-free guidance; 1: none")] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
