"""The CUDA kernels on the emulator of tests/simt: the same sources, compiled for this machine, every thread a fiber."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace

import problems
import pytest
import raw
import simt
import torch
from problems import FUSED_BACKWARD, FUSED_FORWARD, HALF

from tcam_ext import library, reference
from tcam_ext.activations import ACTIVATIONS
from tcam_ext.losses import LOSSES

pytestmark = simt.skip_where_it_cannot_run


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    built = os.environ.get("TCAM_SIMT_LIBRARY") or simt.build(tmp_path_factory.mktemp("simt"))
    return raw.Kernels(ctypes.CDLL(str(built)), "cuda", (0, None))


#: (order, greedy warps, early copies, seed) of tests/simt/simt.h
SCHEDULES = {"in order": (0, 0, 0, 1), "reversed, greedy": (1, 1, 0, 1), "shuffled, early copies": (2, 0, 1, 7)}


@pytest.fixture
def schedule(kernels):
    """Chooses the order in which threads and blocks run, which must not change a result."""
    yield lambda name: kernels.library.simt_schedule(*SCHEDULES[name], 2)
    kernels.library.simt_schedule(*SCHEDULES["in order"], 2)


SHAPES = [
    dict(channels=5, texels=(4, 5, 6), widths=(37, 21, 3), size=(8, 9, 5), bias=False),
    dict(channels=3, texels=(3, 4, 5), widths=(9, 2), size=(5, 7, 9), align_corners=True, batch=2),
    dict(channels=4, texels=(4, 5, 6), widths=(5,), size=(8, 7, 5), padding_mode="zeros"),
    dict(channels=2, texels=(9, 3, 7), widths=(70, 130, 18), size=(3, 11, 8), padding_mode="zeros"),
    dict(channels=2, texels=(1, 1, 1), widths=(8, 8, 8, 8, 1), size=(7, 6, 5)),
]
IDS = [str(s["widths"]) for s in SHAPES]


def gradients(volume, tensors, grad):
    return list(torch.autograd.grad(volume, tensors, grad))


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_values_and_gradients(kernels, shape, activation, dtype):
    p = problems.make(**shape, activation=activation, output_activation="sigmoid")
    name = str(dtype).removeprefix("torch.")
    mine, exact = p.to(dtype), p.to(torch.float64, requires_grad=True)
    out, trusted = problems.masked_reference(exact)
    assert problems.relative(kernels.forward(mine), out) < problems.FORWARD_LIMIT[name]
    grad = torch.randn_like(out) * trusted
    want = gradients(out, exact.tensors, grad)
    for tile in (0, 40):  # several regions
        got = kernels.backward(mine, grad.to(dtype), tile=tile)
        assert problems.gradient_error(got, want) < problems.GRADIENT_LIMIT[name]


#: Planes over any pairs of axes, reductions, paddings and grids, which fused and general kernels share.
SAMPLINGS = [
    dict(plane_axes=((0, 1), (0, 2), (0, 2), (1, 2)), reduce="sum", padding_mode="reflection",
         bounds=[(-1.6, 0.7), (2, -1), (-0.5, 0.4)]),
    dict(plane_axes=((0, 2), (0, 1)), reduce="mean", padding_mode="zeros", grid="corners", align_corners=True),
    dict(plane_axes=((1, 2),), padding_mode="border", grid="corners", bounds=[(-0.3, 1.4), (-3, -2), (0.9, -1.2)]),
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("compute", [0, 3])
def test_planes_and_grids_of_other_projects(kernels, sampling, compute):
    p = problems.make(channels=4, texels=(4, 5, 6), widths=(40, 33, 2), size=(6, 5, 34), batch=2, **sampling)
    p32 = p.to(torch.float32)
    if compute:  # the fused kernels; their masks are their own
        want = p.call(reference.decode_grid)
        assert problems.relative(kernels.forward(p32, compute), want) < problems.FORWARD_LIMIT["bfloat16"]
        p.options["activation"], compute = "tanh", 5  # and TensorFloat-32
        p32 = p.to(torch.float32)
    exact = p.to(torch.float64, requires_grad=True)
    out, trusted = problems.masked_reference(exact)
    limit = "tf32" if compute else "float32"
    assert problems.relative(kernels.forward(p32, compute), out) < problems.FORWARD_LIMIT[limit]
    grad = torch.randn_like(out) * trusted
    want = gradients(out, exact.tensors, grad)
    assert problems.gradient_error(kernels.backward(p32, grad.float(), compute), want) < problems.GRADIENT_LIMIT[limit]


@pytest.mark.parametrize("shape", SHAPES[:4], ids=IDS[:4])  # the fifth is constant: its rounding does not average out
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("compute", [5, 3, 2], ids=["tf32", "bfloat16", "float16"])
def test_tensor_floats(kernels, shape, activation, compute):
    """TensorFloat-32 products, which also stand in for those of bfloat16 and float16 where no fused kernel serves."""
    p = problems.make(**{**shape, "widths": (*shape["widths"][:-1], 5)}, activation=activation, output_activation="sigmoid")
    exact = p.to(torch.float64, requires_grad=True)
    out, trusted = problems.masked_reference(exact, problems.round_tensor_float, margin=1e-4)
    mine = p.to(torch.float32)
    got = kernels.forward(mine, compute)
    error = problems.relative(got, p.call(reference.decode_grid))
    assert error < problems.FORWARD_LIMIT["tf32"]
    assert error > 1e-5 or len(shape["widths"]) < 3  # with no hidden products there is nothing to round
    grad = torch.randn_like(out) * trusted
    want = gradients(out, exact.tensors, grad)
    assert (
        problems.gradient_error(kernels.backward(mine, grad.float(), compute, tile=100), want) < problems.GRADIENT_LIMIT["tf32"]
    )


def test_schedules(kernels, schedule):
    p = problems.make(**SHAPES[0]).to(torch.float32)
    grad = torch.randn(1, 3, 8, 9, 5)
    want = [kernels.forward(p), *kernels.backward(p, grad, tile=60)]
    for name in SCHEDULES:
        schedule(name)
        got = [kernels.forward(p), *kernels.backward(p, grad, tile=60)]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


@pytest.mark.parametrize("tile", [1, 7, 35, 100])
def test_a_region_does_not_change_a_voxel(kernels, tile):
    p = problems.make(**SHAPES[1]).to(torch.float32)
    assert torch.equal(kernels.forward(p, tile=tile), kernels.forward(p))


def test_a_box_is_the_same_part_of_the_whole_bit_for_bit(kernels):
    for shape in SHAPES:
        p = problems.make(**shape).to(torch.float32)
        box = [(n // 3, n - 1) for n in p.size]
        (x0, x1), (y0, y1), (z0, z1) = box
        assert torch.equal(kernels.forward(p, box=box), kernels.forward(p)[:, :, x0:x1, y0:y1, z0:z1])


def test_boxes_add_up_to_the_gradient_of_the_whole(kernels):
    p = problems.make(**SHAPES[0]).to(torch.float64)
    grad = torch.randn(1, 3, 8, 9, 5, dtype=torch.float64)
    total = None
    for x in ((0, 3), (3, 8)):
        part = kernels.backward(p, grad[:, :, x[0] : x[1]], box=(x, (0, 9), (0, 5)))
        total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
    assert problems.gradient_error(total, kernels.backward(p, grad)) < 1e-12


@pytest.mark.parametrize("per_object", [False, True])
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.uint8, torch.float16])
def test_losses(kernels, loss, per_object, target_dtype):
    p = problems.make(**SHAPES[1], output_activation="clamp", activation="silu")
    exact = p.to(torch.float64, requires_grad=True)
    target = (torch.rand(2, 2, 5, 7, 9) * 255).to(target_dtype) if target_dtype == torch.uint8 else torch.rand(2, 2, 5, 7, 9)
    target = target.to(target_dtype)
    want_target = target.double() / (255 if target_dtype == torch.uint8 else 1)
    each = LOSSES[loss](exact.call(reference.decode_grid), want_target, 0.3).flatten(1).sum(1)
    losses, *got = kernels.loss(p, target, loss, per_object=per_object, tile=50)
    torch.testing.assert_close(losses, each.detach(), rtol=1e-12, atol=0)
    planes = gradients(each.sum(), exact.planes, None)
    decoder = exact.tensors[3:]
    if per_object:
        rows = [torch.autograd.grad(e, decoder, retain_graph=True) for e in exact_sums(exact, want_target, loss)]
        want = [torch.stack(r) for r in zip(*rows, strict=True)]
    else:
        want = gradients(exact_sums(exact, want_target, loss).sum(), decoder, None)
    assert problems.gradient_error(got, [*planes, *want]) < 1e-11
    alone = kernels.loss(p, target, loss, grads=(False, False))
    torch.testing.assert_close(alone[0], losses, rtol=1e-13, atol=0)
    for grads in ((True, False), (False, True)):
        chosen = got[:3] if grads[0] else got[3:]
        some = kernels.loss(p, target, loss, per_object=per_object, tile=50, grads=grads)[1:]
        assert all(torch.equal(a, b) for a, b in zip(some, chosen, strict=True))


def exact_sums(p, target, loss):
    return LOSSES[loss](p.call(reference.decode_grid), target, 0.3).flatten(1).sum(1)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_output_dtypes(kernels, out_dtype):
    p = problems.make(**SHAPES[0]).to(torch.float32)
    got = kernels.forward(p, out_dtype=out_dtype)
    assert torch.equal(got, kernels.forward(p).to(out_dtype))
    grad = torch.randn(1, 3, 8, 9, 5).to(out_dtype)
    want = kernels.backward(p, grad.float())
    assert all(torch.equal(a, b) for a, b in zip(kernels.backward(p, grad), want, strict=True))


def test_a_batch_is_independent_objects(kernels):
    p = problems.make(**SHAPES[1]).to(torch.float32)
    whole = kernels.forward(p)
    for i in range(2):
        one = replace(p, planes=[q[i : i + 1].contiguous() for q in p.planes])
        assert torch.equal(kernels.forward(one)[0], whole[i])


# ---- the fused kernel on tensor cores ------------------------------------------------------


@pytest.fixture(params=[(227 << 10, 2), (163 << 10, 3)], ids=["227 KiB", "163 KiB"])
def device(request, kernels):
    kernels.library.simt_device(*request.param)
    yield
    kernels.library.simt_device(227 << 10, 2)


@pytest.mark.parametrize("shape", FUSED_FORWARD, ids=[str(s["widths"]) for s in FUSED_FORWARD])
@pytest.mark.parametrize("dtype", sorted(HALF))
def test_the_fused_kernel_equals_its_mirror(kernels, device, shape, dtype):
    p = problems.make(**shape, output_activation="sigmoid")
    p32 = p.to(torch.float32)
    got = kernels.forward(p32, raw.DTYPES[HALF[dtype]])
    assert problems.relative(got, problems.fused_mirror(p32, HALF[dtype])[-1].sigmoid().movedim(-1, 1).double()) < 1e-3
    full = p.call(reference.decode_grid)
    error = problems.relative(got, full)
    assert 1e-6 < error < 1e-2  # not zero: the general path, in float32, did not take it


@pytest.mark.parametrize("dtype", sorted(HALF))
def test_the_last_layer_loses_nothing_of_its_weights(kernels, dtype):
    """With activations that a half format holds exactly, what remains is the last layer's weight as high and low halves."""
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
    kernels.library.simt_device(99 << 10, 2)
    got = kernels.forward(p, 3)
    kernels.library.simt_device(227 << 10, 2)
    assert torch.equal(got, kernels.forward(p, 5))


# ---- its backward ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", FUSED_BACKWARD, ids=[str(s["widths"]) for s in FUSED_BACKWARD])
@pytest.mark.parametrize("dtype", sorted(HALF))
@pytest.mark.parametrize("tile", [0, 1], ids=["one slab", "slabs"])
def test_fused_gradients(kernels, shape, dtype, tile):
    p = problems.make(**shape, output_activation="sigmoid")
    exact, out, trusted = problems.fused_reference(p, HALF[dtype])
    grad = torch.randn_like(out) * trusted
    want = gradients(out, exact.tensors, grad)
    p32, compute = p.to(torch.float32), raw.DTYPES[HALF[dtype]]
    got = kernels.backward(p32, grad.float(), compute, tile=tile)
    error = problems.gradient_error(got, want)
    assert 1e-5 < error < 1e-2  # not zero: the general kernels, in float32, did not take it
    for grads in ((True, False), (False, True)):
        chosen = got[:3] if grads[0] else got[3:]
        some = kernels.backward(p32, grad.float(), compute, tile=tile, grads=grads)
        assert all(torch.equal(a, b) for a, b in zip(some, chosen, strict=True))


@pytest.mark.parametrize("shape", FUSED_BACKWARD, ids=[str(s["widths"]) for s in FUSED_BACKWARD])
@pytest.mark.parametrize(("loss", "per_object"), [("mse", False), ("smooth_l1", True), ("l1", False)])
def test_fused_losses(kernels, shape, loss, per_object):
    p = problems.make(**shape, output_activation="sigmoid")
    exact, out, _ = problems.fused_reference(p, torch.bfloat16)
    # A difference of order one: mse's gradient is proportional to it, l1's jumps where it is zero.
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
    """As test_decode_grid_loss.py has it on a card: the forward kernel and the head of the backward agree."""
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


def test_a_launch_that_fails_is_an_error_and_no_reason_for_other_kernels(kernels):
    p = problems.make(**FUSED_BACKWARD[0]).to(torch.float32)
    for call in (lambda: kernels.forward(p, 3), lambda: kernels.backward(p, torch.ones(1, 1, *p.size), 3)):
        kernels.library.simt_fail(9)  # cudaErrorInvalidConfiguration, which once meant: too little shared memory
        with pytest.raises(RuntimeError, match="status 9"):
            call()


@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("shape", [*FUSED_FORWARD, *SHAPES[:2]], ids=lambda s: str(s["widths"]))
def test_the_explanation_is_what_happens(kernels, shape, shared):
    """Said to be fused exactly where the bits are not those of the general kernels."""
    p = problems.make(**shape).to(torch.float32)
    grad = torch.randn(p.planes[0].shape[0], p.weights[-1].shape[0], *p.size)
    kernels.library.simt_device(shared << 10, 2)
    try:
        values = torch.equal(kernels.forward(p, 3), kernels.forward(p, 5))
        found = zip(kernels.backward(p, grad, 3), kernels.backward(p, grad, 5), strict=True)
        gradients = all(torch.equal(a, b) for a, b in found)
    finally:
        kernels.library.simt_device(227 << 10, 2)
    for output, general in ((0, values), (2, gradients)):
        text = kernels.explain(p, 3, output, shared << 10)
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
    """grad_output times a power of two gives the gradients times it: in float16, whose smallest number is 2^-24."""
    p = problems.make(**FUSED_BACKWARD[0]).to(torch.float32)
    grad = torch.randn(1, 1, *p.size)
    want = [g * 2.0**exponent for g in kernels.backward(p, grad, 2)]
    assert all(torch.equal(a, b) for a, b in zip(kernels.backward(p, grad * 2.0**exponent, 2), want, strict=True))


@pytest.mark.parametrize("shape", FUSED_BACKWARD[:2], ids=[str(s["widths"]) for s in FUSED_BACKWARD[:2]])
def test_fused_float16_gradients_below_a_small_last_layer(kernels, shape):
    """What goes back through it is small in every layer below; float16 must not lose it."""
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
    """Such differences are slopes of mse: scaled as those of a bounded output are, they would overflow float16."""
    p = problems.make(**FUSED_BACKWARD[0])
    p.biases[-1] += 1000.0
    exact, out, _ = problems.fused_reference(p, torch.float16)
    target = torch.rand_like(out.detach()).float()
    want = gradients(LOSSES["mse"](out, target.double(), 0.3).sum(), exact.tensors, None)
    got = kernels.loss(p.to(torch.float32), target, "mse", compute=2)[1:]
    assert problems.gradient_error(got, want) < 1e-2


@pytest.mark.parametrize(
    ("compute", "backward", "limit"),
    [(3, False, 0.5e9), (3, True, 2e9), (2, True, 2e9), (5, False, 0.9e9), (5, True, 2e9), (0, False, 0.9e9), (0, True, 2e9)],
)
def test_the_workspace_at_512(kernels, capsys, compute, backward, limit):
    """Above inputs and outputs, at the operating point, without and with point noise; what test_cuda.py measures on a card."""
    p = problems.make(channels=42, texels=(64, 64, 64), widths=(128, 128, 128, 128, 1), size=(512, 512, 512)).to(torch.float32)
    for noise_std in (0.0, 0.32):
        p.options |= {"noise_std": noise_std}
        found = kernels.workspace(p, compute, backward)
        with capsys.disabled():
            what = f"compute {compute}, backward {backward}, noise {noise_std}"
            print(f"\n[workspace at 512^3, {what}: {found / 1e9:.2f} GB]", end="")
        assert found < limit


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
    """Unmasked: see test_emulated.py."""
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
    kernels.library.simt_device(163 << 10, 2)
    got = kernels.backward(p, grad, 3)
    kernels.library.simt_device(227 << 10, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, kernels.backward(p, grad, 5), strict=True))


# ---- points ------------------------------------------------------------------------------------

POINTS = [
    dict(widths=(40, 33, 2), batch=2, activation="silu"),
    dict(widths=(17, 3), plane_axes=((0, 1), (0, 2), (0, 2), (1, 2)), reduce="mean", padding_mode="reflection",
         activation="tanh"),
    dict(widths=(9, 8, 1), plane_axes=((0, 2), (0, 1)), reduce="prod", padding_mode="zeros", align_corners=True,
         activation=["sine", "tanh"]),
    dict(widths=(5,), plane_axes=((1, 2),)),
]  # fmt: skip


def point_case(shape, extra=0, n=301):
    p = problems.make(channels=4, texels=(4, 5, 6), **shape)
    if extra:
        p.weights[0] = torch.cat((p.weights[0], torch.randn(p.weights[0].shape[0], extra, dtype=torch.float64)), 1)
    batch = p.planes[0].shape[0]
    xyz = torch.rand(n, 3, dtype=torch.float64) * 3 - 1.5
    return p, xyz, torch.randint(0, batch, (n,)), torch.randn(n, extra, dtype=torch.float64) if extra else None


@pytest.mark.parametrize("shape", POINTS, ids=lambda s: str(s["widths"]))
@pytest.mark.parametrize("formulation", [0, 1, 2])
@pytest.mark.parametrize("extra", [0, 3])
def test_points(kernels, shape, formulation, extra):
    if formulation == 1 and shape.get("reduce") == "prod":
        pytest.skip("a product is not projected")
    p, xyz, objects, own = point_case(shape, extra)
    inputs = [t.requires_grad_() for t in [*p.tensors, xyz, *([own] if extra else [])]]
    want = reference.decode_points(p.planes, p.weights, p.biases, xyz, batch_index=objects, extra=own, **p.options)
    mine = p.to(torch.float64)
    arguments = dict(objects=objects, extra=None if own is None else own.detach(), formulation=formulation)
    grad = torch.randn_like(want)
    wanted = gradients(want, inputs, grad)
    for tile in (0, 70):  # several waves
        (got,) = kernels.points(mine, xyz.detach(), **arguments, tile=tile)
        assert problems.relative(got, want) < 1e-12
        found = kernels.points(mine, xyz.detach(), grad, **arguments, tile=tile)
        assert problems.gradient_error(found, wanted) < 1e-10


@pytest.mark.parametrize("shape", POINTS, ids=lambda s: str(s["widths"]))
def test_samples_of_points(kernels, shape):
    p, xyz, objects, _ = point_case(shape)
    inputs = [t.requires_grad_() for t in [*p.planes, xyz]]
    options = {k: v for k, v in p.options.items() if k != "activation"}
    want = reference.sample_points(p.planes, xyz, batch_index=objects, **options)
    mine, where = p.to(torch.float64), xyz.detach()
    (got,) = kernels.points(mine, where, objects=objects, layers=False)
    assert problems.relative(got, want) < 1e-12
    grad = torch.randn_like(want)
    found = kernels.points(mine, where, grad, objects=objects, layers=False, tile=70)
    assert problems.gradient_error(found, gradients(want, inputs, grad)) < 1e-10


def test_normals_have_the_bits_of_the_cpu(kernels):
    for objects, count, stream, seed in ((1, 1, 0, 0), (3, 70, 2, 2**63 - 1), (2, 5_003, 16, 12345)):
        got = kernels.normals(objects, count, stream, seed)
        assert torch.equal(got, library.normals(torch.empty(objects, count), stream, seed))


@pytest.mark.parametrize("shape", POINTS, ids=lambda s: str(s["widths"]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_noise_and_extra_features_of_a_grid(kernels, shape, dtype):
    p = problems.make(channels=4, texels=(4, 5, 6), size=(5, 7, 9), **{**shape, "activation": "tanh"})
    batch, n1 = p.planes[0].shape[0], p.weights[0].shape[0]
    p.weights[0] = torch.cat((p.weights[0], torch.randn(n1, 3, dtype=torch.float64)), 1)
    extra = torch.randn(batch, 3, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    p.options |= {"noise_std": 0.32, "noise_seed": 2**40 + 3, "extra": extra}
    exact, mine = p.to(torch.float64, True), p.to(dtype)
    want = exact.call(reference.decode_grid)
    assert problems.relative(kernels.forward(mine), want) < problems.FORWARD_LIMIT["float32"]
    grad = torch.randn_like(want)
    wanted = gradients(want, [*exact.tensors, extra], grad)
    for tile in (0, 40):
        found = kernels.backward(mine, grad.to(dtype), tile=tile)
        assert problems.gradient_error(found, wanted) < problems.GRADIENT_LIMIT["float32"]


def test_a_box_has_the_noise_of_the_whole_bit_for_bit(kernels):
    p = problems.make(size=(6, 9, 10), widths=(9, 2), batch=2, noise_std=0.5, noise_seed=9).to(torch.float32)
    box = ((1, 5), (8, 9), (2, 10))
    assert torch.equal(kernels.forward(p)[:, :, 1:5, 8:9, 2:], kernels.forward(p, box=box))


@pytest.mark.parametrize("ragged", [False, True])
def test_noise_of_points(kernels, ragged):
    p, xyz, objects, _ = point_case({"widths": (9, 8, 2), "batch": 3, "activation": "tanh"}, n=99)
    p.options |= {"noise_std": 0.32, "noise_seed": 4}
    where = {"batch_index": objects} if ragged else {}
    want = reference.decode_points(p.planes, p.weights, p.biases, xyz if ragged else xyz.view(3, 33, 3), **where, **p.options)
    (got,) = kernels.points(p, xyz, objects=objects if ragged else None, tile=70)
    assert problems.relative(got, want.view(99, 2)) < 1e-6


def voxel_centres(size):
    axes = [2 * (torch.arange(n) + 0.5) / n - 1 for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3).float()


#: bfloat16 for every shape, float16 for one.
POINT_SHAPES = [(dtype, s) for dtype in sorted(HALF) for s in FUSED_BACKWARD if dtype == "bfloat16" or s is FUSED_BACKWARD[1]]
POINT_IDS = [f"{dtype}-{s['widths']}" for dtype, s in POINT_SHAPES]


@pytest.mark.parametrize(("dtype", "shape"), POINT_SHAPES, ids=POINT_IDS)
@pytest.mark.parametrize("formulation", [1, 2])
def test_fused_points(kernels, shape, dtype, formulation):
    """At the voxels of a grid, whose mirror tells masks from errors; waves that 32 does not divide, and one of less than 32."""
    p = problems.make(**shape, output_activation="sigmoid")
    exact, half = p.to(torch.float64, requires_grad=True), HALF[dtype]
    mirror = problems.fused_points_mirror(p.to(torch.float32), half, projected=formulation == 1)
    out, trusted = problems.masked_reference(exact, margin=1e-4, preactivations=mirror)
    grad = torch.rand_like(out) * trusted  # of one sign: a bias's gradient must not cancel
    want = gradients(out, exact.tensors, grad)
    batch, n_out = out.shape[:2]
    xyz = voxel_centres(p.size).repeat(batch, 1)
    p32, rows = p.to(torch.float32), grad.float().flatten(2).mT.reshape(-1, n_out).contiguous()
    tiles = (300,) if formulation == 1 or shape is not FUSED_BACKWARD[1] else (0, 300, 31)
    for tile in tiles:
        options = dict(compute=raw.DTYPES[half], formulation=formulation, tile=tile)
        (got,) = kernels.points(p32, xyz, **options)
        got = got.view(batch, -1, n_out).mT.double()
        assert 1e-6 < problems.relative(got, p.call(reference.decode_grid).flatten(2)) < 1e-2
        assert problems.relative(got, mirror[-1].sigmoid().flatten(1, 3).mT.double()) < 1e-3
        *found, _ = kernels.points(p32, xyz, rows, **options)
        assert 1e-5 < problems.gradient_error(found, want) < 1e-2


@pytest.mark.parametrize("kind", ["extra", "extra, projected", "noise", "prod"])
@pytest.mark.parametrize(("dtype", "shape"), POINT_SHAPES[:2] + POINT_SHAPES[-1:], ids=POINT_IDS[:2] + POINT_IDS[-1:])
def test_fused_grids_that_go_point_by_point(kernels, shape, dtype, kind):
    p = problems.make(**shape, output_activation="sigmoid", **({"reduce": "prod"} if kind == "prod" else {}))
    if kind.startswith("extra"):
        p.options["extra"] = torch.randn(p.planes[0].shape[0], 2, *p.size, dtype=torch.float64)
        p.weights[0] = torch.cat((p.weights[0], torch.randn(p.weights[0].shape[0], 2, dtype=torch.float64)), 1)
    if kind == "noise":
        p.options |= {"noise_std": 0.32, "noise_seed": 11}
    exact, half = p.to(torch.float64, requires_grad=True), HALF[dtype]
    kernels = replace(kernels, formulation=1 if kind == "extra, projected" else 2)
    mirror = problems.fused_points_mirror(p.to(torch.float32), half, projected=kernels.formulation == 1)
    out, trusted = problems.masked_reference(exact, margin=1e-4, preactivations=mirror)
    p32, compute = p.to(torch.float32), raw.DTYPES[half]
    assert 1e-6 < problems.relative(kernels.forward(p32, compute), p.call(reference.decode_grid)) < 1e-2
    grad = torch.rand_like(out) * trusted  # of one sign, as the differences below: a bias's gradient must not cancel
    want = list(torch.autograd.grad(out, exact.tensors, grad, retain_graph=True))
    target = out.detach() + 1 + torch.rand_like(out)
    each = LOSSES["mse"](out, target, 0.3).flatten(1).sum(1)
    of_each = torch.autograd.grad(each.sum(), exact.tensors)
    decoder = range(len(p.planes), len(p.tensors))
    for tile in (300,) if kind != "noise" else (0, 300):
        found = kernels.backward(p32, grad.float(), compute, tile=tile)
        assert 1e-5 < problems.gradient_error(found[: len(want)], want) < 1e-2
        losses, *of_losses = kernels.loss(p32, target.float(), "mse", compute=compute, per_object=True, tile=tile)
        assert problems.relative(losses, each) < 1e-2
        of_losses = [g.sum(0) if i in decoder else g for i, g in enumerate(of_losses)]
        assert problems.gradient_error(of_losses[: len(want)], list(of_each)) < 1e-2


def test_gradients_of_fused_points_have_one_value(kernels, schedule):
    p = problems.make(**FUSED_BACKWARD[1]).to(torch.float32)
    xyz, objects = torch.rand(333, 3) * 2 - 1, torch.randint(0, 2, (333,))
    grad = torch.randn(333, 2)
    want = kernels.points(p, xyz, grad, objects=objects, compute=3, tile=100)
    for name in SCHEDULES:
        schedule(name)
        got = kernels.points(p, xyz, grad, objects=objects, compute=3, tile=100)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


def test_a_product_of_planes_on_a_grid(kernels):
    sampling = {**SAMPLINGS[0], "reduce": "prod"}
    p = problems.make(channels=4, widths=(9, 8, 2), size=(5, 4, 17), batch=2, activation="silu", **sampling)
    exact = p.to(torch.float64, requires_grad=True)
    want = exact.call(reference.decode_grid)
    assert problems.relative(kernels.forward(p), want) < 1e-12
    target, grad = torch.rand_like(want.detach()), torch.randn_like(want)
    each = (want - target).square().flatten(1).sum(1)
    of_losses = list(torch.autograd.grad(each.sum(), exact.tensors, retain_graph=True))
    assert problems.gradient_error(kernels.backward(p, grad, tile=60), gradients(want, exact.tensors, grad)) < 1e-10
    losses, *found = kernels.loss(p, target, "mse", per_object=True)
    torch.testing.assert_close(losses, each.detach())
    summed = [g.sum(0) if i >= len(p.planes) else g for i, g in enumerate(found)]
    assert problems.gradient_error(summed, of_losses) < 1e-10


@pytest.mark.parametrize("formulation", [1, 2])
def test_gradients_of_points_have_one_value(kernels, schedule, formulation):
    """Atomic additions of integers: the same bits in whichever order they happen."""
    p, xyz, objects, own = point_case(POINTS[0], 2, n=900)
    p, arguments = p.to(torch.float32), dict(objects=objects, extra=own.float(), formulation=formulation, compute=5)
    grad = torch.randn(900, 2)
    found = []
    for name in SCHEDULES:
        schedule(name)
        found.append(kernels.points(p, xyz.float(), grad, **arguments))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    exact = p.to(torch.float64, True)
    where, mine = xyz.float().double().requires_grad_(), own.float().double().requires_grad_()
    want = reference.decode_points(
        exact.planes, exact.weights, exact.biases, where, batch_index=objects, extra=mine, **p.options
    )
    wanted = gradients(want, [*exact.tensors, where, mine], grad.double())
    assert problems.gradient_error(found[0], wanted) < problems.GRADIENT_LIMIT["tf32"]


def test_points_without_an_object_and_gradients_that_are_not_finite(kernels):
    p, xyz, objects, _ = point_case(POINTS[0], n=40)
    p32, where = p.to(torch.float32), xyz.float()
    bad = objects.clone()
    bad[3], bad[7] = 2, -1
    (got,) = kernels.points(p32, where, objects=bad)
    (want,) = kernels.points(p32, where, objects=objects)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[3, 7]] = False
    assert got[~keep].isnan().all()
    assert torch.equal(got[keep], want[keep])
    grad = torch.ones(40, 2)
    grad[5, 0] = float("inf")
    found = kernels.points(p32, where, grad, objects=objects)
    assert not any(g.isfinite().all() for g in found[:3])


@pytest.mark.parametrize("options", [
    dict(),
    dict(padding_mode="zeros", align_corners=True, grid="corners"),
    dict(padding_mode="reflection", bounds=(2.5, -1.7)),
    dict(padding_mode="zeros", bounds=(-1.4, 0.3)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("texels", "size", "lo", "hi"), [(5, 17, 2, 15), (9, 4, 0, 4), (1, 3, 0, 3), (1030, 9, 0, 9)])
def test_resampling_an_axis_and_back(kernels, options, texels, size, lo, hi):
    bounds = options.get("bounds")
    limits = None if bounds is None else torch.tensor(bounds, dtype=torch.float64)
    where = reference.voxel_coordinates(lo, hi, size, options.get("grid") == "corners", limits)
    t = reference.taps(where, texels, options.get("align_corners", False), options.get("padding_mode", "border"))
    x = torch.randn(3, texels, 7, dtype=torch.float64, requires_grad=True)
    want = t.w_below[:, None] * x[:, t.below] + t.w_above[:, None] * x[:, t.above]
    torch.testing.assert_close(kernels.resample(x.detach(), texels, size, lo, hi, **options), want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(want)
    back = kernels.resample(grad, texels, size, lo, hi, adjoint=True, **options)
    torch.testing.assert_close(back, gradients(want, [x], grad)[0], rtol=1e-12, atol=1e-12)
