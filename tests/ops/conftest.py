"""The CUDA kernels on the emulator of tests/simt, built once for all tests and processes."""

from __future__ import annotations

import ctypes
import os

import pytest
import raw
import simt
from filelock import FileLock  # of torch's requirements


@pytest.fixture(scope="session")
def simt_library(tmp_path_factory):
    if given := os.environ.get("TCAM_SIMT_LIBRARY"):
        return given
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "simt"
    with FileLock(f"{folder}.lock"):
        if not (folder / "simt.so").exists():
            folder.mkdir(exist_ok=True)
            simt.build(folder)
    return folder / "simt.so"


@pytest.fixture(scope="session")
def kernels(simt_library):
    return raw.Kernels(ctypes.CDLL(str(simt_library)), "cuda", (0, None))


@pytest.fixture
def schedule(kernels):
    """Set the order in which threads and blocks run, which must not change a result."""
    yield lambda name: kernels.library.simt_schedule(*simt.SCHEDULES[name], 2)
    kernels.library.simt_schedule(*simt.SCHEDULES["in order"], 2)
