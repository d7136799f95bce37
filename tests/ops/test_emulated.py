"""The voxel loops for AVX512_BF16 and AMX, compiled for this machine: the same source, with blocks of 12 x 32 and 32 x 32 sums,
and the bfloat16 instructions replaced by arithmetic (simd.h and amx.h, TCAM_EMULATE_BF16 and TCAM_EMULATE_AMX). The tests call
their extern "C" functions, and so also show that another host can fill the structs of problem.h. A machine that has all of the
instructions runs the loops themselves (test_decode_grid.py), and their emulation in `make test-all` alone."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import problems
import pytest
import raw
import torch

from tcam_ext import _C, reference
from tcam_ext.activations import ACTIVATIONS

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = os.environ.get("CXX") or shutil.which("c++")
pytestmark = [pytest.mark.skipif(CXX is None, reason="no C++ compiler"), pytest.mark.timeout(900)]
if _C.cpu_isa() == "amx":
    pytestmark.append(pytest.mark.exhaustive)


EMULATIONS = {"avx512bf16": ["-DTCAM_EMULATE_BF16=1"], "amx": ["-DTCAM_EMULATE_BF16=1", "-DTCAM_EMULATE_AMX=1"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    wide = ["-mavx2", "-mfma"] if platform.machine() == "x86_64" and _C.cpu_isa() != "portable" else []
    wide += ["-O1", "-ffp-contract=fast", "-DTCAM_ISA=emulated", "-DTCAM_VECTOR_BYTES=64"]
    objects = {
        "decode": ["decode.cpp", "-O2"],
        "isa": ["isa.cpp", "-O2", "-DTCAM_HAS_EMULATED=1"],
        "portable": ["voxel_core.cpp", "-O0", "-DTCAM_ISA=portable", "-DTCAM_VECTOR_BYTES=16"],  # linked, not run
        **{name: ["voxel_core.cpp", *wide, *flags] for name, flags in EMULATIONS.items()},
    }
    common = [*CXX.split(), "-std=c++17", "-fPIC", "-fopenmp", "-Wno-psabi"]
    running = [
        subprocess.Popen([*common, *flags, "-c", str(CSRC / "cpu" / source), "-o", f"{name}.o"], cwd=folder)
        for name, (source, *flags) in objects.items()
    ]
    assert all([p.wait() == 0 for p in running])
    for name in EMULATIONS:
        parts = ["decode.o", "isa.o", "portable.o", f"{name}.o"]
        subprocess.run([*common, "-shared", *parts, "-o", f"{name}.so"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module", params=list(EMULATIONS))
def kernels(built, request):
    library = ctypes.CDLL(str(built / f"{request.param}.so"))
    library.tcam_cpu_isa.restype = ctypes.c_char_p
    before = os.environ.pop("TCAM_CPU_ISA", None)  # read at the first call
    assert library.tcam_cpu_isa() == b"emulated"
    if before:
        os.environ["TCAM_CPU_ISA"] = before
    return raw.Kernels(library, "cpu")


SHAPES = [
    dict(channels=42, texels=(9, 8, 7), widths=(128, 128, 128, 128, 1), size=(7, 9, 11)),
    dict(channels=5, texels=(4, 5, 6), widths=(37, 21, 3), size=(8, 9, 5), bias=False),  # odd widths: a half-empty pair
    dict(channels=11, texels=(5, 5, 5), widths=(256, 160, 16), size=(6, 7, 8), batch=2, padding_mode="zeros"),
    dict(channels=3, texels=(3, 4, 5), widths=(9, 2), size=(5, 7, 9), align_corners=True),
    dict(channels=4, texels=(4, 5, 6), widths=(5,), size=(8, 7, 5)),
    dict(channels=6, texels=(4, 5, 6), widths=(300, 33), size=(6, 5, 7)),  # many outputs
    dict(channels=5, texels=(4, 5, 6), widths=(37, 21, 5), size=(6, 5, 7)),  # the same, with a half-empty pair
]


@pytest.mark.parametrize("shape", SHAPES, ids=[str(s["widths"]) for s in SHAPES])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("name", "compute"), [("float32", 0), ("bfloat16", 3)])
def test_values_and_gradients(kernels, shape, activation, name, compute):
    p = problems.make(**shape, activation=activation, output_activation="sigmoid")
    p32, exact = p.to(torch.float32), p.to(torch.float64, requires_grad=True)
    rounding = problems.round_bfloat16 if name == "bfloat16" else None
    out, trusted = problems.masked_reference(exact, rounding, margin=1e-5)
    full = p.call(reference.decode_grid)
    assert problems.relative(kernels.forward(p32, compute), full) < problems.FORWARD_LIMIT[name]
    grad = torch.randn_like(out) * trusted
    want = torch.autograd.grad(out, exact.tensors, grad)
    assert problems.gradient_error(kernels.backward(p32, grad.float(), compute), list(want)) < problems.GRADIENT_LIMIT[name]


@pytest.mark.parametrize(("name", "compute"), [("float32", 0), ("bfloat16", 3)])
def test_layers_that_read_the_features(kernels, name, compute):
    """The rows of layer 3 for the features follow those of layer 1, from row 64 on."""
    p = problems.make(channels=5, texels=(4, 5, 6), widths=(84, 33, 20, 2), size=(7, 6, 9), activation="tanh", batch=2)
    p.weights[0][40:64], p.biases[0][40:] = 0, 0
    p.weights[1] = torch.randn(33, 40, dtype=torch.float64) / 40**0.5
    leaves = p.to(torch.float64, requires_grad=True)
    first, second, third, last = leaves.weights
    weights = [first[:40], second, torch.cat((first[64:], third), 1), last]
    biases = [leaves.biases[0][:40], leaves.biases[1], leaves.biases[2] + leaves.biases[0][64:], leaves.biases[3]]
    want = reference.decode_grid(leaves.planes, weights, biases, p.size, activation="tanh", skips=(2,))
    p.options["skips"] = [(3, 64)]
    p32 = p.to(torch.float32)
    assert problems.relative(kernels.forward(p32, compute), want) < problems.FORWARD_LIMIT[name]
    grad = torch.randn_like(want)
    want_grads = list(torch.autograd.grad(want, leaves.tensors, grad))
    grads = kernels.backward(p32, grad.float(), compute)
    at = len(p.planes)  # the gradients of rows of no layer are those of an unused sum
    grads[at][40:64], want_grads[at][40:64] = 0, 0
    assert problems.gradient_error(grads, want_grads) < problems.GRADIENT_LIMIT[name]


def test_bfloat16_gradients_are_as_good_as_torchs_own(kernels, capsys):
    """Rounding inevitably flips some relu masks, so the unmasked error is compared with that of a decode by torch in bfloat16
    (docs/performance.md, "Accuracy")."""
    p = problems.make(channels=42, texels=(16, 16, 16), widths=(128, 128, 128, 1), size=(16, 16, 16))
    exact = p.to(torch.float64, requires_grad=True)
    out = exact.call(reference.decode_grid)
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, exact.tensors, grad)
    theirs = p.to(torch.float32, requires_grad=True)
    autocast = theirs.call(reference.decode_grid, compute_dtype=torch.bfloat16)
    torch_error = problems.gradient_error(list(torch.autograd.grad(autocast, theirs.tensors, grad.float())), list(want))
    our_error = problems.gradient_error(kernels.backward(p.to(torch.float32), grad.float(), 3), list(want))
    with capsys.disabled():
        print(f"\n[bfloat16 relu gradients, unmasked: ours {our_error:.3f}, torch {torch_error:.3f}]", end="")
    assert our_error < 1.2 * torch_error


@pytest.mark.parametrize("outputs", [2, 35])
def test_bits_do_not_depend_on_threads_or_tiles(kernels, outputs):
    p = problems.make(channels=6, widths=(40, 33, outputs), size=(20, 30, 26)).to(torch.float32)
    grad = torch.randn(1, outputs, 20, 30, 26)
    forward, backward = kernels.forward(p, 3, threads=1), kernels.backward(p, grad, 3, threads=1)
    for threads, tile in ((2, 0), (3, 12), (2, 60)):
        assert torch.equal(kernels.forward(p, 3, threads=threads, tile=tile), forward)
        assert all(
            torch.equal(a, b) for a, b in zip(kernels.backward(p, grad, 3, threads=threads, tile=tile), backward, strict=True)
        )


def test_a_wheel_kernel_agrees(kernels):
    """float32 in the 512-bit register tile and in the installed module differ only by rounding."""
    import tcam_ext

    p = problems.make(**SHAPES[0]).to(torch.float32)
    assert problems.relative(p.call(tcam_ext.decode_grid), kernels.forward(p).double()) < 1e-6
