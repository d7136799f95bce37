"""Distillation of a diffusion model to one that needs one to four evaluations of its network.

The ODE of the process leads from a state x at the angle eta to planes. A consistency model (Song et al. 2023; Lu and Song 2025,
whose TrigFlow is the arc) estimates them with one evaluation,

    f(x, eta) = flow(x, eta) + s rho F(x, eta),

with the flow of the teacher's prior (prior.py), s rho as there, and the network's head F, which begins with the teacher's
weights. At angle 0 it is x. The network is trained on states of the teacher's trajectories from noise, with the mean squared
error between f and the planes at their ends. Trajectories are integrated by the solver multirate, with few evaluations; their
angles, but for the last one where all modes are decided, are moved at random by up to half an interval.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcam_diff.diffusion.config import DistillConfig
from tcam_diff.diffusion.model import INDEX, TriplaneDiffusion
from tcam_diff.diffusion.process import TIMESTEPS, Estimate, error, unpack
from tcam_diff.diffusion.solver import Solver, arc
from tcam_diff.errors import UserError
from tcam_diff.machine import products
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.ema import update_average
from tcam_diff.training.logger import Logger
from tcam_diff.training.loop import Outcome
from tcam_diff.training.networks import NetworksTask
from tcam_diff.training.rng import rng, seed_of
from tcam_diff.training.run import train


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of the teacher from noise to planes.

    Args:
        model: the teacher.
        states: states (n, B, M), those at the largest angle first.
        etas: their angles.
        ends: planes (B, M), as states.
        labels: classes (B,); None: no classes.
        sizes: voxel sizes (B, 3); None: the teacher does not depend on them.
    """

    states: Tensor
    etas: list[float]
    ends: Tensor
    labels: Tensor | None
    sizes: Tensor | None

    @staticmethod
    @torch.no_grad()
    def draw(
        model: TriplaneDiffusion, noise: Tensor, steps: int, shift: float, labels: Tensor | None, sizes: Tensor | None = None
    ) -> Trajectories:
        """Integrate from noise (B, M) in ``steps`` intervals, whose angles are moved by ``shift`` intervals, -0.5 to 0.5."""
        states: list[Tensor] = []
        angles: list[float] = []

        def visit(x: Tensor, eta: float) -> None:
            states.append(x)
            angles.append(eta)

        def estimate(x: Tensor, eta: float) -> Estimate:
            t = torch.full((len(x),), eta * (TIMESTEPS / (math.pi / 2)), device=x.device)
            noise, x0 = model.estimate(x, t, labels, sizes).chunk(2, 1)
            return Estimate(x, noise, x0, eta)

        etas = moved(arc(steps, variances=model.variances), shift)
        final = "x" if model.variances is None else "x0"  # the last estimate is the end where the grid reaches small angles
        ends = Solver("multirate", final, prior=model.prior, visit=visit).solve(noise, etas, estimate)
        return Trajectories(torch.stack(states), angles, ends, labels, sizes)


def moved(etas: list[float], shift: float) -> list[float]:
    """Angles moved by ``shift`` of their mean distance in log tan(eta), but for the first and the last two."""
    inside = [math.log(math.tan(e)) for e in etas[1:-1]]
    gap = (inside[-1] - inside[0]) / (len(inside) - 1) if len(inside) > 1 else 1.0
    return [etas[0], *(math.atan(math.exp(v + gap * shift)) for v in inside[:-1]), *etas[-2:]]


class Distillation(NetworksTask):
    """Training of a consistency model. Raises UserError if the teacher does not fit."""

    score = "-distance"

    def __init__(self, config: DistillConfig, group: Distributed, folder: Path) -> None:
        teacher = self.teacher = TriplaneDiffusion.load(config.model, group.device)
        super().__init__(config, group, teacher.identity)
        self.config, self.folder, name = config, folder, config.model
        if teacher.consistency:
            raise UserError(f"model: {name}: is distilled already; give the model that it was distilled from")
        if teacher.prior is None:
            raise UserError(f"model: {name}: has no prior; train one with prior=gaussian or unit")
        self.compute = products(config.compute_dtype, group.device)
        teacher.config = teacher.config.model_copy(update={"compute_dtype": config.compute_dtype})
        self.network = copy.deepcopy(teacher.network).requires_grad_(True)  # without dropout: a trajectory has one end
        origin = {**teacher.provenance, "distilled_from": teacher.identity}
        self.average = TriplaneDiffusion(
            copy.deepcopy(teacher.network), teacher.decoder, teacher.config, teacher.stage1, teacher.geometry, teacher.centre,
            origin, teacher.prior, teacher.variances, True, teacher.spacings,
        )  # fmt: skip
        self.modules = {"network": self.network, "average": self.average.network}
        self.adam("network", self.network, config.lr)
        self.batch: tuple[int, Trajectories] | None = None
        self.fixed: Trajectories | None = None

    def load_state(self, shared: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
        if shared["data"] != self.data:
            raise UserError(f"model: {self.config.model}: is not the model with which the run began")
        super().load_state(shared, shards)

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(p.numel() for p in self.network.parameters())

    def _draw(self, purpose: str, index: int, count: int, shift: float) -> Trajectories:
        """Trajectories of a stream of random numbers."""
        c, model = self.config, self.teacher
        noise = torch.stack([torch.randn(model.length, generator=rng(c.seed, purpose, index, i)) for i in range(count)])
        labels = None
        if classes := len(model.geometry.classes):
            labels = torch.randint(classes + 1, (count,), generator=rng(c.seed, purpose, "labels", index)).to(model.device)
        sizes = None
        if model.spacings is not None:
            sizes = model.spacings.drawn(range(index * count, (index + 1) * count), seed_of(c.seed, purpose, "spacing"))
        return Trajectories.draw(model, noise.to(model.device), c.teacher_steps, shift, labels, sizes)

    def step(self, index: int) -> dict[str, Tensor]:
        """Update the network once. Half of the states are noise, the others of all other angles alike."""
        c = self.config
        number = index // c.updates
        if self.batch is None or self.batch[0] != number:
            shift = float(torch.rand((), generator=rng(c.seed, "angles", number))) - 0.5
            self.batch = number, self._draw("trajectories", number, c.batch, shift)
        of = self.batch[1]
        generator = rng(c.seed, "states", index)
        later = torch.randint(1, len(of.etas), (c.batch,), generator=generator)
        chosen = torch.where(torch.rand(c.batch, generator=generator) < 0.5, 0, later)
        x = of.states[chosen.to(of.states.device), torch.arange(c.batch, device=of.states.device)]
        t = torch.tensor(of.etas)[chosen] * (TIMESTEPS / (math.pi / 2))
        loss = error(self._planes(x, t.to(x.device), of), self._unpack(of.ends)).mean()
        self.update("network", loss, c.lr, index, c.grad_clip)
        update_average(self.average.network, self.network, c.ema_decay, index)
        return {"loss": loss.detach()}

    def _unpack(self, x: Tensor) -> list[Tensor]:
        return unpack(x, self.teacher.channels, self.teacher.geometry.sizes)

    def _planes(self, x: Tensor, t: Tensor, of: Trajectories) -> list[Tensor]:
        """Ends of trajectories that the network in training estimates from states (B, M) of theirs."""
        prior, spacings, state = self.teacher.prior, self.teacher.spacings, self._unpack(x)
        assert prior is not None
        numbers = None if spacings is None or of.sizes is None else spacings.condition(of.sizes)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.compute == torch.bfloat16):
            denoised = prior.denoised(state, t)[1] if self.network.config.prior_input else None
            head = self.network(state, t, of.labels, numbers, denoised)[1]
        return prior.combine_flow(state, t, head)[1]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Distances from the teacher's planes to those of one evaluation, from the same noise, and of the prior's flow alone.

        Root mean squares, divided by that of the teacher's planes about their mean.
        """
        c, prior = self.config, self.teacher.prior
        assert prior is not None
        if self.fixed is None:
            self.fixed = self._draw("evaluation", 0, c.evaluate_volumes, 0.0)
        of, x = self.fixed, self.fixed.states[0]
        t = torch.full((len(x),), float(TIMESTEPS), device=x.device)
        found = self.average.estimate(x, t, of.labels, of.sizes).chunk(2, 1)[1]
        scale = (of.ends - of.ends.mean(0)).square().mean().sqrt()
        ends = {"distance": found, "prior_distance": prior.flow(x, torch.full((1,), math.pi / 2, device=x.device))}
        return {name: float((end - of.ends).square().mean().sqrt() / scale) for name, end in ends.items()}

    def draw_pictures(self, step: int, logger: Logger | None) -> None:
        """Save the model to model/."""
        if logger is not None:
            self.average.save(self.folder / "model")

    def finish(self, outcome: Outcome) -> None:
        self.average.provenance |= {"distilled_steps": outcome.step}
        self.average.save(self.folder / "model")


def distill(
    config: DistillConfig,
    out: str | os.PathLike[str],
    resume: str | None = None,
    *,
    started: Callable[[Distillation], None] | None = None,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> Outcome:
    """Distil a model of stage 2 to a folder.

    Args:
        config: configuration.
        out: folder of the run, which gets model/ for ``tcam_diff.diffusion.sampling.Sampler`` with the solver consistency.
        resume: "auto", or the folder of a checkpoint; None: begin.
        started: called with the training before its first step.
        progress: called after every step.
        stop: asked before every step; true: write a checkpoint and end.

    Raises:
        UserError: model or configuration do not fit, or the folder has a run.
    """
    if (Path(out) / INDEX).is_file():
        raise UserError(f"--out {out}: has a model; choose another folder")
    return train(Distillation, config, Path(out), resume, started, progress, stop)
