"""Solvers of dx/deta = -sin(eta) x0 + cos(eta) eps over angles eta of the quarter circle (algorithm.md 2.2).

A method is a generator. It yields points (x, eta), receives the network's estimate at each of them through ``send``, and
returns the state at the last angle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from tcam_diff.diffusion.prior import GaussianPrior
from tcam_diff.diffusion.process import Estimate, decisive

#: Longest interval of multirate in which the prior is integrated by one step of Heun's method, in log tan(eta), between the
#: angles where its modes are decided. Elsewhere one step is enough.
FINE = 0.3
#: Factors of heads below which an evaluation tells nothing of them.
LEAST_FACTOR = 1e-3

Draw = Callable[[Tensor], Tensor]
Steps = Generator[tuple[Tensor, float], Estimate, Tensor]


def euler(x: Tensor, etas: Sequence[float]) -> Steps:
    """Euler's method, of first order."""
    for a, b in pairwise(etas):
        x = x + (b - a) * (yield x, a).drift
    return x


def frozen(x: Tensor, etas: Sequence[float]) -> Steps:
    """Exact integral of the drift with both estimates constant over the interval."""
    for a, b in pairwise(etas):
        e = yield x, a
        x = x + (math.cos(b) - math.cos(a)) * e.x0 + (math.sin(b) - math.sin(a)) * e.noise
    return x


def ddim(x: Tensor, etas: Sequence[float]) -> Steps:
    """DDIM: cos(eta) x0 + sin(eta) eps at the next angle, which is frozen without the residual."""
    for a, b in pairwise(etas):
        e = yield x, a
        x = math.cos(b) * e.x0 + math.sin(b) * e.noise
    return x


def midpoint(x: Tensor, etas: Sequence[float]) -> Steps:
    """Runge-Kutta method of second order with the drift at the midpoint of Euler's step."""
    for a, b in pairwise(etas):
        h = b - a
        k1 = (yield x, a).drift
        x = x + h * (yield x + h / 2 * k1, a + h / 2).drift
    return x


def heun(x: Tensor, etas: Sequence[float]) -> Steps:
    """Runge-Kutta method of second order with the mean of the drifts at both ends of Euler's step."""
    for a, b in pairwise(etas):
        x = yield from _heun_step(x, a, b)
    return x


def _heun_step(x: Tensor, a: float, b: float) -> Steps:
    h = b - a
    k1 = (yield x, a).drift
    k2 = (yield x + h * k1, b).drift
    return x + h / 2 * (k1 + k2)


def rk4(x: Tensor, etas: Sequence[float]) -> Steps:
    """Classical Runge-Kutta method of fourth order."""
    for a, b in pairwise(etas):
        h = b - a
        k1 = (yield x, a).drift
        k2 = (yield x + h / 2 * k1, a + h / 2).drift
        k3 = (yield x + h / 2 * k2, a + h / 2).drift
        k4 = (yield x + h * k3, b).drift
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def ab2(x: Tensor, etas: Sequence[float]) -> Steps:
    """Adams-Bashforth method of second order for intervals of any lengths, with Euler's step at the start."""
    before: Tensor | None = None
    last = math.inf
    for a, b in pairwise(etas):
        k, h = (yield x, a).drift, b - a
        x = x + h * (k if before is None else k + h / last / 2 * (k - before))
        before, last = k, h
    return x


def hot(x: Tensor, etas: Sequence[float], k: int, draw: Draw) -> Steps:
    """Stochastic method of PRDiT: jump k intervals ahead, then add the noise that takes the state back to the next angle."""
    for i, (a, b) in enumerate(pairwise(etas)):
        drift = (yield x, a).drift
        if i + k < len(etas) - 1:
            keep = math.cos(b) / math.cos(etas[i + k])
            x = x + (etas[i + k] - a) * drift
            x = keep * x + math.sqrt(max(0.0, 1 - keep**2)) * draw(x)
        else:
            x = x + (b - a) * drift
    return x


def churn(x: Tensor, etas: Sequence[float], back: float, draw: Draw) -> Steps:
    """Stochastic method of Karras et al. (2022, algorithm 2): noise that takes the state back, then a step of Heun's method.

    The state goes back by ``back`` lengths of the interval in log tan(eta). An interval from pure noise or to the planes is
    infinitely long, and has no noise.
    """
    for a, b in pairwise(etas):
        start = a
        if 1e-9 < b < a < math.pi / 2 - 1e-9:
            start = math.atan(math.tan(a) * (math.tan(a) / math.tan(b)) ** back)
            keep = math.cos(start) / math.cos(a)
            x = keep * x + math.sqrt(max(0.0, 1 - keep**2)) * draw(x)
        x = yield from _heun_step(x, start, b)
    return x


def consistency(x: Tensor, etas: Sequence[float], draw: Draw) -> Steps:
    """Multistep sampling of consistency models: jump to the planes, then add the noise that takes them to the next angle."""
    for a, b in pairwise(etas):
        x0 = (yield x, a).x0
        x = math.cos(b) * x0 + math.sin(b) * draw(x)
    return x


class _Heads:
    """Network's heads around a prior, linear in log tan(eta) between the last two evaluations, and beyond as far again.

    All tensors are coefficients in the prior's basis (B, M). The factors of the heads are those of channels, so the same there.
    """

    def __init__(self, prior: GaussianPrior) -> None:
        self.prior = prior
        self.low, self.high = decisive((float(prior.floor.min()), prior.range[1]))
        self.known: list[tuple[float, list[tuple[Tensor, Tensor]]]] = []  # eta, and each head with where it is known

    def learn(self, e: Estimate) -> None:
        """Take the heads of noise and planes from an evaluation. Where their factors are almost zero they are not known."""
        own, scales = self._prior(self.enter(e.x), e.eta)
        heads = []
        for estimate, of_prior, scale in zip((e.noise, e.x0), own, scales, strict=True):
            known = scale.abs() > LEAST_FACTOR
            head = (self.enter(estimate) - of_prior) / torch.where(known, scale, 1.0)
            heads.append((torch.where(known, head, 0.0), known))
        self.known = [*self.known[-1:], (e.eta, heads)]

    def enter(self, x: Tensor) -> Tensor:
        """Coefficients of states of any shape (B, ...)."""
        return self.prior.transform(x.flatten(1))

    def leave(self, x: Tensor, like: Tensor) -> Tensor:
        """States of a shape (B, ...) with these coefficients."""
        return self.prior.transform(x, inverse=True).view_as(like)

    def drift(self, x: Tensor, eta: float) -> Tensor:
        """dx/deta."""
        (noise, x0), (noise_scale, x0_scale) = self._prior(x, eta)
        noise_head, x0_head = self._at(eta)
        noise, x0 = torch.addcmul(noise, noise_scale, noise_head), torch.addcmul(x0, x0_scale, x0_head)
        return math.cos(eta) * noise - math.sin(eta) * x0

    def _at(self, eta: float) -> list[Tensor]:
        at, heads = self.known[-1]
        before, others = self.known[0]
        gap = _log_tan(at) - _log_tan(before)
        ahead = min(1.0, (_log_tan(eta) - _log_tan(at)) / gap) if gap else 0.0
        extrapolated = []
        for (new, is_known), (old, was_known) in zip(heads, others, strict=True):
            a, b = torch.where(is_known, new, old), torch.where(was_known, old, new)
            extrapolated.append(a + ahead * (a - b))
        return extrapolated

    def _prior(self, x: Tensor, eta: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The prior's estimates of noise and planes, and the factors of the heads."""
        angle = torch.full((1,), eta, device=x.device)
        noise_scale, x0_scale = (s.to(x) for s in self.prior.scales(angle))
        return self.prior.of_coefficients(x, angle), (noise_scale, x0_scale)

    def move(self, x: Tensor, a: float, b: float) -> Tensor:
        """Integrate from a to b in fine steps of Heun's method."""
        start, stop = (min(max(_log_tan(e), self.low), self.high) for e in (a, b))
        count = math.ceil(abs(stop - start) / FINE)
        inside = [math.atan(math.exp(start + (stop - start) * i / max(1, count))) for i in range(count + 1)]
        between = [e for e in inside if min(a, b) < e < max(a, b)]
        for u, v in pairwise([a, *between, b]):
            k = self.drift(x, u)
            x = x + (v - u) / 2 * (k + self.drift(x + (v - u) * k, v))
        return x


def multirate(
    x: Tensor,
    etas: Sequence[float],
    prior: GaussianPrior,
    last: bool = True,
    visit: Callable[[Tensor, float], None] | None = None,
) -> Steps:
    """Multirate predictor-corrector method: the prior in fine steps, the network's heads in one for each interval.

    The heads change slowly. They are extrapolated over an interval, and when those at its end are known, the interval is
    repeated with their interpolation. ``last`` is false if the state after the last interval is not needed. ``visit`` is called
    with the state at every angle but the last, so repeated, and the angle.
    """
    heads, like = _Heads(prior), x
    before: tuple[Tensor, float] | None = None
    x = heads.enter(x)
    for i, (a, b) in enumerate(pairwise(etas)):
        heads.learn((yield heads.leave(x, like), a))
        ends = i + 2 == len(etas) and not last
        if before is not None and not (ends and visit is None):
            x = heads.move(*before, a)
        if visit is not None:
            visit(heads.leave(x, like), a)
        if ends:
            break
        before = x, a
        x = heads.move(x, a, b)
    return heads.leave(x, like)


def _log_tan(eta: float) -> float:
    """log tan(eta), between -8 and 8."""
    return math.log(math.tan(min(max(eta, math.atan(math.exp(-8))), math.atan(math.exp(8)))))


METHODS = {f.__name__: f for f in (euler, frozen, ddim, midpoint, heun, rk4, ab2)}
#: Methods that draw noise, and so have no inverse.
STOCHASTIC = ("hot", "churn", "consistency")


def arc(steps: int, start: float = 1.0, stop: float = 0.0, variances: tuple[float, float] | None = None) -> list[float]:
    """Angles of ``steps`` intervals from ``start`` to ``stop``, in shares of the quarter circle: 1 is noise, 0 planes.

    Args:
        steps: number of intervals.
        start, stop: ends.
        variances: smallest and largest variance of the states' modes. Intervals are then equal in log tan(eta) over
            :func:`~tcam_diff.diffusion.process.decisive`, and one leads from each end that is outside to this range. None, or
            nothing of the range lies between the ends: all intervals are equal.

    Raises:
        ValueError: there is less than one interval, or the ends are equal or outside [0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not (0 <= start <= 1 and 0 <= stop <= 1 and start != stop):
        raise ValueError(f"start, stop: expected two different shares of the arc, 0 to 1, got {start} and {stop}")
    equal = [(start + (stop - start) * i / steps) * math.pi / 2 for i in range(steps + 1)]
    if variances is None:
        return equal
    low, high = (math.atan(math.exp(v)) for v in decisive(variances))
    ends = equal[0], equal[-1]
    inside = [min(max(e, low), high) for e in ends]
    if inside[0] == inside[1]:
        return equal
    before, after = ([e] if e != i else [] for e, i in zip(ends, inside, strict=True))
    count = steps + 1 - len(before) - len(after)
    a, b = (math.log(math.tan(i)) for i in inside)
    only = (len(before) + 1 - len(after)) / 2  # the one angle is the end that is inside, or halfway
    shares = [i / (count - 1) for i in range(count)] if count > 1 else [only] * count
    return [*before, *(math.atan(math.exp(a + (b - a) * share)) for share in shares), *after]


@dataclass(frozen=True)
class Solver:
    """A method with its settings. Raises ValueError if one is unknown.

    Args:
        method: a name of METHODS or of STOCHASTIC; or multirate, which needs a prior.
        final: result of an integration that ends at angle 0. "x0": the estimate of x0 at the last angle above 0; "x": the
            integrated state.
        hot_k: intervals that hot jumps ahead.
        churn: lengths of an interval, in log tan(eta), by which churn goes back before it.
        draw: function that returns standard normals of a tensor's shape, for stochastic methods; default: torch's global
            generator.
        prior: the model's prior, for multirate.
        visit: function that multirate calls with the state at every angle but the last, and the angle.
    """

    method: str = "heun"
    final: str = "x0"
    hot_k: int = 2
    churn: float = 1.0
    draw: Draw = torch.randn_like
    prior: GaussianPrior | None = None
    visit: Callable[[Tensor, float], None] | None = None

    def __post_init__(self) -> None:
        known = [*METHODS, *STOCHASTIC, "multirate"]
        if self.method not in known:
            raise ValueError(f"solver: expected one of {', '.join(known)}, got {self.method!r}")
        if self.method == "multirate" and self.prior is None:
            raise ValueError("solver: multirate needs the prior of a model")
        if self.visit is not None and self.method != "multirate":
            raise ValueError(f"visit: only multirate visits states, got the solver {self.method}")
        if self.final not in ("x0", "x"):
            raise ValueError(f"final: expected x0 or x, got {self.final!r}")

    def steps(self, x: Tensor, etas: Sequence[float]) -> Steps:
        """Generator that integrates from ``x`` at the first of ``etas`` to the last and returns the result."""
        to_planes = self.final == "x0" and etas[-1] == 0
        if self.method == "hot":
            method = hot(x, etas, self.hot_k, self.draw)
        elif self.method == "churn":
            method = churn(x, etas, self.churn, self.draw)
        elif self.method == "consistency":
            method = consistency(x, etas, self.draw)
        elif self.prior is not None and self.method == "multirate":
            method = multirate(x, etas, self.prior, not to_planes, self.visit)
        else:
            method = METHODS[self.method](x, etas)
        last: Tensor | None = None
        point = next(method)
        while True:
            estimate = yield point
            if estimate.eta > 1e-9:
                last = estimate.x0
            try:
                point = method.send(estimate)
            except StopIteration as end:
                return last if to_planes and last is not None else end.value

    def solve(self, x: Tensor, etas: Sequence[float], estimate: Callable[[Tensor, float], Estimate]) -> Tensor:
        """Integrate from ``x`` along ``etas`` with the network's ``estimate(x, eta)``."""
        steps = self.steps(x, etas)
        x, eta = next(steps)
        while True:
            try:
                x, eta = steps.send(estimate(x, eta))
            except StopIteration as end:
                result: Tensor = end.value
                return result

    def evaluations(self, etas: Sequence[float]) -> list[float]:
        """Angles at which :meth:`solve` evaluates the network, in order."""
        if self.method == "multirate":
            return list(etas[:-1])
        zero, angles = torch.zeros(()), []

        def estimate(x: Tensor, eta: float) -> Estimate:
            angles.append(eta)
            return Estimate(zero, zero, zero, eta)

        replace(self, draw=torch.zeros_like).solve(zero, etas, estimate)
        return angles
