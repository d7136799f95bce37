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
