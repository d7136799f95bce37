"""``tcam features``: train a network whose features FID and MMD compare."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import RESUMED, Quiet, Resume, duration, end_training, progress_bar, say, stop_on_interrupt
from tcam_diff.evaluation.config import FeaturesConfig

app = typer.Typer(help="Networks whose features FID and MMD compare.", no_args_is_help=True)


@app.command("train")
def train_command(
    store: Annotated[Path, typer.Argument(help="The data set: a store of `tcam prepare`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run, for `tcam evaluate --features`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. size=128 steps=2000.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help=f"The configuration: {', '.join(configs.presets('features'))}, or a YAML file.")
    ] = "default",
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train an autoencoder on the training volumes of a store. Its encoder gives the features.

    The features know what varies in this data set and nothing else; values of other networks are not comparable.
    """
    from tcam_diff.evaluation.features import train_features

    settings = FeaturesConfig.load(preset, [f"data={store}", *(overrides or [])])
    with progress_bar("training", quiet, [("loss", "loss", ".5f", "")]) as show, stop_on_interrupt(RESUMED) as stop:
        outcome = train_features(settings, out, resume, progress=show, stop=stop)
    end_training(out, outcome, settings.steps, quiet)
    if not quiet:
        error = outcome.metrics["error"]
        say(f"{out}: {outcome.step} steps in {duration(outcome.seconds)}, mean square error of training volumes {error:.2g}")


train_command.__doc__ = (
    f"{inspect.getdoc(train_command)}\n\nKeys with their defaults:\n\n\b\n{configs.describe(FeaturesConfig)}\n"
)
