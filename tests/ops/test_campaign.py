"""Some problems of each shard of the campaign."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "campaign"))
import ops
from shards import Tally


@pytest.mark.parametrize("op", ops.OPS)
def test_random_problems_of_an_op(op):
    tally = Tally()
    for number in range(25):
        ops.record({"op": op, "number": number}, ops.errors_of(op, 5, number), tally)
    assert not tally.failures
    assert tally.outcomes["right"] == 25
    assert 0 < tally.most["error / limit, forward"] < 1


def test_a_shard_runs_in_processes_of_its_instruction_set_and_survives_a_crash(tmp_path, monkeypatch):
    tally, shard = Tally(), ops.shards()[-1]
    shard.run(5, 3, tmp_path, tally)
    assert tally.outcomes == {"right": 3}
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\n"
        "if sys.argv[-2] == '1':\n"
        "    os.abort()\n"
        """print('{"errors": [], "exception": ""}')\n"""
    )
    monkeypatch.setattr(ops, "__file__", str(script))
    crashed = Tally()
    ops.run("decode_grid", "portable", "ops-decode_grid-2", 5, 2, tmp_path, crashed)
    assert crashed.outcomes == {"right": 1, "WRONG": 1}
    assert crashed.failures[0]["case"] == {"shard": "ops-decode_grid-2", "seed": 5, "number": 1}
