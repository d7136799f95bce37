"""Training of stage 2 on a latent set (algorithm.md 4.6)."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tcam_diff.autodecoder.report import rgb
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.diffusion.data import Centre, LatentData
from tcam_diff.diffusion.model import TriplaneDiffusion, assemble
from tcam_diff.diffusion.network import TriplaneUNet, groups_of
from tcam_diff.diffusion.prior import GaussianPrior
from tcam_diff.diffusion.prior_fit import MOST_STATES, cross_fit
from tcam_diff.diffusion.process import TIMESTEPS, angle, error, flip, mix, pack, timesteps, unpack
from tcam_diff.diffusion.report import samples_picture, write_report
from tcam_diff.diffusion.spacing import Spacings
from tcam_diff.environment import restore_compiler_folder
from tcam_diff.errors import UserError
from tcam_diff.files import write_bytes
from tcam_diff.machine import products
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.ema import update_average
from tcam_diff.training.logger import Logger
from tcam_diff.training.loop import Outcome, Task
from tcam_diff.training.lr import lr_scale
from tcam_diff.training.muon import Muon
from tcam_diff.training.rng import in_epochs, rng, seed_of
from tcam_diff.training.run import train
from tcam_diff.training.states import load_module, load_optimiser


class _Loss(nn.Module):
    """Module that computes the errors and has the network's parameters, for DistributedDataParallel to wrap."""

    def __init__(
        self,
        network: nn.Module,
        compute: torch.dtype,
        prior: GaussianPrior | None,
        loss: str = "estimates",
        without: Sequence[GaussianPrior] = (),
    ) -> None:
        super().__init__()
        self.network, self.compute, self.prior, self.loss = network, compute, prior, loss
        self.without = without

    def forward(
        self,
        x0: list[Tensor],
        noise: list[Tensor],
        t: Tensor,
        labels: Tensor | None,
        numbers: Tensor | None = None,
        parts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Errors of noise and of planes, and mean square of x - cos(eta) x0 - sin(eta) eps, each (B,).

        ``parts`` (B,) are the numbers of the priors in ``without``, and -1 is the prior of all volumes.
        """
        x = [mix(p, e, t) for p, e in zip(x0, noise, strict=True)]
        own = None if self.prior is None else self._denoised(self.prior, x, t, parts)
        with torch.autocast(x[0].device.type, torch.bfloat16, enabled=self.compute == torch.bfloat16):
            noise_hat, x0_hat = self.network(x, t, labels, numbers, None if own is None else own[1])
        scales: Sequence[list[Tensor] | None] = (None, None)
        if self.prior is not None and own is not None:
            noise_hat, x0_hat = self.prior.combine(own, t, noise_hat, x0_hat)  # the factors of all priors are equal
            if self.loss == "heads":
                scales = [unpack(s, self.prior.channels, self.prior.sizes) for s in self.prior.scales(angle(t))]
        noise_error, image_error = error(noise_hat, noise, scales[0]), error(x0_hat, x0, scales[1])
        with torch.no_grad():
            residuals = [a - mix(p.to(a), e.to(a), t) for a, p, e in zip(x, x0_hat, noise_hat, strict=True)]
            residual = torch.stack([r.square().mean((1, 2, 3)) for r in residuals]).mean(0)
        return noise_error, image_error, residual

    @torch.no_grad()
    def _denoised(
        self, prior: GaussianPrior, x: list[Tensor], t: Tensor, parts: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Estimates of noise and planes by each volume's prior."""
        if parts is None:
            return prior.denoised(x, t)
        noise, x0 = [torch.empty_like(p) for p in x], [torch.empty_like(p) for p in x]
        for part in parts.unique().tolist():
            rows = (parts == part).nonzero()[:, 0]
            both = (prior if part < 0 else self.without[part]).denoised([p[rows] for p in x], t[rows])
            for all_planes, planes in zip((noise, x0), both, strict=True):
                for p, some in zip(all_planes, planes, strict=True):
                    p[rows] = some
        return noise, x0


class DiffusionTraining(Task):
    """Training run of stage 2: network, its average, optimisers and data. Raises UserError if they do not fit."""

    def __init__(self, config: DiffusionConfig, group: Distributed, folder: Path) -> None:
        self.config, self.group, self.steps, self.folder = config, group, config.steps, folder
        self.evaluated = "training" if config.validation is None else "validation"
        self.score = f"-{self.evaluated}_loss"
        net = config.network
        if groups_of(net.base, net.norm_groups) == net.base:
            warnings.warn(
                f"network.norm_groups={net.norm_groups} with network.base={net.base} normalises every channel alone, which "
                f"hides the time, classes and voxel sizes from the network; take at most {net.base // 2}",
                stacklevel=2,
            )
        latent_dtype = torch.bfloat16 if config.latent_dtype == "bfloat16" else torch.float32
        self.data = LatentData(config.latents, latent_dtype, config.labels)
        self.validation = self.data
        if config.validation is not None:
            self.validation = LatentData(config.validation, latent_dtype, config.labels, self.data.classes)
            if [p.shape[1:] for p in self.validation.planes] != [p.shape[1:] for p in self.data.planes]:
                raise UserError(f"validation: {config.validation}: its planes have other sizes than those of {config.latents}")
            self.validation.set.check_decoder(self.data.set.decoder(), config.latents)
        parts = group.world * config.accumulate
        if config.batch % parts:
            raise UserError(
                f"batch: expected a multiple of {parts} ({group.world} process(es), accumulate={config.accumulate}), got "
                f"{config.batch}"
            )
        self.flips = sorted("xyz".index(name) for name in set(config.flip))
        self.centre = Centre.from_planes(self.data.planes, self.flips) if config.center else None
        self.part: Tensor | None = None
        self.without: list[GaussianPrior] = []
        self.prior, self.variances = self._prior()
        self.spacings = Spacings(self.data.spacings) if config.spacing else None
        self.dtype = torch.float64 if config.compute_dtype == "float64" else torch.float32
        self.compute = products(config.compute_dtype, group.device)
        for prior in (self.prior, *self.without):
            if prior is not None:
                prior.to(group.device, self.dtype)
        self.network, self.average = self._network(), self._network().requires_grad_(False).eval()
        try:
            self.network.check([tuple(p.shape[1:]) for p in self.data.planes])
        except ValueError as error:
            raise UserError(f"latents: {config.latents}: {error}") from error
        self.optimisers = self._optimisers()
        if config.compile:
            restore_compiler_folder()
        inner = torch.compile(self.network) if config.compile else self.network
        loss = self.inner = _Loss(inner, self.compute, self.prior, config.loss, self.without)  # type: ignore[arg-type]
        # The buffers are those of the prior, which are equal on all processes.
        self.loss: nn.Module = DistributedDataParallel(loss, broadcast_buffers=False) if group.world > 1 else loss

    def _network(self) -> TriplaneUNet:
        """Initial network. Its weights depend on the configuration's seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.config.seed, "network"))
            network = TriplaneUNet(self.data.channels, self.config.network, len(self.data.classes), 3 * self.config.spacing)
        return network.placed(self.group.device, self.dtype)

    def _optimisers(self) -> dict[str, tuple[torch.optim.Optimizer, float]]:
        """Adam, and Muon for the convolutions' weights if it has a rate, with their rates, under the names of their states."""
        c = self.config
        weights = self.network.convolutions() if c.muon_lr is not None else []
        rest = [p for p in self.network.parameters() if all(p is not w for w in weights)]
        adam = torch.optim.Adam(rest, lr=c.lr, betas=(0.9, c.beta2), eps=c.adam_eps, fused=True)
        found: dict[str, tuple[torch.optim.Optimizer, float]] = {"optimiser": (adam, c.lr)}
        if c.muon_lr is not None:
            copies = 3 if c.network.weights == "independent" else 1
            found["muon"] = Muon(weights, c.muon_lr, copies=copies, products=self.compute), c.muon_lr
        return found

    def _prior(self) -> tuple[GaussianPrior | None, tuple[float, float] | None]:
        """Prior, and smallest and largest variance of the states' modes if the configuration needs them."""
        c, data = self.config, self.data
        sizes = [(p.shape[2], p.shape[3]) for p in data.planes]
        prior = GaussianPrior.unit(data.channels, sizes) if c.prior == "unit" else None
        if c.prior != "gaussian" and c.timesteps != "spectrum":
            return prior, None
        mirrored = [axes for n in range(len(self.flips) + 1) for axes in combinations(self.flips, n)]
        volumes = torch.randperm(len(data), generator=rng(c.seed, "prior"))[: max(3, MOST_STATES // len(mirrored))]
        states, groups = [], []
        for axes in mirrored:
            planes = data.rows(volumes)
            for axis in axes:
                planes = flip(planes, axis)
            states.append(pack(planes if self.centre is None else self.centre.apply(planes)))
            groups += volumes.tolist()
        try:
            fitted = cross_fit(
                torch.cat(states),
                data.channels,
                sizes,
                groups=groups,
                most=c.prior_directions,
                seed=c.seed,
                without=c.cross_fit,
            )
        except UserError as error:
            raise UserError(f"latents: {c.latents}: {error}") from error
        if fitted.without and c.prior == "gaussian":  # volumes beyond MOST_STATES are new to the prior of the others
            self.without, self.part = fitted.without, torch.full((len(data),), -1)
            self.part[torch.tensor(groups)] = fitted.part
        return (fitted.prior if c.prior == "gaussian" else prior), fitted.prior.range

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(p.numel() for p in self.network.parameters())

    # ---- a step ------------------------------------------------------------------------

    def _batch(
        self, step: int, positions: range
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None, Tensor | None]:
        """Planes, noise, labels, numbers and parts at positions within a step's batch.

        Each depends on step and position alone.
        """
        c, device = self.config, self.group.device
        indices = [in_epochs(step * c.batch + i, len(self.data), c.seed) for i in positions]
        planes = self.data.rows(indices)
        if self.centre is not None:
            planes = self.centre.apply(planes)
        noise = [torch.empty_like(p, device=device) for p in planes]
        labels = None if self.data.labels is None else self.data.labels[indices].clone()
        for row, i in enumerate(positions):
            _fill_normal(noise, row, rng(c.seed, "noise", step, i, device=device))
            coins = torch.rand(4, generator=rng(c.seed, "coins", step, i)).tolist()
            for axis, name in enumerate("xyz"):
                if name in c.flip and coins[axis] < 0.5:
                    for plane, flipped in zip(planes, flip([p[row] for p in planes], axis), strict=True):
                        plane[row] = flipped
            if labels is not None and coins[3] < c.label_dropout:
                labels[row] = len(self.data.classes)
        moved = [p.to(device, self.dtype) for p in planes]
        labels = None if labels is None else labels.to(device)
        parts = None if self.part is None else self.part[indices].to(device)
        return moved, [n.to(self.dtype) for n in noise], labels, self._numbers(self.data, indices), parts

    def _numbers(self, data: LatentData, indices: Sequence[int]) -> Tensor | None:
        """What the network takes for the voxel sizes of volumes, if it does."""
        if self.spacings is None:
            return None
        return self.spacings.condition(data.spacings[list(indices)]).to(self.group.device, self.dtype)

    def step(self, index: int) -> dict[str, Tensor]:
        """Update the network once. Returns "loss", its terms, the residual and the gradient norm."""
        c, group = self.config, self.group
        each = c.batch // (group.world * c.accumulate)
        t = timesteps(c.timesteps, c.batch, c.seed, index, self.variances or (1.0, 1.0)).to(group.device)
        self.network.train()
        for optimiser, _ in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=group.device)
        with torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else []):
            torch.manual_seed(seed_of(c.seed, "dropout", index, group.rank))
            for part in range(c.accumulate):
                first = (group.rank * c.accumulate + part) * each
                x0, noise, labels, numbers, own = self._batch(index, range(first, first + each))
                accumulating = part + 1 < c.accumulate and isinstance(self.loss, DistributedDataParallel)
                with self.loss.no_sync() if accumulating else contextlib.nullcontext():  # type: ignore[operator]
                    parts = self.loss(x0, noise, t[first : first + each], labels, numbers, own)
                    terms = torch.stack([p.mean() for p in parts]) / c.accumulate
                    (c.noise_weight * terms[0] + c.image_weight * terms[1]).backward()
                sums += terms.detach().float()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), c.grad_clip)
        for optimiser, lr in self.optimisers.values():
            for parameters in optimiser.param_groups:
                parameters["lr"] = lr * lr_scale(c, index)
            optimiser.step()
        update_average(self.average, self.network, c.ema_decay, index)
        loss = c.noise_weight * sums[0] + c.image_weight * sums[1]
        return {"loss": loss, "noise": sums[0], "image": sums[1], "residual": sums[2], "grad": norm.detach()}

    # ---- evaluation --------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluate the averaged network on the validation set, or on training volumes, with fixed timesteps and noise.

        Returns:
            Equation 9's "validation_loss", which is 2 before training with weights 1 and without a prior, and
            "validation_residual"; without a validation set "training_loss" and "training_residual".
        """
        c, device = self.config, self.group.device
        count = min(c.evaluate_volumes, len(self.validation))
        average_loss = _Loss(self.average, self.compute, self.prior)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        mine, each = range(self.group.rank, count, self.group.world), c.batch // (self.group.world * c.accumulate)
        for first in range(0, len(mine), each):
            indices = list(mine[first : first + each])
            x0 = self.validation.rows(indices)
            if self.centre is not None:
                x0 = self.centre.apply(x0)
            noise = [torch.empty_like(p) for p in x0]
            for row, i in enumerate(indices):
                _fill_normal(noise, row, rng(c.seed, "validation", i))
            t = (torch.tensor(indices, device=device) + 0.5) / count * TIMESTEPS
            labels = None if self.validation.labels is None else self.validation.labels[indices].to(device)
            numbers = self._numbers(self.validation, indices)
            parts = average_loss(*([p.to(device, self.dtype) for p in planes] for planes in (x0, noise)), t, labels, numbers)
            sums += torch.stack([p.double().sum() for p in parts])
        noise_error, image_error, residual = (self.group.sum(sums) / count).tolist()
        loss = c.noise_weight * noise_error + c.image_weight * image_error
        return {f"{self.evaluated}_loss": loss, f"{self.evaluated}_residual": residual}

    def model(self, step: int) -> TriplaneDiffusion:
        """Model with the averaged network."""
        return assemble(self.average, self.data, self.config, self.centre, step, self.prior, self.variances, self.spacings)

    def draw_pictures(self, step: int, logger: Logger | None) -> None:
        """Save the model to model/, and draw samples from it to samples/ and TensorBoard."""
        if logger is None:
            return
        model, samples = self.model(step), self.folder / "samples"
        model.save(self.folder / "model")
        if self.config.preview_steps:
            samples.mkdir(exist_ok=True)
            picture = samples_picture(model, self.config.preview_steps)
            write_bytes(samples / f"step-{step:08d}.png", picture)
            logger.picture(step, "samples", rgb(picture))

    def finish(self, outcome: Outcome) -> None:
        """Save the model, and write report.html unless the run was stopped."""
        if self.group.first:
            self.model(outcome.step).save(self.folder / "model")
            if not outcome.stopped:
                write_report(self.folder, self.config, self, outcome)

    # ---- checkpoints -------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            **{name: o.state_dict() for name, (o, _) in self.optimisers.items()},
            "latents": self.data.digest,
            "labels": self._labels(),
            "prior": None if self.prior is None else self.prior.state_dict(),
            "variances": self.variances,
        }

    def _labels(self) -> list[str]:
        """Class of every volume; empty without labels."""
        return [] if self.data.labels is None else [self.data.classes[i] for i in self.data.labels.tolist()]

    def shard_state(self) -> dict[str, Any]:
        return {}

    def load_state(self, shared: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
        if shared["latents"] != self.data.digest:
            raise UserError(f"{self.config.latents}: not the planes with which the run began")
        if shared.get("labels", self._labels()) != self._labels():
            raise UserError(f"labels: {self.config.labels}: not the labels with which the run began")
        if self.prior is not None and self.config.prior == "gaussian":  # another machine may fit another one
            tensors = [shared["prior"][name] for name in ("mean", "floor", "directions")]
            prior = GaussianPrior(self.data.channels, self.prior.sizes, *tensors).to(self.group.device, self.dtype)
            self.prior = self.inner.prior = prior
        if self.variances is not None:
            low, high = shared["variances"]
            self.variances = float(low), float(high)
        load_module(self.network, shared["network"])
        load_module(self.average, shared["average"])
        for name, (optimiser, _) in self.optimisers.items():
            load_optimiser(optimiser, shared[name])

    def finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.network.parameters())


def _fill_normal(planes: Sequence[Tensor], row: int, generator: torch.Generator) -> None:
    """Fill a row of each plane with standard normals."""
    for plane in planes:
        torch.randn(plane.shape[1:], generator=generator, out=plane[row])


def train_diffusion(
    config: DiffusionConfig,
    out: str | os.PathLike[str],
    resume: str | None = None,
    *,
    started: Callable[[DiffusionTraining], None] | None = None,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> Outcome:
    """Train a diffusion model on a latent set, on the processes that torchrun started, or on this one.

    Args:
        config: for example ``DiffusionConfig.load("small", ["latents=LATENTS"])``.
        out: folder of the run: config.yaml, checkpoints, model/ (for ``TriplaneDiffusion.load(out)``), metrics.jsonl,
            TensorBoard files, samples (pictures), report.html.
        resume: "auto": continue from the last checkpoint in ``out``, if any; or a checkpoint's folder; None: start anew.
        started: called with the training before its first step, on the first process.
        progress: called after every step, with "loss", and "validation_loss" or "training_loss" of
            the last evaluation, among the metrics.
        stop: asked before every step; true: write a checkpoint and return.

    Returns:
        The last step and its metrics.

    Raises:
        UserError: ``out`` has a run that would be overwritten, configuration and data do not fit, or the loss is not finite.
    """
    return train(DiffusionTraining, config, Path(out), resume, started, progress, stop)
