"""The CUDA kernels on the emulator of tests/simt, built once for all tests."""

from __future__ import annotations

import ctypes
import os

import pytest
import raw
import simt


@pytest.fixture(scope="session")
def simt_library(tmp_path_factory):
    return os.environ.get("TCAM_SIMT_LIBRARY") or simt.build(tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="session")
def kernels(simt_library):
    return raw.Kernels(ctypes.CDLL(str(simt_library)), "cuda", (0, None))


@pytest.fixture
def schedule(kernels):
    """Set the order in which threads and blocks run, which must not change a result."""
    yield lambda name: kernels.library.simt_schedule(*simt.SCHEDULES[name], 2)
    kernels.library.simt_schedule(*simt.SCHEDULES["in order"], 2)
