"""Shards of damaged files. Each is refused in one line that names the file, or read right, in bounded time and memory.

Atheris (libFuzzer) runs in a process of its own, ``files_case.py``, which writes its results line by line. A process that dies
or hangs is replaced, and its case counts as wrong. To repeat a case of a result:

    python tests/campaign/files.py KIND INPUT        (INPUT: "input" of the failure)
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from shards import Shard, Tally

#: Kinds of files, with an oracle in files_oracles.py or files_folders.py each.
KINDS = ("nifti", "dicom", "yaml", "safetensors", "checkpoint", "store")

CASES = 2000
SILENCE = 60  # seconds without a result after which a process hangs; a case may take files_case.SECONDS of the processor's time
LONGEST = 4096  # characters of an input that a failure keeps


def shards() -> list[Shard]:
    """One shard a kind."""
    return [Shard(f"files-{kind}", CASES, functools.partial(run, kind)) for kind in KINDS]


def run(kind: str, seed: int, cases: int, work: Path, tally: Tally) -> None:
    """Judge ``cases`` files."""
    if importlib.util.find_spec("atheris") is None:
        raise SystemExit("the shards of damaged files need the package atheris: pip install 'tcam-ext[dev]'")
    from files_seeds import make_seeds

    seeds = work / "seeds"
    make_seeds(kind, seeds)
    while (left := cases - sum(tally.outcomes.values())) > 0:
        attempt(kind, seed + cases - left, left, work, tally)


def attempt(kind: str, seed: int, cases: int, work: Path, tally: Tally) -> None:
    """Judge up to ``cases`` files in a process, and count them."""
    results, current, log = (work / name for name in ("results.jsonl", "current", "log"))
    for path in (results, current):
        path.write_bytes(b"")
    command = [sys.executable, str(Path(__file__).with_name("files_case.py")), kind, str(seed), str(cases), str(work)]
    began = counted = 0
    with log.open("wb") as out, results.open() as lines:
        child = subprocess.Popen(command, cwd=work, stdout=out, stderr=out, env=os.environ | {"PYTHONHASHSEED": "0"})
        last, ended, rest = time.monotonic(), "", ""
        while not ended:
            if child.poll() is not None:
                ended = f"the process ended with status {child.returncode}"
            rest += lines.read()
            *whole, rest = rest.split("\n")
            for line in whole:
                count(json.loads(line), seed, tally)
                counted += 1
                last = time.monotonic()
            began = began or counted
            if time.monotonic() - last > SILENCE + (0 if began else SILENCE):
                child.kill()
                child.wait()
                ended = f"no result within {SILENCE} seconds"
            time.sleep(0.02)
    if counted < cases:
        text = log.read_bytes()[-2000:].decode(errors="replace")
        if not counted and not current.read_bytes():
            raise SystemExit(f"files-{kind}: {ended}: {text}")
        tally.fail({"seed": seed, "number": counted, "input": shown(current.read_bytes())}, f"{ended}: {text}")


def count(row: dict[str, Any], seed: int, tally: Tally) -> None:
    """Count a result of a process."""
    tally.measure("seconds", row["seconds"])
    tally.measure("bytes", row["bytes"])
    if row["outcome"] == "WRONG":
        tally.fail({"seed": seed, "number": row["number"], "input": row["input"]}, row["what"])
    else:
        tally.count(row["outcome"])


def shown(data: bytes) -> str:
    """An input as text, if it is not too long."""
    text = base64.b64encode(zlib.compress(data, 9)).decode()
    return text if len(text) <= LONGEST else f"{len(data)} bytes; repeat the shard with its seed"


def repeat(kind: str, text: str) -> None:
    """Judge one input in this process."""
    import files_case
    from files_seeds import make_seeds

    with tempfile.TemporaryDirectory() as work:
        make_seeds(kind, Path(work) / "seeds")
        print(files_case.Judge(kind, Path(work)).judge(zlib.decompress(base64.b64decode(text))))


if __name__ == "__main__":
    repeat(*sys.argv[1:])
