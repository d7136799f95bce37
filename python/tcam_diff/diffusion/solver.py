"""Solvers of dx/deta = -sin(eta) x0 + cos(eta) eps over angles eta of the quarter circle (algorithm.md 2.2).

A method is a generator: it yields the points (x, eta) at which it wants the network's estimates, is sent them, and returns the
state at the last angle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tcam_diff.diffusion.process import Estimate

Draw = Callable[[Tensor], Tensor]
Steps = Generator[tuple[Tensor, float], Estimate, Tensor]


def euler(x: Tensor, etas: Sequence[float]) -> Steps:
    """x + h f."""
    for a, b in pairwise(etas):
        x = x + (b - a) * (yield x, a).drift
    return x


def frozen(x: Tensor, etas: Sequence[float]) -> Steps:
    """The exact integral with both estimates held over the interval."""
    for a, b in pairwise(etas):
        e = yield x, a
        x = x + (math.cos(b) - math.cos(a)) * e.x0 + (math.sin(b) - math.sin(a)) * e.noise
    return x


def ddim(x: Tensor, etas: Sequence[float]) -> Steps:
    """cos x0 + sin eps at the next angle: frozen, less the residual."""
    for a, b in pairwise(etas):
        e = yield x, a
        x = math.cos(b) * e.x0 + math.sin(b) * e.noise
    return x


def midpoint(x: Tensor, etas: Sequence[float]) -> Steps:
    """Runge-Kutta of second order: the drift halfway, found by half a step of Euler's."""
    for a, b in pairwise(etas):
        h = b - a
        k1 = (yield x, a).drift
        x = x + h * (yield x + h / 2 * k1, a + h / 2).drift
    return x


def heun(x: Tensor, etas: Sequence[float]) -> Steps:
    """Runge-Kutta of second order: the mean of the drifts at both ends."""
    for a, b in pairwise(etas):
        h = b - a
        k1 = (yield x, a).drift
        k2 = (yield x + h * k1, b).drift
        x = x + h / 2 * (k1 + k2)
    return x


def rk4(x: Tensor, etas: Sequence[float]) -> Steps:
    """Runge-Kutta of fourth order, the classical one."""
    for a, b in pairwise(etas):
        h = b - a
        k1 = (yield x, a).drift
        k2 = (yield x + h / 2 * k1, a + h / 2).drift
        k3 = (yield x + h / 2 * k2, a + h / 2).drift
        k4 = (yield x + h * k3, b).drift
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def ab2(x: Tensor, etas: Sequence[float]) -> Steps:
    """Adams-Bashforth of second order, begun with Euler's step."""
    before: Tensor | None = None
    for a, b in pairwise(etas):
        k = (yield x, a).drift
        x = x + (b - a) * (k if before is None else 1.5 * k - 0.5 * before)
        before = k
    return x


def hot(x: Tensor, etas: Sequence[float], k: int, draw: Draw) -> Steps:
    """Jump k intervals ahead, then add the noise that brings the state back to the next angle (PRDiT)."""
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


def arc(steps: int, start: float = 1.0, stop: float = 0.0) -> list[float]:
    """Angles of ``steps`` equal intervals from ``start`` to ``stop``, shares of the quarter circle: 1 is noise, 0 planes.

    Raises ValueError where there is no interval, or the ends are equal or not in [0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not (0 <= start <= 1 and 0 <= stop <= 1 and start != stop):
        raise ValueError(f"start, stop: expected two different shares of the arc, 0 to 1, got {start} and {stop}")
    return [(start + (stop - start) * i / steps) * math.pi / 2 for i in range(steps + 1)]


@dataclass(frozen=True)
class Solver:
    """A method and how it ends.

    Args:
        method: a name of METHODS; or hot, which is stochastic.
        final: the result of an integration that ends at angle 0. "x0": the estimate of x0 at the last angle above 0; "x": the
            integrated state.
        hot_k: intervals that hot jumps ahead.
        draw: standard normals like a tensor, for hot; default: torch's global generator.
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
        """The integration from ``x`` at the first of ``etas`` to the last, as a generator."""
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
        """The end of the integration from ``x`` along ``etas``; ``estimate(x, eta)`` is the network's."""
        steps = self.steps(x, etas)
        x, eta = next(steps)
        while True:
            try:
                x, eta = steps.send(estimate(x, eta))
            except StopIteration as end:
                result: Tensor = end.value
                return result

    def evaluations(self, etas: Sequence[float]) -> list[float]:
        """The angles at which ``solve`` asks for estimates, in order."""
        zero, angles = torch.zeros(()), []

        def estimate(x: Tensor, eta: float) -> Estimate:
            angles.append(eta)
            return Estimate(zero, zero, zero, eta)

        Solver(self.method, self.final, self.hot_k, torch.zeros_like).solve(zero, etas, estimate)
        return angles
