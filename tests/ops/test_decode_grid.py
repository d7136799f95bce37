"""decode_grid: equality with the float64 reference, and invariances of the method."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import problems
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import grid_sample

import tcam_ext
from tcam_ext import _C, checks, library, reference
from tcam_ext.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS
from tcam_ext.testing import make

ISAS = [isa for isa in ("portable", "avx2", "avx512", "avx512bf16", "amx")]


# ---- values ----------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
def test_reference_samples_as_grid_sample_does(align_corners, padding_mode):
    """The ops are defined by the reference, and its sampling by torch's grid_sample."""
    p = problems.make(channels=3, texels=(4, 7, 5), widths=(9,), size=(6, 5, 11), align_corners=align_corners,
                      padding_mode=padding_mode)  # fmt: skip
    p.weights[0], p.biases[0] = (
        torch.eye(9, dtype=torch.float64),
        None,
    )  # one identity layer, which returns the features
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in p.size]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    want = [
        grid_sample(plane, torch.stack((v, u), -1).view(1, -1, 1, 2), align_corners=align_corners, padding_mode=padding_mode)
        .view(1, 3, *p.size)
        for plane, (u, v) in zip(p.planes, ((x, y), (y, z), (x, z)), strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(p.call(reference.decode_grid), torch.cat(want, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", problems.DEVICES)
@problems.examples(150)
@given(p=problems.problems(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_equals_the_float64_reference(device, p, dtype):
    name = str(dtype).removeprefix("torch.")
    got = p.to(dtype, device=device).call(tcam_ext.decode_grid)
    want = p.call(reference.decode_grid)
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert problems.relative(got, want, problems.terms_of(p)) < problems.FORWARD_LIMIT[name]


@pytest.mark.parametrize("device", problems.DEVICES)
@problems.examples(150)
@given(p=problems.problems(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_gradients_equal_the_float64_reference(device, p, dtype):
    name = str(dtype).removeprefix("torch.")
    exact, mine = p.to(torch.float64, requires_grad=True), p.to(dtype, requires_grad=True, device=device)
    out, trusted = problems.masked_reference(exact)
    grad = torch.randn_like(out) * trusted
    want = torch.autograd.grad(out, exact.tensors, grad)
    got = torch.autograd.grad(mine.call(tcam_ext.decode_grid), mine.tensors, grad.to(device, dtype))
    assert problems.gradient_error(list(got), list(want)) < problems.GRADIENT_LIMIT[name]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    "widths",
    [
        (128, 128, 128, 128, 1), (256, 200, 16), (256, 256, 256, 256, 256, 3), (131, 17, 1), (512, 300, 256), (64, 33), (40, 4),
        (200,), (64,) * 9 + (4,), (16,) * 15 + (5,),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", problems.DEVICES)
def test_wide_decoders(device, activation, widths):
    """The operating point, wide and deep decoders, many outputs, and widths that are not multiples of a vector."""
    p = problems.make(channels=42, texels=(8, 9, 10), widths=widths, size=(7, 11, 13), activation=activation)
    exact, mine = p.to(torch.float64, requires_grad=True), p.to(torch.float32, requires_grad=True, device=device)
    out, trusted = problems.masked_reference(exact)
    grad = torch.randn_like(out) * trusted
    got = mine.call(tcam_ext.decode_grid)
    assert problems.relative(got, out, problems.terms_of(exact)) < 1e-5
    want = torch.autograd.grad(out, exact.tensors, grad)
    assert problems.gradient_error(list(torch.autograd.grad(got, mine.tensors, grad.float().to(device))), list(want)) < 1e-4


@pytest.mark.parametrize("device", problems.DEVICES)
def test_most_channels(device):
    p = problems.make(channels=512, texels=(4, 5, 6), widths=(512, 256), size=(7, 8, 9), activation="tanh")
    exact = p.to(torch.float64, requires_grad=True)
    want = exact.call(reference.decode_grid)
    grad = torch.randn_like(want)
    grads = list(torch.autograd.grad(want, exact.tensors, grad))
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        mine = p.to(dtype, requires_grad=True, device=device)
        got = mine.call(tcam_ext.decode_grid)
        assert problems.relative(got, want) < limit
        own = torch.autograd.grad(got, mine.tensors, grad.to(device, dtype))
        assert problems.gradient_error(list(own), grads) < 10 * limit


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("output_activation", sorted(OUTPUT_ACTIVATIONS))
@pytest.mark.parametrize("device", problems.DEVICES)
def test_gradcheck(device, activation, output_activation):
    p = problems.make(channels=2, texels=(3, 2, 4), widths=(5, 4, 2), size=(3, 4, 3), activation=activation,
                      output_activation=output_activation).to(torch.float64, True, device)  # fmt: skip

    def f(*t):
        return replace(p, planes=list(t[:3]), weights=list(t[3:6]), biases=list(t[6:])).call(tcam_ext.decode_grid)

    assert torch.autograd.gradcheck(f, p.tensors)


@pytest.mark.parametrize(
    ("reduce", "groups"),
    [("concat", None), ("mean", None), ("sum", (2, 3)), ("prod", None), ("prod", (3, 2)), ("prod", (1, 4)), ("prod", (5,))],
)
@pytest.mark.parametrize("bounds", [None, [(-0.3, 0.1), (0.2, 0.3), (0.9, -0.2)]])
@pytest.mark.parametrize("padding_mode", checks.PADDING_MODES)
@pytest.mark.parametrize("device", problems.DEVICES)
def test_planes_finer_than_the_grid(device, reduce, groups, bounds, padding_mode):
    """The grid, and a part of the planes that is smaller still, are far fewer voxels than texels."""
    axes = ((1, 0), (2, 1), (0, 2), (1, 2), (2, 0))
    p = problems.make(channels=20, texels=(33, 31, 40), widths=(24, 3), size=(9, 8, 7), batch=2, activation="silu",
                      plane_axes=axes[: sum(groups)] if groups else axes[:3], reduce=reduce, groups=groups, bounds=bounds,
                      padding_mode=padding_mode)  # fmt: skip
    exact, mine = p.to(torch.float64, requires_grad=True), p.to(torch.float32, requires_grad=True, device=device)
    want, got = exact.call(reference.decode_grid), mine.call(tcam_ext.decode_grid)
    way = "maps over pairs of axes, multiplied" if reduce == "prod" else f"{len(p.planes)} of {len(p.planes)} planes sampled"
    assert device != "cpu" or way in p.call(partial(tcam_ext.explain, tcam_ext.decode_grid))["values"]
    assert problems.relative(got, want) < 1e-5
    grad = torch.randn_like(want)
    grads = list(torch.autograd.grad(want, exact.tensors, grad))
    for wanted in (mine.tensors, mine.planes, mine.tensors[len(mine.planes) :]):  # all, and each kind alone
        at = [i for i, t in enumerate(mine.tensors) if any(t is w for w in wanted)]
        own = torch.autograd.grad(got, wanted, grad.float().to(device), retain_graph=True)
        assert problems.gradient_error(list(own), [grads[i] for i in at]) < 1e-4


@pytest.mark.parametrize("device", problems.DEVICES)
@pytest.mark.parametrize(("reduce", "channels"), [("sum", 20), ("sum", 2), ("prod", 20)])
def test_a_box_of_a_large_grid_reads_its_texels_alone(device, reduce, channels):
    """Texels that no voxel of the box reads may be anything, and their gradients are 0."""
    p = problems.make(channels=channels, texels=(64, 64, 64), widths=(24, 3), size=(64, 64, 64), reduce=reduce)
    p = p.to(torch.float32)
    box, near = ((10, 14), (30, 33), (50, 63)), ((8, 16), (28, 35), (48, 65))
    want = p.call(tcam_ext.decode_grid, box=box)
    for plane, (rows, columns) in zip(p.planes, ((0, 1), (1, 2), (0, 2)), strict=True):
        part = plane[:, :, slice(*near[rows]), slice(*near[columns])].clone()
        plane.fill_(torch.nan)
        plane[:, :, slice(*near[rows]), slice(*near[columns])] = part
    p = p.to(torch.float32, requires_grad=True, device=device)
    got = p.call(tcam_ext.decode_grid, box=box)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    for plane, grad in zip(p.planes, torch.autograd.grad(got.sum(), p.planes), strict=True):
        assert not grad[plane.isnan()].any()
        assert grad.isfinite().all()
        assert grad.any()


@pytest.mark.parametrize("device", problems.DEVICES)
@pytest.mark.parametrize("widths", [(16,) * 15 + (5,), (33,)])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_products_of_planes_on_grids(device, widths, compute):
    """From one layer to the most, whose first is one more layer of the voxel loop on a CPU."""
    p = problems.make(channels=40, texels=(9, 8, 7), widths=widths, size=(9, 10, 11), batch=2, activation="tanh",
                      reduce="prod", plane_axes=((0, 1), (2, 1), (0, 2), (1, 0)), groups=(2, 2))  # fmt: skip
    exact, mine = p.to(torch.float64, requires_grad=True), p.to(torch.float32, requires_grad=True, device=device)
    want, got = exact.call(reference.decode_grid), mine.call(tcam_ext.decode_grid, compute_dtype=getattr(torch, compute))
    limit = 1e-5 if compute == "float32" else 2e-2
    assert problems.relative(got, want) < limit
    grad = torch.randn_like(want)
    grads = torch.autograd.grad(want, exact.tensors, grad)
    own = torch.autograd.grad(got, mine.tensors, grad.float().to(device))
    assert problems.gradient_error(list(own), list(grads)) < 10 * limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", problems.DEVICES)
def test_half_tensors(device, dtype):
    """Half inputs are widened, so that the only errors are those of rounding the inputs and the output."""
    p = problems.make(**problems.SMALL_OPERATING_POINT).to(dtype, requires_grad=True, device=device)
    got = p.call(tcam_ext.decode_grid)
    assert got.dtype == dtype
    want = p.to(torch.float64).call(reference.decode_grid)
    assert problems.relative(got, want) < 1e-2
    for t, g in zip(p.tensors, torch.autograd.grad(got.sum(), p.tensors), strict=True):
        assert g.dtype == dtype
        assert g.shape == t.shape


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_out_dtype_rounds_as_torch_does(out_dtype):
    p = problems.make().to(torch.float32)
    p.weights[-1] *= 100
    full = p.call(tcam_ext.decode_grid)
    assert torch.equal(p.call(tcam_ext.decode_grid, out_dtype=out_dtype), full.to(out_dtype))


def test_float16_output_overflows_and_underflows_as_torch_does():
    p = problems.make(widths=(1,), bias=False).to(torch.float32)
    for scale in (1e-9, 1e-7, 1e-6, 1e-4, 1e4, 1e6):
        p.weights[0] = torch.randn(1, 15) * scale
        full = p.call(tcam_ext.decode_grid)
        assert torch.equal(p.call(tcam_ext.decode_grid, out_dtype=torch.float16), full.half())


@pytest.mark.parametrize("compute", [torch.float64, torch.float32, torch.float16, torch.bfloat16, "tf32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", problems.DEVICES)
def test_compute_dtype(device, compute, dtype):
    p = problems.make(**problems.SMALL_OPERATING_POINT)
    got = p.to(dtype, device=device).call(tcam_ext.decode_grid, compute_dtype=compute)
    assert got.dtype == dtype
    limit = {torch.float64: 1e-5, torch.float32: 1e-5, "tf32": 1e-5 if device == "cpu" else 1e-3}.get(compute, 1e-2)
    assert problems.relative(got, p.call(reference.decode_grid)) < limit


def test_nan_and_infinity_reach_the_output():
    p = problems.make(output_activation="none").to(torch.float32)
    p.planes[0][0, 0, 2, 3] = float("nan")
    out = p.call(tcam_ext.decode_grid)
    assert torch.equal(out.isnan(), p.call(reference.decode_grid).isnan())
    assert out.isnan().any()
    assert not out.isnan().all()


@pytest.mark.exhaustive
@pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 12 * 2**30, reason="needs 12 GiB of memory")
def test_more_than_two_to_the_31_elements():
    """2.2e9 voxels of a one-layer decoder in bfloat16 need 64-bit offsets in the kernel."""
    p = problems.make(channels=1, texels=(2, 2, 2), widths=(1,), size=(1304, 1304, 1304), bias=False).to(torch.bfloat16)
    out = p.call(tcam_ext.decode_grid)
    assert out.numel() > 2**31
    corner = ((1300, 1304), (1299, 1304), (1298, 1304))
    assert torch.equal(out[:, :, 1300:, 1299:, 1298:], p.call(tcam_ext.decode_grid, box=corner))


# ---- invariances -----------------------------------------------------------------------


@pytest.mark.parametrize("device", problems.DEVICES)
@problems.examples(60)
@given(p=problems.problems(), data=st.data())
def test_a_box_is_the_same_part_of_the_whole_bit_for_bit(device, p, data):
    p = p.to(torch.float32, device=device)
    box = []
    for n in p.size:
        lo = data.draw(st.integers(0, n - 1))
        box.append((lo, data.draw(st.integers(lo + 1, n))))
    (x0, x1), (y0, y1), (z0, z1) = box
    whole = p.call(tcam_ext.decode_grid)
    assert torch.equal(p.call(tcam_ext.decode_grid, box=box), whole[:, :, x0:x1, y0:y1, z0:z1])


@pytest.mark.parametrize("device", problems.DEVICES)
def test_boxes_add_up_to_the_gradient_of_the_whole(device):
    """Backward is linear in grad_output: the gradients of disjoint boxes sum to that of the whole."""
    p = problems.make(size=(12, 10, 9)).to(torch.float64, True, device)
    grad = torch.randn(1, 2, 12, 10, 9, dtype=torch.float64, device=device)
    want = torch.autograd.grad(p.call(tcam_ext.decode_grid), p.tensors, grad)
    total = [torch.zeros_like(t) for t in p.tensors]
    for x in ((0, 5), (5, 12)):
        for z in ((0, 1), (1, 9)):
            part = p.call(tcam_ext.decode_grid, box=(x, (0, 10), z))
            for t, g in zip(
                total,
                torch.autograd.grad(part, p.tensors, grad[:, :, x[0] : x[1], :, z[0] : z[1]]),
                strict=True,
            ):
                t += g
    assert problems.gradient_error(total, [w.cpu() for w in want]) < 1e-12


@pytest.mark.parametrize(("channels", "reduce", "way"), [(60, "sum", None), (3, "sum", "3 of 3"), (256, "prod", "multiplied")])
def test_a_volume_of_several_slabs_is_the_sum_of_its_parts(channels, reduce, way):
    """Large enough that backward takes five slabs of x; each part fits in one. Planes are projected or sampled first."""
    p = problems.make(
        channels=channels, texels=(20, 9, 9), widths=(256, 2), size=(120, 64, 64), activation="silu", reduce=reduce
    )
    p = p.to(torch.float32, requires_grad=True)
    explained = p.call(partial(tcam_ext.explain, tcam_ext.decode_grid))["values"]
    assert way in explained if way else "sampled" not in explained
    whole = p.call(tcam_ext.decode_grid)
    grad = torch.randn_like(whole)
    want = torch.autograd.grad(whole, p.tensors, grad)
    total = [torch.zeros_like(t) for t in p.tensors]
    for x in range(0, 120, 20):
        part = p.call(tcam_ext.decode_grid, box=((x, x + 20), (0, 64), (0, 64)))
        assert torch.equal(part, whole[:, :, x : x + 20])
        for t, g in zip(total, torch.autograd.grad(part, p.tensors, grad[:, :, x : x + 20]), strict=True):
            t += g
    assert problems.gradient_error(total, [w.double() for w in want]) < 1e-4


@pytest.mark.parametrize("size", [(40, 24, 32), (5, 1, 700), (1, 300, 9), (900, 2, 2)])
@pytest.mark.parametrize(("activation", "outputs"), [("relu", 2), ("silu", 2), ("relu", 35)])
@pytest.mark.parametrize(("reduce", "channels"), [("concat", 40), ("concat", 6), ("prod", 6)])
def test_bits_do_not_depend_on_threads_tiles_or_runs(size, activation, outputs, reduce, channels, threads):
    """Of planes that are projected first, of planes that are sampled first, and of their products."""
    p = problems.make(channels=channels, texels=(40, 33, 31), widths=(40, 33, outputs), size=size, activation=activation,
                      batch=2, reduce=reduce).to(torch.float32)  # fmt: skip
    options = problems.flat_options(p, "float32")
    if reduce == "prod":
        options = (options[0], [3], "product", *options[3:])
    grad = torch.randn(2, outputs, *size)

    def run(count, tile):
        threads(count)
        forward = library.decode_grid(p.planes, p.weights, p.biases, *options, torch.float32, tile=tile)
        return [
            forward,
            *library.decode_grid_backward(grad, p.planes, p.weights, p.biases, *options, True, True, False, tile=tile),
        ]

    want = run(1, 0)
    for count, tile in ((1, 0), (2, 0), (3, 0), (2, 12), (5, 36), (2, 96)):
        for got, first in zip(run(count, tile), want, strict=True):
            assert torch.equal(got, first), (count, tile)


@pytest.mark.parametrize("device", problems.DEVICES)
def test_batch_is_independent_objects(device):
    p = problems.make(batch=3).to(torch.float32, device=device)
    whole = p.call(tcam_ext.decode_grid)
    for i in range(3):
        one = replace(p, planes=[q[i : i + 1] for q in p.planes]).call(tcam_ext.decode_grid)
        assert torch.equal(one[0], whole[i])


@pytest.mark.parametrize("device", problems.DEVICES)
def test_one_layer_is_linear_and_its_gradient_is_the_adjoint(device):
    """With a single layer and no bias the decode is linear in the planes: <A x, y> = <x, A^T y>."""
    p = problems.make(widths=(3,), bias=False, size=(9, 8, 7)).to(torch.float64, True, device)
    q = replace(p, planes=[torch.randn_like(t) for t in p.planes])
    both = replace(p, planes=[2 * a - 3 * b for a, b in zip(p.planes, q.planes, strict=True)])
    ax, aq = p.call(tcam_ext.decode_grid), q.call(tcam_ext.decode_grid)
    torch.testing.assert_close(both.call(tcam_ext.decode_grid), 2 * ax - 3 * aq, rtol=1e-11, atol=1e-11)
    y = torch.randn_like(ax)
    grads = torch.autograd.grad(ax, p.planes, y)
    inner = sum(float((g * x).detach().sum()) for g, x in zip(grads, p.planes, strict=True))
    assert inner == pytest.approx(float((ax * y).detach().sum()), rel=1e-12)


def test_a_constant_volume_when_planes_and_volume_have_one_cell():
    p = problems.make(texels=(1, 1, 1), size=(1, 1, 1))
    whole = replace(p, size=(5, 4, 3)).call(tcam_ext.decode_grid)
    torch.testing.assert_close(whole, p.call(tcam_ext.decode_grid).expand_as(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("device", problems.DEVICES)
def test_axes_are_in_order(device, axis):
    """Flipping the planes along a coordinate flips the volume along it: no axis is swapped."""
    p = problems.make(texels=(5, 6, 7), size=(8, 9, 10)).to(torch.float64, device=device)
    owners = {0: ((0, 2), (2, 2)), 1: ((0, 3), (1, 2)), 2: ((1, 3), (2, 3))}[axis]  # (plane, its dimension)
    flipped = list(p.planes)
    for plane, dim in owners:
        flipped[plane] = flipped[plane].flip(dim)
    want = p.call(tcam_ext.decode_grid).flip(2 + axis)
    torch.testing.assert_close(replace(p, planes=flipped).call(tcam_ext.decode_grid), want, rtol=1e-11, atol=1e-11)


def test_stacked_planes_and_strided_tensors():
    stacked = torch.randn(2, 3, 4, 6, 6, requires_grad=True)
    p = problems.make(channels=4).to(torch.float32)
    out = tcam_ext.decode_grid(stacked, p.weights, p.biases, (5, 6, 7))
    listed = tcam_ext.decode_grid([stacked[:, i] for i in range(3)], p.weights, p.biases, (5, 6, 7))
    assert torch.equal(out, listed)
    weights = [w.t().contiguous().t() for w in p.weights]
    channels_last = [stacked[:, i].contiguous(memory_format=torch.channels_last) for i in range(3)]
    assert torch.equal(tcam_ext.decode_grid(channels_last, weights, p.biases, np.array([5, 6, 7])), out)
    out.sum().backward()
    assert stacked.grad is not None
    assert stacked.grad.shape == stacked.shape


# ---- instruction sets ------------------------------------------------------------------

_ISA_SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import problems, tcam_ext
from tcam_ext import _C
from tcam_ext.activations import ACTIVATIONS
assert _C.cpu_isa() == {isa!r}
torch.manual_seed(1)
for activation in ACTIVATIONS:
    for widths in ((33, 17, 2), (128, 128, 1), (160, 16), (3,)):
        p = problems.make(channels=7, widths=widths, size=(9, 10, 11), activation=activation, output_activation="sigmoid")
        for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
            exact, mine = p.to(torch.float64, requires_grad=True), p.to(dtype, requires_grad=True)
            out, trusted = problems.masked_reference(exact)
            grad = torch.randn_like(out) * trusted
            got = mine.call(tcam_ext.decode_grid)
            assert problems.relative(got, out) < limit / 10
            want = torch.autograd.grad(out, exact.tensors, grad)
            got = torch.autograd.grad(got, mine.tensors, grad.to(dtype))
            assert problems.gradient_error(list(got), list(want)) < limit
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    env = {**os.environ, "TCAM_CPU_ISA": isa}
    probe = subprocess.run([sys.executable, "-c", "import tcam_ext"], env=env, capture_output=True, text=True)
    if "not an instruction set that this build and this machine both have" in probe.stderr:
        pytest.skip(f"this machine or build has no {isa}")
    script = _ISA_SCRIPT.format(tests=os.path.dirname(__file__), isa=isa)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_runs_serially():
    import multiprocessing

    p = problems.make(size=(20, 20, 20)).to(torch.float32)
    want = p.call(tcam_ext.decode_grid)  # the parent has entered a parallel region
    with multiprocessing.get_context("fork").Pool(1) as pool:
        got = pool.apply_async(_decode_in_child, (p,)).get(timeout=60)
    assert np.array_equal(got, want.numpy())


def _decode_in_child(p):
    assert _C.cpu_forked()
    return p.call(tcam_ext.decode_grid).numpy()


@pytest.mark.parametrize("threads", [1, 2])
def test_subnormal_floats_count_as_zero_inside_and_nowhere_else(threads):
    """The gradients of a nearly empty volume are subnormal: exactly 0 here. The caller's own arithmetic keeps subnormals."""
    p = make(widths=(16, 8, 1)).to(torch.float32, True, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        volume = p.call(tcam_ext.decode_grid)
        volume.backward(torch.full_like(volume, 1e-42))
        gradients = [t.grad for t in (*p.planes, *p.weights)]
        assert all(g is not None and not g.any() for g in gradients)
        assert float(torch.full((4096,), 1e-42).mul(2).sum()) > 0
    finally:
        torch.set_num_threads(before)
