"""The sampling and decoding of other projects, written again from their published shapes: dense code in plain PyTorch.

Each module takes planes (B, planes, C, h, w) and coordinates (B, N, 3) and has the project's layers under its names. `channels`
and `texels` are those of the project's published model, `chunk` the points that its code decodes at a time for a volume.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

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

    channels, texels, chunk = 32, 256, 1000000
    pairs, width = ((0, 1), (0, 2), (2, 0)), 1.4

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(FullyConnected(32, 64, 0.5), nn.Softplus(), FullyConnected(64, 33, 0.5))

    def forward(self, planes, xyz):
        x = self.net(sample(planes, 2 / self.width * xyz, self.pairs).mean(1))
        return {"rgb": torch.sigmoid(x[..., 1:]) * (1 + 2 * 0.001) - 0.001, "sigma": x[..., 0:1]}


class OpenLrm(nn.Module):
    """OSGDecoder of four layers on concatenated planes."""

    channels, texels, chunk = 80, 64, 1048576
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

    channels, texels, chunk = 40, 64, 8192
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

    channels, texels, chunk = 32, 128, 50000
    pairs, width = ((0, 1), (1, 2), (0, 2)), 2.0

    def __init__(self, fourier=True):
        super().__init__()
        first = [Fourier(32, 64), nn.Linear(128, 128, dtype=DOUBLE)] if fourier else [nn.Linear(32, 128, dtype=DOUBLE)]
        rest = [nn.ReLU(), nn.Linear(128, 128, dtype=DOUBLE), nn.ReLU(), nn.Linear(128, 1, dtype=DOUBLE)]
        self.net = nn.Sequential(*first, *rest)

    def forward(self, planes, xyz):
        return self.net(sample(planes, xyz, self.pairs, align_corners=True).sum(1))


class SemCity(nn.Module):
    """A sum of planes, sines of the coordinates, and six layers, of which the fourth reads the input again."""

    channels, texels, chunk = 64, 128, 100000
    width = 2.0

    def __init__(self, frequencies=6, classes=20):
        super().__init__()
        self.frequencies, n = frequencies, 64 + 6 * frequencies
        self.first_layers = nn.Sequential(
            nn.Linear(n, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
        ).to(DOUBLE)
        self.second_layers = nn.Sequential(
            nn.Linear(n + 128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes)
        ).to(DOUBLE)

    def forward(self, planes, xyz):
        pairs = ((0, 1), (0, 2), (1, 2))
        f = sum(
            F.grid_sample(planes[:, i], xyz[:, None, :, list(pair)].flip(-1), align_corners=False, padding_mode="border")[
                :, :, 0
            ]
            for i, pair in enumerate(pairs)
        ).mT
        waves = [wave(2**k * xyz) for k in range(self.frequencies) for wave in (torch.sin, torch.cos)]
        x = torch.cat((f, *waves), -1)
        return self.second_layers(torch.cat((x, self.first_layers(x)), -1))


class SsdNerf(nn.Module):
    """TriPlaneDecoder: features channel by channel, a density, and a colour of h plus a layer of the encoded direction."""

    channels, texels, chunk = 6, 128, 100000
    width, use_dir_enc, sigmoid_saturation = 2.0, True, 0.001

    def __init__(self, flip_z=False, views=True, hidden=0):
        super().__init__()
        self.flip_z, self.use_dir_enc, self.code_dropout = flip_z, views, None
        self.scene_base = nn.Parameter(torch.randn(1, 3, 1, 1, 1, dtype=DOUBLE))
        more = [nn.Linear(64, 64, dtype=DOUBLE), nn.SiLU()] * hidden
        self.base_net, self.base_activation = nn.Sequential(nn.Linear(18, 64, dtype=DOUBLE)), nn.SiLU()
        self.density_net = nn.Sequential(*more, nn.Linear(64, 1, dtype=DOUBLE))
        self.dir_net = nn.Sequential(nn.Linear(16, 64, dtype=DOUBLE)) if views else None
        self.color_net = nn.Sequential(*more, nn.Linear(64, 3, dtype=DOUBLE), nn.Sigmoid())

    def forward(self, code, xyz, directions=None):
        if self.flip_z:
            xyz = torch.cat((xyz[..., :2], -xyz[..., 2:]), -1)
        code = code + self.scene_base
        planes = [
            F.grid_sample(code[:, i], xyz[:, None][..., list(pair)], padding_mode="border", align_corners=False)[:, :, 0]
            for i, pair in enumerate(((0, 1), (0, 2), (1, 2)))
        ]
        h = self.base_net(torch.stack(planes, 1).permute(0, 3, 2, 1).flatten(2))
        out = {"sigma": self.density_net(self.base_activation(h)).exp()}
        if directions is None and self.use_dir_enc:
            return out
        h = h if self.dir_net is None else h + self.dir_net(self.harmonics(directions))
        rgb = self.color_net(self.base_activation(h))
        return {**out, "rgb": rgb * (1 + self.sigmoid_saturation * 2) - self.sigmoid_saturation}

    @staticmethod
    def harmonics(d):
        """Of degree l and order m at l^2 + l + m, from Legendre functions and angles: K P_l^|m|(z) cos(m phi), or sin."""
        z, phi, out = d[..., 2], torch.atan2(d[..., 1], d[..., 0]), []
        s = (1 - z * z).clamp(min=0).sqrt()
        legendre = {(0, 0): torch.ones_like(z)}
        for m in range(1, 4):
            legendre[m, m] = -(2 * m - 1) * s * legendre[m - 1, m - 1]
        for m in range(3):
            legendre[m + 1, m] = (2 * m + 1) * z * legendre[m, m]
            for n in range(m + 2, 4):
                legendre[n, m] = ((2 * n - 1) * z * legendre[n - 1, m] - (n + m - 1) * legendre[n - 2, m]) / (n - m)
        for n in range(4):
            for m in range(-n, n + 1):
                k = math.sqrt((2 * n + 1) / (4 * math.pi) * math.factorial(n - abs(m)) / math.factorial(n + abs(m)))
                wave = (abs(m) * phi).sin() if m < 0 else (m * phi).cos()
                out.append(k * (math.sqrt(2) if m else 1) * legendre[n, abs(m)] * wave)
        return torch.stack(out, -1)


class Blaze3dm(nn.Module):
    """TriplaneConvAutoDecoder.decoder: a convolution across planes, features, and NeRF's encoding before them."""

    channels, texels, chunk = 32, 128, 500000
    pairs, width, cells, order = ((0, 1), (1, 2), (0, 2)), 2.0, True, "zyx"

    def __init__(self, aggregate="concat", use_tanh=True):
        super().__init__()
        self.aggregate, self.use_tanh = aggregate, use_tanh
        n = 63 + (96 if aggregate == "concat" else 32)
        self.embeddings = nn.ParameterList([nn.Embedding(1, 12)])
        self.conv = Rollout(32)
        self.net = nn.Sequential(*(nn.Linear(a, b, dtype=DOUBLE) for a, b in pairwise((n, 128, 128, 1))))

    def prepare(self, planes):
        planes = self.conv(planes) + planes
        return planes.tanh() if self.use_tanh else planes

    def forward(self, planes, xyz):
        f = sample(self.prepare(planes), xyz, self.pairs)
        f = f.prod(1) if self.aggregate == "prod" else f.transpose(1, 2).flatten(2)
        waves = [wave(2**i * math.pi * xyz[..., j]) for i in range(10) for j in range(3) for wave in (torch.sin, torch.cos)]
        h = torch.cat((xyz, torch.stack(waves, -1), f), -1)
        for layer in self.net:
            h = (layer(h).sin() + 1) / 2
        return h


class Rollout(nn.Module):
    """A convolution of each plane with the means of the other two (here of the plane alone: the module is the project's)."""

    def __init__(self, channels):
        super().__init__()
        self.conv_xy = nn.Conv2d(channels, channels, 3, padding=1, dtype=DOUBLE)

    def forward(self, planes):
        return 0.1 * self.conv_xy(planes.flatten(0, 1)).view_as(planes)


class TinyCuda(nn.Module):
    """A network of tinycudann: flat parameters, rows padded to 16, inputs padded with ones, no biases, relu."""

    def __init__(self, n, width, hidden, outputs):
        super().__init__()
        self.sizes = [-(-n // 16) * 16, *[width] * hidden, -(-outputs // 16) * 16]
        self.outputs = outputs
        count = sum(a * b for a, b in pairwise(self.sizes))
        self.params = nn.Parameter(torch.randn(count, dtype=DOUBLE) * 0.3)

    def forward(self, x):
        x = torch.cat((x, x.new_ones(len(x), self.sizes[0] - x.shape[1])), 1)
        at = 0
        for i, (n, m) in enumerate(pairwise(self.sizes)):
            x = (x.relu() if i else x) @ self.params[at : at + n * m].view(m, n).T
            at += n * m
        return x[:, : self.outputs]


class KPlanes(nn.Module):
    """KPlaneField.get_density, hybrid or linear, over three coordinates or with time."""

    def __init__(self, channels=32, time=False, linear=False, concat=True, scales=(1, 2, 4, 8), base=4, tiny=True):
        super().__init__()
        self.concat_features, self.linear_decoder, self.spatial_distortion = concat, linear, None
        self.aabb = nn.Parameter(torch.tensor([[-1.5, -1.0, -2.0], [1.0, 1.2, 1.4]], dtype=DOUBLE), requires_grad=False)
        self.pairs = [(a, b) for a in range(3 + time) for b in range(a + 1, 3 + time)]
        resolution = [[s * base, s * (base + 1), s * (base + 2), 5] for s in scales]
        self.grids = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.rand(1, channels, r[b], r[a], dtype=DOUBLE) + 0.3) for a, b in self.pairs)
            for r in resolution
        )
        n, outputs = channels * (len(scales) if concat else 1), 1 if linear else 16
        if tiny:
            self.sigma_net = TinyCuda(n, 64, 0 if linear else 1, outputs)
        else:
            self.sigma_net = nn.Sequential(nn.Linear(n, 64, dtype=DOUBLE), nn.ReLU(), nn.Linear(64, outputs, dtype=DOUBLE))

    def forward(self, points, timestamps=None):
        if self.spatial_distortion is None:
            x = (points - self.aabb[0]) * (2 / (self.aabb[1] - self.aabb[0])) - 1
        else:
            x = self.spatial_distortion(points) / 2
        if timestamps is not None:
            x = torch.cat((x, timestamps[:, None, None].expand(-1, x.shape[1], 1)), -1)
        shape, x = x.shape[:2], x.reshape(1, 1, -1, x.shape[-1])
        scales = []
        for grid in self.grids:
            f = 1.0
            for plane, pair in zip(grid, self.pairs, strict=True):
                f = f * F.grid_sample(plane, x[..., list(pair)], padding_mode="border", align_corners=True)[0, :, 0].T
            scales.append(f)
        z = self.sigma_net(torch.cat(scales, -1) if self.concat_features else sum(scales)).view(*shape, -1)
        out = {"density": (z[..., -1:] - 1).exp()}
        return out if self.linear_decoder else {**out, "features": z[..., :-1]}
