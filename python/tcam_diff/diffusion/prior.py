"""Gaussian prior of states, whose exact denoiser is a fixed skip around the network (algorithm.md section 11).

States x0 (M,), the packed planes of volumes, are modelled as a normal distribution with mean m and covariance

    S = T' D T + T' W' W T

T is the orthonormal DCT-II of every plane and channel. D is diagonal, with one variance for each plane, channel and octave of
spatial frequency: the floor. The K rows of W are the leading principal directions. With c = cos(eta), s = sin(eta) and
A = c^2 D + s^2 I, the posterior means given x = c x0 + s eps are, in the basis of T,

    y = x - c m,    z = (I + c^2 W A^-1 W')^-1 W A^-1 y,    r = (c^2 S + s^2 I)^-1 y = A^-1 (y - c^2 W' z)
    x0 = m + c S r = m + c (D r + W' z),    eps = s r

without a division by c or s, so c x0 + s eps = x at every angle. The network's two heads F and G are added as

    x0_hat = x0 + s rho F,    eps_hat = eps - c rho G,    rho^2 = mean of d / (c^2 d + s^2) over the channel's floor

Under the prior the ODE of the process is linear and leads from x at the angle eta to the planes

    flow(x) = m + S^(1/2) (c^2 S + s^2 I)^(-1/2) (x - c m)

The root is an integral of posterior means, for a variance v of S

    (v / (c^2 v + s^2))^(1/2) = 2/pi times the integral over k of v / (e^-k v + e^k (c^2 v + s^2))

for which the trapezoidal rule converges exponentially: the integrand is 1 / cosh around the logarithm of the root.

s rho and c rho are the posterior standard deviations of x0 and eps outside the leading directions, averaged over the channel,
so F and G have about unit variance there. With m = 0, D = I and K = 0 the skips are cos(eta) x and sin(eta) x. With one head,
F = G, c x0_hat + s eps_hat = x whatever the network says, and with the unit prior -F is the velocity dx/deta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tcam_diff.diffusion.dct import octaves_of, transform_planes
from tcam_diff.diffusion.process import angle, pack, unpack

Sizes = Sequence[tuple[int, int]]

#: Steps of the trapezoidal rule of the flow, relative error 4 exp(-pi^2 / step), and how far it goes beyond the roots'
#: logarithms, relative error exp(-3 margin).
FLOW_STEP, FLOW_MARGIN = 1.0, 3.0


def transform(x: Tensor, channels: int, sizes: Sizes, inverse: bool = False) -> Tensor:
    """DCT-II of every plane and channel of states (B, M), or its inverse."""
    return pack([transform_planes(plane, inverse) for plane in unpack(x, channels, sizes)])


class Bands(NamedTuple):
    """Bands of the coefficients of the DCT.

    Attributes:
        band: band of every coefficient (M,).
        owner: plane and channel of every band, 0 to 3 C - 1.
        octave: octave of every band, from 0.
    """

    band: Tensor
    owner: Tensor
    octave: Tensor


def octaves(channels: int, sizes: Sizes) -> Bands:
    """Bands of planes: one for each plane, channel and octave (:func:`octaves_of`)."""
    bands, owners, octave, first = [], [], [], 0
    for p, (h, w) in enumerate(sizes):
        present, index = octaves_of(h, w).unique(return_inverse=True)
        for c in range(channels):
            bands.append(first + index.flatten())
            owners += [p * channels + c] * len(present)
            octave += present.tolist()
            first += len(present)
    return Bands(torch.cat(bands), torch.tensor(owners), torch.tensor(octave))


class GaussianPrior(nn.Module):
    """Normal distribution of states with its exact denoiser.

    Args:
        channels: channels C of the planes.
        sizes: rows and columns of xy, yz, xz.
        mean: mean m (M,).
        floor: variances d, positive: (1,) for all coefficients, or one for each band of :func:`octaves`.
        directions: rows of W (K, M) in the basis of T; K may be 0.

    Raises:
        ValueError: shapes do not fit, or a variance is not positive.
    """

    def __init__(self, channels: int, sizes: Sizes, mean: Tensor, floor: Tensor, directions: Tensor) -> None:
        super().__init__()
        self.channels, self.sizes = channels, list(sizes)
        numbers = channels * sum(h * w for h, w in sizes)
        band, owner, _ = octaves(channels, sizes)
        if len(floor) == 1:
            band, owner = torch.zeros_like(band), owner[:1]
        if mean.shape != (numbers,) or directions.shape[1:] != (numbers,) or floor.shape != owner.shape:
            raise ValueError(
                f"prior: expected mean ({numbers},), floor ({len(owner)},) and directions (K, {numbers}), got "
                f"{tuple(mean.shape)}, {tuple(floor.shape)} and {tuple(directions.shape)}"
            )
        if not (floor > 0).all():
            raise ValueError("prior: expected positive variances of the floor")
        counts = torch.bincount(band, minlength=len(owner)).float()
        self.owners = int(owner.max()) + 1
        in_channel = torch.zeros(self.owners).index_add(0, owner, counts)
        self.mean, self.floor, self.directions = (nn.Buffer(t.float().contiguous()) for t in (mean, floor, directions))
        self.band, self.owner = nn.Buffer(band, persistent=False), nn.Buffer(owner, persistent=False)
        self.counts = nn.Buffer(counts, persistent=False)
        self.share = nn.Buffer(counts / in_channel[owner], persistent=False)
        self.gram = nn.Buffer(self._gram(), persistent=False)
        self.mean_coefficients = nn.Buffer(self.transform(self.mean[None])[0], persistent=False)

    @staticmethod
    def unit(channels: int, sizes: Sizes) -> GaussianPrior:
        """Standard normal distribution, whose denoiser is the skips cos(eta) x and sin(eta) x."""
        numbers = channels * sum(h * w for h, w in sizes)
        return GaussianPrior(channels, sizes, torch.zeros(numbers), torch.ones(1), torch.zeros(0, numbers))

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest variance: of the floor, without the smallest 5 % of its coefficients, and of the directions."""
        order = self.floor.argsort()
        below = self.counts[order].cumsum(0) / self.counts.sum()
        smallest = float(self.floor[order][int((below < 0.05).sum())])
        largest = float(self.directions.square().sum(1).max()) if len(self.directions) else 0.0
        return smallest, max(largest, float(self.floor.max()))

    def _gram(self) -> Tensor:
        """W W' by bands (bands, K, K)."""
        w = self.directions
        grams = torch.zeros(len(self.floor), len(w), len(w))
        if len(w):
            order = self.band.argsort(stable=True)
            for i, part in enumerate(w[:, order].split([int(n) for n in self.counts], 1)):
                grams[i] = part @ part.T
        return grams

    def _solved(self, weighted: Tensor, inner: Tensor, factor: Tensor) -> Tensor:
        """(I + factor W A^-1 W')^-1 W (B, K) applied to ``weighted`` A^-1 y (B, M), with A (B, bands)."""
        g = weighted @ self.directions.to(weighted).T
        h = torch.einsum("bn,nkl->bkl", 1 / inner, self.gram.to(inner)).double()
        system = torch.eye(h.shape[1], dtype=h.dtype, device=h.device) + factor.double().unsqueeze(-1) * h
        return torch.linalg.solve(system, g.double().unsqueeze(-1)).squeeze(-1).to(g)

    def transform(self, x: Tensor, inverse: bool = False) -> Tensor:
        """T x, the coefficients of states x (B, M), or T' x. The unit prior needs no basis, and takes T = I."""
        return x if len(self.floor) == 1 and not len(self.directions) else transform(x, self.channels, self.sizes, inverse)

    def forward(self, x: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means of noise and x0, each (B, M), for states x (B, M) at angles eta (B,)."""
        noise, x0 = self.of_coefficients(self.transform(x), eta)
        return self.transform(noise, inverse=True), self.transform(x0, inverse=True)

    def of_coefficients(self, x: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the posterior means of noise and x0, each (B, M), for those of states at angles eta (B,) or (1,)."""
        eta = eta.to(x)[:, None]
        c, s = eta.cos(), eta.sin()
        mean, floor = self.mean_coefficients.to(x), self.floor.to(x)[self.band]
        r, along = self._posterior(x - c * mean, c.square(), s.square())
        return s * r, mean + c * along.addcmul_(floor, r)

    def _posterior(self, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """r = (a S + b I)^-1 y and W' W r, each (B, M) in the basis of T, for factors a and b (B, 1). S r = D r + W' W r."""
        inner = a * self.floor.to(y) + b
        spread = inner[:, self.band]
        r = y / spread
        along = torch.zeros_like(y)
        if len(self.directions):
            along = self._solved(r, inner, a) @ self.directions.to(y)
            r = r.addcmul_(along, -a / spread)
        return r, along

    def flow(self, x: Tensor, eta: Tensor) -> Tensor:
        """Planes (B, M) to which the process's ODE under the prior leads from states x (B, M) at angles eta (B,) or (1,).

        The relative error is below 1e-3, along every direction.
        """
        eta = eta.to(x)[:, None]
        c, s = eta.cos(), eta.sin()
        mean, floor = self.mean_coefficients.to(x), self.floor.to(x)[self.band]
        y = self.transform(x) - c * mean

        def shrunk(a: Tensor, b: Tensor) -> Tensor:  # S (a S + b I)^-1 y
            r, along = self._posterior(y, a, b)
            return along.addcmul_(floor, r)

        most = float(self.floor.max() + self.directions.square().sum())  # no variance is larger
        roots = [torch.log(v / (c.square() * v + s.square())) / 2 for v in (float(self.floor.min()), most)]
        low, high = (float(end) for end in (torch.cat(roots).min(), torch.cat(roots).max()))
        count = math.ceil((high - low + 2 * FLOW_MARGIN) / FLOW_STEP)
        first, last = low - FLOW_MARGIN, low - FLOW_MARGIN + FLOW_STEP * (count - 1)
        beyond = 1 / math.expm1(FLOW_STEP)  # the terms beyond both ends are geometric series
        total = beyond * (math.exp(first) * y + math.exp(-last) * shrunk(c.square(), s.square()))
        for i in range(count):
            u = math.exp(first + FLOW_STEP * i)
            total = total + shrunk(1 / u + u * c.square(), u * s.square())
        return self.transform(mean + 2 / math.pi * FLOW_STEP * total, inverse=True)

    def spread(self, eta: Tensor) -> Tensor:
        """rho (B, M) at angles eta (B,)."""
        eta = eta.to(self.floor)[:, None]
        ratio = self.floor / (eta.cos().square() * self.floor + eta.sin().square())
        channels = torch.zeros(len(ratio), self.owners, dtype=ratio.dtype, device=ratio.device)
        return channels.index_add(1, self.owner, ratio * self.share).sqrt()[:, self.owner[self.band]]

    def denoised(self, planes: Sequence[Tensor], t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Posterior means of noise and x0 for planes (B, C, rows, columns) at timesteps t (B,)."""
        with torch.autocast(planes[0].device.type, enabled=False):
            noise, x0 = self(pack(planes), angle(t.to(self.floor)))
        return unpack(noise, self.channels, self.sizes), unpack(x0, self.channels, self.sizes)

    def combine(
        self, own: tuple[Sequence[Tensor], Sequence[Tensor]], t: Tensor, noise: Sequence[Tensor], x0: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Estimates of noise and planes: those of :meth:`denoised`, ``own``, and the network's heads at timesteps t (B,)."""
        with torch.autocast(t.device.type, enabled=False):
            scales = [unpack(s, self.channels, self.sizes) for s in self.scales(angle(t.to(self.floor)))]
            both = [
                [o + s * h.to(o) for o, s, h in zip(owns, of, heads, strict=True)]
                for owns, of, heads in zip(own, scales, (noise, x0), strict=True)
            ]
        return both[0], both[1]

    def combine_flow(self, planes: Sequence[Tensor], t: Tensor, x0: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Noise and planes from the head F of a consistency model, which add up to the states: x0 = flow(x) + s rho F.

        All are (B, C, rows, columns), at timesteps t (B,) above 0.
        """
        with torch.autocast(planes[0].device.type, enabled=False):
            x, eta = pack(planes), angle(t.to(self.floor))
            end = self.flow(x, eta) + self.scales(eta)[1] * pack(x0).to(x)
            noise = (x - eta.cos()[:, None].to(x) * end) / eta.sin()[:, None].to(x)
        both = [unpack(e, self.channels, self.sizes) for e in (noise, end)]
        return both[0], both[1]

    def scales(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """-c rho and s rho (B, M): the factors of the heads G and F at angles eta (B,)."""
        rho, eta = self.spread(eta), eta.to(self.floor)[:, None]
        return -eta.cos() * rho, eta.sin() * rho

    def log_likelihood(self, states: Tensor) -> Tensor:
        """Logarithm of the density at states (N, M), in nats (N,)."""
        y = self.transform(states - self.mean.to(states))
        floor = self.floor.to(states)[None]
        weighted = y / floor[:, self.band]
        squares = (y * weighted).sum(1).double()
        logarithm = (self.counts.double() * self.floor.double().log()).sum()
        if len(self.directions):
            z = self._solved(weighted, floor, torch.ones_like(floor[:, :1]))
            squares = squares - ((weighted @ self.directions.to(states).T) * z).sum(1).double()
            h = torch.einsum("n,nkl->kl", 1 / self.floor.double(), self.gram.double())
            logarithm = logarithm + torch.logdet(torch.eye(len(h), dtype=h.dtype, device=h.device) + h)
        return -0.5 * (squares + logarithm + len(self.mean) * math.log(2 * math.pi))
