"""The CUDA kernels on the emulator of tests/simt: points, grids decoded voxel by voxel, noise and resampling."""

from __future__ import annotations

from dataclasses import replace

import problems
import pytest
import raw
import simt
import torch
from problems import FUSED_BACKWARD, HALF
from simt import SAMPLINGS, SCHEDULES, gradients

from tcam_ext import library, reference
from tcam_ext.losses import LOSSES

pytestmark = simt.skip_where_it_cannot_run

POINTS = [
    dict(widths=(40, 33, 2), batch=2, activation="silu"),
    dict(widths=(17, 3), plane_axes=((0, 1), (0, 2), (0, 2), (1, 2)), reduce="mean", padding_mode="reflection",
         activation="tanh"),
    dict(widths=(9, 8, 1), plane_axes=((0, 2), (0, 1)), reduce="prod", padding_mode="zeros", align_corners=True,
         activation=["sine", "tanh"]),
    dict(widths=(5,), plane_axes=((1, 2),)),
    dict(widths=(9, 3), plane_axes=((0, 1), (0, 2), (1, 2), (0, 2), (0, 1)), reduce="prod", groups=(2, 1, 2)),
    dict(widths=(7, 3), plane_axes=((0, 1), (0, 2), (1, 2), (0, 2), (0, 1)), reduce="mean", groups=(2, 3)),
]  # fmt: skip


def point_case(shape, extra_channels=0, n=301):
    p = problems.make(channels=4, texels=(4, 5, 6), **shape)
    if extra_channels:
        columns = torch.randn(p.weights[0].shape[0], extra_channels, dtype=torch.float64)
        p.weights[0] = torch.cat((p.weights[0], columns), 1)
    batch = p.planes[0].shape[0]
    xyz = torch.rand(n, 3, dtype=torch.float64) * 3 - 1.5
    extra = torch.randn(n, extra_channels, dtype=torch.float64) if extra_channels else None
    return p, xyz, torch.randint(0, batch, (n,)), extra


@pytest.mark.parametrize("shape", POINTS, ids=lambda s: str(s["widths"]))
@pytest.mark.parametrize("formulation", [0, 1, 2])
@pytest.mark.parametrize("extra_channels", [0, 3])
def test_points(kernels, shape, formulation, extra_channels):
    if formulation == 1 and shape.get("reduce") == "prod":
        pytest.skip("a product is not projected")
    p, xyz, objects, extra = point_case(shape, extra_channels)
    inputs = [t.requires_grad_() for t in [*p.tensors, xyz, *([extra] if extra_channels else [])]]
    want = reference.decode_points(p.planes, p.weights, p.biases, xyz, batch_index=objects, extra=extra, **p.options)
    mine = p.to(torch.float64)
    arguments = dict(objects=objects, extra=None if extra is None else extra.detach(), formulation=formulation)
    grad = torch.randn_like(want)
    want_grads = gradients(want, inputs, grad)
    for tile in (0, 70):  # several waves
        (got,) = kernels.points(mine, xyz.detach(), **arguments, tile=tile)
        assert problems.relative(got, want) < 1e-12
        grads = kernels.points(mine, xyz.detach(), grad, **arguments, tile=tile)
        assert problems.gradient_error(grads, want_grads) < 1e-10


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
    grads = kernels.points(mine, where, grad, objects=objects, layers=False, tile=70)
    assert problems.gradient_error(grads, gradients(want, inputs, grad)) < 1e-10


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
    want_grads = gradients(want, [*exact.tensors, extra], grad)
    for tile in (0, 40):
        grads = kernels.backward(mine, grad.to(dtype), tile=tile)
        assert problems.gradient_error(grads, want_grads) < problems.GRADIENT_LIMIT["float32"]


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
    """At the voxels of a grid, for which there is a mirror. Also waves that are no multiples of 32, and one of under 32."""
    p = problems.make(**shape, output_activation="sigmoid")
    exact, half = p.to(torch.float64, requires_grad=True), HALF[dtype]
    mirror = problems.fused_points_mirror(p.to(torch.float32), half, projected=formulation == 1)
    out, trusted = problems.masked_reference(exact, margin=1e-4, preactivations=mirror)
    grad = torch.rand_like(out) * trusted  # positive, so that a bias's gradient does not cancel
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
        *grads, _ = kernels.points(p32, xyz, rows, **options)
        assert 1e-5 < problems.gradient_error(grads, want) < 1e-2


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
    grad = torch.rand_like(out) * trusted  # positive, as the differences below, so that a bias's gradient does not cancel
    want = list(torch.autograd.grad(out, exact.tensors, grad, retain_graph=True))
    target = out.detach() + 1 + torch.rand_like(out)
    each = LOSSES["mse"](out, target, 0.3).flatten(1).sum(1)
    of_each = torch.autograd.grad(each.sum(), exact.tensors)
    decoder = range(len(p.planes), len(p.tensors))
    for tile in (300,) if kind != "noise" else (0, 300):
        grads = kernels.backward(p32, grad.float(), compute, tile=tile)
        assert 1e-5 < problems.gradient_error(grads[: len(want)], want) < 1e-2
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
    losses, *grads = kernels.loss(p, target, "mse", per_object=True)
    torch.testing.assert_close(losses, each.detach())
    summed = [g.sum(0) if i >= len(p.planes) else g for i, g in enumerate(grads)]
    assert problems.gradient_error(summed, of_losses) < 1e-10


@pytest.mark.parametrize("formulation", [1, 2])
def test_gradients_of_points_have_one_value(kernels, schedule, formulation):
    """Atomic additions of integers give the same bits in any order."""
    p, xyz, objects, extra = point_case(POINTS[0], 2, n=900)
    p, arguments = p.to(torch.float32), dict(objects=objects, extra=extra.float(), formulation=formulation, compute=5)
    grad = torch.randn(900, 2)
    runs = []
    for name in SCHEDULES:
        schedule(name)
        runs.append(kernels.points(p, xyz.float(), grad, **arguments))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    exact = p.to(torch.float64, True)
    xyz, extra = xyz.float().double().requires_grad_(), extra.float().double().requires_grad_()
    want = reference.decode_points(
        exact.planes, exact.weights, exact.biases, xyz, batch_index=objects, extra=extra, **p.options
    )
    want_grads = gradients(want, [*exact.tensors, xyz, extra], grad.double())
    assert problems.gradient_error(runs[0], want_grads) < problems.GRADIENT_LIMIT["tf32"]


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
    grads = kernels.points(p32, where, grad, objects=objects)
    assert not any(g.isfinite().all() for g in grads[:3])


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
