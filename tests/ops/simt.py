"""Builds the CUDA sources for the emulator of tests/simt, and problems for its tests."""

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
import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "simt"
CXX = os.environ.get("CXX") or shutil.which("c++")
#: Exit status of a process that the emulator ended because a kernel broke a rule (`die` in tests/simt/simt.h).
DIED = 86
skip_where_it_cannot_run = [
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator's fibers are written for x86-64"),
]
#: (order, greedy warps, early copies, seed) of tests/simt/simt.h
SCHEDULES = {"in order": (0, 0, 0, 1), "reversed, greedy": (1, 1, 0, 1), "shuffled, early copies": (2, 0, 1, 7)}
#: Arguments of simt_device: bytes of shared memory a block, multiprocessors, whether wgmma runs.
HOPPER = (227 << 10, 2, True)
#: Problems for the general kernels.
SHAPES = [
    dict(channels=5, texels=(4, 5, 6), widths=(37, 21, 3), size=(8, 9, 5), bias=False),
    dict(channels=3, texels=(3, 4, 5), widths=(9, 2), size=(5, 7, 9), align_corners=True, batch=2),
    dict(channels=4, texels=(4, 5, 6), widths=(5,), size=(8, 7, 5), padding_mode="zeros"),
    dict(channels=2, texels=(3, 9, 7), widths=(84, 132, 76), size=(3, 11, 8)),  # large tiles of gemm.cuh, with ends of all axes
    dict(channels=2, texels=(9, 3, 7), widths=(70, 130, 18), size=(3, 11, 8), padding_mode="zeros"),
    dict(channels=2, texels=(1, 1, 1), widths=(8, 8, 8, 8, 1), size=(7, 6, 5)),
]
#: Plane axes, reductions, paddings and grids, which fused and general kernels share.
SAMPLINGS = [
    dict(plane_axes=((0, 1), (0, 2), (0, 2), (1, 2)), reduce="sum", padding_mode="reflection",
         bounds=[(-1.6, 0.7), (2, -1), (-0.5, 0.4)]),
    dict(plane_axes=((0, 2), (0, 1), (1, 2)), reduce="mean", groups=(2, 1), padding_mode="zeros", grid="corners",
         align_corners=True),
    dict(plane_axes=((1, 2),), padding_mode="border", grid="corners", bounds=[(-0.3, 1.4), (-3, -2), (0.9, -1.2)]),
]  # fmt: skip

_objects = tempfile.TemporaryDirectory(prefix="tcam-simt-")  # compiled objects, by the hash of their preprocessed source


def _compile(command: list[str], source: Path, folder: Path) -> tuple[Path, subprocess.Popen[bytes] | None]:
    """The object, and the running compiler if this process has not built it yet."""
    command = [*command, f"-I{EMULATOR}", "-x", "c++", str(source)]
    text = subprocess.run([*command, "-E", "-P"], cwd=folder, capture_output=True, check=True).stdout
    key = hashlib.sha256(" ".join(command[:-1]).encode() + text).hexdigest()
    target = Path(_objects.name) / f"{key}.o"
    return target, None if target.exists() else subprocess.Popen([*command, "-c", "-o", str(target)], cwd=folder)


def build(folder: Path, *flags: str, csrc: Path = ROOT / "csrc") -> Path:
    """Build a shared library with the extern "C" functions of csrc/cuda/launch.h."""
    assert CXX is not None
    common = [*CXX.split(), "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags]
    compiled = [_compile(common, s, folder) for s in [*sorted((csrc / "cuda").glob("*.cu")), EMULATOR / "main.cpp"]]
    assert all(p is None or p.wait() == 0 for _, p in compiled)
    objects = [str(o) for o, _ in compiled]
    subprocess.run([*CXX.split(), *flags, "-shared", *objects, "-o", "simt.so", "-lpthread"], cwd=folder, check=True)
    return folder / "simt.so"


def gradients(volume, tensors, grad):
    return list(torch.autograd.grad(volume, tensors, grad))


if __name__ == "__main__":  # python tests/ops/simt.py FOLDER: build there and print the path of the library
    target = Path(sys.argv[1]).resolve()
    target.mkdir(parents=True, exist_ok=True)
    print(build(target))
