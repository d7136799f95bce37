"""``tcam estimate``: estimate memory, disk space and time of a training run."""

from __future__ import annotations

from typing import Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.cli.common import bytes_text, duration, say
from tcam_diff.diffusion.config import presets_text


def command(
    config: Annotated[str, typer.Argument(help=f"A preset ({', '.join(configs.presets('train'))}) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as for train-autodecoder.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Approximate length of the trial.", min=1)] = 10.0,
) -> None:
    """Estimate the requirements of `tcam train-autodecoder CONFIG` on this machine from a short trial."""
    from tcam_diff.autodecoder.estimate import estimate

    settings = TrainConfig.load(config, overrides or [])
    needs = estimate(settings, seconds)
    steps = f"{settings.steps} steps of {1000 * needs.step:.1f} ms"
    say(f"time         {duration(needs.seconds)} ({steps}, evaluations, checkpoints)")
    say(f"host memory  {bytes_text(needs.host)} at the peak")
    if needs.device:
        say(f"device       {bytes_text(needs.device)} at the peak")
    say(f"tables       {bytes_text(needs.tables)} of planes and moments, on {needs.where}")
    say(f"disk         {bytes_text(needs.disk)} at the end, up to {bytes_text(needs.disk_most)} during the run")
    if text := presets_text(needs.texels):
        say(f"stage 2      {text}")
    memory = needs.device if needs.device and needs.where == "device" else needs.tables
    if needs.where != "disk" and memory > needs.available:
        say(f"{bytes_text(needs.available)} are free; take tables=disk, or fewer channels or objects", "does not fit:")
        raise typer.Exit(1)
