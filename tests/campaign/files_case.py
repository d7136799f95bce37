"""Process of a shard of damaged files: atheris makes the files, the product reads them, an oracle judges.

    python files_case.py KIND SEED CASES WORK

WORK/seeds has the sound files. Every case writes its files to WORK/case, its input to WORK/current and its result, a line of
JSON, to WORK/results.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import atheris
from files import shown
from files_mutate import mutated, pack, unpack

SECONDS = 5.0  # of the processor, for a case
BYTES = 1 << 30  # of memory beyond that before the case

with atheris.instrument_imports(include=["tcam_diff", "nibabel", "pydicom"]):
    import files_oracles
    from tcam_diff.errors import UserError


def memory(key: str) -> int:
    """Bytes of an entry of /proc/self/status, for example VmRSS."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


class Judge:
    """Judge of the inputs of a kind."""

    def __init__(self, kind: str, work: Path) -> None:
        self.kind, self.work = kind, work
        self.seeds = [path.read_bytes() for path in sorted((work / "seeds").glob("*.case"))]
        self.oracle = files_oracles.oracle(kind, work / "seeds")
        for data in self.seeds:  # imports and caches of the first use
            assert self.outcome(data) == ("right", ""), "a sound file is not read"

    def outcome(self, data: bytes) -> tuple[str, str]:
        """Outcome of an input: right, refused or WRONG, and why it is wrong."""
        folder = self.work / "case"
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in unpack(data, self.kind).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        try:
            self.oracle(folder)
        except UserError as error:
            problem = files_oracles.unclear(str(error), folder, self.work / "seeds")
            return ("WRONG", f"unclear refusal ({problem}): {error}") if problem else ("refused", "")
        except files_oracles.Wrong as error:
            return "WRONG", str(error)
        except BaseException:  # also those that are no Exception
            return "WRONG", traceback.format_exc()
        return "right", ""

    def judge(self, data: bytes) -> dict[str, Any]:
        """Result of an input."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        before, began = memory("VmRSS"), time.process_time()
        outcome, what = self.outcome(data)
        seconds, more = time.process_time() - began, memory("VmHWM") - before
        if outcome == "refused" and data in self.seeds:
            outcome, what = "WRONG", "a sound file is refused"
        if outcome != "WRONG" and (seconds > SECONDS or more > BYTES):
            outcome, what = "WRONG", f"{outcome}, but it took {seconds:.1f} s of the processor and {more} bytes of memory"
        row: dict[str, Any] = {"outcome": outcome, "seconds": round(seconds, 3), "bytes": more}
        what = what if len(what) < 3000 else f"{what[:1000]}\n...\n{what[-2000:]}"
        return row | ({"what": what, "input": shown(data)} if outcome == "WRONG" else {})


def main(kind: str, seed: int, cases: int, work: Path) -> None:
    judge = Judge(kind, work)
    limit = memory("VmSize") + BYTES + (256 << 20)  # what libFuzzer and the log of the cases take
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    number = 0
    with (work / "results.jsonl").open("w") as results:

        def one(data: bytes) -> None:
            nonlocal number
            (work / "current").write_bytes(data)
            results.write(json.dumps({"number": number} | judge.judge(data)) + "\n")
            results.flush()
            number += 1
            if number == cases:
                os._exit(0)

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            rng = random.Random(seed)
            anew = not data.strip() or rng.random() < 0.5  # most of libFuzzer's inputs are refused already
            files = unpack(rng.choice(judge.seeds) if anew else data, kind)
            return pack(mutated(files, rng, lambda raw: bytes(atheris.Mutate(raw, len(raw) + 64))))[:most]

        inputs = ",".join(map(str, sorted((work / "seeds").glob("*.case"))))
        longest = 4 * max(map(len, judge.seeds))
        options = [f"-seed={seed % 2**31 or 1}", f"-max_len={longest}", "-rss_limit_mb=0", "-timeout=600", "-runs=-1"]
        atheris.Setup([sys.argv[0], f"-seed_inputs={inputs}", *options], one, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
