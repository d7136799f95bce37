"""TriplaneDecoder, info, and the binary itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tcam_ext
from tcam_ext import _C, info

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_go_both_ways_with_a_sequential(activation, bias):
    decoder = tcam_ext.TriplaneDecoder(4, (12, 9), 2, activation=activation, output_activation="none", bias=bias)
    act = {"relu": nn.ReLU, "silu": nn.SiLU}[activation]
    plain = nn.Sequential(nn.Linear(12, 12, bias), act(), nn.Linear(12, 9, bias), act(), nn.Linear(9, 2, bias))
    plain.load_state_dict(decoder.state_dict())
    decoder.load_state_dict(plain.state_dict())
    planes = torch.randn(1, 3, 4, 5, 5)
    features = tcam_ext.decode_grid(planes, [torch.eye(12)], [None], (5, 5, 5))
    want = plain(features.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(decoder(planes, (5, 5, 5)), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder.sequential()(features.movedim(1, -1)).movedim(-1, 1), want)


def test_the_operating_point_has_the_papers_number_of_parameters():
    assert sum(p.numel() for p in tcam_ext.TriplaneDecoder(42).parameters()) == 65_921


def test_a_decoder_trains():
    decoder = tcam_ext.TriplaneDecoder(4, (16,), 1)
    planes = (0.1 * torch.randn(1, 3, 4, 8, 8)).requires_grad_()
    target = torch.rand(1, 1, 8, 8, 8)
    optimiser = torch.optim.Adam([planes, *decoder.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (decoder(planes, (8, 8, 8)) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_info_names_what_one_asks_for():
    done = subprocess.run([sys.executable, "-m", "tcam_ext.info"], capture_output=True, text=True, check=True)
    for word in (tcam_ext.__version__, torch.__version__, _C.cpu_isa(), "threads", "CUDA"):
        assert word in done.stdout
    assert [f"{k}" for k, _ in info.lines()]


def test_an_unknown_instruction_set_is_an_error():
    env = {**os.environ, "TCAM_CPU_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", "import tcam_ext"], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TCAM_CPU_ISA=sse9" in done.stderr


def _nm(*arguments: str) -> str:
    return subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(subprocess.run(["which", "nm"], capture_output=True).returncode != 0, reason="no nm")
def test_the_module_needs_no_torch_library_and_no_recent_openmp():
    """No libtorch or libcudart to link; OpenMP symbols that torch's own copy of libgomp has (GOMP_5.0)."""
    symbols = _nm("-D", "--undefined-only", _C.__file__)
    assert "c10" not in symbols
    assert "cuda" not in symbols
    versions = [float(v) for v in re.findall(r"@G?OMP_(\d+\.\d+)", symbols)]
    assert versions
    assert max(versions) <= 5.0


def test_instruction_set_objects_leak_no_shared_code():
    """An inline function compiled for AVX-512 must not become the copy that older machines run."""
    objects = list((ROOT / "build").glob("ninja-*/voxel_core.*.o"))
    if not objects:
        pytest.skip("no build folder here")
    for path in objects:
        leaked = [line for line in _nm("-C", str(path)).splitlines() if re.search(r" [WVu] ", line)]
        assert not leaked, (path.name, leaked)


def test_versions_agree():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{tcam_ext.__version__}"' in pyproject
    assert _C.version == tcam_ext.__version__
