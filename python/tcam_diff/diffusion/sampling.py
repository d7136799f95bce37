"""Sampling of planes from noise, its inverse, and interpolation (algorithm.md 2.2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.process import TIMESTEPS, Estimate
from tcam_diff.diffusion.solver import STOCHASTIC, Solver, arc
from tcam_diff.errors import UserError
from tcam_diff.training.rng import rng

#: Function that corrects an estimate, for guidance by an image (guidance.py).
Correct = Callable[[Estimate], Estimate]


class Sampler:
    """Sampler of a model. Sample i depends on (seed, i) alone, up to rounding, whichever samples are drawn with it.

    Args:
        model: the model.
        config: integration; default: ``SampleConfig()``.
    """

    def __init__(self, model: TriplaneDiffusion, config: SampleConfig | None = None) -> None:
        self.model, self.config = model, config or SampleConfig()

    @property
    def variances(self) -> tuple[float, float] | None:
        """Variances of the grid of angles; None: a uniform one."""
        return None if self.config.grid == "uniform" else self.model.variances

    def check(self) -> None:
        """Raise UserError if the grid or the solver needs what the model does not have."""
        if self.config.grid == "spectrum" and self.model.variances is None:
            raise UserError(
                "grid=spectrum: the model does not know its latents' variances; take uniform, or train with timesteps=spectrum "
                "or prior=gaussian"
            )
        if self.config.solver == "multirate" and self.model.prior is None:
            raise UserError(
                "solver=multirate: the model has no prior; take another solver, or train with prior=gaussian or unit"
            )
        if self.config.solver == "consistency" and not self.model.consistency:
            raise UserError("solver=consistency: the model is not distilled; take another solver, or `tcam distill` it")
        if self.model.consistency and self.config.solver != "consistency":
            raise UserError(
                f"solver={self.config.solver}: the model is one of `tcam distill`; take the solver consistency, 1 to 4 steps"
            )
        if self.config.prior_guidance != 1 and (self.model.prior is None or self.model.consistency):
            raise UserError(
                f"prior_guidance={self.config.prior_guidance:g}: the model is distilled or has no prior; leave it "
                "out, or take one trained with prior=gaussian or unit"
            )
        if self.config.spacing is not None and self.model.spacings is None:
            raise UserError("spacing: the model does not depend on voxel sizes; leave it out, or train with spacing=true")
        if self.model.consistency and self.config.guidance_scale != 1:
            raise UserError(f"guidance_scale={self.config.guidance_scale:g}: models of `tcam distill` have none; leave it out")

    def sizes(self, indices: Sequence[int]) -> Tensor | None:
        """Voxel sizes (B, 3) in mm of the samples with these numbers; None: the model does not depend on them."""
        if self.model.spacings is None:
            return None
        given = self.config.spacing
        if given is not None and self.model.spacings.is_far(given):
            low, high = (" x ".join(f"{n:.3g}" for n in ends) for ends in self.model.spacings.ends)
            warnings.warn(f"spacing: {given} mm is far from the training volumes', {low} to {high} mm", stacklevel=2)
        drawn = self.model.spacings.drawn(indices, self.config.seed)
        return drawn if given is None else torch.tensor(given).to(drawn).expand_as(drawn)

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Standard normals (B, M) of the samples with these numbers."""
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
        """Draw samples.

        Args:
            indices: numbers of the samples.
            label: index of a class, for all of them; None: no class.
            correct: correction of every estimate.
            on_step: called after every evaluation of the network with its number, the number of all, and the mean square (B,)
                of the samples' residuals.

        Returns:
            Normalised planes (B, C, rows, columns).
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
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Integrate states (B, M) from ``start`` to ``stop``, in shares of the quarter circle: 1 is noise, 0 planes.

        ``sizes`` are voxel sizes (B, 3), by default those of the samples with numbers ``indices``. The other arguments are
        those of :meth:`sample`.
        """
        self.check()
        sizes = self.sizes(indices) if sizes is None else sizes
        c, drawn, evaluation = self.config, 0, 0

        def draw(like: Tensor) -> Tensor:
            nonlocal drawn
            drawn += 1
            return self._normals(indices, c.solver, drawn).to(like)

        def estimate(x: Tensor, eta: float) -> Estimate:
            nonlocal evaluation
            evaluation += 1
            noise, x0 = self._estimate(x, eta * (TIMESTEPS / (math.pi / 2)), label, sizes).chunk(2, 1)
            result = Estimate(x, noise, x0, eta)
            if correct is not None:
                result = correct(result)
            if on_step is not None:
                on_step(evaluation, evaluations, result.residual.square().mean(1))
            return result

        solver = Solver(c.solver, c.final, c.hot_k, c.churn, draw, self.model.prior)
        etas = arc(c.steps, start, stop, self.variances)
        evaluations = len(solver.evaluations(etas))
        return solver.solve(x, etas, estimate)

    def _estimate(self, x: Tensor, t: float, label: int | None, sizes: Tensor | None = None) -> Tensor:
        """Noise and planes (B, 2M), guided: prior + prior_guidance (network - prior) for the network's
        unlabelled + guidance_scale (labelled - unlabelled)."""
        model, scale, guidance = self.model, self.config.guidance_scale, self.config.prior_guidance
        times = torch.full((len(x),), t, device=x.device)
        if label is None:
            return model.estimate(x, times, None, sizes, guidance)
        labels = torch.full((len(x),), label, device=x.device)
        if scale == 1:
            return model.estimate(x, times, labels, sizes, guidance)
        no_label = torch.full_like(labels, model.network.classes)
        twice = None if sizes is None else torch.cat([sizes, sizes])
        both = model.estimate(torch.cat([x, x]), torch.cat([times, times]), torch.cat([labels, no_label]), twice, guidance)
        labelled, unlabelled = both.chunk(2)
        return unlabelled + scale * (labelled - unlabelled)

    def invert(self, planes: Sequence[Tensor], label: int | None = None, sizes: Tensor | None = None) -> Tensor:
        """Noise (B, M) from which the ODE leads to normalised planes (B, C, rows, columns).

        Heun's method stands in for stochastic solvers. Raises ValueError without ``sizes``, the voxel sizes (B, 3) of the
        volumes, for a model that depends on them.
        """
        if self.model.spacings is not None and sizes is None:
            raise ValueError("sizes: expected the voxel sizes of the volumes, on which the model depends; got None")
        x = self.model.state([p.to(self.model.device) for p in planes])
        solver = "heun" if self.config.solver in STOCHASTIC else self.config.solver
        deterministic = Sampler(self.model, self.config.model_copy(update={"final": "x", "solver": solver}))
        return deterministic.integrate(x, range(len(x)), label, start=0.0, stop=1.0, sizes=sizes)

    def interpolate(
        self,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        count: int,
        label: int | None = None,
        sizes: Sequence[Tensor] | None = None,
    ) -> Iterator[list[Tensor]]:
        """Interpolate between the planes (1, C, rows, columns) of two volumes, along the great circle between their noises.

        Args:
            a, b: planes of the two volumes.
            count: number of volumes.
            label: class of both.
            sizes: voxel sizes (3,) of each of the ``count`` volumes, for a model that depends on them.

        Yields:
            ``count`` sets of normalised planes (1, C, rows, columns), from ``a`` to ``b``.
        """
        each = [None] * count if sizes is None else [s[None].to(self.model.device) for s in sizes]
        x, y = self.invert(a, label, each[0]), self.invert(b, label, each[-1])
        cosine = torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1).item()
        omega = max(math.acos(cosine), 1e-6)
        for i, (weight, size) in enumerate(zip(torch.linspace(0, 1, count).tolist(), each, strict=True)):
            between = (math.sin((1 - weight) * omega) * x + math.sin(weight * omega) * y) / math.sin(omega)
            yield self.model.planes(self.integrate(between, [i], label, sizes=size))
