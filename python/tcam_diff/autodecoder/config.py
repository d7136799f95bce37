"""The configuration of a fit: a pydantic model, presets in configs/, overrides as key=value."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tcam_diff.errors import UserError

PRESETS = ("fast", "paper")


class FitConfig(BaseModel):
    """One volume's planes and decoder. Defaults are those of algorithm.md section 0; see configs/*.yaml."""

    model_config = ConfigDict(extra="forbid")

    channels: Annotated[int, Field(ge=1, le=256, description="C of the planes")] = 42
    plane_size: Annotated[
        int | tuple[int, int, int] | None,
        Field(description="texels along x, y, z; null: half the volume's voxels"),
    ] = None
    widths: Annotated[list[Annotated[int, Field(ge=1, le=256)]], Field(max_length=5)] = [128, 128, 128, 128]
    activation: Literal["relu", "leaky_relu", "silu", "softplus", "tanh"] = "relu"
    output_activation: Literal["sigmoid", "clamp", "none"] = "sigmoid"
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="auto: bfloat16 where the CPU multiplies it"),
    ] = "auto"

    steps: Annotated[int, Field(ge=1)] = 20000
    region: Annotated[
        Literal["volume", "box", "lattice"],
        Field(description="voxels of a step: all, one random box, or every stride-th along each axis from a random start"),
    ] = "volume"
    voxels_per_step: Annotated[int, Field(ge=1, description="of a box")] = 2**18
    stride: Annotated[int, Field(ge=1, le=16, description="of a lattice")] = 4

    lr_planes: Annotated[float, Field(gt=0)] = 3e-5
    lr_decoder: Annotated[float, Field(gt=0)] = 3e-5
    beta2: Annotated[float, Field(ge=0, lt=1, description="Adam's second decay")] = 0.999
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    plane_init_std: Annotated[float, Field(gt=0)] = 1e-3
    grad_clip: Annotated[float, Field(gt=0, description="norm; planes and decoder separately")] = 1.0

    loss: Literal["smooth_l1", "l1", "mse"] = "smooth_l1"
    beta: Annotated[float, Field(gt=0, description="of smooth_l1")] = 0.3
    tv_weight: Annotated[float, Field(ge=0)] = 1e-3
    noise_std: Annotated[float, Field(ge=0, description="C of equation 7")] = 0.32
    noise_mode: Annotated[
        Literal["point", "texel"],
        Field(
            description="noise of every voxel's features, as the paper has it, or of the planes' texels, which costs nothing"
        ),
    ] = "texel"
    noise_free_fraction: Annotated[float, Field(ge=0, le=1, description="of the last steps")] = 0.0

    intensity: Annotated[
        Literal["minmax", "percentile"],
        Field(description="what maps to [0, 1]; percentile: 0 to 99.5, clipped"),
    ] = "minmax"
    seed: Annotated[int, Field(ge=0)] = 0


def load_config(preset: str, overrides: Sequence[str] = ()) -> FitConfig:
    """A preset with ``key=value`` overrides (values are YAML). Raises UserError naming the key."""
    if preset not in PRESETS:
        raise UserError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    values: dict[str, Any] = yaml.safe_load(resources.files("tcam_diff.configs").joinpath(f"fit-{preset}.yaml").read_text())
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"{item!r}: expected key=value, for example steps=500")
        if key not in FitConfig.model_fields:
            near = difflib.get_close_matches(key, FitConfig.model_fields, n=1)
            raise UserError(f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else "; see `tcam fit --help`"))
        try:
            values[key] = yaml.safe_load(text)
            if isinstance(values[key], str):  # YAML 1.1 reads 1e-2 as text
                values[key] = float(text)
        except ValueError:
            pass
        except yaml.YAMLError as error:
            raise UserError(f"{key}: cannot read {text!r} as YAML") from error
    try:
        return FitConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        raise UserError(f"{path}: {first['msg'].lower()}, got {first['input']!r}") from error
