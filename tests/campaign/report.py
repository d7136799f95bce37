"""Write the tables of docs/reliability.md from the results of the campaign.

python tests/campaign/report.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    arguments = parser.parse_args()
    old = PAGE.read_text()
    new = filled(old, [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))])
    if arguments.check and new != old:
        sys.exit(f"{PAGE}: not up to date; run {sys.argv[0]}")
    if not arguments.check:
        PAGE.write_text(new)


def filled(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with new tables between its marks."""
    for name, text in (("provenance", provenance(rows)), ("shards", shards(rows)), ("errors", errors(rows))):
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.S)
    return page


def provenance(rows: list[dict[str, Any]]) -> str:
    """Commits, dates and machines."""
    states = sorted({r["sources"] for r in rows})
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
    machines = Counter(
        "{cpu}, {cores} cores, {isa} kernels, Python {python}, torch {torch}".format(**r["machine"]) for r in rows
    )
    dates = sorted({r["date"] for r in rows})
    cases, wrong = sum(r["cases"] for r in rows), sum(r["outcomes"].get("WRONG", 0) for r in rows)
    return (
        f"{len(rows)} shards, **{cases:,} cases, {wrong} wrong**; {sum(r['seconds'] for r in rows) / 3600:.1f} hours in all. "
        f"{'One state' if len(states) == 1 else f'{len(states)} states'} of the sources ({', '.join(states)}: both packages "
        f"without the CUDA kernels), of commits {commits}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {'; '.join(machines)}."
    )


def shards(rows: list[dict[str, Any]]) -> str:
    """A table with a row for each part and subject, its shards together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault(re.sub(r"-\d+$", "", r["shard"]), []).append(r)
    lines = ["| shards | seeds | cases | wrong | outcomes | s |", "|---|---|---:|---:|---|---:|"]
    for name, group in groups.items():
        outcomes: Counter[str] = Counter()
        for r in group:
            outcomes.update(r["outcomes"])
        wrong = outcomes.pop("WRONG", 0)
        shown = ", ".join(f"{n:,} {what}" for what, n in outcomes.most_common())
        seeds = f"{group[0]['seed']}" + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        cases, seconds = sum(r["cases"] for r in group), sum(r["seconds"] for r in group)
        lines.append(f"| {name} | {seeds} | {cases:,} | {wrong} | {shown} | {seconds:.0f} |")
    return "\n".join(lines)


def errors(rows: list[dict[str, Any]]) -> str:
    """A table of the largest measured quantities."""
    most: dict[tuple[str, str], float] = {}
    for r in rows:
        for what, value in r["most"].items():
            key = (re.sub(r"-\d+$", "", r["shard"]), what)
            most[key] = max(value, most.get(key, value))
    lines = ["| shards | quantity | largest |", "|---|---|---:|"]
    return "\n".join([*lines, *(f"| {shard} | {what} | {value:.3g} |" for (shard, what), value in most.items())])


if __name__ == "__main__":
    main()
