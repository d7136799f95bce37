"""The campaign: random problems, kills, damaged files, full memory and disk, in shards that can be run one by one.

    python tests/campaign/run.py [PATTERN]... [--jobs N] [--seed S] [--scale F] [--again]

A shard with a result of the present sources in benchmarks/results/reliability is skipped, so that an interrupted campaign
continues. The exit status is 1 if a case is wrong.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: shards run side by side

from shards import RESULTS, Shard, execute, seed_of, sources

#: Modules with a function ``shards``.
PARTS = ("ops", "kills", "faults", "files")
LIMIT = 30 * 60  # seconds of a shard


def all_shards() -> list[Shard]:
    """The shards of a whole campaign, in order."""

    def of_parts() -> Iterator[Shard]:
        for part in PARTS:
            yield from __import__(part).shards()

    return list(of_parts())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names of shards, for example 'kills-*' (default: all)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="shards at a time (default: the cores)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the campaign (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the cases, for a trial (default: 1)")
    parser.add_argument("--again", action="store_true", help="also repeat shards with a result")
    parser.add_argument("--list", action="store_true", help="print the shards and end")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one shard, in this process
    arguments = parser.parse_args()
    shards = [s for s in all_shards() if not arguments.patterns or any(fnmatch.fnmatch(s.name, p) for p in arguments.patterns)]
    if not shards:
        parser.error(f"no shard is named {' or '.join(arguments.patterns)}; --list prints the names")
    if arguments.list:
        for s in shards:
            print(f"{s.name:<28} {s.cases:>6} cases, seed {seed_of(s.name, arguments.seed)}{', done' if s.current() else ''}")
        return
    if arguments.here:
        one(shards[0], arguments)
        return
    todo = [s for s in shards if arguments.again or not s.current()]
    print(f"{len(todo)} of {len(shards)} shards, seed {arguments.seed}, sources {sources()}", flush=True)
    with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        bad = sum(pool.map(lambda s: start(s, arguments), todo))
    if bad:
        raise SystemExit(f"{bad} shards have cases that are wrong, or did not end; see {RESULTS}")


def one(shard: Shard, arguments: argparse.Namespace) -> None:
    """Run a shard in this process."""
    shard = replace(shard, cases=max(1, round(shard.cases * arguments.scale)))
    with tempfile.TemporaryDirectory(prefix="tcam-campaign-") as work:
        execute(shard, arguments.seed, Path(work))


def start(shard: Shard, arguments: argparse.Namespace) -> bool:
    """Run a shard in a process of its own. Returns whether it has wrong cases, or did not end."""
    command = [sys.executable, __file__, shard.name, "--here", f"--seed={arguments.seed}", f"--scale={arguments.scale}"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with (RESULTS / f"{shard.name}.log").open("w") as log, tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if shard.preload is not None:
            environment["LD_PRELOAD"] = str(Path(folder) / f"{shard.preload.stem}.so")
            subprocess.run(
                ["cc", "-O2", "-shared", "-fPIC", "-o", environment["LD_PRELOAD"], shard.preload, "-ldl"], check=True
            )
        try:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT)
            problem = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"no end after {LIMIT // 60} minutes"
    if problem:
        print(f"{shard.name}: {problem}; see {log.name}", flush=True)
        return True
    row = json.loads(shard.file.read_text())
    counts = ", ".join(f"{n} {what}" for what, n in sorted(row["outcomes"].items()))
    print(f"{shard.name}: {counts}; seed {row['seed']}, {time.time() - began:.0f} s", flush=True)
    return bool(row["failures"])


if __name__ == "__main__":
    main()
