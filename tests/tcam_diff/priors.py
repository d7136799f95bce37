"""Gaussian priors that the tests share."""

import torch
from tcam_diff.autodecoder.planes import plane_sizes
from tcam_diff.diffusion.prior import GaussianPrior, octaves, transform

#: Changes of a configuration that give it the Gaussian prior, and a network that is tied to it.
GAUSSIAN = ("prior=gaussian", "timesteps=spectrum", "center=true")
FILTERED = ("network.octave_gains=true", "network.prior_input=true")
OBLONG = plane_sizes((4, 6, 2))


def numbers(channels, sizes):
    return channels * sum(h * w for h, w in sizes)


def some_prior(channels=2, sizes=OBLONG, directions=3, white=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    m, owner = numbers(channels, sizes), octaves(channels, sizes).owner
    floor = torch.full((1,), 0.4) if white else 0.05 + torch.rand(len(owner), generator=g)
    return GaussianPrior(
        channels, sizes, torch.randn(m, generator=g), floor, 2 * torch.randn(directions, m, generator=g)
    ).double()


def covariance(prior):
    """S in the basis of texels (M, M), from its definition."""
    basis = transform(
        torch.eye(len(prior.mean), dtype=torch.float64), prior.channels, prior.sizes
    )  # rows: T e_i, so basis = T'
    w = prior.directions @ basis.T
    return basis @ torch.diag(prior.floor[prior.band]) @ basis.T + w.T @ w


def drawn(prior, count, seed=0):
    """States (N, M) of a prior."""
    g = torch.Generator().manual_seed(seed)
    m = len(prior.mean)
    normals = torch.randn(count, m, dtype=torch.float64, generator=g) * prior.floor[prior.band].sqrt()
    along = torch.randn(count, len(prior.directions), dtype=torch.float64, generator=g) @ prior.directions
    return (prior.mean + transform(normals + along, prior.channels, prior.sizes, inverse=True)).float()
