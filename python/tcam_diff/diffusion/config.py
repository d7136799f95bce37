"""Configurations of stage 2: ``tcam train-diffusion`` and ``tcam sample``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tcam_diff.config import Config, presets
from tcam_diff.text import size_text
from tcam_diff.training.config import Count, Rate, RunConfig

Grid = Literal["auto", "uniform", "spectrum"]
Method = Literal["euler", "frozen", "ddim", "midpoint", "heun", "rk4", "ab2", "hot", "churn", "multirate", "consistency"]


class NetworkConfig(Config):
    """U-Net (algorithm.md section 4; the paper gives no sizes)."""

    weights: Annotated[
        Literal["independent", "shared", "concatenated"],
        Field(
            description="weights of the planes: separate, as in the paper; shared, with a plane embedding; or one network that "
            "takes the planes as channels of one image (as in NFD; no cross-attention, planes of one size)"
        ),
    ] = "independent"
    base: Annotated[int, Field(ge=4, le=1024, description="channels of the first level")] = 96
    multipliers: Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=1, max_length=8)] = Field(
        default=[1, 2, 2, 2],
        description="channels of each level as multiples of base; each level halves the resolution of the one before",
    )
    blocks: Annotated[int, Field(ge=1, le=8, description="residual blocks per level")] = 2
    attention_levels: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(description="levels with attention; 0: the finest")
    ] = Field(default=[2, 3])
    cross: Annotated[
        Literal["full", "axis", "none"],
        Field(
            description="cross-attention to all texels of the other two planes, to their lines of the same coordinate, or none "
            "(the paper's ablation)"
        ),
    ] = "full"
    position: Annotated[
        Literal["axis", "none"],
        Field(description="positional encoding of texels in attention, by coordinates in the volume, or none"),
    ] = "axis"
    head_channels: Annotated[Count, Field(description="channels of an attention head")] = 64
    heads: Annotated[
        Literal["two", "one"],
        Field(
            description="estimates of noise and of planes, as in the paper; or one velocity from which both follow, which "
            "needs a prior (the recipe of the authors' later PRDiT)"
        ),
    ] = "two"
    octave_gains: Annotated[
        bool, Field(description="gains of the heads by channel and octave of frequency, which depend on time; not in the paper")
    ] = False
    prior_input: Annotated[
        bool, Field(description="the planes as the prior estimates them are a further input; not in the paper")
    ] = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    norm_groups: Annotated[int, Field(ge=1, description="most groups of a group normalisation")] = 32
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

    @property
    def fold(self) -> int:
        """Number that divides the rows and columns of all planes: every level but the last halves them."""
        return int(2 ** (len(self.multipliers) - 1))

    def refusal(self, sizes: Sequence[tuple[int, int]]) -> str:
        """Reason why planes of these rows and columns do not fit the network; "" where they fit."""
        for name, size in zip(("xy", "yz", "xz"), sizes, strict=True):
            if any(n % self.fold for n in size):
                return (
                    f"expected {name} with rows and columns multiples of {self.fold} ({len(self.multipliers)} "
                    f"network.multipliers), got {size_text(size)}"
                )
        if self.weights == "concatenated" and len(set(sizes)) > 1:
            return f"network.weights=concatenated needs planes of one size, got {', '.join(map(size_text, sizes))}"
        return ""


class DiffusionConfig(RunConfig):
    """Training. Defaults are in algorithm.md 4.6; they follow the paper where it gives a value."""

    kind = "diffusion"
    changeable = RunConfig.changeable | {"latents", "validation", "compile", "evaluate_volumes", "preview_steps"}

    latents: Annotated[str, Field(description="latent set of `tcam export-latents` or `tcam encode`")]
    validation: Annotated[str | None, Field(description="latent set of held-out volumes; null: evaluate training volumes")] = (
        None
    )
    labels: Annotated[str | None, Field(description="CSV with columns name and label, for classes; null: no classes")] = None
    spacing: Annotated[
        bool,
        Field(
            description="condition the network on the volumes' voxel sizes, where fields of view differ (CT of one shape); not "
            "in the paper"
        ),
    ] = False
    latent_dtype: Annotated[Literal["float32", "bfloat16"], Field(description="type of the planes in memory")] = "float32"
    center: Annotated[
        bool,
        Field(
            description="subtract the set's mean planes and divide by the RMS of the rest; useful if the mean planes have much "
            "of the energy (algorithm.md 6.5; not in the paper)"
        ),
    ] = False
    prior: Annotated[
        Literal["none", "unit", "gaussian"],
        Field(
            description="fixed skip around the network, which learns the rest: none, as in the paper; the denoiser of a "
            "standard normal distribution; or that of one with the latents' mean and covariance (algorithm.md 11)"
        ),
    ] = "none"
    prior_directions: Annotated[Count, Field(description="most principal directions of the gaussian prior")] = 128
    cross_fit: Annotated[
        bool,
        Field(
            description="with prior=gaussian: train each volume around one of five priors that is fitted without it, so that "
            "it is as far from its prior as a new volume is; samples have the prior of all volumes"
        ),
    ] = False
    network: NetworkConfig = NetworkConfig()

    steps: Count = 100000
    batch: Annotated[int, Field(ge=1, description="volumes per step, over all processes")] = 32
    accumulate: Annotated[int, Field(ge=1, description="parts of a process's batch, run one after another to save memory")] = 1
    lr: Rate = 3e-5
    muon_lr: Annotated[
        Rate | None,
        Field(
            description="rate of the convolutions' weights, by Muon, whose steps have at most about a fifth of it as their "
            "root mean square; null: Adam with lr for all weights, as in the paper"
        ),
    ] = None
    grad_clip: Annotated[float, Field(gt=0, description="largest gradient norm")] = 1.0
    noise_weight: Annotated[float, Field(gt=0, description="weight of the noise error in equation 9")] = 1.0
    image_weight: Annotated[float, Field(gt=0, description="weight of the error of the planes in equation 9")] = 1.0
    loss: Annotated[
        Literal["estimates", "heads"],
        Field(
            description="errors of the estimates of noise and planes (equation 9), or of the network's heads around the prior, "
            "which are these errors over the heads' factors"
        ),
    ] = "estimates"
    timesteps: Annotated[
        Literal["stratified", "uniform", "integer", "antithetic", "straight", "spectrum"],
        Field(
            description="timesteps of a batch: one in each of B equal intervals; independent; integers; pairs t, 999 - t; as "
            "for the straight path (1 - s) x0 + s eps with uniform s; or half of them where the latents' modes are decided"
        ),
    ] = "stratified"
    flip: Annotated[
        list[Literal["x", "y", "z"]],
        Field(description="axes along which volumes are mirrored at random, by flipping their planes"),
    ] = Field(default=[])
    label_dropout: Annotated[
        float, Field(gt=0, le=1, description="share of labels dropped, for unlabelled samples and for guidance")
    ] = 0.1
    ema_decay: Annotated[float, Field(ge=0, lt=1, description="decay of the average used for sampling, with warm-up")] = 0.9999
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"],
        Field(description="type of the products; auto: bfloat16 if the machine multiplies it"),
    ] = "auto"
    compile: Annotated[bool, Field(description="compile the network with torch.compile")] = False

    evaluate_volumes: Annotated[Count, Field(description="volumes of an evaluation")] = 64
    preview_steps: Annotated[int, Field(ge=0, description="steps of ab2 for samples at evaluations; 0: no samples")] = 20

    @model_validator(mode="after")
    def _heads(self) -> DiffusionConfig:
        if self.loss == "heads" and self.prior == "none":
            raise ValueError("loss: heads is the loss of heads around a prior; take prior=unit or gaussian, or loss=estimates")
        if self.network.heads == "one" and self.prior == "none":
            raise ValueError("network.heads: one head is a velocity around a prior; take prior=unit or gaussian, or two heads")
        if self.network.prior_input and self.prior == "none":
            raise ValueError("network.prior_input: there is no prior; take prior=gaussian, or network.prior_input=false")
        return self


class DistillConfig(RunConfig):
    """Distillation to a model of one to four evaluations (``diffusion/distill.py``)."""

    kind = "distill"
    changeable = RunConfig.changeable | {"model", "evaluate_volumes"}

    model: Annotated[str, Field(description="run of `tcam train-diffusion`, or a model's folder, trained with a prior")]
    steps: Count = 400
    batch: Annotated[int, Field(ge=1, description="trajectories at a time, and states of a step")] = 16
    teacher_steps: Annotated[int, Field(ge=2, description="intervals of a trajectory, by the solver multirate")] = 8
    updates: Annotated[Count, Field(description="steps with the same trajectories")] = 8
    lr: Rate = 5e-4
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    grad_clip: Annotated[float, Field(gt=0, description="largest gradient norm")] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1, description="decay of the average that is kept, with warm-up")] = 0.99
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="type of the products; auto: bfloat16 if the machine multiplies it"),
    ] = "auto"
    evaluate_volumes: Annotated[int, Field(ge=2, description="trajectories of an evaluation")] = 16


class SampleConfig(Config):
    """Integration from noise to planes (algorithm.md 2.2)."""

    solver: Method = "heun"
    steps: Annotated[Count, Field(description="intervals from pi/2 to 0; heun evaluates the network twice in each")] = 50
    grid: Annotated[
        Grid,
        Field(
            description="intervals: equal, or equal in log tan(eta) where the latents' modes are decided; auto: the latter for "
            "models that know their latents' variances"
        ),
    ] = "auto"
    hot_k: Annotated[int, Field(ge=1, description="intervals that hot jumps ahead before it adds noise")] = 2
    churn: Annotated[
        float, Field(ge=0, le=8, description="lengths of an interval by which churn goes back, by adding noise, before it")
    ] = 1.0
    final: Annotated[
        Literal["x0", "x"], Field(description="result: the last estimate of the planes, or the integrated state")
    ] = "x0"
    guidance_scale: Annotated[float, Field(ge=0, description="scale of classifier-free guidance; 1: none")] = 1.0
    prior_guidance: Annotated[
        float,
        Field(
            ge=0,
            description="scale of the network's corrections of the prior's estimates, for models with a prior; 1: as trained, "
            "0: the prior alone, more than 1: more of what the network adds",
        ),
    ] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    spacing: Annotated[
        tuple[Rate, Rate, Rate] | None,
        Field(
            description="voxel sizes in mm, of the model's own number of voxels, for models trained with spacing=true; null: "
            "those of random training volumes"
        ),
    ] = None


def presets_text(texels: tuple[int, int, int]) -> str:
    """One line on which presets of stage 2 take planes with ``texels`` along x, y, z, and which plane_size the others need;
    "" where all take them."""
    x, y, z = texels
    fit: list[str] = []
    others: dict[int, list[str]] = {}
    for name in presets("diffusion"):
        network = DiffusionConfig.load(name).network
        if network.refusal([(x, y), (y, z), (x, z)]):
            others.setdefault(network.fold, []).append(name)
        else:
            fit.append(name)
    needs = []
    for fold, names in sorted(others.items()):
        sizes = [-(-n // fold) * fold for n in texels]
        size = str(sizes[0]) if len(set(sizes)) == 1 else str(sizes).replace(" ", "")
        needs.append(f"{', '.join(names)} (multiples of {fold}, plane_size={size})")
    known = f"the presets {', '.join(fit)}, but not" if fit else "no preset:"
    return f"planes of {size_text(texels)} texels fit {known} {', '.join(needs)}" if others else ""
