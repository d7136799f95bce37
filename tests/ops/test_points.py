"""decode_points, sample_points, sample_grid: equality with the float64 reference and grid_sample, invariances, contracts."""

from __future__ import annotations

import math
from dataclasses import replace

import problems
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import grid_sample

import tcam_ext
from tcam_ext import checks, library, reference
from tcam_ext.options import PLANE_AXES

AUTO, PROJECTED, FEATURES = range(3)  # tcam_formulation


def coordinates(batch=1, n=200, axes=3, spread=1.5):
    return (torch.rand(batch, n, axes, dtype=torch.float64) * 2 - 1) * spread


def flat(p, xyz, compute="float32", objects=None, extra=None):
    """The arguments of library.decode_points for three concatenated planes."""
    options = problems.flat_options(p, compute)[: len(library.KernelOptions._fields)]
    return (p.planes, p.weights, p.biases, *options, xyz.reshape(-1, 3), objects, extra)


@st.composite
def point_problems(draw):
    p = draw(problems.problems())
    for name in ("grid", "bounds"):
        del p.options[name]
    batch = p.planes[0].shape[0]
    n = draw(st.integers(200, 900)) // batch
    return p, coordinates(batch, n, spread=draw(st.sampled_from([0.9, 1.5, 6.0])))


# ---- values and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", checks.PADDING_MODES)
@pytest.mark.parametrize("what", ["sample_points", "sample_grid"])
def test_the_reference_samples_as_grid_sample_does(align_corners, padding_mode, what):
    """Values and gradients, also outside the planes."""
    planes = [torch.randn(2, 3, *s, dtype=torch.float64, requires_grad=True) for s in ((4, 7), (7, 5), (4, 5))]
    options = {"align_corners": align_corners, "padding_mode": padding_mode}
    if what == "sample_points":
        xyz = coordinates(2, 300, spread=4.0).requires_grad_()
        got = reference.sample_points(planes, xyz, **options)
        inputs = [*planes, xyz]
    else:
        bounds = [(-2.0, 0.7), (3.0, -1.0), (-0.5, 0.4)]
        got = reference.sample_grid(planes, (5, 6, 7), bounds=bounds, **options).flatten(2).mT
        axes = [
            reference.voxel_coordinates(0, n, n, False, torch.tensor(b, dtype=torch.float64))
            for n, b in zip((5, 6, 7), bounds, strict=True)
        ]
        xyz = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3).expand(2, -1, -1)
        inputs = planes
    want = torch.cat(
        [
            grid_sample(q, xyz[..., [column, row]].unsqueeze(1), **options)[:, :, 0]
            for q, (row, column) in zip(planes, PLANE_AXES, strict=True)
        ],
        1,
    ).mT
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@problems.examples(150)
@given(case=point_problems(), formulation=st.sampled_from([AUTO, PROJECTED, FEATURES]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", problems.DEVICES)
def test_values_and_gradients_equal_the_float64_reference(device, case, formulation, dtype):
    p, xyz = case
    if dtype == torch.float32:  # with kinks, rounding would put some points on the other side
        if p.options["activation"].split("(")[0] in problems.PIECEWISE_LINEAR:
            p.options["activation"] = "silu"
        if p.options["output_activation"].split("(")[0] == "clamp":
            p.options["output_activation"] = "sigmoid"
    name = str(dtype).removeprefix("torch.")
    reduce = p.options["reduce"]
    # A rounded coordinate may cross the kink at a texel's centre; coordinates that are exact in float32 do not.
    xyz = xyz.float().double()
    exact, mine = p.to(torch.float64, requires_grad=True), p.to(dtype, requires_grad=True, device=device)
    where, there = (xyz.to(d, t, copy=True).requires_grad_() for d, t in (("cpu", torch.float64), (device, dtype)))
    want = reference.decode_points(exact.planes, exact.weights, exact.biases, where, **p.options)
    real, direct = library.decode_points, library.decode_points_backward
    try:
        if reduce != "prod" or formulation != PROJECTED:
            library.decode_points = lambda *a: real(*a, formulation=formulation)
            library.decode_points_backward = lambda *a: direct(*a, formulation=formulation)
        got = tcam_ext.decode_points(mine.planes, mine.weights, mine.biases, there, **p.options)
        assert got.shape == want.shape
        assert problems.relative(got, want, problems.terms_of(exact, where)) < problems.FORWARD_LIMIT[name]
        grad = torch.randn_like(want)
        grads = torch.autograd.grad(got, [*mine.tensors, there], grad.to(device, dtype))
    finally:
        library.decode_points, library.decode_points_backward = real, direct
    *want_grads, want_xyz = torch.autograd.grad(want, [*exact.tensors, where], grad)
    *grads, xyz_grad = grads
    assert problems.gradient_error(grads, want_grads) < problems.GRADIENT_LIMIT[name]
    if dtype == torch.float64 or p.options["padding_mode"] != "reflection":  # far reflections lose the last bits of a float32
        close = problems.away_from_kinks(xyz, p) if dtype == torch.float32 else torch.ones_like(xyz, dtype=torch.bool)
        scale = want_xyz.norm().clamp_min(max(1e-3 * max(float(w.norm()) for w in want_grads), 1e-30))
        assert float(((xyz_grad.cpu().double() - want_xyz) * close).norm() / scale) < problems.GRADIENT_LIMIT[name]


@problems.examples(60)
@given(sampling=problems.sampling(), bounds=problems.bounds, grid=st.sampled_from(checks.GRIDS), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", problems.DEVICES)
def test_sample_grid_equals_the_reference(device, sampling, bounds, grid, seed, dtype):
    torch.manual_seed(seed)
    p = problems.make(texels=(3, 4, 6), batch=2, **sampling).to(dtype, requires_grad=True, device=device)
    box = ((1, 5), (0, 7), (2, 8))
    got = tcam_ext.sample_grid(p.planes, p.size, box=box, grid=grid, bounds=bounds, **sampling)
    exact = p.to(torch.float64, requires_grad=True)
    want = reference.sample_grid(exact.planes, p.size, box=box, grid=grid, bounds=bounds, **sampling)
    assert got.shape == want.shape
    assert problems.relative(got, want) < problems.FORWARD_LIMIT[str(dtype)[6:]]
    grad = torch.randn_like(want)
    grads = torch.autograd.grad(got, p.planes, grad.to(device, dtype))
    assert problems.gradient_error(grads, torch.autograd.grad(want, exact.planes, grad)) < 1e-5


@problems.examples(40)
@given(sampling=problems.sampling(), seed=st.integers(0, 2**31))
def test_points_at_voxels_equal_the_grid(sampling, seed):
    """decode_points against decode_grid, and sample_points against sample_grid."""
    torch.manual_seed(seed)
    p = problems.make(batch=2, activation="silu", **sampling)
    axes = [reference.voxel_coordinates(0, n, n, True) for n in p.size]
    xyz = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3).expand(2, -1, -1)
    grid = p.call(tcam_ext.decode_grid, grid="corners")
    points = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz, **p.options)
    torch.testing.assert_close(points.mT.reshape(grid.shape), grid, rtol=1e-9, atol=1e-9)
    grid = tcam_ext.sample_grid(p.planes, p.size, grid="corners", **sampling)
    points = tcam_ext.sample_points(p.planes, xyz, **sampling)
    torch.testing.assert_close(points.mT.reshape(grid.shape), grid, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduce", ["concat", "sum", "prod"])
def test_gradcheck(reduce):
    p = problems.make(channels=2, texels=(3, 2, 4), widths=(5, 4, 2), batch=2, reduce=reduce, activation="tanh")
    p = p.to(torch.float64, True)
    xyz, extra = coordinates(2, 5).requires_grad_(), torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    p.weights[0] = torch.randn(5, p.weights[0].shape[1] + 3, dtype=torch.float64, requires_grad=True)

    def decode(*t):
        return tcam_ext.decode_points(list(t[:3]), list(t[3:6]), list(t[6:9]), t[9], extra=t[10], **p.options)

    assert torch.autograd.gradcheck(decode, (*p.planes, *p.weights, *p.biases, xyz, extra))
    assert torch.autograd.gradcheck(
        lambda *t: tcam_ext.sample_points(list(t[:3]), t[3], reduce=reduce), (*p.planes, xyz), fast_mode=True
    )
    assert torch.autograd.gradgradcheck(lambda *t: tcam_ext.sample_grid(list(t), (2, 3, 4), reduce=reduce), p.planes)


def test_linear_in_the_last_layer_and_adjoint():
    """Sampling is linear in the planes: <A F, y> = <F, A^T y>."""
    p = problems.make(channels=4, batch=2).to(torch.float64, True)
    xyz = coordinates(2, 150)
    out = tcam_ext.sample_points(p.planes, xyz)
    y = torch.randn_like(out)
    back = torch.autograd.grad(out, p.planes, y)
    inner = sum((a * b).sum() for a, b in zip(p.planes, back, strict=True))
    torch.testing.assert_close((out * y).sum(), inner)


# ---- arguments -------------------------------------------------------------------------------


def test_ragged_batches_equal_their_parts():
    p = problems.make(batch=3, activation="silu").to(torch.float64, True)
    counts = (5, 0, 123)
    index = torch.cat([torch.full((n,), b) for b, n in enumerate(counts)])
    order = torch.randperm(len(index))
    xyz = coordinates(1, len(index))[0]
    got = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz[order], batch_index=index[order], **p.options)
    parts = []
    for b in range(3):
        one = [q[b : b + 1] for q in p.planes]
        parts.append(tcam_ext.decode_points(one, p.weights, p.biases, xyz[index == b], **p.options))
    want = torch.cat(parts)[order]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, p.tensors, grad), torch.autograd.grad(want, p.tensors, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding_mode", checks.PADDING_MODES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_strange_coordinates_are_safe(padding_mode, align_corners):
    p = problems.make(texels=(1, 4, 3), padding_mode=padding_mode, align_corners=align_corners).to(torch.float32, True)
    strange = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e10, -1e9, 2.0**31, -(2.0**31), 0.0, 1.0, -1.0]
    xyz = torch.cartesian_prod(*[torch.tensor(strange)] * 3).unsqueeze(0).requires_grad_()
    for impl in ("native", "reference"):
        out = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz, impl=impl, **p.options)
        assert out.isfinite().all()
    got = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz, **p.options)
    grads = torch.autograd.grad(got.sum(), [*p.tensors, xyz])
    assert all(g.isfinite().all() for g in grads)
    minus = xyz.detach().nan_to_num(-1.0, posinf=math.inf, neginf=-math.inf)
    assert torch.equal(got, tcam_ext.decode_points(p.planes, p.weights, p.biases, minus, **p.options))
    nan = xyz.isnan()
    assert grads[-1][nan].count_nonzero() == 0


def test_bounds_are_the_planes_box():
    p = problems.make(batch=2).to(torch.float64)
    bounds = torch.tensor([[[0.0, 4.0], [-10.0, 10.0], [3.0, 2.0]], [[1.0, 2.0], [5.0, 7.0], [-1.0, 1.0]]])
    unit = coordinates(2, 50)
    world = (unit + 1) / 2 * (bounds[:, None, :, 1] - bounds[:, None, :, 0]) + bounds[:, None, :, 0]
    mlp = (p.planes, p.weights, p.biases)
    got = tcam_ext.decode_points(*mlp, world, bounds=bounds)
    torch.testing.assert_close(got, tcam_ext.decode_points(*mlp, unit), rtol=1e-9, atol=1e-9)
    index = torch.arange(100) % 2
    flat_world = world.transpose(0, 1).reshape(-1, 3)
    ragged = tcam_ext.decode_points(*mlp, flat_world, batch_index=index, bounds=bounds)
    torch.testing.assert_close(ragged, got.transpose(0, 1).reshape(-1, 2), rtol=1e-9, atol=1e-9)


def test_shapes_dtypes_and_preactivation():
    p = problems.make(output_activation="affine_sigmoid", batch=2).to(torch.float32)
    mlp = (p.planes, p.weights, p.biases)
    xyz = coordinates(2, 60).float()
    want = tcam_ext.decode_points(*mlp, xyz, **p.options)
    assert torch.equal(tcam_ext.decode_points(*mlp, xyz.view(2, 3, 4, 5, 3), **p.options), want.view(2, 3, 4, 5, 2))
    out, z = tcam_ext.decode_points(*mlp, xyz, return_preactivation=True, **p.options)
    torch.testing.assert_close(out, torch.sigmoid(z) * 1.002 - 0.001)
    torch.testing.assert_close(out, want)
    volume, z = p.call(tcam_ext.decode_grid, return_preactivation=True)
    torch.testing.assert_close(volume, p.call(tcam_ext.decode_grid))
    for dtype in (torch.bfloat16, torch.float16):
        half = p.to(dtype)
        got = tcam_ext.decode_points(half.planes, half.weights, half.biases, xyz, **p.options)
        assert got.dtype == dtype
        assert problems.relative(got, want.double()) < 2e-2
    assert tcam_ext.decode_points(*mlp, xyz[:, :0], **p.options).shape == (2, 0, 2)
    empty = problems.make(batch=0).to(torch.float32, True)
    none = tcam_ext.decode_points(empty.planes, empty.weights, empty.biases, torch.empty(0, 7, 3))
    assert none.shape == (0, 7, 2)
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(none.sum(), empty.tensors))


@pytest.mark.parametrize("op", ["decode_grid", "sample_grid", "decode_points", "sample_points"])
def test_no_objects_with_planes_of_any_strides(op):
    """torch calls every tensor without elements contiguous, and so leaves its strides as they are."""
    plane = torch.empty(0, 2, 5, 4).mT.requires_grad_()
    mlp = ([torch.ones(1, 2)], [None]) if op.startswith("decode") else ()
    where = (3, 4, 5) if op.endswith("grid") else torch.empty(0, 7, 3)
    out = getattr(tcam_ext, op)([plane], *mlp, where, plane_axes=((0, 1),))
    assert out.numel() == 0
    (grad,) = torch.autograd.grad(out.sum(), plane)
    assert grad.shape == plane.shape


def test_gradients_only_of_what_is_wanted():
    p = problems.make(activation="silu").to(torch.float32, True)
    xyz = coordinates().float()
    full = torch.autograd.grad(
        tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz.requires_grad_(), **p.options).sum(), [*p.tensors, xyz]
    )
    for chosen in ([9], [0, 1, 2], [3], [3, 8]):
        q, where = p.to(torch.float32), xyz.detach().clone()
        inputs = [*q.tensors, where]
        for i in chosen:
            inputs[i].requires_grad_()
        out = tcam_ext.decode_points(q.planes, q.weights, q.biases, where, **p.options)
        got = torch.autograd.grad(out.sum(), [inputs[i] for i in chosen])
        assert all(torch.equal(g, full[i]) for g, i in zip(got, chosen, strict=True))


# ---- invariances -------------------------------------------------------------------------------


@pytest.mark.parametrize("formulation", [PROJECTED, FEATURES])
def test_bits_do_not_depend_on_threads(formulation, threads):
    p = problems.make(channels=6, widths=(40, 33, 2), batch=2).to(torch.float32)
    xyz, extra = coordinates(2, 30_000).float().view(-1, 3), torch.randn(60_000, 2)
    p.weights[0] = torch.randn(40, 20)
    grad = torch.randn(60_000, 2)

    def run(count):
        threads(count)
        arguments = flat(p, xyz, extra=extra)
        return [
            library.decode_points(*arguments, torch.float32, formulation=formulation),
            *library.decode_points_backward(grad, *arguments, True, True, True, True, formulation=formulation),
        ]

    first = run(1)
    for count in (2, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(run(count), first, strict=True))


def test_memory_does_not_grow_with_the_points():
    from tcam_ext.library import KernelPoints, KernelTensors, _Call

    p = problems.make(channels=42, texels=(64, 64, 64), widths=(128, 128, 128, 128, 1)).to(torch.float32)
    options = library.KernelOptions(*problems.flat_options(p, "float32")[: len(library.KernelOptions._fields)])
    sizes = []
    for n in (100_000, 3_000_000):
        xyz = torch.empty(n, 3)
        tensors, points = KernelTensors(p.planes, p.weights, p.biases), KernelPoints(xyz, None, None)
        call = _Call(tensors, options, points, torch.float32, (True, True))
        sizes.append(call._call.workspace(True))
    assert sizes[0] == sizes[1] < 120e6


def test_autocast_compile_and_opcheck():
    p = problems.make(activation="silu").to(torch.float32, True)
    xyz = coordinates().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tcam_ext.decode_points([q.bfloat16() for q in p.planes], p.weights, p.biases, xyz, **p.options)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(inside.float().sum(), [*p.tensors, xyz]))
    q = p.to(torch.float32)
    index = torch.zeros(200, dtype=torch.int64)
    for arguments in (flat(q, xyz.detach()), flat(q, xyz.detach(), objects=index)):
        torch.library.opcheck(library.decode_points, (*arguments, torch.float32))
        grad = torch.randn(200, 2)
        torch.library.opcheck(library.decode_points_backward, (grad, *arguments, True, True, False, True))
    torch.library.opcheck(library.resample_axis, (torch.randn(2, 3, 4), 3, 7, 1, 6, False, "reflection", True, None, False))


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    p = problems.make(batch=2, activation="silu").to(torch.float32, True)
    xyz = coordinates(2).float().requires_grad_()

    def f(planes, weights, biases, xyz):
        planes = [2 * q for q in planes]
        decoded = tcam_ext.decode_points(planes, weights, biases, xyz, activation="silu")
        return (
            decoded.square().sum() + tcam_ext.sample_grid(planes, (3, 4, 5)).sum() + tcam_ext.sample_points(planes, xyz).sum()
        )

    eager = torch.autograd.grad(f(p.planes, p.weights, p.biases, xyz), [*p.tensors, xyz])
    compiled = torch.compile(f, fullgraph=True)
    got = torch.autograd.grad(compiled(p.planes, p.weights, p.biases, xyz), [*p.tensors, xyz])
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["softplus", "leaky_relu(0.2)", "sine"])
def test_compiles_for_any_size_with_activations_that_have_parameters(activation):
    torch._dynamo.reset()
    p = problems.make().to(torch.float32)
    compiled = torch.compile(
        lambda xyz: tcam_ext.decode_points(
            p.planes, p.weights, p.biases, xyz, activation=activation, output_activation="trunc_exp(-1)"
        ),
        fullgraph=True,
        dynamic=True,
    )
    for n in (40, 50):
        assert compiled(coordinates(1, n).float()).shape == (1, n, 2)


def test_a_change_between_forward_and_backward_is_noticed():
    p = problems.make(batch=2).to(torch.float32, True)
    index, bounds = torch.zeros(9, dtype=torch.int64), torch.tensor([[[-1.0, 1.0]] * 3] * 2, dtype=torch.float64)
    out = tcam_ext.decode_points(p.planes, p.weights, p.biases, coordinates(1, 9)[0].float(), batch_index=index)
    index.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = p.call(tcam_ext.decode_grid, bounds=bounds)
    bounds.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_batch_index_of_any_strides_and_no_extra_features():
    p = problems.make(batch=2).to(torch.float64)
    index = torch.arange(12).remainder(2)[::2].contiguous() + torch.arange(6).remainder(2)
    strided = torch.stack((index, index), 1)[:, 0]
    xyz, mlp = coordinates(1, 6)[0], (p.planes, p.weights, p.biases)
    want = tcam_ext.decode_points(*mlp, xyz, batch_index=index)
    for impl in ("native", "reference"):
        got = tcam_ext.decode_points(*mlp, xyz, batch_index=strided, extra=torch.empty(6, 0), impl=impl)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_bounds_far_from_the_origin():
    """A box of one unit at 1e8, points in float64, planes in float32."""
    p = problems.make().to(torch.float32)
    unit = torch.rand(1, 50, 3, dtype=torch.float64)
    got = tcam_ext.sample_points(p.planes, 1e8 + unit, bounds=[(1e8, 1e8 + 1)] * 3)
    torch.testing.assert_close(got, tcam_ext.sample_points(p.planes, unit * 2 - 1), rtol=1e-4, atol=1e-5)


def test_half_planes_are_reduced_before_they_are_rounded():
    p = problems.make(batch=2).to(torch.bfloat16)
    for reduce in ("sum", "mean", "prod"):
        got, want = (tcam_ext.sample_grid(p.planes, (4, 5, 6), reduce=reduce, impl=i) for i in ("native", "reference"))
        torch.testing.assert_close(got, want)


def test_no_second_derivative():
    p = problems.make(batch=2).to(torch.float32, True)
    points = torch.zeros(2, 5, 3)
    out = tcam_ext.decode_points(p.planes, p.weights, p.biases, points)
    with pytest.raises(RuntimeError, match=r'decode_points.*impl="reference"'):
        torch.autograd.grad(out.sum(), p.planes, create_graph=True)
    q = replace(p, options={"activation": "silu"})
    xyz = points.clone().requires_grad_()
    out = tcam_ext.decode_points(q.planes, q.weights, q.biases, xyz, impl="reference", **q.options)
    (first,) = torch.autograd.grad(out.sum(), xyz, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), xyz)[0].isfinite().all()  # as an eikonal loss needs
