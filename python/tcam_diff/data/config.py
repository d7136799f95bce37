"""Configuration of the preprocessing of a data set."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tcam_diff.config import Config

Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1, le=4096)]


class PrepareConfig(Config):
    """Steps of the preprocessing, in this order: channels, window, orientation, spacing, crop or resize, percentiles, maps."""

    kind = "prepare"

    channels: Annotated[
        list[Annotated[int, Field(ge=0)]] | None, Field(description="channels of the files, from 0; null: all")
    ] = None
    window: Annotated[
        tuple[float, float] | None,
        Field(description="values that map to 0 and 1, with clipping, before interpolation (CT: HU)"),
    ] = None
    orientation: Annotated[str | None, Field(pattern="^[RL][AP][SI]$", description="axis codes; null: unchanged")] = "RAS"
    spacing: Annotated[tuple[Positive, Positive, Positive] | None, Field(description="mm, trilinear; null: unchanged")] = None
    crop: Annotated[tuple[Size, Size, Size] | None, Field(description="voxels about the centre, padded with zeros")] = None
    resize: Annotated[tuple[Size, Size, Size] | None, Field(description="voxels, trilinear with anti-aliasing")] = None
    percentiles: Annotated[
        tuple[float, float] | None, Field(description="percentiles of each channel that map to 0 and 1, with clipping")
    ] = None
    label_maps: Annotated[
        dict[str, Annotated[list[Annotated[int, Field(ge=1, le=255)]], Field(min_length=1)]] | None,
        Field(
            min_length=1,
            description="labels as further channels, 1 inside and 0 outside: names and codes, e.g. {ED: [1], core: [2, 3]}; "
            "codes may be in several; volumes without labels are refused; null: none",
        ),
    ] = None
    dtype: Annotated[Literal["uint8", "float16"], Field(description="type of the stored voxels")] = "uint8"
    split: Annotated[
        Literal["listed", "monai"],
        Field(
            description="listed: the split of the data set (the paper trains on all 484 of imagesTr); monai: that of MONAI's "
            "DecathlonDataset, which takes a part of imagesTr for validation"
        ),
    ] = "listed"
    val_fraction: Annotated[float, Field(ge=0, lt=1, description="share for validation with split=monai")] = 0.2
    split_seed: Annotated[int, Field(ge=0, description="seed of split=monai")] = 0

    @model_validator(mode="after")
    def _consistent(self) -> PrepareConfig:
        if (self.window is None) == (self.percentiles is None):
            raise ValueError("expected window or percentiles, one of the two")
        for name, pair in (("window", self.window), ("percentiles", self.percentiles)):
            if pair is not None and not pair[0] < pair[1]:
                raise ValueError(f"{name}: expected the lower first")
        if self.percentiles is not None and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("percentiles: expected 0 to 100")
        return self
