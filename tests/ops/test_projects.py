"""Modules in place of other projects' decoders equal the projects' code, written again from its published shapes."""

from __future__ import annotations

import math
from itertools import pairwise

import problems
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcam_ext.nn import from_eg3d, from_nfd, from_openlrm, from_triposr

DOUBLE = torch.float64


def sample(planes, xyz, pairs, **options):
    """Features (B, planes, N, C) of planes (B, planes, C, h, w) at pairs of coordinates (column, row)."""
    rows = [
        F.grid_sample(planes[:, i], xyz[:, None, :, list(pair)], align_corners=options.get("align_corners", False))[:, :, 0].mT
        for i, pair in enumerate(pairs)
    ]
    return torch.stack(rows, 1)


class FullyConnected(nn.Module):
    """A layer whose raw parameters are scaled at run time."""

    def __init__(self, n, m, lr_multiplier):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n, dtype=DOUBLE) / lr_multiplier)
        self.bias = nn.Parameter(torch.randn(m, dtype=DOUBLE))
        self.weight_gain, self.bias_gain = lr_multiplier / math.sqrt(n), lr_multiplier

    def forward(self, x):
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class Eg3d(nn.Module):
    """OSGDecoder, with the planes of the released checkpoints, in a cube of width 1.4."""

    pairs, width = ((0, 1), (0, 2), (2, 0)), 1.4

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(FullyConnected(32, 64, 0.5), nn.Softplus(), FullyConnected(64, 33, 0.5))

    def forward(self, planes, xyz):
        x = self.net(sample(planes, 2 / self.width * xyz, self.pairs).mean(1))
        return {"rgb": torch.sigmoid(x[..., 1:]) * (1 + 2 * 0.001) - 0.001, "sigma": x[..., 0:1]}


class OpenLrm(nn.Module):
    """OSGDecoder of four layers on concatenated planes."""

    pairs, width = ((0, 1), (0, 2), (2, 1)), 2.0

    def __init__(self):
        super().__init__()
        sizes = (3 * 80, 64, 64, 64, 4)
        layers = [m for n, k in pairwise(sizes) for m in (nn.Linear(n, k, dtype=DOUBLE), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, planes, xyz):
        features = sample(planes, 2 / self.width * xyz, self.pairs)
        x = self.net(features.transpose(1, 2).flatten(2))
        return {"rgb": torch.sigmoid(x[..., 1:]) * (1 + 2 * 0.001) - 0.001, "sigma": x[..., 0:1]}


class TripoSr(nn.Module):
    """NeRFMLP of ten layers, and the activations of query_triplane."""

    pairs, width = ((0, 1), (0, 2), (1, 2)), 2 * 0.87

    def __init__(self):
        super().__init__()
        sizes = (3 * 40, *[64] * 9, 4)
        layers = [m for n, k in pairwise(sizes) for m in (nn.Linear(n, k, dtype=DOUBLE), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, planes, xyz):
        features = sample(planes, 2 / self.width * xyz, self.pairs)
        x = self.layers(features.transpose(1, 2).flatten(2))
        density, features = x[..., 0:1], x[..., 1:4]
        return {"density": density, "features": features, "density_act": (density - 1).exp(), "color": torch.sigmoid(features)}


class Fourier(nn.Module):
    def __init__(self, channels, count):
        super().__init__()
        self._B = nn.Parameter(torch.randn(channels, count, dtype=DOUBLE) * 0.3, requires_grad=False)

    def forward(self, x):
        x = 2 * math.pi * (x @ self._B)
        return torch.cat((x.sin(), x.cos()), -1)


class Nfd(nn.Module):
    """The network of MultiTriplane, with or without Fourier features."""

    pairs, width = ((0, 1), (1, 2), (0, 2)), 2.0

    def __init__(self, fourier=True):
        super().__init__()
        first = [Fourier(32, 64), nn.Linear(128, 128, dtype=DOUBLE)] if fourier else [nn.Linear(32, 128, dtype=DOUBLE)]
        rest = [nn.ReLU(), nn.Linear(128, 128, dtype=DOUBLE), nn.ReLU(), nn.Linear(128, 1, dtype=DOUBLE)]
        self.net = nn.Sequential(*first, *rest)

    def forward(self, planes, xyz):
        return self.net(sample(planes, xyz, self.pairs, align_corners=True).sum(1))


def of_nfd(source):
    return from_nfd(source.net if isinstance(source, nn.Module) else source)


PROJECTS = {
    "eg3d": (Eg3d, 32, lambda d: from_eg3d(d, box_warp=1.4, lr_multiplier=0.5)),
    "openlrm": (OpenLrm, 80, from_openlrm),
    "triposr": (TripoSr, 40, from_triposr),
    "nfd": (Nfd, 32, of_nfd),
    "nfd-plain": (lambda: Nfd(False), 32, of_nfd),
}


def results(out):
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.fixture(params=sorted(PROJECTS))
def project(request):
    torch.manual_seed(0)
    make, channels, of = PROJECTS[request.param]
    decoder = make()
    planes = torch.randn(2, 3, channels, 6, 6, dtype=DOUBLE, requires_grad=True)
    return decoder, planes, of


def test_points_and_gradients(project):
    decoder, planes, of = project
    mine = of(decoder)
    xyz = (torch.rand(2, 40, 3, dtype=DOUBLE) - 0.5) * 1.2 * decoder.width
    xyz.requires_grad_()
    want, got = decoder(planes, xyz), mine(planes, xyz)
    assert type(want) is type(got)
    assert not isinstance(want, dict) or want.keys() == got.keys()
    inputs = [planes, xyz, *(p for p in decoder.parameters() if p.requires_grad)]
    grads = [torch.randn_like(w) for w in results(want)]
    for a, b in zip(results(got), results(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(results(want), inputs, grads)
    for a, b in zip(torch.autograd.grad(results(got), inputs, grads), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_one_object_and_coordinates_of_any_shape(project):
    decoder, planes, of = project
    xyz = (torch.rand(4, 5, 3, dtype=DOUBLE) - 0.5) * decoder.width
    want = decoder(planes[:1], xyz.reshape(1, -1, 3))
    for a, b in zip(results(of(decoder)(planes[0], xyz)), results(want), strict=True):
        torch.testing.assert_close(a, b.reshape(4, 5, -1), rtol=1e-9, atol=1e-9)


def test_grids(project):
    decoder, planes, of = project
    size, mine = (4, 3, 5), of(decoder)
    axes = [torch.linspace(-0.5, 0.5, n, dtype=DOUBLE) * decoder.width for n in size]
    xyz = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3).expand(2, -1, -1)
    for a, b in zip(results(mine.grid(planes, size)), results(decoder(planes, xyz)), strict=True):
        torch.testing.assert_close(a.flatten(2).mT, b, rtol=1e-9, atol=1e-9)


def test_a_state_dict_gives_the_same(project):
    decoder, planes, of = project
    xyz = torch.rand(2, 7, 3, dtype=DOUBLE) - 0.5
    mine = of({k: v.clone() for k, v in decoder.state_dict().items()})
    for a, b in zip(results(mine(planes, xyz)), results(decoder(planes, xyz)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(p.requires_grad for p in mine.parameters())


def test_a_module_shares_the_projects_parameters():
    decoder = OpenLrm()
    mine = from_openlrm(decoder)
    assert {id(p) for p in mine.parameters()} == {id(p) for p in decoder.parameters()}


@pytest.mark.parametrize("device", problems.DEVICES)
def test_float32(device):
    torch.manual_seed(0)
    for make, channels, of in PROJECTS.values():
        decoder = make()
        planes, xyz = torch.randn(2, 3, channels, 6, 6, dtype=DOUBLE), torch.rand(2, 40, 3, dtype=DOUBLE) - 0.5
        want = results(decoder(planes, xyz))
        mine = of(decoder).to(device, torch.float32)
        for a, b in zip(results(mine(planes.to(device).float(), xyz.to(device).float())), want, strict=True):
            assert float((a.cpu().double() - b).norm() / b.norm()) < 1e-4


def test_bad_decoders_are_refused():
    with pytest.raises(ValueError, match="decoder: expected a module with linear layers"):
        from_openlrm(nn.ReLU())
    with pytest.raises(ValueError, match=r"expected a state_dict with matrices named \.\.\.weight, got a"):
        from_openlrm({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="half_width"):
        from_triposr(TripoSr(), radius=0.0)
