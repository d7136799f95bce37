"""The ops with the preset of another project equal that project's sampling and decoding, written in plain PyTorch.

Each formula below takes tensors and coordinates in the project's order, and passes them to ``grid_sample`` as the project does.
Planes are random and of unequal sizes, so that any swapped axis, plane or channel shows.
"""

from __future__ import annotations

import math
from itertools import combinations

import problems
import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import grid_sample

import tcam_ext
from tcam_ext import conventions
from tcam_ext.conventions import CONVENTIONS

C, N = 4, 150


def sample(plane, u, v, align_corners=False, padding_mode="zeros"):
    """grid_sample of a plane (B, C, rows, columns) at u along its columns and v along its rows: (B, N, C)."""
    where = torch.stack((u, v), -1).unsqueeze(1)
    return grid_sample(plane, where, align_corners=align_corners, padding_mode=padding_mode)[:, :, 0].mT


def layers(h, weights, biases, activation):
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = F.linear(activation(h), w, b) if i else F.linear(h, w, b)
    return h


def tcam(p, xyz):
    xy, yz, xz = p.planes
    x, y, z = xyz.unbind(-1)
    border = {"padding_mode": "border"}
    f = torch.cat((sample(xy, y, x, **border), sample(yz, z, y, **border), sample(xz, z, x, **border)), -1)
    return torch.sigmoid(layers(f, p.weights, p.biases, torch.relu))


def nfd(p, xyz):
    """A sum, Gaussian Fourier features (the first of the weights), and two ReLU layers."""
    x, y, z = xyz.unbind(-1)
    f = sum(sample(q, u, v, align_corners=True) for q, (u, v) in zip(p.planes, ((x, y), (y, z), (x, z)), strict=True))
    half = p.weights[0].shape[0] // 2
    projected = 2 * math.pi * F.linear(f, p.weights[0][:half] / (2 * math.pi))
    h = torch.cat((projected.sin(), projected.cos()), -1)
    h = torch.relu(F.linear(h, p.weights[1], p.biases[1]))
    h = torch.relu(F.linear(h, p.weights[2], p.biases[2]))
    return F.linear(h, p.weights[3], p.biases[3])


def eg3d(p, xyz):
    """Planes over (x, y), (x, z), (z, y); mean; softplus."""
    x, y, z = xyz.unbind(-1)
    f = torch.stack([sample(q, u, v) for q, (u, v) in zip(p.planes, ((x, y), (x, z), (z, y)), strict=True)]).mean(0)
    return layers(f, p.weights, p.biases, F.softplus)


def eg3d_legacy(p, xyz):
    """As released, with plane axes as matrices that project coordinates by their inverse; the third plane is over (z, x)."""
    x, y, z = xyz.unbind(-1)
    f = torch.stack([sample(q, u, v) for q, (u, v) in zip(p.planes, ((x, y), (x, z), (z, x)), strict=True)]).mean(0)
    return layers(f, p.weights, p.biases, F.softplus)


def openlrm(p, xyz):
    x, y, z = xyz.unbind(-1)
    f = torch.cat([sample(q, u, v) for q, (u, v) in zip(p.planes, ((x, y), (x, z), (z, y)), strict=True)], -1)
    return layers(f, p.weights, p.biases, torch.relu)


def triposr(p, xyz):
    pairs = (xyz[..., [0, 1]], xyz[..., [0, 2]], xyz[..., [1, 2]])
    f = torch.cat([sample(q, *uv.unbind(-1)) for q, uv in zip(p.planes, pairs, strict=True)], -1)
    return layers(f, p.weights, p.biases, F.silu)


def ssdnerf(p, xyz):
    """Features in the order channel, plane."""
    pairs = (xyz[..., [0, 1]], xyz[..., [0, 2]], xyz[..., [1, 2]])
    f = torch.stack([sample(q, *uv.unbind(-1), padding_mode="border") for q, uv in zip(p.planes, pairs, strict=True)], -1)
    return layers(f.flatten(-2), p.weights, p.biases, F.silu)


def semcity(p, xyz):
    """Planes (X, Y), (X, Z), (Y, Z), sampled at the flipped pair of coordinates."""
    pairs = (xyz[..., [0, 1]], xyz[..., [0, 2]], xyz[..., [1, 2]])
    f = sum(sample(q, *uv.flip(-1).unbind(-1), padding_mode="border") for q, uv in zip(p.planes, pairs, strict=True))
    return layers(f, p.weights, p.biases, torch.relu)


def blaze3dm(p, zyx):
    """Coordinates in the order z, y, x, flipped first; (sin + 1)/2 after every layer, also the last."""
    x, y, z = zyx.flip(-1).unbind(-1)
    f = torch.cat([sample(q, u, v) for q, (u, v) in zip(p.planes, ((x, y), (y, z), (x, z)), strict=True)], -1)

    def half_sine(h):
        return (h.sin() + 1) / 2

    return half_sine(layers(f, p.weights, p.biases, half_sine))


def kplanes(p, points):
    """A product of planes for every pair of coordinates; the plane of (a, b) has the size (res[b], res[a])."""
    pairs = [(a, b) for a in range(points.shape[-1]) for b in range(a + 1, points.shape[-1])]
    f = torch.ones(())
    for q, (a, b) in zip(p.planes, pairs, strict=True):
        f = f * sample(q, points[..., a], points[..., b], align_corners=True, padding_mode="border")
    return layers(f, p.weights, p.biases, torch.relu)


FORMULAS = dict(
    tcam=tcam, nfd=nfd, eg3d=eg3d, eg3d_legacy=eg3d_legacy, openlrm=openlrm, triposr=triposr, ssdnerf=ssdnerf, semcity=semcity,
    blaze3dm=blaze3dm, kplanes=kplanes, kplanes_4d=kplanes,
)  # fmt: skip


def problem(name):
    c = CONVENTIONS[name]
    widths = {"nfd": (12, 10, 9, 1), "eg3d": (16, 33), "eg3d_legacy": (16, 33)}.get(name, (16, 12, 4))
    p = problems.make(channels=C, texels=(5, 6, 7, 3), widths=widths, batch=2, **c.options)
    if name == "nfd":  # sines, and sines shifted by a quarter turn
        half = torch.randn(6, C, dtype=torch.float64)
        p.weights[0] = torch.cat((half, half))
        p.biases[0] = torch.cat((torch.zeros(6), torch.ones(6))).double() * (math.pi / 2)
    return p.to(torch.float64, requires_grad=True)


def test_every_convention_has_a_formula():
    assert FORMULAS.keys() == CONVENTIONS.keys()
    assert all(CONVENTIONS[name] is getattr(conventions, name) for name in FORMULAS)


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", problems.DEVICES)
def test_points(device, name, dtype):
    p = problem(name)
    axes = 4 if name.endswith("4d") else 3
    xyz = (torch.rand(2, N, axes, dtype=torch.float64) * 2.4 - 1.2).requires_grad_()
    want = FORMULAS[name](p, xyz)
    mine, where = p.to(dtype, True, device), xyz.detach().to(device, dtype, copy=True).requires_grad_()
    got = tcam_ext.decode_points(mine.planes, mine.weights, mine.biases, where, **CONVENTIONS[name].options)
    exact = dtype == torch.float64
    assert problems.relative(got, want) < (1e-12 if exact else 1e-5)
    if not exact:  # relu masks may flip
        return
    grad = torch.randn_like(want)
    inputs = [*p.tensors, xyz]
    want_grads = torch.autograd.grad(want, inputs, grad, allow_unused=True)
    grads = [g.cpu() for g in torch.autograd.grad(got, [*mine.tensors, where], grad.to(device))]
    for i, (a, b) in enumerate(zip(grads, want_grads, strict=True)):
        if name == "nfd" and inputs[i] is p.weights[0]:  # its frequencies are one tensor in both halves
            a = a[:6] + a[6:]
            b = b[:6]
        if b is not None:  # (nfd has no bias there)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["kplanes", "kplanes_4d"])
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_kplanes_at_four_scales(name, impl):
    """The features of each scale, products of planes for every pair of coordinates, follow those of the scale before."""
    c, axes = CONVENTIONS[name].scales(4), 4 if name.endswith("4d") else 3
    planes, scales = [], []
    for scale in (1, 2, 4, 8):  # multiplies the resolution in space, not in time
        texels = [3 * scale, 2 * scale, 4 * scale, 5]
        scales.append([torch.randn(2, C, texels[b], texels[a], dtype=torch.float64) for a, b in combinations(range(axes), 2)])
        planes += scales[-1]
    p = problems.make(channels=4 * C, widths=(16, 3), plane_axes=((0, 1),))  # its weights
    inputs = [t.requires_grad_() for t in (*planes, *p.weights, *p.biases)]
    xyz = (torch.rand(2, N, axes, dtype=torch.float64) * 2.4 - 1.2).requires_grad_()
    features = []
    for scale in scales:
        f = torch.ones(())
        for plane, (a, b) in zip(scale, combinations(range(axes), 2), strict=True):
            f = f * sample(plane, xyz[..., a], xyz[..., b], align_corners=True, padding_mode="border")
        features.append(f)
    want = layers(torch.cat(features, -1), p.weights, p.biases, torch.relu)
    got = tcam_ext.decode_points(planes, p.weights, p.biases, xyz, impl=impl, **c.options)
    assert problems.relative(got, want) < 1e-12
    grad = torch.randn_like(want)
    want_grads, grads = (torch.autograd.grad(out, [*inputs, xyz], grad) for out in (want, got))
    torch.testing.assert_close(grads, want_grads, rtol=1e-9, atol=1e-9)
    if axes == 4:
        return
    size = (4, 6, 5)
    volume = tcam_ext.decode_grid(planes, p.weights, p.biases, size, grid=c.grid, impl=impl, **c.options)
    ends = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in size]
    at = torch.stack(torch.meshgrid(*ends, indexing="ij"), -1).view(1, -1, 3).expand(2, -1, -1)
    voxels = tcam_ext.decode_points(planes, p.weights, p.biases, at, impl="reference", **c.options)
    assert problems.relative(volume, voxels.mT.reshape(volume.shape)) < 1e-12


@pytest.mark.parametrize("padding_mode", ["border", "reflection"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_planes_at_one_time(padding_mode, align_corners):
    """A grid decoded from the planes at a time equals points at that time, with the gradients of planes and times."""
    changes = dict(padding_mode=padding_mode, align_corners=align_corners)
    p, options = problem("kplanes_4d"), {**conventions.kplanes_4d.options, **changes}
    time = torch.tensor([0.37, -1.2], dtype=torch.float64, requires_grad=True)
    size = (4, 6, 5)
    at, sampling = tcam_ext.at_time(p.planes, time, **{**conventions.kplanes_4d.sampling, **changes})
    got = tcam_ext.decode_grid(at, p.weights, p.biases, size, grid="corners", activation="relu", **sampling)
    ends = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in size]
    xyz = torch.stack(torch.meshgrid(*ends, indexing="ij"), -1).view(1, -1, 3).expand(2, -1, -1)
    xyzt = torch.cat((xyz, time.view(2, 1, 1).expand(2, xyz.shape[1], 1)), -1)
    want = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyzt, **options).mT.reshape(got.shape)
    assert problems.relative(got, want) < 1e-12
    grad = torch.randn_like(want)
    grads, want_grads = (torch.autograd.grad(out, [*p.planes, time], grad) for out in (got, want))
    torch.testing.assert_close(grads, want_grads, rtol=1e-9, atol=1e-9)


def test_time_is_checked():
    p, options = problem("kplanes_4d"), conventions.kplanes_4d.sampling
    with pytest.raises(ValueError, match=r"time.*\(2,\).*\(3,\)"):
        tcam_ext.at_time(p.planes, torch.zeros(3), **options)
    with pytest.raises(ValueError, match=r"time.*int64"):
        tcam_ext.at_time(p.planes, torch.zeros(2, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match=r"padding_mode.*zeros"):
        tcam_ext.at_time(p.planes, 0.5, **{**options, "padding_mode": "zeros", "align_corners": False})


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"kplanes_4d"}))
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_grids(name, impl):
    """The dense volume equals the formula at its voxels."""
    p, c, size = problem(name), CONVENTIONS[name], (4, 6, 5)
    axes = [
        torch.linspace(-1, 1, n, dtype=torch.float64)
        if c.grid == "corners"
        else (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1
        for n in size
    ]
    xyz = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3).expand(2, -1, -1)
    want = FORMULAS[name](p, xyz).mT.reshape(2, -1, *size)
    got = tcam_ext.decode_grid(p.planes, p.weights, p.biases, size, grid=c.grid, impl=impl, **c.options)
    assert problems.relative(got, want) < 1e-12
    features = tcam_ext.sample_grid(p.planes, size, grid=c.grid, impl=impl, **c.sampling)
    points = tcam_ext.sample_points(p.planes, xyz, impl=impl, **c.sampling)
    torch.testing.assert_close(features.flatten(2).mT, points, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_a_swapped_axis_fails(name):
    """An asymmetric phantom, for which no other assignment of plane axes gives the same values."""
    p, c = problem(name), CONVENTIONS[name]
    axes = 4 if name.endswith("4d") else 3
    xyz = torch.rand(2, N, axes, dtype=torch.float64) * 2 - 1
    want = FORMULAS[name](p, xyz)
    for q, (row, column) in enumerate(c.plane_axes):
        other = min(set(range(axes)) - {row, column})
        for pair in ((column, row), (row, other)):
            changed = (*c.plane_axes[:q], pair, *c.plane_axes[q + 1 :])
            got = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz, **{**c.options, "plane_axes": changed})
            assert problems.relative(got, want) > 1e-3
