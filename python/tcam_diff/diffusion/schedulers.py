"""Solvers of dx/deta = -sin(eta) x0 + cos(eta) eps, as a scheduler of MONAI's kind (algorithm.md 2.2).

A solver is a generator: it yields the points at which it wants the network's estimates, is sent them, and returns the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise

import torch
from monai.networks.schedulers.scheduler import NoiseSchedules, Scheduler
from torch import Tensor

from tcam_diff.diffusion.process import TIMESTEPS, Estimate, mix

Draw = Callable[[Tensor], Tensor]
Solve = Generator[tuple[Tensor, float], Estimate, Tensor]


def euler(x: Tensor, etas: Sequence[float]) -> Solve:
    """x + h f."""
    for a, b in pairwise(etas):
        x = x + (b - a) * (yield x, a).drift
    return x


def frozen(x: Tensor, etas: Sequence[float]) -> Solve:
    """The exact integral with both estimates held over the interval."""
    for a, b in pairwise(etas):
        e = yield x, a
        x = x + (math.cos(b) - math.cos(a)) * e.x0 + (math.sin(b) - math.sin(a)) * e.noise
    return x


def ddim(x: Tensor, etas: Sequence[float]) -> Solve:
    """cos x0 + sin eps at the next angle: frozen, less the residual."""
    for a, b in pairwise(etas):
        e = yield x, a
        x = math.cos(b) * e.x0 + math.sin(b) * e.noise
    return x


def midpoint(x: Tensor, etas: Sequence[float]) -> Solve:
    """Runge-Kutta of second order: the drift halfway, found by half a step of Euler's."""
    for a, b in pairwise(etas):
        h = b - a
        k1 = (yield x, a).drift
        x = x + h * (yield x + h / 2 * k1, a + h / 2).drift
    return x


def heun(x: Tensor, etas: Sequence[float]) -> Solve:
    """Runge-Kutta of second order: the mean of the drifts at both ends."""
    for a, b in pairwise(etas):
        h = b - a
        k1 = (yield x, a).drift
        k2 = (yield x + h * k1, b).drift
        x = x + h / 2 * (k1 + k2)
    return x


def rk4(x: Tensor, etas: Sequence[float]) -> Solve:
    """Runge-Kutta of fourth order, the classical one."""
    for a, b in pairwise(etas):
        h = b - a
        k1 = (yield x, a).drift
        k2 = (yield x + h / 2 * k1, a + h / 2).drift
        k3 = (yield x + h / 2 * k2, a + h / 2).drift
        k4 = (yield x + h * k3, b).drift
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def ab2(x: Tensor, etas: Sequence[float]) -> Solve:
    """Adams-Bashforth of second order, begun with Euler's step."""
    before: Tensor | None = None
    for a, b in pairwise(etas):
        k = (yield x, a).drift
        x = x + (b - a) * (k if before is None else 1.5 * k - 0.5 * before)
        before = k
    return x


def hot(x: Tensor, etas: Sequence[float], k: int, draw: Draw) -> Solve:
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


SOLVERS = {f.__name__: f for f in (euler, frozen, ddim, midpoint, heun, rk4, ab2)}


@NoiseSchedules.add_def("quarter_circle", "sqrt(alpha_bar) = cos((t / T) pi/2)")
def _quarter_circle(num_train_timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(betas, alphas, alphas_cumprod) of the quarter circle: for MONAI's own schedulers, which know networks of one head."""
    eta = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps * (math.pi / 2)
    cumulative = eta.cos().square()
    alphas = cumulative[1:] / cumulative[:-1]
    return (1 - alphas).float(), alphas.float(), cumulative[:-1].float()


class ArcScheduler(Scheduler):
    """A MONAI scheduler for networks of two heads: ``model_output`` (B, 2M, ...) is noise, then x0, of ``sample`` (B, M, ...).

    ``timesteps`` has one entry for each evaluation of the network, in [0, 1000], not always whole. Solvers of several stages
    keep them between calls of ``step``, which must follow ``timesteps`` in order; after the last one it starts again.

    Args:
        solver: euler, frozen, ddim, midpoint, heun, rk4, ab2; or hot, which is stochastic.
        final: "x0": the last step returns the estimate of x0 at the last angle above 0; "x": the integrated state.
        hot_k: intervals that hot jumps ahead.
        draw: standard normals like a tensor, for hot; default: torch's global generator.
    """

    def __init__(
        self,
        solver: str = "heun",
        final: str = "x0",
        hot_k: int = 2,
        draw: Draw = torch.randn_like,
        num_train_timesteps: int = TIMESTEPS,
    ) -> None:
        super().__init__(num_train_timesteps, "quarter_circle")
        if solver not in SOLVERS and solver != "hot":
            raise ValueError(f"solver: expected one of {', '.join([*SOLVERS, 'hot'])}, got {solver!r}")
        if final not in ("x0", "x"):
            raise ValueError(f"final: expected x0 or x, got {final!r}")
        self.solver, self.final, self.hot_k, self.draw = solver, final, hot_k, draw
        self.set_timesteps(50)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, start: float = 1.0, stop: float = 0.0
    ) -> None:
        """``num_inference_steps`` equal intervals from ``start`` to ``stop``, shares of the quarter circle, 1 being noise. From
        0 to 1 planes become the noise that they come from."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: expected at least 1, got {num_inference_steps}")
        if not (0 <= start <= 1 and 0 <= stop <= 1 and start != stop):
            raise ValueError(f"start, stop: expected two different shares of the arc, 0 to 1, got {start} and {stop}")
        self.num_inference_steps = num_inference_steps
        shares = (start + (stop - start) * i / num_inference_steps for i in range(num_inference_steps + 1))
        self.etas = [s * math.pi / 2 for s in shares]
        zero, visited = torch.zeros(()), []
        solve = self._solve(zero, torch.zeros_like)
        try:
            _, eta = next(solve)
            while True:
                visited.append(eta)
                _, eta = solve.send(Estimate(zero, zero, zero, eta))
        except StopIteration:
            pass
        self.visited = visited
        self.timesteps = torch.tensor(visited, dtype=torch.float64).mul(self.num_train_timesteps / (math.pi / 2)).float()
        if device is not None:
            self.timesteps = self.timesteps.to(device)
        self._running: Solve | None = None
        self._index = 0
        self._kept: Tensor | None = None

    def _solve(self, x: Tensor, draw: Draw) -> Solve:
        if self.solver == "hot":
            return hot(x, self.etas, self.hot_k, draw)
        return SOLVERS[self.solver](x, self.etas)

    def step(self, model_output: Tensor, timestep: Tensor | float, sample: Tensor) -> tuple[Tensor, Tensor]:
        """(next point for the network to look at, estimate of x0); after the last timestep the point is the result.

        ``timestep`` is the one of ``timesteps`` whose turn it is. Raises ValueError where it is not, or shapes differ.
        """
        if self._index == 0:
            self._running = self._solve(sample, self.draw)
            next(self._running)
        assert self._running is not None
        eta = self.visited[self._index]
        if abs(float(timestep) / self.num_train_timesteps * math.pi / 2 - eta) > 1e-4:
            due = float(self.timesteps[self._index])
            raise ValueError(f"timestep: expected {due:.3f}, whose turn it is, got {float(timestep):.3f}; see set_timesteps")
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"model_output: expected {2 * sample.shape[1]} channels (noise, x0) for {sample.shape[1]} of sample, got "
                f"{model_output.shape[1]}"
            )
        noise, x0 = model_output.chunk(2, 1)
        if eta > 1e-9:
            self._kept = x0
        self._index += 1
        try:
            x, _ = self._running.send(Estimate(sample, noise, x0, eta))
            return x, x0
        except StopIteration as end:
            self._index, self._running = 0, None
            to_planes = self.final == "x0" and self.etas[-1] == 0 and self._kept is not None
            return (self._kept if to_planes else end.value), x0  # type: ignore[return-value]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """cos(eta) x0 + sin(eta) eps at timesteps (B,) in [0, 1000], whole or not."""
        return mix(original_samples, noise, timesteps.to(original_samples.device) * (TIMESTEPS / self.num_train_timesteps))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """cos(eta) eps - sin(eta) x0: dx/deta along the path from ``sample``, x0, to ``noise``."""
        return mix(noise, -sample, timesteps.to(sample.device) * (TIMESTEPS / self.num_train_timesteps))
