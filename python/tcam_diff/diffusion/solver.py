"""Solvers of dx/deta = -sin(eta) x0 + cos(eta) eps over angles eta of the quarter circle (algorithm.md 2.2).

A method is a generator. It yields points (x, eta), receives the network's estimate at each of them through ``send``, and
returns the state at the last angle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tcam_diff.diffusion.process import Estimate, decisive

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
        h = b - a
        k1 = (yield x, a).drift
        k2 = (yield x + h * k1, b).drift
        x = x + h / 2 * (k1 + k2)
    return x


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


METHODS = {f.__name__: f for f in (euler, frozen, ddim, midpoint, heun, rk4, ab2)}


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
        method: a name of METHODS, or hot, which is stochastic.
        final: result of an integration that ends at angle 0. "x0": the estimate of x0 at the last angle above 0; "x": the
            integrated state.
        hot_k: intervals that hot jumps ahead.
        draw: function that returns standard normals of a tensor's shape, for hot; default: torch's global generator.
    """

    method: str = "heun"
    final: str = "x0"
    hot_k: int = 2
    draw: Draw = torch.randn_like

    def __post_init__(self) -> None:
        if self.method not in METHODS and self.method != "hot":
            raise ValueError(f"solver: expected one of {', '.join([*METHODS, 'hot'])}, got {self.method!r}")
        if self.final not in ("x0", "x"):
            raise ValueError(f"final: expected x0 or x, got {self.final!r}")

    def steps(self, x: Tensor, etas: Sequence[float]) -> Steps:
        """Generator that integrates from ``x`` at the first of ``etas`` to the last and returns the result."""
        method = hot(x, etas, self.hot_k, self.draw) if self.method == "hot" else METHODS[self.method](x, etas)
        last: Tensor | None = None
        point = next(method)
        while True:
            estimate = yield point
            if estimate.eta > 1e-9:
                last = estimate.x0
            try:
                point = method.send(estimate)
            except StopIteration as end:
                to_planes = self.final == "x0" and etas[-1] == 0 and last is not None
                return last if to_planes else end.value  # type: ignore[return-value]

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
        zero, angles = torch.zeros(()), []

        def estimate(x: Tensor, eta: float) -> Estimate:
            angles.append(eta)
            return Estimate(zero, zero, zero, eta)

        Solver(self.method, self.final, self.hot_k, torch.zeros_like).solve(zero, etas, estimate)
        return angles
