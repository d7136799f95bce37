"""Builds the CUDA sources for this machine, against the emulator of tests/simt."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "simt"
CXX = os.environ.get("CXX") or shutil.which("c++")
skip_where_it_cannot_run = [
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator's fibers are written for x86-64"),
]


_objects = tempfile.TemporaryDirectory(prefix="tcam-simt-")  # compiled already, by the hash of their preprocessed text


def _compile(command: list[str], source: Path, folder: Path) -> tuple[Path, subprocess.Popen[bytes] | None]:
    """The object, and the compiler at work on it where no build of this process has made it."""
    command = [*command, f"-I{EMULATOR}", "-x", "c++", str(source)]
    text = subprocess.run([*command, "-E", "-P"], cwd=folder, capture_output=True, check=True).stdout
    key = hashlib.sha256(" ".join(command[:-1]).encode() + text).hexdigest()
    target = Path(_objects.name) / f"{key}.o"
    return target, None if target.exists() else subprocess.Popen([*command, "-c", "-o", str(target)], cwd=folder)


def build(folder: Path, *flags: str, csrc: Path = ROOT / "csrc") -> Path:
    """A shared library with the extern "C" functions of csrc/cuda/launch.h."""
    assert CXX is not None
    common = [*CXX.split(), "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags]
    compiled = [_compile(common, s, folder) for s in [*sorted((csrc / "cuda").glob("*.cu")), EMULATOR / "main.cpp"]]
    assert all(p is None or p.wait() == 0 for _, p in compiled)
    objects = [str(o) for o, _ in compiled]
    subprocess.run([*CXX.split(), *flags, "-shared", *objects, "-o", "simt.so", "-lpthread"], cwd=folder, check=True)
    return folder / "simt.so"


if __name__ == "__main__":  # python tests/ops/simt.py FOLDER: builds there and prints the library's path
    target = Path(sys.argv[1]).resolve()
    target.mkdir(parents=True, exist_ok=True)
    print(build(target))
