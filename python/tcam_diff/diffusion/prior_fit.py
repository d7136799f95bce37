"""Fit of the Gaussian prior (:mod:`tcam_diff.diffusion.prior`) to states, with states held out (algorithm.md section 11)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcam_diff.diffusion.prior import GaussianPrior, Sizes, octaves, transform
from tcam_diff.errors import UserError
from tcam_diff.training.rng import rng

#: Least variance of the floor. States have a mean square of 1.
LEAST = 1e-3
#: States from which a prior is fitted, at most.
MOST_STATES = 512
#: Iterations of L-BFGS for the variances of held-out states.
ITERATIONS = 60


@dataclass
class Principal:
    """Mean (M,), variances (K,) in decreasing order and orthonormal directions (K, M) of states."""

    mean: Tensor
    variances: Tensor
    directions: Tensor


def principal(states: Tensor, most: int | None = None) -> Principal:
    """Principal components of states (N, M), at most N - 1 and those of positive variance."""
    mean = states.double().mean(0).to(states)
    centred = states - mean
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    for part in centred.split(1 << 16, 1):
        gram += part.double() @ part.double().T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = min(len(states) - 1, int((values > 1e-9 * values[0].clamp(min=1e-300)).sum()), most or len(states))
    directions = (vectors[:, :kept] / values[:kept].sqrt()).T.to(states) @ centred
    return Principal(mean, (values[:kept] / max(1, len(states) - 1)).to(states), directions)


@dataclass
class CrossFit:
    """Prior of all states, those of the states outside each part, and the part of every state (N,)."""

    prior: GaussianPrior
    without: list[GaussianPrior]
    part: Tensor


def fit_prior(states: Tensor, channels: int, sizes: Sizes, **options: Any) -> GaussianPrior:
    """The prior of :func:`cross_fit`, alone."""
    return cross_fit(states, channels, sizes, **options).prior


def cross_fit(
    states: Tensor,
    channels: int,
    sizes: Sizes,
    *,
    groups: Sequence[int] | None = None,
    most: int = 128,
    folds: int = 5,
    seed: int = 0,
    without: bool = False,
) -> CrossFit:
    """Fit a Gaussian to states and, if asked, one to the states outside each of ``folds`` parts.

    A state lies in the span of the states to which its prior was fitted, and a new one does not: outside it there is as much of
    it as the floor says. A network that is trained around the prior of all states therefore learns that there is nothing
    outside the span. Around the prior of the other parts, a training state is like a new one.

    The leading variances are those of the states. The floor is the mean square of held-out states outside the directions of the
    others, by bands, over ``folds`` parts of the states. The number of directions is that of the largest held-out likelihood.

    N states have about trace(D) / N of their variance along each of their own directions by chance. In the prior of all states
    alone it is not taken off, because around it smaller leading variances cost samples their spread (algorithm.md section 11).
    With priors ``without`` a part, all of them share a floor, variances and a gain of the directions in each octave, of which
    the likelihood of held-out states is largest (:func:`fit_held_out`).

    Args:
        states: (N, M), at least three.
        channels: channels C of the planes.
        sizes: rows and columns of xy, yz, xz.
        groups: number of the volume of every state; its mirrored copies are in the same part. Default: each is its own.
        most: largest number of directions.
        folds: number of parts.
        seed: seed of the division.
        without: whether to fit the priors of the states outside each part too, with the same floor.

    Raises:
        UserError: there are fewer than three volumes.
    """
    group = torch.arange(len(states)) if groups is None else torch.tensor(groups)
    volumes = group.unique()
    if len(volumes) < 3:
        raise UserError(f"prior: {len(volumes)} volume(s); a covariance needs at least 3; take prior=unit timesteps=stratified")
    part_of = torch.randperm(len(volumes), generator=rng(seed, "prior folds")) % min(folds, len(volumes))
    part = part_of[torch.searchsorted(volumes, group)]
    count = int(part.max()) + 1
    least = min(min(int((part != f).sum()) - 1, most) for f in range(count))
    candidates = sorted({k for k in (0, *(2**i for i in range(20))) if k < least} | {least})

    def parts() -> Iterator[tuple[Principal, Tensor]]:  # one after another, because directions are large
        for f in range(count):
            yield principal(states[part != f], most), states[part == f]

    band, owner, octave = octaves(channels, sizes)
    counts = torch.bincount(band, minlength=len(owner)).double()
    energy = torch.zeros(len(candidates), len(owner), dtype=torch.float64)
    for p, held_out in parts():
        rest, done = held_out - p.mean, 0
        for i, k in enumerate(candidates):
            more = p.directions[done:k]
            rest, done = rest - (rest @ more.T) @ more, k
            squares = transform(rest, channels, sizes).double().square().sum(0)
            energy[i].index_add_(0, band, squares)
    floors = (energy / counts / len(states)).clamp(min=LEAST)
    scores = [0.0] * len(candidates)
    for p, held_out in parts():
        for i, (k, floor) in enumerate(zip(candidates, floors, strict=True)):
            scores[i] += float(_assembled(p, k, floor, channels, sizes).log_likelihood(held_out).sum())
    best = max(range(len(candidates)), key=scores.__getitem__)
    everything = principal(states, most)
    kept = len(everything.variances) if candidates[best] == least else candidates[best]
    if not without:
        return CrossFit(_assembled(everything, kept, floors[best], channels, sizes), [], part)

    def unit(p: Principal) -> GaussianPrior:
        return GaussianPrior(channels, sizes, p.mean, floors[best], transform(p.directions[:kept], channels, sizes))

    fitted, others, held_out_of = unit(everything), [], []
    own = torch.zeros(min(kept, least), dtype=torch.float64)
    for p, held_out in parts():
        others.append(unit(p))
        held_out_of.append(HeldOut.of(others[-1], held_out))
        own += p.variances[: len(own)].double() / count
    if not kept:
        return CrossFit(fitted, others, part)
    found = fit_held_out(held_out_of, octave, floors[best], own)
    return CrossFit(found.apply(fitted), [found.apply(other) for other in others], part)


@dataclass
class HeldOut:
    """Held-out states y = T (x0 - m) and the unit directions u of a prior, as sums over bands, in float64.

    Attributes:
        gram: u u' (bands, K, K).
        along: u y (N, bands, K).
        squares: y y' (N, bands).
        counts: coefficients of every band (bands,).
    """

    gram: Tensor
    along: Tensor
    squares: Tensor
    counts: Tensor

    @staticmethod
    def of(prior: GaussianPrior, states: Tensor) -> HeldOut:
        """Sums for states (N, M) and a prior whose directions have unit length."""
        y, order = prior.transform(states - prior.mean), prior.band.argsort(stable=True)
        each = [int(n) for n in prior.counts]
        pairs = list(zip(y[:, order].split(each, 1), prior.directions[:, order].split(each, 1), strict=True))
        along = torch.stack([part @ u.T for part, u in pairs], 1)
        squares = torch.stack([part.square().sum(1) for part, _ in pairs], 1)
        return HeldOut(prior.gram.double(), along.double(), squares.double(), prior.counts.double())

    def surprise(self, floor: Tensor, gain: Tensor, variances: Tensor) -> Tensor:
        """Negative logarithm of the density, in nats, summed over the states and but for a constant.

        Args:
            floor: variances of the floor (bands,).
            gain: factor of the directions in every band (bands,).
            variances: of the directions (K,).
        """
        root = variances.sqrt()
        h = root[:, None] * torch.einsum("n,nkl->kl", gain.square() / floor, self.gram) * root
        system = torch.eye(len(h), dtype=h.dtype) + h
        g = root * torch.einsum("n,bnk->bk", gain / floor, self.along)
        squares = (self.squares / floor).sum() - (g * torch.linalg.solve(system, g.T).T).sum()
        return 0.5 * (squares + len(g) * ((self.counts * floor.log()).sum() + torch.logdet(system)))


@dataclass
class Variances:
    """Variances of a prior: floor and gain of the directions (bands,), and variances along the first directions (K,)."""

    floor: Tensor
    gain: Tensor
    along: Tensor

    def along_each(self, count: int) -> Tensor:
        """Variances of ``count`` directions. Those beyond K have the last one."""
        return self.along[torch.arange(count).clamp(max=len(self.along) - 1)]

    def apply(self, prior: GaussianPrior) -> GaussianPrior:
        """The prior with these variances in place of its floor and of its unit directions' lengths."""
        root = self.along_each(len(prior.directions)).sqrt().to(prior.directions)
        directions = root[:, None] * self.gain.to(prior.directions)[prior.band] * prior.directions
        return GaussianPrior(prior.channels, prior.sizes, prior.mean, self.floor, directions)


def fit_held_out(parts: Sequence[HeldOut], octave: Tensor, floor: Tensor, variances: Tensor) -> Variances:
    """Variances of the largest likelihood of held-out states, by L-BFGS over their logarithms.

    Directions of few states are partly those of all volumes and partly noise, the more so the higher the octave. With one
    length in all octaves, what they have too much of in high octaves they have too little of in low ones. One gain an octave,
    shared by planes and channels, sets the two apart.

    Args:
        parts: held-out states and the directions of the others.
        octave: octave of every band (bands,).
        floor: floor (bands,) from which to start.
        variances: variances (K,) of the directions from which to start.
    """
    floors = (floor - LEAST).clamp(min=1e-3 * LEAST).log().requires_grad_()
    gains = torch.zeros(int(octave.max()) + 1, dtype=torch.float64, requires_grad=True)
    logarithms = variances.clamp(min=LEAST).log().requires_grad_()
    numbers = float(sum(len(p.squares) for p in parts) * parts[0].counts.sum())

    def current() -> Variances:
        return Variances(LEAST + floors.exp(), gains.exp()[octave], logarithms.exp())

    optimiser = torch.optim.LBFGS([floors, gains, logarithms], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        v = current()
        total = sum(p.surprise(v.floor, v.gain, v.along_each(p.gram.shape[-1])) for p in parts)
        loss = 1000 * torch.as_tensor(total) / numbers  # the optimiser's tolerances are absolute
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimiser.step(closure)
    with torch.no_grad():
        return current()


def _assembled(p: Principal, kept: int, floor: Tensor, channels: int, sizes: Sizes) -> GaussianPrior:
    """Prior with the variances of the first ``kept`` directions, the floor's share included."""
    along = transform(p.directions[:kept], channels, sizes)
    band = octaves(channels, sizes).band
    below = along.square() @ floor.to(along)[band]
    scale = (p.variances[:kept] - below).clamp(min=1e-6).sqrt()
    return GaussianPrior(channels, sizes, p.mean, floor, scale[:, None] * along)
