"""From noise to planes: sampling, its inverse, and interpolation (algorithm.md 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.process import TIMESTEPS, Estimate
from tcam_diff.diffusion.solver import Solver, arc
from tcam_diff.training.rng import rng

#: Corrects an estimate: guidance by an image (guidance.py).
Correct = Callable[[Estimate], Estimate]


class Sampler:
    """Draws from a model. The i-th sample is a function of (seed, i): which others are drawn with it makes no difference beyond
    rounding."""

    def __init__(self, model: TriplaneDiffusion, config: SampleConfig | None = None) -> None:
        self.model, self.config = model, config or SampleConfig()

    def noise(self, indices: Sequence[int]) -> Tensor:
        """(B, M) standard normals: row i is always the same for the seed."""
        return self._normals(indices, "sample").to(self.model.device)

    def _normals(self, indices: Sequence[int], *purpose: str | int) -> Tensor:
        draws = [rng(self.config.seed, *purpose, i) for i in indices]
        return torch.stack([torch.randn(self.model.length, generator=g) for g in draws])

    def sample(
        self,
        indices: Sequence[int],
        label: int | None = None,
        correct: Correct | None = None,
        on_step: Callable[[int, int, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """Normalised planes (B, C, rows, columns) of the samples of these numbers.

        Args:
            indices: their numbers.
            label: a class of the model, for all of them; None: none.
            correct: a correction of every estimate.
            on_step: is told (evaluation, evaluations, mean square of each sample's residual, (B,)).
        """
        return self.model.planes(self.integrate(self.noise(indices), indices, label, correct, on_step))

    @torch.no_grad()
    def integrate(
        self,
        x: Tensor,
        indices: Sequence[int],
        label: int | None = None,
        correct: Correct | None = None,
        on_step: Callable[[int, int, Tensor], None] | None = None,
        start: float = 1.0,
        stop: float = 0.0,
    ) -> Tensor:
        """States (B, M) at ``stop``, of states at ``start``, shares of the quarter circle: 1 is noise, 0 planes."""
        c, drawn, evaluation = self.config, 0, 0

        def draw(like: Tensor) -> Tensor:
            nonlocal drawn
            drawn += 1
            return self._normals(indices, "hot", drawn).to(like)

        def estimate(x: Tensor, eta: float) -> Estimate:
            nonlocal evaluation
            evaluation += 1
            noise, x0 = self._estimate(x, eta * (TIMESTEPS / (math.pi / 2)), label).chunk(2, 1)
            found = Estimate(x, noise, x0, eta)
            if correct is not None:
                found = correct(found)
            if on_step is not None:
                on_step(evaluation, evaluations, found.residual.square().mean(1))
            return found

        solver, etas = Solver(c.solver, c.final, c.hot_k, draw), arc(c.steps, start, stop)
        evaluations = len(solver.evaluations(etas))
        return solver.solve(x, etas, estimate)

    def _estimate(self, x: Tensor, t: float, label: int | None) -> Tensor:
        """With classifier-free guidance: none + s (label - none)."""
        model, scale = self.model, self.config.guidance_scale
        times = torch.full((len(x),), t, device=x.device)
        if label is None:
            return model.estimate(x, times)
        labels = torch.full((len(x),), label, device=x.device)
        if scale == 1:
            return model.estimate(x, times, labels)
        none_of_them = torch.full_like(labels, model.network.classes)
        both = model.estimate(torch.cat([x, x]), torch.cat([times, times]), torch.cat([labels, none_of_them]))
        given, none = both.chunk(2)
        return none + scale * (given - none)

    def invert(self, planes: Sequence[Tensor], label: int | None = None) -> Tensor:
        """(B, M): the noise from which the ODE leads to these normalised planes."""
        x = self.model.state([p.to(self.model.device) for p in planes])
        solver = "heun" if self.config.solver == "hot" else self.config.solver
        deterministic = Sampler(self.model, self.config.model_copy(update={"final": "x", "solver": solver}))
        return deterministic.integrate(x, range(len(x)), label, start=0.0, stop=1.0)

    def interpolate(
        self, a: Sequence[Tensor], b: Sequence[Tensor], count: int, label: int | None = None
    ) -> Iterator[list[Tensor]]:
        """``count`` times normalised planes (1, C, rows, columns), one after another, from those of one volume to those of
        another, along the great circle between the noises that they come from."""
        x, y = self.invert(a, label), self.invert(b, label)
        cosine = torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1).item()
        omega = max(math.acos(cosine), 1e-6)
        for i, weight in enumerate(torch.linspace(0, 1, count).tolist()):
            between = (math.sin((1 - weight) * omega) * x + math.sin(weight * omega) * y) / math.sin(omega)
            yield self.model.planes(self.integrate(between, [i], label))
