"""``tcam estimate``: memory, disk and time of a training run, before it starts."""

from __future__ import annotations

from typing import Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.estimate import estimate
from tcam_diff.cli.common import bytes_text, duration, say


def command(
    config: Annotated[str, typer.Argument(help=f"A preset ({', '.join(configs.presets('train'))}) or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as for train-autodecoder.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long the trial may take, about.", min=1)] = 10.0,
) -> None:
    """What `tcam train-autodecoder CONFIG` would take on this machine: a short trial of the real thing, then arithmetic."""
    wanted = TrainConfig.load(config, overrides or [])
    found = estimate(wanted, seconds)
    say(
        f"time         {duration(found.seconds)} ({wanted.steps} steps of {1000 * found.step:.1f} ms, evaluations, checkpoints)"
    )
    say(f"host memory  {bytes_text(found.host)} at the peak")
    if found.device:
        say(f"device       {bytes_text(found.device)} at the peak")
    say(f"tables       {bytes_text(found.tables)} of planes and moments, on {found.where}")
    say(f"disk         {bytes_text(found.disk)} at the end, up to {bytes_text(found.disk_most)} meanwhile")
    need = found.device if found.device and found.where == "device" else found.tables
    if found.where != "disk" and need > found.available:
        say(f"[red]does not fit[/red]: {bytes_text(found.available)} are free; take tables=disk, or fewer channels or objects")
        raise typer.Exit(1)
