"""Shards of the campaign: the seeded tasks, their results and the files of these."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in (".", "python", "benchmarks", "tests/ops", "tests/tcam_diff")]

#: Folders of both packages.
SOURCES = ("csrc", "tcam_ext", "python")

#: Results of the shards, one JSON file each.
RESULTS = ROOT / "benchmarks" / "results" / "reliability"


@dataclass
class Tally:
    """Outcomes of the cases of a shard. ``seconds`` and ``bytes`` are the most that one case took, where it was measured."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    most: dict[str, float] = field(default_factory=dict)

    def count(self, outcome: str) -> None:
        """Count a case with an outcome that is right."""
        self.outcomes[outcome] += 1

    def fail(self, case: object, what: str) -> None:
        """Count a case that is wrong. ``case`` says how to repeat it."""
        self.outcomes["WRONG"] += 1
        print(f"WRONG: {case}: {what}", flush=True)
        if len(self.failures) < 100:
            self.failures.append({"case": case, "what": what[-4000:]})

    def measure(self, name: str, value: float) -> None:
        """Record the largest value of a quantity, for example error / limit, or seconds."""
        self.most[name] = max(self.most.get(name, value), value)


@dataclass(frozen=True)
class Shard:
    """A task of at most 30 minutes.

    Args:
        name: PART-WHAT or PART-WHAT-NUMBER, the name of its file.
        cases: number of cases.
        run: function of the seed, the number of cases, an empty folder and the tally.
        preload: C source of a library that is loaded before the others, if any.
        at_most: whether the task may end with fewer cases, when it has been through all that there are.
    """

    name: str
    cases: int
    run: Callable[[int, int, Path, Tally], None]
    preload: Path | None = None
    at_most: bool = False

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    def current(self) -> bool:
        """Whether a whole result of these sources exists."""
        try:
            row = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return False
        return bool(row["sources"] == sources() and (self.at_most or row["cases"] >= self.cases))


def seed_of(name: str, seed: int) -> int:
    """Seed of a shard, different for every name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


def sources() -> str:
    """Digest of the sources of both packages, without the CUDA kernels, which the campaign does not run."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if "cuda" not in path.relative_to(ROOT).parts and path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".yaml"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def execute(shard: Shard, seed: int, work: Path) -> dict[str, Any]:
    """Run a shard and write its file."""
    from harness import commit

    began, tally, own = time.monotonic(), Tally(), seed_of(shard.name, seed)
    print(f"{shard.name}: {shard.cases} cases, seed {own}", flush=True)
    made_of, at = sources(), commit(*SOURCES)
    shard.run(own, shard.cases, work, tally)
    row = {
        "shard": shard.name,
        "cases": sum(tally.outcomes.values()),
        "seed": own,
        **vars(tally),
        "seconds": round(time.monotonic() - began, 1),
        "sources": made_of,
        "commit": at,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = shard.file.with_suffix(".part")
    partial.write_text(json.dumps(row, indent=1) + "\n")
    partial.replace(shard.file)
    return row


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    import numpy
    import torch

    from tcam_ext import _C

    model = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "isa": _C.cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
