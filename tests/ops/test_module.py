"""TriplaneDecoder, info, and the binary."""

from __future__ import annotations

import inspect
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
from tcam_ext.options import Options

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
    """No libtorch or libcudart is linked, and torch's copy of libgomp (GOMP_5.0) has all OpenMP symbols."""
    symbols = _nm("-D", "--undefined-only", _C.__file__)
    assert "c10" not in symbols
    assert "cuda" not in symbols
    versions = [float(v) for v in re.findall(r"@G?OMP_(\d+\.\d+)", symbols)]
    assert versions
    assert max(versions) <= 5.0


def test_instruction_set_objects_leak_no_shared_code():
    """An inline function compiled for AVX-512 must not be the copy that older machines run."""
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


# ---- options -------------------------------------------------------------------------------------


def test_every_option_stands_in_the_signature_and_in_the_docstring():
    names = Options._fields
    for op in (tcam_ext.decode_grid, tcam_ext.decode_grid_loss, tcam_ext.decode_points, tcam_ext.TriplaneDecoder):
        parameters = inspect.signature(op).parameters
        assert set(names) <= set(parameters), op
        assert "options" not in parameters
        assert all(parameters[n].kind is inspect.Parameter.KEYWORD_ONLY for n in names)
        assert all(n in op.__doc__ for n in names)
        assert "<options>" not in op.__doc__
        assert "<meaning" not in op.__doc__
    assert inspect.signature(tcam_ext.TriplaneDecoder).parameters["output_activation"].default == "sigmoid"
    sampling = inspect.signature(tcam_ext.sample_grid).parameters
    assert "padding_mode" in sampling
    assert "activation" not in sampling
    method = list(inspect.signature(tcam_ext.TriplaneDecoder(2).points).parameters)
    assert method[:2] == ["planes", "xyz"]
    assert "noise_std" in method


def test_a_calls_options_take_the_place_of_the_decoders():
    decoder = tcam_ext.TriplaneDecoder(3, (8,), padding_mode="zeros", activation="silu", compute_dtype=torch.float64)
    planes = torch.randn(1, 3, 3, 4, 4)
    volume = decoder(planes, (5, 6, 7))
    weights, biases = [m.weight for m in decoder.layers()], [m.bias for m in decoder.layers()]
    mine = dict(output_activation="sigmoid", padding_mode="zeros", activation="silu", compute_dtype=torch.float64)
    assert torch.equal(volume, tcam_ext.decode_grid(planes, weights, biases, (5, 6, 7), **mine))
    other = decoder(planes, (5, 6, 7), output_activation="none", activation="tanh")
    mine |= dict(output_activation="none", activation="tanh")
    assert torch.equal(other, tcam_ext.decode_grid(planes, weights, biases, (5, 6, 7), **mine))
    assert torch.equal(decoder(planes, (5, 6, 7)), volume)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_an_unknown_option_is_named(impl):
    with pytest.raises(TypeError, match=r"paddin: no such option; expected .*padding_mode"):
        tcam_ext.sample_grid(torch.zeros(1, 3, 2, 3, 3), (2, 2, 2), impl=impl, paddin="zeros")
    with pytest.raises(TypeError, match="activation: no such option"):
        tcam_ext.sample_grid(torch.zeros(1, 3, 2, 3, 3), (2, 2, 2), impl=impl, activation="relu")
    with pytest.raises(TypeError, match="paddin: no such option"):
        tcam_ext.TriplaneDecoder(2, paddin="zeros")
