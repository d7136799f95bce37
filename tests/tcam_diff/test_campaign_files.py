"""The shards of damaged files of the campaign, with a few files each. tests/campaign/run.py runs them whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="makes the damaged files; it has no wheel for this Python")
CAMPAIGN = Path(__file__).parents[1] / "campaign"
SCRIPT = """
import json, sys
from pathlib import Path
import files, shards
tally = shards.Tally()
files.run(sys.argv[1], 5, 30, Path(sys.argv[2]), tally)
print(json.dumps(vars(tally)))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["nifti", "dicom", "yaml", "safetensors", "checkpoint", "store"])
def test_damaged_files_are_refused_or_read_right(tmp_path, kind):
    environment = os.environ | {"PYTHONPATH": str(CAMPAIGN), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, kind, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert sum(result["outcomes"].values()) == 30
    assert set(result["outcomes"]) == {"right", "refused"}
