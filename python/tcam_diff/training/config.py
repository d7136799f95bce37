"""What the configurations of all trainings share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tcam_diff.config import Config

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class OptimiserConfig(Config):
    """Steps of Adam."""

    steps: Count = 20000
    beta2: Annotated[float, Field(ge=0, lt=1, description="Adam's second decay")] = 0.999
    adam_eps: Rate = 1e-8
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0


class RunConfig(OptimiserConfig):
    """A run with a folder: where it computes, and how often it logs, evaluates and writes checkpoints."""

    #: Keys that may change when a run is resumed: they decide when things happen, or where, not what is computed.
    changeable: ClassVar[frozenset[str]] = frozenset({"device", "log_every", "evaluate_every", "checkpoint_every", "keep"})

    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, ...")] = "auto"
    log_every: Annotated[Count, Field(description="steps")] = 50
    evaluate_every: Annotated[int | None, Field(ge=1, description="steps; null: a tenth of all")] = None
    checkpoint_every: Annotated[
        int | None, Field(ge=1, description="steps, beside every evaluation; null: a twentieth of all")
    ] = None
    keep: Annotated[Count, Field(description="checkpoints, beside the best")] = 2

    def evaluation_steps(self) -> int:
        """Between evaluations."""
        return self.evaluate_every or max(1, self.steps // 10)

    def checkpoint_steps(self) -> int:
        """Between checkpoints."""
        return self.checkpoint_every or max(1, self.steps // 20)
