"""``tcam check-data``: check every case of a data set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcam_diff.cli.common import cores, say, tracked
from tcam_diff.data import LAYOUTS, VOXEL_BUDGET
from tcam_diff.errors import UserError
from tcam_diff.files import reason, write_text

if TYPE_CHECKING:
    from tcam_diff.data import check


def command(
    source: Annotated[Path, typer.Argument(help=f"The data set: {LAYOUTS}; or a prepared store.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    max_voxels: Annotated[int, typer.Option(help="Refuse files with more voxels, channels counted.")] = VOXEL_BUDGET,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Files read at a time. [default: the machine's cores]", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, and only cases that cannot be used.")] = False,
) -> None:
    """Check every case of SOURCE: shape, spacing, orientation, range, labels, and whether it can be used.

    The exit status is 1 if a case cannot be used. A bad file does not stop the check. Memory does not grow with the volumes.
    """
    from tcam_diff.data import check
    from tcam_diff.data.sources import find_cases
    from tcam_diff.data.store import INDEX

    if (source / INDEX).is_file():
        _check_store(source, jobs or cores(), quiet)
        return
    data = find_cases(source)
    say(f"{source}: {data.layout}, {len(data.cases)} cases")
    reports: list[check.Report] = []
    for report in tracked(check.check_cases(data.cases, max_voxels, jobs or cores()), len(data.cases), "checking", quiet):
        reports.append(report)
        if report.problem or not quiet:
            say(_line(report), "FAILS" if report.problem else "")
    bad = [r for r in reports if r.problem]
    for remark in check.differences(reports):
        say(remark)
    say(f"{len(reports) - len(bad)} of {len(reports)} cases can be used")
    if json_out is not None:
        try:
            write_text(json_out, json.dumps([r.plain() for r in reports], indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {json_out}: cannot be written: {reason(error)}") from error
    if bad:
        raise typer.Exit(1)


def _check_store(folder: Path, jobs: int, quiet: bool) -> None:
    """Compare every case of a prepared store with its checksum."""
    from tcam_diff.data import check
    from tcam_diff.data.store import Store

    store = Store(folder)
    problems = list(tracked(check.check_store(store, jobs), len(store.records), "checking", quiet))
    for problem in filter(None, problems):
        say(problem, "FAILS")
    say(f"{folder}: a prepared store; {problems.count('')} of {len(problems)} cases match their checksums")
    if any(problems):
        raise typer.Exit(1)


def _line(r: check.Report) -> str:
    if r.problem:
        return f"{r.name} [{r.split}]: {r.problem}"
    parts = [
        " x ".join(map(str, r.shape or ())) + (f", {r.channels} channels" if r.channels > 1 else ""),
        " x ".join(f"{s:.3g}" for s in r.spacing or ()) + " mm",
        r.orientation,
        "no range" if math.isnan(r.low) else f"{r.low:g} to {r.high:g}",
    ]
    if r.labels is not None:
        parts.append("labels " + ", ".join(map(str, r.labels)))
    return f"ok    {r.name} [{r.split}]: {'; '.join([*parts, *r.notes])}"
