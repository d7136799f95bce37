"""The commands of ``tcam``."""

from __future__ import annotations

from typing import Annotated

import typer

import tcam_ext
from tcam_diff.cli import (
    ablate,
    check_data,
    compare,
    critic,
    decode,
    encode,
    estimate,
    export_bundle,
    fit,
    interpolate,
    make_cohort,
    prepare,
    sample,
    train_autodecoder,
    train_diffusion,
)

app = typer.Typer(
    help="Triplane autodecoding and diffusion of 3D medical volumes (TCAM-Diff).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("fit")(fit.fit)
app.command("decode")(decode.decode)
app.command("compare")(compare.compare)
app.command("critic")(critic.critic)
app.command("check-data")(check_data.check_data)
app.command("prepare")(prepare.prepare)
app.command("train-autodecoder")(train_autodecoder.train_autodecoder)
app.command("estimate")(estimate.estimate)
app.command("ablate")(ablate.ablate)
app.command("encode")(encode.encode)
app.command("export-latents")(encode.export_latents)
app.command("train-diffusion")(train_diffusion.train_diffusion)
app.command("sample")(sample.sample)
app.command("interpolate")(interpolate.interpolate)
app.command("export-bundle")(export_bundle.export_bundle)
app.command("make-cohort")(make_cohort.make_cohort)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tcam {tcam_ext.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    pass
