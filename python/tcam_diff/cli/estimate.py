"""``tcam estimate``: estimate memory, disk space and time of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.cli.common import bytes_text, duration, say
from tcam_diff.diffusion.config import DiffusionConfig, presets_text

if TYPE_CHECKING:
    from tcam_diff.training.trial import Requirements

PRESETS = ", ".join([*configs.presets("train"), *configs.presets("diffusion")])


def command(
    config: Annotated[str, typer.Argument(help=f"A preset of either stage ({PRESETS}) or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as for train-autodecoder or train-diffusion."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Approximate length of the trial.", min=1)] = 10.0,
) -> None:
    """Estimate, from a short trial, what `tcam train-autodecoder CONFIG` or `tcam train-diffusion CONFIG` needs here."""
    file = Path(config)
    if config in configs.presets("diffusion") or (file.is_file() and "latents" in configs.read_settings(file)):
        from tcam_diff.diffusion.estimate import estimate as estimate_stage2

        stage2 = DiffusionConfig.load(config, overrides or [])
        _common(estimate_stage2(stage2, seconds), stage2.steps)
        return
    from tcam_diff.autodecoder.estimate import estimate

    settings = TrainConfig.load(config, overrides or [])
    needs = estimate(settings, seconds)
    _common(needs, settings.steps)
    say(f"tables       {bytes_text(needs.tables)} of planes and moments, on {needs.where}")
    if text := presets_text(needs.texels):
        say(f"stage 2      {text}")
    memory = needs.device if needs.device and needs.where == "device" else needs.tables
    if needs.where != "disk" and memory > needs.available:
        say(f"{bytes_text(needs.available)} are free; take tables=disk, or fewer channels or objects", "does not fit:")
        raise typer.Exit(1)


def _common(needs: Requirements, count: int) -> None:
    """Print what trainings of both stages need."""
    steps = f"{count} steps of {1000 * needs.step:.1f} ms"
    say(f"time         {duration(needs.seconds)} ({steps}, evaluations, checkpoints)")
    say(f"host memory  {bytes_text(needs.host)} at the peak")
    if needs.device:
        say(f"device       {bytes_text(needs.device)} at the peak")
    say(f"disk         {bytes_text(needs.disk)} at the end, up to {bytes_text(needs.disk_most)} during the run")
