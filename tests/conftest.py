"""Shared by all tests: a check that the binary was built from these sources, and reasons for skipped GPU tests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import tcam_ext
from tcam_ext import _C

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile("tcam", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=1000)
#: For a GPU that is available for minutes: the same few examples every time, without shrinking.
settings.register_profile(
    "card", settings.get_profile("tcam"), max_examples=25, derandomize=True, database=None,
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
settings.load_profile("tcam")


def source_hash() -> str:
    csrc = ROOT / "csrc"
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.is_file()):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):  # without pytest-timeout its setting and mark have no effect
        parser.addini("timeout", "seconds a test may take")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): as pytest-timeout has it")
    if os.environ.get("TCAM_TEST_DETERMINISTIC"):  # fresh memory is filled with NaN
        torch.use_deterministic_algorithms(True)
    if os.environ.get("TCAM_TEST_ANY_BINARY"):  # a wheel built elsewhere
        return
    if _C.source_hash != source_hash():
        pytest.exit(f"{_C.__file__} was built from other sources than csrc/; run `make build`", returncode=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TCAM_TEST_EMULATED"):  # a library built by simt.build, on which the GPU tests run
        for item in items:
            if "card" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="the emulator does not show it"))
        return
    if not _C.cuda_info()["built"]:
        reason = "tcam_ext was built without CUDA"
    elif not torch.cuda.is_available():
        reason = "no CUDA device"
    else:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a line of JSON for each test to the file TCAM_TEST_JSONL, which benchmarks/run_gpu.py sets."""
    path = os.environ.get("TCAM_TEST_JSONL")
    if path and "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or report.outcome != "passed"):
        why = "" if report.outcome == "passed" else str(report.longrepr)[-2000:]
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), "why": why}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = os.environ.get("TCAM_TEST_EMULATED")
    if not library or "gpu" not in request.keywords:
        yield
        return
    import emulated

    emulated.replace_kernels(monkeypatch, Path(library))
    with emulated.OnCpu():
        yield


@pytest.fixture(scope="session")
def _arm_process() -> Iterator[Any]:
    import arm

    process = arm.Arm(Path(os.environ["TCAM_TEST_ARM"]))
    yield process
    process.close()


@pytest.fixture(autouse=True)
def _arm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TCAM_TEST_ARM the ops run on the kernels of ARM (tests/ops/arm.py)."""
    if os.environ.get("TCAM_TEST_ARM"):
        import arm

        arm.replace_kernels(monkeypatch, request.getfixturevalue("_arm_process"))


@pytest.fixture
def threads():
    """Set the number of torch threads; it is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_report_header() -> str:
    return f"tcam_ext {tcam_ext.__version__}, torch {torch.__version__}, {_C.cpu_isa()}"
