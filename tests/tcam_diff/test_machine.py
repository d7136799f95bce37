"""Faults of the machine: full disks, memory that runs out, killed processes, two processes on one folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from tcam_diff import cli, files
from tcam_diff.errors import UserError, out_of_memory
from tcam_diff.files import PART, locked_folder, replacing
from tcam_diff.folder import Folder
from tcam_diff.processes import map_on_processes
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.logger import Logger

#: A device on which every write fails for lack of space.
FULL = Path("/dev/full")


# ---- disk --------------------------------------------------------------------------------------


def no_space(monkeypatch, after: int = 0) -> None:
    """Make every write to files of ``replacing`` fail but the first ``after``."""
    calls, real = 0, files._Output.write

    def write(self, data):
        nonlocal calls
        calls += 1
        if calls <= after:
            return real(self, data)
        self.error = OSError(28, "No space left on device")
        raise self.error

    monkeypatch.setattr(files._Output, "write", write)


@pytest.mark.parametrize("after", range(0, 60, 4))
def test_a_checkpoint_names_the_reason_that_torch_hides(tmp_path, monkeypatch, after):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(1000)}, {}, Distributed())
    no_space(monkeypatch, after)
    with pytest.raises(UserError, match="step-00000002: cannot be written: No space left on device; the checkpoint of step 1"):
        checkpoint.save(tmp_path, 2, {str(i): torch.ones(5000) for i in range(9)}, {}, Distributed())
    assert checkpoint.steps(tmp_path) == [1]


def test_an_array_of_a_store_names_the_reason_that_numpy_hides(tmp_path, monkeypatch):
    no_space(monkeypatch)
    with pytest.raises(UserError, match=r"cases/blob0\.npy: cannot be written: No space left on device"):
        runs.make_store(tmp_path)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_log_on_a_full_disk_is_named(tmp_path):
    logger = Logger(tmp_path, 0)
    logger.file.close()
    logger.file = FULL.open("w")
    with pytest.raises(OSError, match="No space left") as error:
        logger.scalars(1, {"loss": 1.0})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_tensorboard_on_a_full_disk_is_named(tmp_path, monkeypatch):
    """Its thread fails; the next record raises the error, with the folder's name."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    def full(*_):
        raise OSError(28, "No space left on device")

    logger = Logger(tmp_path, 0)
    monkeypatch.setattr(threading, "excepthook", cli._thread_error)
    monkeypatch.setattr(gfile.LocalFileSystem, "append", full)

    def log() -> None:
        for step in range(1, 2000):
            logger.scalars(step, {"loss": 1.0})
            time.sleep(0.01)

    with pytest.raises(OSError, match="No space left") as error:
        log()
    assert error.value.filename == str(tmp_path / "tensorboard")


# ---- memory ------------------------------------------------------------------------------------


def too_large_for_torch() -> None:
    torch.empty(1 << 60)


def too_large_for_numpy() -> None:
    np.empty(1 << 50)


@pytest.mark.parametrize("allocate", [too_large_for_torch, too_large_for_numpy])
def test_out_of_memory_is_one_line(allocate, monkeypatch, capsys):
    monkeypatch.setattr("tcam_diff.cli.app.app", allocate)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tcam: out of memory: ")
    assert "lower sizes" in line


def test_errors_that_out_of_memory_causes_count():
    error = RuntimeError("cannot join thread before it is started")
    error.__context__ = RuntimeError("can't start new thread")
    assert out_of_memory(error) == "can't start new thread"
    assert out_of_memory(RuntimeError("size mismatch")) is None
    assert out_of_memory(MemoryError()) == "no memory is left"


def test_a_file_is_not_called_damaged_because_memory_ran_out(tmp_path):
    folder = Folder(tmp_path, "index.json", "a test", "make it again")
    with pytest.raises(RuntimeError, match="allocate"), folder.reading():
        too_large_for_torch()


# ---- processes ---------------------------------------------------------------------------------


def hold(folder: Path, ready) -> None:
    with locked_folder(folder):
        (folder / f".a.12345678{PART}").write_text("half")
        ready.set()
        time.sleep(60)


def test_a_folder_has_one_writer_until_it_is_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready))
    other.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match="another process is writing to it"), locked_folder(tmp_path):
        pass
    other.kill()
    other.join()
    with locked_folder(tmp_path):
        assert list(tmp_path.iterdir()) == []  # what the killed process left half written


def test_another_programs_files_are_kept(tmp_path):
    (tmp_path / ".download.part").write_text("mine")
    with locked_folder(tmp_path):
        pass
    assert (tmp_path / ".download.part").exists()


def test_two_trainings_in_one_folder(tmp_path):
    store, out = runs.make_store(tmp_path / "store").folder, tmp_path / "run"
    with locked_folder(out), pytest.raises(UserError, match="another process is writing to it"):
        runs.run(store, out, resume="auto")
    assert list(out.iterdir()) == []


WORKERS = """
import os, sys, time
from tcam_diff.processes import map_on_processes

def work(i):
    os.write(1, b"%d\\n" % os.getpid())  # one write: the other worker writes to the same pipe
    time.sleep(60)

for _ in map_on_processes(work, range(2), 2):
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers end with their parent on Linux alone")
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while any(alive(w) for w in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_one_line():
    with pytest.raises(UserError, match=r"a worker process was killed.*lower --jobs"):
        list(map_on_processes(die, range(4), 2))


def test_nothing_half_written_stays(tmp_path):
    def interrupted() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
