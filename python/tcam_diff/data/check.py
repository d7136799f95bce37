"""Checks behind ``tcam check-data``: the geometry, range and labels of every case, or why it cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tcam_diff.data import VOXEL_BUDGET
from tcam_diff.data.labels import label_codes
from tcam_diff.data.readers import read_header, read_label_header, same_grid, scan
from tcam_diff.data.sources import Case
from tcam_diff.data.store import Record, Store
from tcam_diff.errors import UserError
from tcam_diff.files import reason


@dataclass
class Report:
    """Result of checking one case. ``problem`` is the reason why the case cannot be used, or "" if it can."""

    name: str
    split: str
    problem: str = ""
    shape: tuple[int, int, int] | None = None
    channels: int = 0
    spacing: tuple[float, float, float] | None = None
    orientation: str = ""
    low: float = float("nan")
    high: float = float("nan")
    not_finite: int = 0
    labels: list[int] | None = None
    notes: list[str] = field(default_factory=list)  # oddities that do not make the case unusable

    def plain(self) -> dict[str, Any]:
        """Fields as JSON values, without those that are NaN."""
        known = {k: v for k, v in vars(self).items() if not (isinstance(v, float) and v != v)}
        return known | {"shape": list(self.shape or ()), "spacing": list(self.spacing or ())}


def check_case(case: Case, max_voxels: int = VOXEL_BUDGET) -> Report:
    """Check the headers of a case, then its voxels in one pass over each file, up to the first problem."""
    report = Report(case.name, case.split)
    try:
        headers = [read_header(p, max_voxels) for p in case.images]
        first = headers[0]
        report.shape, report.spacing, report.orientation = first.info.shape, first.info.spacing, first.info.orientation
        report.channels = sum(h.info.channels for h in headers)
        for other in headers[1:]:
            same_grid(first, other)
        label = None if case.label is None else read_label_header(case.label, first, max_voxels)
        scans = [scan(h, max_voxels) for h in headers]
        report.low, report.high = min(s.low for s in scans), max(s.high for s in scans)
        report.not_finite = sum(s.not_finite for s in scans)
        if report.not_finite:
            bad = next(h for h, s in zip(headers, scans, strict=True) if s.not_finite)
            raise UserError(f"{bad.path}: {report.not_finite} voxels are NaN or infinite; replace them first")
        if label is not None:
            found = scan(label, max_voxels)
            report.labels = label_codes(label.path, found.values, found.not_finite)
    except UserError as error:
        report.problem = str(error)
        return report
    except OSError as error:  # a file that vanished
        report.problem = f"{error.filename or case.images[0]}: {reason(error)}"
        return report
    if report.low == report.high:
        report.notes.append(f"every voxel is {report.low:g}")
    if report.labels == [0]:
        report.notes.append("no voxel has a label")
    return report


def check_cases(cases: Sequence[Case], max_voxels: int = VOXEL_BUDGET, jobs: int = 1) -> Iterator[Report]:
    """Check cases in ``jobs`` threads and yield the reports in order."""
    with ThreadPoolExecutor(jobs) as pool:  # unpacking and numpy release the interpreter lock
        yield from pool.map(lambda case: check_case(case, max_voxels), cases)


def check_store(store: Store, jobs: int = 1) -> Iterator[str]:
    """Compare the cases of a prepared store with their checksums.

    Yields:
        For each case, in order, "" or the reason why it does not match.
    """

    def check(record: Record) -> str:
        try:
            store.verify(record)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(check, store.records)


def differences(reports: Sequence[Report]) -> list[str]:
    """Remarks about properties that differ between the usable cases."""
    usable, remarks = [r for r in reports if not r.problem], []
    for name, values in (
        ("channels", [str(r.channels) for r in usable]),
        ("shape", [" x ".join(map(str, r.shape or ())) for r in usable]),
        ("orientation", [r.orientation for r in usable]),
        ("spacing", [" x ".join(f"{s:.3g}" for s in r.spacing or ()) for r in usable]),
    ):
        counted = Counter(values).most_common()
        if len(counted) > 1:
            shown = ", ".join(f"{value} ({count})" for value, count in counted[:4])
            remarks.append(f"{name} differs: {shown}{', ...' if len(counted) > 4 else ''}")
    return remarks
