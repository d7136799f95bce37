"""``tcam critic``: distance of generated volumes from real ones."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tcam_diff.cli.common import progress_bar, say
from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder, write_text


def command(
    real: Annotated[Path, typer.Argument(help="Real volumes: a store of `tcam prepare`, or NIfTI files in any layout.")],
    fake: Annotated[Path, typer.Argument(help="A folder of `tcam sample`, or other volumes; {seed} is replaced by each seed.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FAKE2] [KEY=VALUE]...",
            help="Volumes of another generator, scored by the same critic. Changes to the critic, e.g. size=64 epochs=50.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of critics, each with its own initial weights and split.")] = 3,
    split: Annotated[str | None, typer.Option(help="Split of REAL. [default: all]", show_default=False)] = None,
    intensity: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Physical values at 0 and 1, for files other than stores and samples. [default: values are in 0 to 1]",
            show_default=False,
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option(help="Also score real volumes against other real ones, unchanged and blurred.")
    ] = True,
    out: Annotated[Path | None, typer.Option("--json", help="Write all values to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Estimate the Wasserstein distance of FAKE (and FAKE2) from REAL with a critic (WGAN-GP): mean ± standard deviation over
    seeds; lower is closer.

    Values depend on size, scale and critic, so compare only those of one run.
    """
    from tcam_diff.evaluation.critic import CriticConfig
    from tcam_diff.evaluation.distances import distances

    others = [m for m in more or [] if "=" not in m]
    if len(others) > 1:
        raise UserError(f"expected at most two generators, FAKE and FAKE2, got {' '.join([str(fake), *others])}")
    config = CriticConfig.load("default", [m for m in more or [] if "=" in m])
    if out is not None:
        writable_folder(out.parent)
    shown = [("W", "distance", ".3g", "")]
    with progress_bar("critic", quiet, shown) as show:
        result = distances(
            real, [fake, *others], config, seeds=seeds, split=split, intensity=intensity, controls=controls, progress=show
        )
    say(f"real: {real}, {result.volumes} volumes of {config.size} voxels along each axis; held-out W, lower is closer")
    for name, scores in result.scores.items():
        values = [s.distance[name] for s in scores]
        spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        doubt = "" if all(s.valid for s in scores) else "  (not converged: no epoch had a gradient norm near 1)"
        counts = scores[0].counts
        trained = statistics.fmean(s.train_distance for s in scores)
        norm = statistics.fmean(s.gradient_norm for s in scores)
        say(
            f"{name}: {statistics.fmean(values):.4g}{spread}   ({scores[0].real_count} real and {counts[name]} fake ones "
            f"scored; on the training volumes {trained:.4g}, gradient norm {norm:.2f}){doubt}"
        )
    if out is not None:
        content = {
            "real": str(real),
            "config": config.model_dump(),
            "scores": {k: [asdict(s) for s in v] for k, v in result.scores.items()},
        }
        write_text(out, json.dumps(content, indent=1))
