"""decode_grid_loss gives the loss and the gradients of decoding, comparing and averaging, in one pass."""

from __future__ import annotations

from dataclasses import replace

import problems
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tcam_ext
from tcam_ext import library, reference
from tcam_ext.losses import LOSSES

REDUCTIONS = ("mean", "sum", "none_batch")


def voxels_of(p):
    return (p.planes[0].shape[0], p.weights[-1].shape[0], *p.size)


def random_target(p, dtype):
    shape = voxels_of(p)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.rand(shape, dtype=torch.float64).to(dtype)


def one_pass(p, target, loss_of=tcam_ext.decode_grid_loss, **options):
    return loss_of(p.planes, p.weights, p.biases, target, p.size, **{**p.options, **options})


def gradients(value, tensors, weight=None):
    return list(torch.autograd.grad(value, tensors, torch.ones_like(value) if weight is None else weight))


@pytest.mark.parametrize("device", problems.DEVICES)
@problems.examples(100)
@given(
    p=problems.problems(),
    loss=st.sampled_from(sorted(LOSSES)),
    reduction=st.sampled_from(REDUCTIONS),
    beta=st.sampled_from([0.0, 0.05, 0.3, 2.0]),
    target=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8]),
)
def test_equals_the_float64_reference(device, p, loss, reduction, beta, target):
    p, want_volume = p.to(torch.float64, True, device), random_target(p, target).to(device)
    options = dict(loss=loss, reduction=reduction, beta=beta)
    got = one_pass(p, want_volume, **options)
    want = one_pass(p, want_volume, reference.decode_grid_loss, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    weight = torch.rand_like(want)
    for a, b in zip(gradients(got, p.tensors, weight), gradients(want, p.tensors, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("device", problems.DEVICES)
def test_equals_decode_then_loss_then_backward(device, activation, compute, loss):
    """Both run the same products, so that no mask flips between them, whatever the activation and precision. The loss is a
    sum: gradients of a mean, divided by N before bfloat16 rounds them, would round differently."""
    p = problems.make(channels=42, texels=(9, 8, 7), widths=(128, 96, 2), size=(9, 12, 11), activation=activation, batch=2)
    p = p.to(torch.float32, True, device)
    target = random_target(p, torch.float32).to(device)
    volume = p.call(tcam_ext.decode_grid, compute_dtype=compute)
    want = LOSSES[loss](volume, target, 0.3).sum()
    got = one_pass(p, target, loss=loss, compute_dtype=compute, reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    expected = [g.cpu().double() for g in gradients(want, p.tensors)]
    assert problems.gradient_error(gradients(got, p.tensors), expected) < problems.GRADIENT_LIMIT["float32"]


def test_the_default_is_the_papers_loss():
    p = problems.make().to(torch.float64)
    target = random_target(p, torch.float64)
    want = F.smooth_l1_loss(p.call(tcam_ext.decode_grid), target, beta=0.3)
    torch.testing.assert_close(tcam_ext.decode_grid_loss(p.planes, p.weights, p.biases, target), want)


def test_bytes_stand_for_their_255th():
    p = problems.make(output_activation="sigmoid").to(torch.float64)
    target = random_target(p, torch.uint8)
    torch.testing.assert_close(one_pass(p, target), one_pass(p, target.double() / 255), rtol=1e-14, atol=0)


def test_reductions_agree_with_each_other():
    p = problems.make(batch=3).to(torch.float64)
    target = random_target(p, torch.float64)
    each = one_pass(p, target, reduction="none_batch")
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), one_pass(p, target), rtol=1e-13, atol=0)
    torch.testing.assert_close(one_pass(p, target, reduction="sum"), one_pass(p, target) * target.numel(), rtol=1e-13, atol=0)
    for i in range(3):
        one = replace(p, planes=[q[i : i + 1] for q in p.planes])
        torch.testing.assert_close(each[i], one_pass(one, target[i : i + 1]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_boxes_add_up_to_the_whole(reduction):
    p = problems.make(size=(12, 10, 9), batch=2).to(torch.float64, requires_grad=True)
    target = random_target(p, torch.float32)
    whole = one_pass(p, target, reduction=reduction)
    want = gradients(whole, p.tensors)
    total, grads = torch.zeros_like(whole), [torch.zeros_like(t) for t in p.tensors]
    for x in ((0, 5), (5, 12)):
        part = one_pass(p, target[:, :, x[0] : x[1]], box=(x, (0, 10), (0, 9)), reduction=reduction)
        if reduction != "sum":
            part = part * ((x[1] - x[0]) / 12)
        total = total + part
        for t, g in zip(grads, gradients(part, p.tensors), strict=True):
            t += g
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    assert problems.gradient_error(grads, want) < 1e-12


@pytest.mark.parametrize("size", [(40, 24, 32), (5, 1, 700), (1, 300, 9)])
@pytest.mark.parametrize(("grads", "outputs"), [((True, True), 3), ((False, False), 3), ((True, True), 35)])
def test_bits_do_not_depend_on_threads_or_tiles(size, grads, outputs, threads):
    p = problems.make(channels=6, widths=(40, 33, outputs), size=size, batch=2, output_activation="sigmoid").to(torch.float32)
    target = random_target(p, torch.float16)
    options = (*problems.flat_options(p, "float32"), "smooth_l1", 0.3, True, *grads, False)

    def run(count, tile):
        threads(count)
        return library.decode_grid_loss(target, p.planes, p.weights, p.biases, *options, tile=tile)

    want = run(1, 0)
    for count, tile in ((1, 0), (2, 0), (3, 12), (5, 60)):
        for got, first in zip(run(count, tile), want, strict=True):
            assert torch.equal(got, first), (count, tile)


def test_the_loss_alone_is_the_same_number():
    p = problems.make(channels=6, widths=(40, 33, 3), size=(30, 20, 17)).to(torch.float32, requires_grad=True)
    target = random_target(p, torch.float32)
    with torch.no_grad():
        alone = one_pass(p, target)
    assert not alone.requires_grad
    assert torch.equal(alone, one_pass(p, target).detach())


def test_only_wanted_gradients_are_computed(monkeypatch):
    p = problems.make().to(torch.float32, requires_grad=True)
    target = random_target(p, torch.float32)
    full = gradients(one_pass(p, target), p.tensors)
    asked = []
    real = library.decode_grid_loss
    monkeypatch.setattr(library, "decode_grid_loss", lambda *a, **k: asked.append(a[-3:]) or real(*a, **k))
    frozen = replace(p, weights=[w.detach() for w in p.weights], biases=[b.detach() for b in p.biases])
    got = gradients(one_pass(frozen, target), p.planes)
    assert all(torch.equal(a, b) for a, b in zip(got, full[:3], strict=True))
    one_pass(replace(frozen, planes=[q.detach() for q in p.planes]), target)
    assert asked == [(True, False, False), (False, False, False)]


@pytest.mark.parametrize("device", problems.DEVICES)
def test_a_mean_in_float16_does_not_underflow(device):
    """Divided by N, the gradient of one voxel is below the smallest float16 number; that of the sum is not."""
    p = problems.make(channels=4, texels=(3, 3, 3), widths=(16, 1), size=(96, 96, 96), output_activation="sigmoid")
    half = p.to(torch.float16, True, device)
    wide = half.to(torch.float32, True, device)
    target = random_target(p, torch.uint8).to(device)
    loss = one_pass(half, target, compute_dtype=torch.float32)
    assert loss.dtype == torch.float32
    scaled = gradients(loss * 2.0**10, half.tensors)  # as a GradScaler does
    assert all(g.dtype == torch.float16 for g in scaled)
    want = [g.cpu().double() * 2.0**10 for g in gradients(one_pass(wide, target), wide.tensors)]
    assert problems.gradient_error(scaled, want) < 1e-3


# ---- torch's contracts -----------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
def test_gradcheck(loss, reduction):
    p = problems.make(channels=2, texels=(3, 2, 4), widths=(5, 4, 2), size=(3, 4, 3), batch=2, activation="tanh")
    p = p.to(torch.float64, requires_grad=True)
    target = random_target(p, torch.float64)

    def f(*t):
        q = replace(p, planes=list(t[:3]), weights=list(t[3:6]), biases=list(t[6:]))
        return one_pass(q, target, loss=loss, reduction=reduction, beta=10.0)  # no kink nearby

    assert torch.autograd.gradcheck(f, p.tensors)


@pytest.mark.parametrize("per_object", [False, True])
@pytest.mark.parametrize("device", problems.DEVICES)
def test_opcheck(device, per_object):
    p = problems.make(batch=2).to(torch.float32, device=device)
    options = (*problems.flat_options(p, "float32"), "l1", 0.3, per_object)
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        arguments = (random_target(p, torch.uint8).to(device), p.planes, p.weights, p.biases, *options, *wanted, False)
        torch.library.opcheck(library.decode_grid_loss, arguments)


def test_backward_twice_and_through_a_larger_graph():
    p = problems.make(batch=2).to(torch.float64, requires_grad=True)
    target = random_target(p, torch.float64)
    loss = one_pass(p, target, reduction="none_batch")
    weight = torch.tensor([2.0, -3.0], dtype=torch.float64)
    first = torch.autograd.grad((loss * weight).sum(), p.tensors, retain_graph=True)
    again = torch.autograd.grad((loss * weight).sum(), p.tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    got, want = (
        gradients(one_pass(replace(p, planes=[2 * q for q in p.planes]), target, loss_of), p.tensors)
        for loss_of in (tcam_ext.decode_grid_loss, reference.decode_grid_loss)
    )
    assert problems.gradient_error(got, want) < 1e-11


def test_second_derivatives_raise():
    p = problems.make().to(torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r'impl="reference"'):
        torch.autograd.grad(one_pass(p, random_target(p, torch.float64)), p.tensors, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    p = problems.make(batch=2).to(torch.float32, requires_grad=True)
    target = random_target(p, torch.uint8)

    def f(planes, weights, biases, target):
        q = replace(p, planes=[2 * x for x in planes], weights=weights, biases=biases)
        return one_pass(q, target, reduction="none_batch").square().sum()

    eager = gradients(f(p.planes, p.weights, p.biases, target), p.tensors)
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    got = gradients(compiled(p.planes, p.weights, p.biases, target), p.tensors)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    p = problems.make().to(torch.float32, requires_grad=True)
    target = random_target(p, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = one_pass(replace(p, planes=[q.bfloat16() for q in p.planes]), target)
    assert inside.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients(inside, p.tensors))
    want = gradients(one_pass(p, target), p.tensors)
    got = gradients(
        checkpoint(
            lambda *t: one_pass(replace(p, planes=list(t[:3]), weights=list(t[3:6]), biases=list(t[6:])), target),
            *p.tensors,
            use_reentrant=False,
        ),
        p.tensors,
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_empty_batch():
    p = problems.make(batch=0).to(torch.float32, requires_grad=True)
    target = random_target(p, torch.float32)
    each = one_pass(p, target, reduction="none_batch")
    assert each.shape == (0,)
    loss = one_pass(p, target, reduction="sum")
    assert float(loss.detach()) == 0
    for value in (loss, one_pass(p, target), each):
        assert all(g.count_nonzero() == 0 for g in gradients(value, p.tensors))


def test_the_modules_loss():
    decoder = tcam_ext.TriplaneDecoder(4, (16,), 2)
    planes, target = torch.randn(1, 3, 4, 6, 6), torch.rand(1, 2, 7, 8, 9)
    want = F.mse_loss(decoder(planes, (7, 8, 9)), target)
    torch.testing.assert_close(decoder.loss(planes, target, loss="mse"), want)


# ---- bad input -------------------------------------------------------------------------

P = problems.make().to(torch.float32)
TARGET = torch.rand(voxels_of(P))
BAD = [
    (dict(target=3), TypeError, "target.*tensor"),
    (dict(target=TARGET[0]), ValueError, "target.*5 dimensions"),
    (dict(target=TARGET[:, :1]), ValueError, r"target.*\(1, 2, 6, 7, 8\)"),
    (dict(target=TARGET[..., :5]), ValueError, r"target.*\(1, 2, 6, 7, 5\)"),
    (dict(target=TARGET.int()), TypeError, "target.*int32"),
    (dict(target=TARGET.to("meta")), ValueError, "target.*cpu.*meta"),
    (dict(target=TARGET.clone().requires_grad_()), ValueError, "target.*grad"),
    (dict(target=TARGET.to_sparse()), TypeError, "target.*sparse"),
    (dict(size=None, box=((0, 6), (0, 7), (0, 8))), ValueError, "size.*box"),
    (dict(box=((0, 3), (0, 7), (0, 8))), ValueError, "target.*box"),
    (dict(loss="huber"), ValueError, "loss.*smooth_l1.*huber"),
    (dict(reduction="none"), ValueError, "reduction.*none_batch.*'none'"),
    (dict(beta=-1.0), ValueError, "beta.*-1"),
    (dict(beta=float("nan")), ValueError, "beta.*nan"),
    (dict(beta="0.3"), TypeError, "beta.*str"),
    (dict(impl="fused"), ValueError, "impl"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(list(c[0])) + c[2] for c in BAD])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_bad_input(change, error, message, impl):
    arguments = {"target": TARGET, "size": P.size, "impl": impl, **change}
    with pytest.raises(error, match=message):
        tcam_ext.decode_grid_loss(P.planes, P.weights, P.biases, **arguments)
