"""``tcam table`` and ``tcam figure``: the paper's tables and figures, each as one command."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import INTERRUPTED, Quiet, progress_bar, say, stop_on_interrupt
from tcam_diff.errors import UserError
from tcam_diff.tables.config import TableConfig

Number = Annotated[int, typer.Argument(help="Number of the table or figure in the paper: tables 1 to 4, figures 3, 5, 6, 7.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of all tables and figures of one protocol: data, runs and results.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the protocol, e.g. data=FOLDER samples=100.")
]
Preset = Annotated[str, typer.Option(help=f"The protocol: {', '.join(configs.presets('table'))}, or a YAML file.")]


def table_command(
    number: Number,
    out: Out,
    overrides: Overrides = None,
    preset: Preset = "small",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every training (tables 1 and 3).")] = 1,
    equal_steps: Annotated[
        bool, typer.Option("--equal-steps", help="Table 1: also train the rivals for as many steps as ours.")
    ] = False,
    commands: Annotated[bool, typer.Option("--commands", help="Print the commands and run none.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train what a table of the paper needs, evaluate it, and print the measured rows beside the printed ones, with hardware,
    time and memory.

    1: reconstruction, ours and the rivals VAE-GAN and VQ-GAN at equal training time. 2: segmentation of reconstructions.
    3: distance of generated volumes by critics, for pairs of generators. 4: latents against quality.

    The preset small makes a cohort of 64^3 voxels and takes hours on two CPU cores (table 1: less than two). Real data:
    --preset brats data=DIR/Task01_BrainTumour. Ctrl-C stops; the same command continues.
    """
    from tcam_diff.tables.make import make_table
    from tcam_diff.tables.plan import Plan

    config = _load(number, (1, 2, 3, 4), preset, overrides)
    if seeds > 1 and number in (2, 4):
        raise UserError(f"--seeds {seeds}: only tables 1 and 3 have several seeds; table 2 repeats its segmentation networks")
    if equal_steps and number != 1:
        raise UserError("--equal-steps: only for table 1")
    if commands:
        for s in Plan(out, config, seeds, equal_steps).steps(number):
            say(f"tcam {shlex.join(s.arguments())}")
        return
    text = _run(quiet, lambda **callbacks: make_table(number, out, config, seeds=seeds, equal_steps=equal_steps, **callbacks))
    say(f"{text}\n\n{out / f'table-{number}.md'}")


def figure_command(
    number: Number, out: Out, overrides: Overrides = None, preset: Preset = "small", quiet: Quiet = False
) -> None:
    """Draw a figure of the paper from the models of its table, which are trained if they are missing.

    3: reconstructions and their errors. 5: new volumes of ours and the rivals. 6: new volumes at two sizes. 7: with and without
    cross-attention.
    """
    from tcam_diff.tables.make import FIGURES, make_figure

    config = _load(number, tuple(FIGURES), preset, overrides)
    say(f"{_run(quiet, lambda **callbacks: make_figure(number, out, config, **callbacks))}")


def _load(number: int, known: tuple[int, ...], preset: str, overrides: list[str] | None) -> TableConfig:
    if number not in known:
        raise UserError(f"NUMBER: expected one of {', '.join(map(str, known))}, got {number}")
    config = TableConfig.load(preset, overrides or [])
    return config if config.data is None else config.model_copy(update={"data": str(Path(config.data).resolve())})


def _run(quiet: bool, work: Callable[..., Any]) -> Any:
    with progress_bar("steps", quiet) as show, stop_on_interrupt("the same command continues") as stop:
        result = work(progress=show, stop=stop)
    if result is None:
        raise typer.Exit(INTERRUPTED)
    return result


table_command.__doc__ = (
    f"{inspect.getdoc(table_command)}\n\nKeys of the protocol with their defaults:\n\n\b\n{configs.describe(TableConfig)}\n"
)
