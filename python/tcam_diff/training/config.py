"""Common parts of the configurations of training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tcam_diff.config import Config

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class OptimiserConfig(Config):
    """Optimisation with Adam."""

    steps: Count = 20000
    beta2: Annotated[float, Field(ge=0, lt=1, description="beta2 of Adam")] = 0.999
    adam_eps: Rate = 1e-8
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0


class RunConfig(OptimiserConfig):
    """Run in a folder: device, and intervals of logging, evaluation and checkpoints."""

    #: Keys that may change when a run is resumed, because they do not change what is computed.
    changeable: ClassVar[frozenset[str]] = frozenset(
        {"device", "log_every", "evaluate_every", "checkpoint_every", "keep", "minutes"}
    )

    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, ...")] = "auto"
    minutes: Annotated[
        float | None,
        Field(gt=0, description="end after this time, evaluations included; null: never"),
    ] = None
    log_every: Annotated[Count, Field(description="steps between records of the log")] = 50
    evaluate_every: Annotated[int | None, Field(ge=1, description="steps between evaluations; null: a tenth of all")] = None
    checkpoint_every: Annotated[
        int | None, Field(ge=1, description="steps between checkpoints, also written at evaluations; null: a twentieth of all")
    ] = None
    keep: Annotated[Count, Field(description="checkpoints to keep, in addition to the best")] = 2

    def evaluation_steps(self) -> int:
        """Steps between evaluations."""
        return self.evaluate_every or max(1, self.steps // 10)

    def checkpoint_steps(self) -> int:
        """Steps between checkpoints."""
        return self.checkpoint_every or max(1, self.steps // 20)
