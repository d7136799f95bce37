"""explain: the kernels that a call would use. test_simt_fused.py compares it with the CUDA kernels that run."""

from __future__ import annotations

import problems
import pytest
import torch

import tcam_ext
from tcam_ext import _C

DECODER = tcam_ext.TriplaneDecoder(4, (16, 16))
PLANES = torch.randn(1, 3, 4, 5, 5)
FINE = [torch.randn(1, 4, n, n) for n in (5, 64, 64)]
needs_cuda_build = pytest.mark.skipif(not _C.has_cuda, reason="tcam_ext was built without CUDA")


def test_nothing_is_computed():
    explained = tcam_ext.explain(DECODER, PLANES, (100_000, 100_000, 1))  # 40 GB
    assert _C.cpu_isa() in explained["values"]
    assert set(explained) == {"values", "gradients"}


def test_products_on_a_cpu():
    text = tcam_ext.explain(DECODER, PLANES, (8, 8, 8), compute_dtype=torch.bfloat16)["values"]
    assert ("bfloat16 products" in text) == _C.cpu_has_bf16()
    assert "float16" in tcam_ext.explain(DECODER, PLANES, (8, 8, 8), compute_dtype=torch.float16)["values"]


def test_why_a_grid_goes_voxel_by_voxel():
    assert "maps" in tcam_ext.explain(DECODER, PLANES, (8, 8, 8))["values"]
    noisy = tcam_ext.explain(DECODER, PLANES, (8, 8, 8), noise_std=0.1, noise_seed=1)["values"]
    assert "voxel by voxel, as every voxel has its own noise" in noisy
    product = tcam_ext.TriplaneDecoder(4, (16,), reduce="prod")
    assert "maps over pairs of axes, multiplied" in tcam_ext.explain(product, PLANES, (8, 8, 8))["values"]
    noisy = tcam_ext.explain(product, PLANES, (8, 8, 8), noise_std=0.1, noise_seed=1)["values"]
    assert "voxel by voxel, as planes are multiplied and every voxel has its own noise" in noisy
    assert "2 of 3 planes sampled before" in tcam_ext.explain(DECODER, FINE, (8, 8, 8))["values"]
    assert "points" in tcam_ext.explain(DECODER.points, PLANES, torch.zeros(1, 9, 3))["values"]


@needs_cuda_build
@pytest.mark.parametrize(
    ("widths", "outputs", "activation", "compute", "card", "values", "gradients"),
    [
        ((128,) * 4, 1, "relu", torch.bfloat16, "sm_90a", "by wgmma: 128 channels, 3 products, teams of 2 x 1", "3 launches"),
        (
            (128,) * 4,
            1,
            "relu",
            torch.bfloat16,
            "sm_80",
            "by mma.sync: 128 channels, 3 products, teams of 3 x 2",
            "211728 bytes of shared memory and has",
        ),
        ((128,) * 4, 1, "relu", torch.float16, "sm_86", "needs 144512 bytes", "needs 211728 bytes"),
        ((64,) * 4, 1, "relu", torch.float16, "sm_89", "64 channels", "float16"),
        ((200, 8), 1, "relu", torch.bfloat16, "sm_90", "200 wide, and they take up to 128", "200 wide"),
        ((64, 64), 1, "silu", torch.bfloat16, "sm_90", "hidden layer 1 is not a relu", "not a relu"),
        ((64,), 1, "relu", torch.bfloat16, "sm_90", "2 layers, and they take 3 to 5", "2 layers"),
        ((64, 64), 5, "relu", torch.bfloat16, "sm_90", "5 outputs, and they take up to 4", "5 outputs"),
        ((64, 64), 1, "relu", torch.float32, "sm_90", "float32 products; not the fused kernels", "compute_dtype"),
        ((64, 64), 1, "relu", torch.float64, "sm_90", "float64 products", "float64 products"),
    ],
)
def test_cards(widths, outputs, activation, compute, card, values, gradients):
    decoder = tcam_ext.TriplaneDecoder(4, widths, outputs, activation=activation)
    if compute == torch.float64:
        decoder, planes = decoder.double(), PLANES.double()
    else:
        planes = PLANES
    for place in (dict(size=(8, 8, 8)), dict(size=(8, 8, 8), noise_std=0.1, noise_seed=1)):
        explained = tcam_ext.explain(decoder, planes, **place, compute_dtype=compute, device=card)
        assert values in explained["values"]
        assert gradients in explained["gradients"]
    target = torch.rand(1, outputs, 8, 8, 8)
    loss = tcam_ext.explain(decoder.loss, planes, target, compute_dtype=compute, device=card)
    assert gradients in loss["gradients"]


@pytest.mark.gpu
def test_the_device_of_the_planes_is_meant():
    decoder = tcam_ext.TriplaneDecoder(4, (64, 64), device="cuda")
    explained = tcam_ext.explain(decoder, PLANES.cuda(), (8, 8, 8), compute_dtype=torch.bfloat16)
    assert "fused" in explained["values"]
    assert explained == tcam_ext.explain(decoder, PLANES.cuda(), (8, 8, 8), compute_dtype=torch.bfloat16, device="cuda:0")


@pytest.mark.parametrize("device", ["sm_75", "gpu", "cuda:99", 3.5, "mps"])
def test_bad_devices(device):
    with pytest.raises((ValueError, TypeError), match="device: expected"):
        tcam_ext.explain(DECODER, PLANES, (8, 8, 8), device=device)


def test_bad_calls():
    with pytest.raises(ValueError, match=r"op: expected one call.*reference"):
        tcam_ext.explain(DECODER, PLANES, (8, 8, 8), impl="reference")
    with pytest.raises(ValueError, match=r"op: expected one call.*2 calls"):
        tcam_ext.explain(lambda: [DECODER(PLANES, (8, 8, 8)), DECODER(PLANES, (8, 8, 8))])
    with pytest.raises(ValueError, match="size"):
        tcam_ext.explain(DECODER, PLANES, (8, 8))
    p = problems.make().to(torch.float32)  # after an error, calls are computed again
    assert p.call(tcam_ext.decode_grid).isfinite().all()
