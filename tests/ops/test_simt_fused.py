"""The CUDA kernels on the emulator of tests/simt: grids on the fused tensor-core kernels."""

from __future__ import annotations

import problems
import pytest
import raw
import simt
import torch
from problems import FUSED_BACKWARD, FUSED_FORWARD, HALF
from simt import HOPPER, SCHEDULES, SHAPES, gradients

from tcam_ext import reference
from tcam_ext.losses import LOSSES

pytestmark = simt.skip_where_it_cannot_run


@pytest.fixture(
    params=[(227 << 10, 2, True), (227 << 10, 2, False), (163 << 10, 3, False)], ids=["wgmma", "227 KiB", "163 KiB"]
)
def device(request, kernels):
    kernels.library.simt_device(*request.param)
    yield
    kernels.library.simt_device(*HOPPER)


@pytest.fixture(params=[True, False], ids=["wgmma", "mma.sync"])
def instruction(request, kernels):
    """The instruction with which the fused kernels multiply."""
    kernels.library.simt_device(227 << 10, 2, request.param)
    yield
    kernels.library.simt_device(*HOPPER)


@pytest.mark.parametrize("shape", FUSED_FORWARD, ids=[str(s["widths"]) for s in FUSED_FORWARD])
@pytest.mark.parametrize("dtype", sorted(HALF))
def test_the_fused_kernel_equals_its_mirror(kernels, device, shape, dtype):
    p = problems.make(**shape, output_activation="sigmoid")
    p32 = p.to(torch.float32)
    got = kernels.forward(p32, raw.DTYPES[HALF[dtype]])
    assert problems.relative(got, problems.fused_mirror(p32, HALF[dtype])[-1].sigmoid().movedim(-1, 1).double()) < 1e-3
    full = p.call(reference.decode_grid)
    error = problems.relative(got, full)
    assert 1e-6 < error < 1e-2  # not zero, so the general kernels in float32 did not run


@pytest.mark.parametrize("dtype", sorted(HALF))
def test_the_last_layer_loses_nothing_of_its_weights(kernels, dtype):
    """With activations that are exact in the half dtype, the only error is that of the last weight as high and low halves."""
    p = problems.make(channels=2, texels=(1, 1, 1), widths=(16, 16, 3), size=(3, 4, 40), bias=False)
    p.planes = [torch.randint(-2, 3, q.shape).double() for q in p.planes]
    p.weights[0] = torch.randint(0, 4, p.weights[0].shape).double()
    p.weights[1] = torch.eye(16, dtype=torch.float64)
    got = kernels.forward(p.to(torch.float32), raw.DTYPES[HALF[dtype]])
    assert problems.relative(got, p.call(reference.decode_grid)) < 1e-5


def test_the_fused_kernel_under_every_schedule(kernels, schedule):
    p = problems.make(**FUSED_FORWARD[0]).to(torch.float32)
    want = kernels.forward(p, 3)
    for name in SCHEDULES:
        schedule(name)
        assert torch.equal(kernels.forward(p, 3), want), name


def test_a_box_of_the_fused_kernel_is_the_same_part_of_the_whole_bit_for_bit(kernels):
    p = problems.make(**FUSED_FORWARD[3]).to(torch.float32)
    box = ((1, 2), (2, 7), (30, 95))
    assert torch.equal(kernels.forward(p, 3, box=box), kernels.forward(p, 3)[:, :, 1:2, 2:7, 30:95])


def test_no_fused_kernel_fits_and_the_general_path_serves(kernels):
    p = problems.make(**FUSED_FORWARD[0]).to(torch.float32)
    kernels.library.simt_device(99 << 10, 2, False)
    got = kernels.forward(p, 3)
    kernels.library.simt_device(*HOPPER)
    assert torch.equal(got, kernels.forward(p, 5))


# ---- gradients and losses --------------------------------------------------------------------


@pytest.mark.parametrize("shape", FUSED_BACKWARD, ids=[str(s["widths"]) for s in FUSED_BACKWARD])
@pytest.mark.parametrize("dtype", sorted(HALF))
@pytest.mark.parametrize("tile", [0, 1], ids=["one slab", "slabs"])
def test_fused_gradients(kernels, instruction, shape, dtype, tile):
    p = problems.make(**shape, output_activation="sigmoid")
    exact, out, trusted = problems.fused_reference(p, HALF[dtype])
    grad = torch.randn_like(out) * trusted
    want = gradients(out, exact.tensors, grad)
    p32, compute = p.to(torch.float32), raw.DTYPES[HALF[dtype]]
    got = kernels.backward(p32, grad.float(), compute, tile=tile)
    error = problems.gradient_error(got, want)
    assert 1e-5 < error < 1e-2  # not zero, so the general kernels in float32 did not run
    for grads in ((True, False), (False, True)):
        chosen = got[:3] if grads[0] else got[3:]
        some = kernels.backward(p32, grad.float(), compute, tile=tile, grads=grads)
        assert all(torch.equal(a, b) for a, b in zip(some, chosen, strict=True))


@pytest.mark.parametrize("shape", FUSED_BACKWARD, ids=[str(s["widths"]) for s in FUSED_BACKWARD])
@pytest.mark.parametrize(("loss", "per_object"), [("mse", False), ("smooth_l1", True), ("l1", False)])
def test_fused_losses(kernels, shape, loss, per_object):
    p = problems.make(**shape, output_activation="sigmoid")
    exact, out, _ = problems.fused_reference(p, torch.bfloat16)
    # A difference of order one, as mse's gradient is proportional to it, and l1's jumps where it is zero.
    target = (out.detach() + torch.randn_like(out).sign() * (1 + torch.rand_like(out))).float()
    each = LOSSES[loss](out, target.double(), 0.01).flatten(1).sum(1)
    losses, *got = kernels.loss(p.to(torch.float32), target, loss, 0.01, per_object, 3)
    assert problems.relative(losses, each) < 1e-2
    rows = [torch.autograd.grad(e, exact.tensors, retain_graph=True) for e in each]
    want = [torch.stack(r) if per_object and i >= 3 else sum(r) for i, r in enumerate(zip(*rows, strict=True))]
    assert problems.gradient_error(got, want) < 1e-2
    alone = kernels.loss(p.to(torch.float32), target, loss, 0.01, per_object, 3, grads=(False, False))
    torch.testing.assert_close(alone[0], losses, rtol=1e-13, atol=0)
    for grads in ((True, False), (False, True)):
        chosen = got[:3] if grads[0] else got[3:]
        some = kernels.loss(p.to(torch.float32), target, loss, 0.01, per_object, 3, grads=grads)[1:]
        assert all(torch.equal(a, b) for a, b in zip(some, chosen, strict=True))


@pytest.mark.parametrize("shape", FUSED_BACKWARD, ids=[str(s["widths"]) for s in FUSED_BACKWARD])
@pytest.mark.parametrize("dtype", sorted(HALF))
def test_fused_losses_equal_decode_then_loss_then_backward(kernels, shape, dtype):
    """The forward kernel and the head of the backward agree, as on a GPU in test_decode_grid_loss.py."""
    p, compute = problems.make(**shape, output_activation="sigmoid").to(torch.float32), raw.DTYPES[HALF[dtype]]
    volume = kernels.forward(p, compute).requires_grad_()
    target = torch.rand_like(volume)
    each = LOSSES["smooth_l1"](volume, target, 0.3).double().flatten(1).sum(1)
    losses, *got = kernels.loss(p, target, "smooth_l1", 0.3, compute=compute)
    torch.testing.assert_close(losses, each.detach(), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(each.sum(), volume)
    want = kernels.backward(p, grad, compute)
    limit = problems.GRADIENT_LIMIT["float32"] if dtype == "bfloat16" else 1e-3  # float16's scales follow the gradient
    assert problems.gradient_error(got, [w.double() for w in want]) < limit


def test_a_nan_of_the_planes_reaches_the_gradients(kernels, instruction):
    """As in torch, whose relu passes it on: a mask that took it for zero would hide it."""
    p = problems.make(**FUSED_BACKWARD[0], output_activation="sigmoid").to(torch.float32)
    p.planes[0][0, 0, 1, 1] = torch.nan
    gradients = kernels.backward(p, torch.ones(1, 1, *p.size), 3)
    assert all(g.isnan().any() for g in gradients if g is not None)
    assert not gradients[0].isnan().all()


def test_a_launch_that_fails_is_an_error_and_no_reason_for_other_kernels(kernels):
    p = problems.make(**FUSED_BACKWARD[0]).to(torch.float32)
    for call in (lambda: kernels.forward(p, 3), lambda: kernels.backward(p, torch.ones(1, 1, *p.size), 3)):
        kernels.library.simt_fail(9)  # cudaErrorInvalidConfiguration, once taken for too little shared memory
        with pytest.raises(RuntimeError, match="status 9"):
            call()


@pytest.mark.parametrize(("shared", "wgmma"), [(99, False), (163, False), (227, False), (227, True)])
@pytest.mark.parametrize("shape", [*FUSED_FORWARD, *SHAPES[:2]], ids=lambda s: str(s["widths"]))
def test_the_explanation_is_what_happens(kernels, shape, shared, wgmma):
    """Explained as fused exactly if the bits differ from those of the general kernels."""
    p = problems.make(**shape).to(torch.float32)
    grad = torch.randn(p.planes[0].shape[0], p.weights[-1].shape[0], *p.size)
    kernels.library.simt_device(shared << 10, 2, wgmma)
    try:
        values = torch.equal(kernels.forward(p, 3), kernels.forward(p, 5))
        pairs = zip(kernels.backward(p, grad, 3), kernels.backward(p, grad, 5), strict=True)
        gradients = all(torch.equal(a, b) for a, b in pairs)
    finally:
        kernels.library.simt_device(*HOPPER)
    for output, general in ((0, values), (2, gradients)):
        text = kernels.explain(p, 3, output, shared << 10, wgmma)
        assert ("layer by layer, TensorFloat-32 products; not the fused kernels: " in text) == general
        assert text.startswith("fused, ") != general


@pytest.mark.parametrize("shape", FUSED_BACKWARD[:2], ids=[str(s["widths"]) for s in FUSED_BACKWARD[:2]])
def test_fused_gradients_under_every_schedule(kernels, schedule, shape):
    p = problems.make(**shape).to(torch.float32)
    target = torch.rand(p.planes[0].shape[0], shape["widths"][-1], *p.size)
    want = kernels.loss(p, target, "mse", compute=3)
    for name in SCHEDULES:
        schedule(name)
        got = kernels.loss(p, target, "mse", compute=3)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


@pytest.mark.parametrize("exponent", [-40, 30])
def test_fused_float16_gradients_do_not_underflow(kernels, exponent):
    """grad_output times a power of two gives the gradients times that power, even in float16 (least number 2^-24)."""
    p = problems.make(**FUSED_BACKWARD[0]).to(torch.float32)
    grad = torch.randn(1, 1, *p.size)
    want = [g * 2.0**exponent for g in kernels.backward(p, grad, 2)]
    assert all(torch.equal(a, b) for a, b in zip(kernels.backward(p, grad * 2.0**exponent, 2), want, strict=True))


@pytest.mark.parametrize("shape", FUSED_BACKWARD[:2], ids=[str(s["widths"]) for s in FUSED_BACKWARD[:2]])
def test_fused_float16_gradients_below_a_small_last_layer(kernels, shape):
    """The gradients of all layers below it are small, and float16 must not lose them."""
    p = problems.make(**shape)
    p.weights[-1] *= 1e-4
    exact, out, trusted = problems.fused_reference(p, torch.float16)
    grad = torch.randn_like(out) * trusted
    want = torch.autograd.grad(out, exact.tensors, grad, retain_graph=True)
    got = kernels.backward(p.to(torch.float32), grad.float(), 2)
    assert max(problems.relative(g, w) for g, w in zip(got, want, strict=True) if w.norm() > 1e-6) < 1e-2
    target = (out.detach() + torch.randn_like(out).sign() * (1 + torch.rand_like(out))).float()
    want = gradients(LOSSES["l1"](out, target.double(), 0.3).sum(), exact.tensors, None)
    got = kernels.loss(p.to(torch.float32), target, "l1", compute=2)[1:]
    assert max(problems.relative(g, w) for g, w in zip(got, want, strict=True) if w.norm() > 1e-6) < 2e-2


def test_fused_float16_mse_of_an_output_far_from_its_target(kernels):
    """The slope of mse is the difference: scaled as for a bounded output, it would overflow float16."""
    p = problems.make(**FUSED_BACKWARD[0])
    p.biases[-1] += 1000.0
    exact, out, _ = problems.fused_reference(p, torch.float16)
    target = torch.rand_like(out.detach()).float()
    want = gradients(LOSSES["mse"](out, target.double(), 0.3).sum(), exact.tensors, None)
    got = kernels.loss(p.to(torch.float32), target, "mse", compute=2)[1:]
    assert problems.gradient_error(got, want) < 1e-2


def test_float16_gradients_of_trunc_exp(kernels):
    """Its slope, to exp(15), is beyond float16: kernels with a wider format compute these gradients."""
    p = problems.make(**FUSED_BACKWARD[0], output_activation="trunc_exp")
    p.biases[-1] += 12.0
    exact = p.to(torch.float64, requires_grad=True)
    grad = torch.randn(1, 1, *p.size, dtype=torch.float64)
    want = gradients(exact.call(reference.decode_grid), exact.tensors, grad)
    got = kernels.backward(p.to(torch.float32), grad.float(), 2)
    assert problems.gradient_error(got, want) < 0.1
    assert "trunc_exp" in kernels.explain(p.to(torch.float32), 2, 2, 227 << 10)
    assert kernels.explain(p.to(torch.float32), 2, 0, 227 << 10).startswith("fused, ")


@pytest.mark.parametrize(
    ("compute", "backward", "limit"),
    [(3, False, 0.5e9), (3, True, 2e9), (2, True, 2e9), (5, False, 0.9e9), (5, True, 2e9), (0, False, 0.9e9), (0, True, 2e9)],
)
def test_the_workspace_at_512(kernels, capsys, compute, backward, limit):
    """Memory beyond inputs and outputs at the operating point, with and without point noise; on a GPU see test_cuda.py."""
    p = problems.make(channels=42, texels=(64, 64, 64), widths=(128, 128, 128, 128, 1), size=(512, 512, 512)).to(torch.float32)
    for noise_std in (0.0, 0.32):
        p.options |= {"noise_std": noise_std}
        size = kernels.workspace(p, compute, backward)
        with capsys.disabled():
            what = f"compute {compute}, backward {backward}, noise {noise_std}"
            print(f"\n[workspace at 512^3, {what}: {size / 1e9:.2f} GB]", end="")
        assert size < limit


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_fused_float16_gradients_of_what_has_no_scale(kernels, value):
    p = problems.make(**FUSED_BACKWARD[2]).to(torch.float32)
    grad = torch.zeros(1, 1, *p.size)
    grad[..., 0] = value
    for g in kernels.backward(p, grad, 2):
        assert torch.all(g == 0) if value == 0 else not g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_fused_targets_of_every_dtype(kernels, dtype):
    p = problems.make(**FUSED_BACKWARD[1]).to(torch.float32)
    target = torch.rand(2, 2, *p.size).mul(255 if dtype == torch.uint8 else 1).to(dtype)
    got = kernels.loss(p, target, "mse", compute=3)
    want = kernels.loss(p, target.float() / (255 if dtype == torch.uint8 else 1), "mse", compute=3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_fused_bfloat16_gradients_are_as_good_as_torchs_own(kernels, capsys):
    """The unmasked error, as in test_emulated.py."""
    p = problems.make(channels=12, texels=(6, 7, 8), widths=(128, 128, 128, 1), size=(6, 8, 32))
    exact = p.to(torch.float64, requires_grad=True)
    grad = torch.randn(1, 1, *p.size, dtype=torch.float64)
    want = gradients(exact.call(reference.decode_grid), exact.tensors, grad)
    theirs = p.to(torch.float32, requires_grad=True)
    autocast = theirs.call(reference.decode_grid, compute_dtype=torch.bfloat16)
    torch_error = problems.gradient_error(gradients(autocast, theirs.tensors, grad.float()), want)
    our_error = problems.gradient_error(kernels.backward(p.to(torch.float32), grad.float(), 3), want)
    with capsys.disabled():
        print(f"\n[bfloat16 relu gradients, fused, unmasked: ours {our_error:.3f}, torch {torch_error:.3f}]", end="")
    assert our_error < 1.2 * torch_error


def test_no_fused_backward_fits_and_the_general_kernels_serve(kernels):
    p = problems.make(**FUSED_BACKWARD[0]).to(torch.float32)
    grad = torch.randn(1, 1, *p.size)
    kernels.library.simt_device(163 << 10, 2, False)
    got = kernels.backward(p, grad, 3)
    kernels.library.simt_device(*HOPPER)
    assert all(torch.equal(a, b) for a, b in zip(got, kernels.backward(p, grad, 5), strict=True))
