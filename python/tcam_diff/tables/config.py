"""Configuration of the tables: data, models and sizes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tcam_diff.config import Config
from tcam_diff.training.config import Count

Changes = Annotated[list[str], Field(description="KEY=VALUE changes of a preset")]
Generator = Literal["ldm-vae-gan", "ldm-vq-gan", "concatenated", "no-cross", "no-prior", "one-head", "gaussian"]


class TableConfig(Config):
    """Protocol of the tables. Every entry becomes a part of a ``tcam`` command, and all of these are printed."""

    kind = "table"

    data: Annotated[str | None, Field(description="data set in any layout of `tcam check-data`; null: a cohort is made")] = None
    cohort: Annotated[list[str], Field(description="options of `tcam make-cohort`")] = Field(
        default=["--n", "120", "--size", "64", "--held-out", "24"]
    )
    prepare: Annotated[str, Field(description="preset of `tcam prepare` for tables 1, 3 and 4")] = "cohort"
    prepare_changes: Changes = Field(default=[])
    prepare_channels: Annotated[str, Field(description="preset of `tcam prepare` for table 2, of all channels")] = "cohort"
    prepare_channels_changes: Changes = Field(default=["channels=[0,1,2,3]"])
    held_out: Annotated[str, Field(description="split of the held-out volumes")] = "test"

    train: Annotated[str, Field(description="preset of `tcam train-autodecoder`")] = "fast"
    train_changes: Changes = Field(default=[])
    encode_changes: Changes = Field(default=[])
    latents_changes: Annotated[
        list[str] | None,
        Field(
            description="KEY=VALUE changes of `tcam encode`, with which training and held-out volumes are encoded for stage 2; "
            "null: stage 2 learns the planes that stage 1 fitted with its decoder"
        ),
    ] = None
    vae_gan: Annotated[str, Field(description="preset of `tcam baseline train`")] = "vae-gan"
    vae_gan_changes: Changes = Field(default=[])
    vq_gan: Annotated[str, Field(description="preset of `tcam baseline train`")] = "vq-gan"
    vq_gan_changes: Changes = Field(default=[])

    segment: Annotated[str, Field(description="preset of `tcam segment` (table 2)")] = "brats"
    segment_changes: Changes = Field(default=[])
    repeats: Annotated[Count, Field(description="segmentation networks (table 2)")] = 4

    diffusion: Annotated[str, Field(description="preset of `tcam train-diffusion` (table 3)")] = "brats"
    diffusion_changes: Changes = Field(default=[])
    ldm_vae_gan: Annotated[str, Field(description="preset of `tcam baseline train`")] = "ldm-vae-gan"
    ldm_vae_gan_changes: Changes = Field(default=[])
    ldm_vq_gan: Annotated[str, Field(description="preset of `tcam baseline train`")] = "ldm-vq-gan"
    ldm_vq_gan_changes: Changes = Field(default=[])
    generators: Annotated[
        list[Generator] | None,
        Field(description="generators of table 3 beside ours; null: all of them"),
    ] = None
    samples: Annotated[Count, Field(description="volumes drawn from each generator")] = 200
    sample_steps: Annotated[Count, Field(description="steps of `tcam sample`")] = 50
    size: Annotated[Count, Field(description="voxels along each axis for comparisons of generated volumes")] = 64
    critics: Annotated[Count, Field(description="critics of each pair of generators")] = 3
    critic_changes: Changes = Field(default=[])

    channels: Annotated[list[Count], Field(description="channels C of the planes in table 4")] = Field(default=[18, 20, 24, 42])
