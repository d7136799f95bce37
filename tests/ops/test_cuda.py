"""Tests that need a GPU: streams, graphs, determinism, memory. The property tests run on it too (problems.DEVICES)."""

from __future__ import annotations

import os
import subprocess
import sys

import problems
import pytest
import torch

import tcam_ext

pytestmark = pytest.mark.gpu
#: bfloat16 runs the fused kernels, float32 the general ones.
BOTH = pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
SIZE = 12 if os.environ.get("TCAM_TEST_EMULATED") else 64
OPERATING_POINT = dict(channels=42, texels=(64, 64, 64), widths=(128, 128, 128, 128, 1), size=(SIZE,) * 3)


@pytest.fixture
def p():
    return problems.make(**OPERATING_POINT, output_activation="sigmoid").to(torch.float32, True, "cuda")


def gradients(p, **options):
    volume = p.call(tcam_ext.decode_grid, **options)
    return [volume.detach(), *torch.autograd.grad(volume.square().mean(), p.tensors)]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16, "tf32"])
def test_two_runs_give_the_same_bits(p, compute):
    first, second = gradients(p, compute_dtype=compute), gradients(p, compute_dtype=compute)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_agrees_with_the_cpu():
    p = problems.make(**OPERATING_POINT, activation="silu").to(torch.float32, True, "cuda")  # relu masks would flip
    want = [t.double() for t in gradients(p.to(torch.float32, True))]
    got = gradients(p)
    assert problems.relative(got[0], want[0]) < 1e-5
    assert problems.gradient_error(got[1:], want[1:]) < 1e-4


@pytest.mark.parametrize("shape", problems.FUSED_BACKWARD, ids=[str(s["widths"]) for s in problems.FUSED_BACKWARD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_kernels_equal_their_mirror(shape, dtype):
    """The fused kernels equal their mirror, as in test_simt_fused.py."""
    p = problems.make(**shape, output_activation="sigmoid")
    mine = p.to(torch.float32, True, "cuda")
    volume = mine.call(tcam_ext.decode_grid, compute_dtype=dtype)
    mirror = problems.fused_mirror(p.to(torch.float32), dtype)[-1].sigmoid().movedim(-1, 1)
    assert problems.relative(volume, mirror.double()) < 1e-3
    exact, out, trusted = problems.fused_reference(p, dtype)
    grad = torch.randn_like(out) * trusted
    want = torch.autograd.grad(out, exact.tensors, grad)
    got = torch.autograd.grad(volume, mine.tensors, grad.float().cuda())
    assert problems.gradient_error(list(got), list(want)) < 1e-2


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_tensor_floats(activation):
    """The root mean square over seeds. Voxels within 2e-3 of a kink, several times the error of z, are left out."""
    errors = []
    for seed in range(2 if SIZE < 64 else 8):
        torch.manual_seed(seed)
        p = problems.make(**{**OPERATING_POINT, "size": (min(SIZE, 24),) * 3}, activation=activation)
        exact, mine = p.to(torch.float64, True), p.to(torch.float32, True, "cuda")
        out, trusted = problems.masked_reference(exact, problems.round_tensor_float, margin=2e-3)
        volume = mine.call(tcam_ext.decode_grid, compute_dtype="tf32")
        grad = torch.randn_like(out) * trusted
        want = torch.autograd.grad(out, exact.tensors, grad)
        got = torch.autograd.grad(volume, mine.tensors, grad.float().cuda())
        forward = problems.relative(volume, exact.call(tcam_ext.reference.decode_grid))
        errors.append((forward, problems.gradient_error(list(got), list(want))))
    forward, backward = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert 1e-5 < forward < 1e-3
    assert backward < 1e-3


@pytest.mark.card
def test_a_float16_mean_is_the_sum_over_n():
    """1/N of 256^3 voxels is near the smallest float16 number, so no gradient may be rounded to float16 after the division."""
    p = problems.make(**{**OPERATING_POINT, "size": (256, 256, 256)}).to(torch.float32, True, "cuda")
    count = 256**3
    mean = torch.autograd.grad(p.call(tcam_ext.decode_grid, compute_dtype=torch.float16).mean(), p.tensors)
    total = torch.autograd.grad(p.call(tcam_ext.decode_grid, compute_dtype=torch.float16).sum(), p.tensors)
    assert problems.gradient_error(list(mean), [(t / count).cpu().double() for t in total]) < 1e-6
    target = torch.rand(1, 1, 256, 256, 256, device="cuda").bfloat16()
    losses = [
        torch.autograd.grad(tcam_ext.decode_grid_loss(p.planes, p.weights, p.biases, target, compute_dtype=torch.float16,
                                                      reduction=reduction), p.tensors)
        for reduction in ("mean", "sum")
    ]  # fmt: skip
    assert problems.gradient_error(list(losses[0]), [(t / count).cpu().double() for t in losses[1]]) < 1e-6


@pytest.mark.card
@BOTH
def test_runs_on_the_current_stream(p, compute):
    want = gradients(p, compute_dtype=compute)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # so that a kernel on another stream would run too early
        late = p.to(torch.float32, True, "cuda")
        for t in late.tensors:
            t.data.mul_(1.0)
        got = gradients(late, compute_dtype=compute)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.card
@BOTH
def test_never_synchronises(p, compute):
    """The call returns while the GPU still sleeps, and torch reports no synchronisation."""
    target = torch.rand(1, 1, 64, 64, 64, device="cuda")

    def everything():
        gradients(p, compute_dtype=compute)
        tcam_ext.decode_grid_loss(p.planes, p.weights, p.biases, target, compute_dtype=compute).backward()

    for _ in range(2):  # the second adds to existing gradients, as the call after the sleep does
        everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(4_000_000_000)  # seconds
        everything()
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.card
@BOTH
def test_a_graph_replays_forward_and_backward(p, compute):
    want = gradients(p, compute_dtype=compute)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(p, compute_dtype=compute)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(p, compute_dtype=compute)
    for t in got:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


FIRST_CALLS = """
import torch, tcam_ext
decoder = tcam_ext.TriplaneDecoder(8, (64, 64)).cuda()
planes = torch.randn(1, 3, 8, 16, 16, device="cuda", requires_grad=True)
def run():
    decoder.zero_grad(set_to_none=True)
    planes.grad = None
    volume = decoder(planes, (32, 32, 32), compute_dtype=torch.bfloat16)
    volume.square().sum().backward()
    return [volume.detach(), planes.grad, *(p.grad for p in decoder.parameters())]
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    want = [t.clone() for t in run()]
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = run()
graph.replay()
torch.cuda.synchronize()
assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
"""


@pytest.mark.card
def test_one_call_is_enough_to_warm_up_for_a_graph():
    """In a new process, in which no test has loaded a kernel."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.card
@BOTH
def test_memory_stays_bounded(compute):
    """Memory beyond inputs and outputs does not grow as voxels x width."""
    big = problems.make(**{**OPERATING_POINT, "size": (256, 256, 256)}).to(torch.float32, True, "cuda")
    torch.cuda.synchronize()
    for backward, limit in ((False, 0.9e9), (True, 2e9)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        volume = big.call(tcam_ext.decode_grid, compute_dtype=compute)
        if backward:
            torch.autograd.grad(volume, big.tensors, torch.ones_like(volume))
        assert torch.cuda.max_memory_allocated() - before - volume.nbytes * (2 if backward else 1) < limit


@pytest.mark.card
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@BOTH
def test_other_devices_than_the_current_one(p, compute):
    other = p.to(torch.float32, True, "cuda:1")
    got = gradients(other, compute_dtype=compute)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, gradients(p, compute_dtype=compute), strict=True))


@pytest.mark.card
def test_mixed_devices_are_refused(p):
    with pytest.raises(ValueError, match=r"weights\[0\].*cuda.*cpu"):
        tcam_ext.decode_grid(p.planes, [w.cpu() for w in p.weights], p.biases, p.size)
