"""Builds the CUDA sources for this machine, against the emulator of tests/simt."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "simt"
CXX = os.environ.get("CXX") or shutil.which("c++")
skip_where_it_cannot_run = [
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator's fibers are written for x86-64"),
]
SOURCES = ("decode_grid", "fused_forward_bfloat16", "fused_forward_float16", "resample")


def build(folder: Path, *flags: str, csrc: Path = ROOT / "csrc") -> Path:
    """A shared library with the extern "C" functions of csrc/cuda/launch.h; two compilers at a time."""
    assert CXX is not None
    common = [*CXX.split(), "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags]
    sources = [*(csrc / "cuda" / f"{s}.cu" for s in SOURCES), EMULATOR / "main.cpp"]
    objects = [f"{s.stem}.o" for s in sources]
    running = [
        subprocess.Popen([*common, f"-I{EMULATOR}", "-x", "c++", "-c", str(s), "-o", o], cwd=folder)
        for s, o in zip(sources, objects, strict=True)
    ]
    assert all(p.wait() == 0 for p in running)
    subprocess.run([*CXX.split(), *flags, "-shared", *objects, "-o", "simt.so", "-lpthread"], cwd=folder, check=True)
    return folder / "simt.so"
