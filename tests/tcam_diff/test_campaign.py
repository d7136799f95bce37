"""Shards of the campaign that kill, starve and double commands, with a few cases each. `make campaign` runs them whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "campaign"
SCRIPT = """
import json, sys
from pathlib import Path
import shards
part, name, work = sys.argv[1:]
tally = shards.Tally()
(shard,) = [s for s in __import__(part).shards() if s.name == name]
shard.run(5, 6, Path(work), tally)
print(json.dumps(vars(tally)))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and LD_PRELOAD")
@pytest.mark.parametrize("name", ["kills-encode", "memory-encode", "disk-fit", "twins-encode"])
def test_a_command_survives_its_shard(tmp_path, name):
    environment = os.environ | {"PYTHONPATH": str(CAMPAIGN), "OMP_NUM_THREADS": "1"}
    if name.startswith("disk"):
        environment["LD_PRELOAD"] = str(tmp_path / "full_disk.so")
        source = CAMPAIGN / "full_disk.c"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", environment["LD_PRELOAD"], source, "-ldl"], check=True)
    part = "kills" if name.startswith("kills") else "faults"
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", SCRIPT, part, name, str(tmp_path / "work")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(done.stdout.splitlines()[-1])
    assert tally["failures"] == []
    assert sum(tally["outcomes"].values()) == 6
