"""The CUDA kernels on the emulator of tests/simt: grids on the general kernels.

The emulator compiles the same sources for this machine and runs every CUDA thread as a fiber.
"""

from __future__ import annotations

from dataclasses import replace

import problems
import pytest
import simt
import torch
from simt import SAMPLINGS, SCHEDULES, SHAPES, gradients

from tcam_ext import reference
from tcam_ext.activations import ACTIVATIONS
from tcam_ext.losses import LOSSES

pytestmark = simt.skip_where_it_cannot_run
IDS = [str(s["widths"]) for s in SHAPES]


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


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("compute", [0, 3])
def test_planes_and_grids_of_other_projects(kernels, sampling, compute):
    p = problems.make(channels=4, texels=(4, 5, 6), widths=(40, 33, 2), size=(6, 5, 34), batch=2, **sampling)
    p32 = p.to(torch.float32)
    if compute:  # the fused kernels, which have their own relu masks
        want = p.call(reference.decode_grid)
        assert problems.relative(kernels.forward(p32, compute), want) < problems.FORWARD_LIMIT["bfloat16"]
        p.options["activation"], compute = "tanh", 5  # with TensorFloat-32
        p32 = p.to(torch.float32)
    exact = p.to(torch.float64, requires_grad=True)
    out, trusted = problems.masked_reference(exact)
    limit = "tf32" if compute else "float32"
    assert problems.relative(kernels.forward(p32, compute), out) < problems.FORWARD_LIMIT[limit]
    grad = torch.randn_like(out) * trusted
    want = gradients(out, exact.tensors, grad)
    assert problems.gradient_error(kernels.backward(p32, grad.float(), compute), want) < problems.GRADIENT_LIMIT[limit]


@pytest.mark.parametrize("shape", SHAPES[:5], ids=IDS[:5])  # the sixth is constant: its errors do not average out
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("compute", [5, 3, 2], ids=["tf32", "bfloat16", "float16"])
def test_tensor_floats(kernels, shape, activation, compute):
    """TensorFloat-32 products, which also replace those of bfloat16 and float16 if no fused kernel serves."""
    last = 20 if len(shape["widths"]) == 2 else 5
    p = problems.make(**{**shape, "widths": (*shape["widths"][:-1], last)}, activation=activation, output_activation="sigmoid")
    exact = p.to(torch.float64, requires_grad=True)
    out, trusted = problems.masked_reference(exact, problems.round_tensor_float, margin=1e-4)
    mine = p.to(torch.float32)
    got = kernels.forward(mine, compute)
    error = problems.relative(got, p.call(reference.decode_grid))
    assert error < problems.FORWARD_LIMIT["tf32"]
    assert error > 1e-5 or len(shape["widths"]) < 2  # without products above the first layer nothing is rounded
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
@pytest.mark.parametrize("outputs", [2, 37])
def test_losses(kernels, loss, per_object, target_dtype, outputs):
    p = problems.make(**{**SHAPES[1], "widths": (9, outputs)}, output_activation="clamp", activation="silu")
    exact = p.to(torch.float64, requires_grad=True)
    target = torch.rand(2, outputs, 5, 7, 9)
    target = ((target * 255) if target_dtype == torch.uint8 else target).to(target_dtype)
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
