"""``tcam check-data``: is every case of a data set sound, and what is in it?"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tcam_diff.cli.common import cores, say, tracked
from tcam_diff.data import check
from tcam_diff.data.nifti import VOXEL_BUDGET
from tcam_diff.data.sources import LAYOUTS, find_cases
from tcam_diff.data.store import INDEX, Record, Store
from tcam_diff.errors import UserError

console = Console()


def check_data(
    source: Annotated[Path, typer.Argument(help=f"The data set: {LAYOUTS}; or a prepared store.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Write what was found here as well.")] = None,
    max_voxels: Annotated[int, typer.Option(help="Refuse files with more voxels, channels counted.")] = VOXEL_BUDGET,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Files read at a time. [default: the machine's cores]", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, and only cases that would fail.")] = False,
) -> None:
    """Look at every case of SOURCE: shape, spacing, orientation, range, labels, and whether it can be used.

    Exit status 1 where a case cannot; one bad file never stops the others. Memory does not grow with the volumes.
    """
    if (source / INDEX).is_file():
        _check_store(source, jobs or cores(), quiet)
        return
    found = find_cases(source)
    console.print(f"{source}: {found.layout}, {len(found.cases)} cases", highlight=False, soft_wrap=True)
    reports: list[check.Report] = []
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet, transient=True) as progress:
        task = progress.add_task("check", total=len(found.cases))
        for report in check.check_cases(found.cases, max_voxels, jobs or cores()):
            reports.append(report)
            progress.update(task, completed=len(reports))
            if report.problem or not quiet:
                console.print(_line(report), highlight=False, soft_wrap=True)
    bad = [r for r in reports if r.problem]
    for remark in check.compare(reports):
        console.print(remark, highlight=False, soft_wrap=True)
    console.print(f"{len(reports) - len(bad)} of {len(reports)} cases can be used", highlight=False)
    if json_out is not None:
        try:
            json_out.write_text(json.dumps([r.plain() for r in reports], indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {json_out}: cannot be written: {error.strerror}") from error
    if bad:
        raise typer.Exit(1)


def _check_store(folder: Path, jobs: int, quiet: bool) -> None:
    """Every case of a prepared store against its checksum."""
    store = Store(folder)

    def verify(record: Record) -> str:
        try:
            store.verify(record)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(jobs) as pool:
        problems = list(tracked(pool.map(verify, store.records), len(store.records), "checking", quiet))
    for problem in filter(None, problems):
        say(f"[red]FAILS[/red] {escape(problem)}")
    say(f"{folder}: a prepared store; {problems.count('')} of {len(problems)} cases have their checksum")
    if any(problems):
        raise typer.Exit(1)


def _line(r: check.Report) -> str:
    name = escape(f"{r.name} [{r.split}]")
    if r.problem:
        return f"[red]FAILS[/red] {name}: {escape(r.problem)}"
    parts = [
        " x ".join(map(str, r.shape or ())) + (f", {r.channels} channels" if r.channels > 1 else ""),
        " x ".join(f"{s:.3g}" for s in r.spacing or ()) + " mm",
        r.orientation,
        "no range" if math.isnan(r.low) else f"{r.low:g} to {r.high:g}",
    ]
    if r.labels is not None:
        parts.append("labels " + ", ".join(map(str, r.labels)))
    return f"ok    {name}: {escape('; '.join([*parts, *r.notes]))}"
