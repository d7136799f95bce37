"""The typer application with all commands of ``tcam``."""

from __future__ import annotations

from typing import Annotated

import typer

from tcam_diff.cli import (
    ablate,
    baseline,
    check_data,
    compare,
    decode,
    distill,
    encode,
    estimate,
    evaluate,
    export_bundle,
    export_model,
    features,
    fit,
    interpolate,
    make_cohort,
    prepare,
    report,
    sample,
    segment,
    table,
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
app.command("fit")(fit.command)
app.command("decode")(decode.command)
app.command("compare")(compare.command)
app.command("evaluate")(evaluate.command)
app.command("segment")(segment.command)
app.add_typer(features.app, name="features")
app.add_typer(baseline.app, name="baseline")
app.command("check-data")(check_data.command)
app.command("prepare")(prepare.command)
app.command("train-autodecoder")(train_autodecoder.command)
app.command("estimate")(estimate.command)
app.command("ablate")(ablate.command)
app.command("encode")(encode.encode_command)
app.command("export-latents")(encode.export_command)
app.command("train-diffusion")(train_diffusion.command)
app.command("distill")(distill.command)
app.command("sample")(sample.command)
app.command("table")(table.table_command)
app.command("figure")(table.figure_command)
app.command("interpolate")(interpolate.command)
app.command("export-bundle")(export_bundle.command)
app.command("export-model")(export_model.command)
app.command("report")(report.command)
app.command("make-cohort")(make_cohort.command)


def _print_version(version: bool) -> None:
    if version:
        import tcam_diff

        print(f"tcam {tcam_diff.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass
