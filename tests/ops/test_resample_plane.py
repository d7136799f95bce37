"""resample_plane: the same bilinear taps (csrc/maths/bilinear.h) on every device."""

from __future__ import annotations

import pytest
import torch

from tcam_ext import library
from tcam_ext.reference import linear_taps, sample_plane

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
@pytest.mark.parametrize("shape", [(5, 7, 3, 11, 4), (64, 64, 128, 96, 100), (1, 1, 1, 3, 2), (9, 2, 130, 1, 17)])
def test_equals_the_reference(device, dtype, align_corners, padding_mode, shape):
    m0, m1, channels, n0, n1 = shape
    plane = torch.randn(m0, m1, channels, dtype=torch.float64)
    rows, columns = (linear_taps(0, n, n, m, align_corners, padding_mode) for n, m in ((n0, m0), (n1, m1)))
    want = sample_plane(plane.movedim(-1, 0).unsqueeze(0), rows, columns)[0].movedim(0, -1)
    got = library.resample_plane(plane.to(device, dtype), [n0, n1], align_corners, padding_mode)
    assert got.device.type == device
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    assert float((got.cpu().double() - want).norm() / want.norm()) < limit


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    torch.library.opcheck(library.resample_plane, (torch.randn(5, 6, 3, device=device), [4, 9], False, "zeros"))


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph():
    plane = torch.randn(16, 16, 32, device="cuda")
    want = library.resample_plane(plane, [40, 40], False, "border")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        library.resample_plane(plane, [40, 40], False, "border")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = library.resample_plane(plane, [40, 40], False, "border")
    got.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
