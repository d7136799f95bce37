"""A replacement of tcam_ext._C with which the ops run the CPU kernels of ARM in a process under qemu (tests/arm/main.cpp).

python tests/ops/arm.py FOLDER builds it, and prints the path for TCAM_TEST_ARM.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import raw
import torch
from emulated import EmulatedCall
from torch import Tensor

from tcam_ext import _C

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("TCAM_ARM_CXX") or shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CALLS = ("decode", "decode_backward", "decode_loss", "normals", "resample")


def build(folder: Path) -> Path:
    """Compile the kernels for ARM, with the flags of setup.py but for -O2, which compiles in half of the time."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O2", "-fopenmp", "-static", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    sources = [ROOT / "csrc/cpu/decode.cpp", ROOT / "csrc/cpu/isa.cpp", ROOT / "tests/arm/main.cpp"]
    core = ["-ffp-contract=fast", "-DTCAM_ISA=portable", "-DTCAM_VECTOR_BYTES=16"]
    command = [CXX, *flags, "-c", ROOT / "csrc/cpu/voxel_core.cpp", "-o", folder / "core.o", *core]
    subprocess.run(command, check=True)
    program = folder / "arm"
    subprocess.run([CXX, *flags, *sources, folder / "core.o", "-o", program], check=True)
    return program


class Arm:
    """The functions of _C that library.py calls."""

    def __init__(self, program: Path) -> None:
        assert QEMU is not None
        self.process = subprocess.Popen([QEMU, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __getattr__(self, name: str) -> Any:
        return getattr(_C, name)

    def close(self) -> None:
        self.process.communicate()

    def run(self, call: str, problem: ctypes.Structure, inputs: list[bytes], outputs: list[Tensor | None]) -> None:
        """Send a call and fill its outputs."""
        to, answer = self.process.stdin, self.process.stdout
        assert to is not None
        assert answer is not None
        to.write(struct.pack("<i", CALLS.index(call)) + bytes(problem))
        for data in inputs:
            to.write(data)
        for t in outputs:
            to.write(struct.pack("<q", -1 if t is None else t.nbytes))
        to.flush()
        for t in outputs:
            if t is None or not t.nbytes:
                continue
            data = answer.read(t.nbytes)
            if len(data) != t.nbytes:
                raise RuntimeError(f"the process for ARM ended with {self.process.wait()}")
            t.copy_(torch.frombuffer(bytearray(data), dtype=t.dtype).view(t.shape))

    def Call(self, *arguments: Any) -> ArmCall:
        return ArmCall(self, *arguments)

    def normals(self, out: Tensor, sequence: int, seed: int, threads: int) -> None:
        self.run("normals", raw.Normals(seed, out.shape[0], out[0].numel(), sequence, threads), [], [out])

    def resample_axis(self, x: Tensor, out: Tensor, texels: int, size: int, lo: int, hi: int, align_corners: bool,
                      padding: int, corners: bool, bounds: Tensor | None, adjoint: bool, threads: int) -> None:  # fmt: skip
        problem = raw.Resample(
            x.shape[0], x.shape[2], texels, size, lo, hi, align_corners, padding, corners, adjoint, raw.DTYPES[x.dtype], threads
        )
        self.run("resample", problem, [packed(bounds), packed(x)], [out])


def packed(t: Tensor | None) -> bytes:
    """An array as the process reads it."""
    if t is None:
        return struct.pack("<q", -1)
    return struct.pack("<q", t.nbytes) + ctypes.string_at(t.contiguous().data_ptr(), t.nbytes)


class ArmCall(EmulatedCall):
    """_C.Call, whose checks and explanations are those of this machine's."""

    def __init__(self, module: Arm, *arguments: Any) -> None:
        super().__init__(module, *arguments)  # type: ignore[arg-type]
        self.here = _C.Call(*arguments)

    def workspace(self, backward: bool) -> int:
        return 1  # the process has its own

    def explain(self, output: int, shared_limit: int, warpgroups: bool) -> str:
        return str(self.here.explain(output, shared_limit, warpgroups))

    def _sent(self) -> list[bytes]:
        planes, weights, biases, *others = self.kept[:7]
        return [packed(t) for t in (*planes, *weights, *biases, *others)]

    def _outputs(self, planes: Any, decoder: Any, points: Any, extra: Any) -> list[Tensor | None]:
        planes = planes or [None] * self.p.plane_count
        decoder = decoder or [None] * (2 * self.p.layers)
        return [*planes, *decoder, points, extra]

    def forward(self, out: Tensor, workspace: Tensor) -> None:
        self.module.run("decode", self.p, self._sent(), [out])

    def backward(self, grad: Tensor, planes: Any, decoder: Any, points: Any, extra: Any, workspace: Tensor) -> None:
        outputs = self._outputs(planes, decoder, points, extra)
        self.module.run("decode_backward", self.p, [*self._sent(), packed(grad)], outputs)

    def loss(self, target: Tensor, loss: int, beta: float, per_object: bool, losses: Tensor, planes: Any, decoder: Any,
             extra: Any, workspace: Tensor) -> None:  # fmt: skip
        objective = raw.Objective(None, raw.DTYPES[target.dtype], loss, beta, per_object)
        outputs = [losses, *self._outputs(planes, decoder, None, extra)]
        self.module.run("decode_loss", self.p, [*self._sent(), bytes(objective), packed(target)], outputs)


def replace_kernels(monkeypatch: Any, arm: Arm) -> None:
    """Make the ops run on the process."""
    from tcam_ext import library

    monkeypatch.setattr(library, "_C", arm)
    monkeypatch.setattr(library, "_workspaces", library._Workspaces())


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
