"""The Wasserstein distance of generated volumes from real ones, by a critic (WGAN-GP; algorithm.md 5.1; the paper's table 3).

A critic f is trained to tell real volumes from fake ones, max E f(real) - E f(fake) - lambda (|grad f| - 1)^2, and then scores
volumes that it never saw: W = mean f(real) - mean f(fake). Generators that are compared share one critic. Values depend on the
size and scale of the volumes and on the critic: those of different runs are not comparable.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from tcam_diff.config import Config
from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import gaussian
from tcam_diff.progress import Progress, ProgressCallback
from tcam_diff.training.config import Count, Rate
from tcam_diff.training.rng import rng, seed_of


class CriticConfig(Config):
    """Defaults are those of the released protocol, the split shuffled and no volume stretched by itself."""

    kind = "critic"

    size: Annotated[
        int, Field(ge=16, le=512, description="voxels along each axis to which volumes are resampled: 8 times a power of 2")
    ] = 128
    ndim: Annotated[Literal[2, 3], Field(description="3: volumes; 2: their middle axial slices")] = 3
    width: Annotated[int | None, Field(ge=4, description="channels of the first layer; null: size / 2, 32 to 128")] = None
    epochs: Count = 200
    batch: Count = 4
    lr: Rate = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    grad_clip: Annotated[float, Field(gt=0, description="norm")] = 1.0
    constraint: Annotated[
        Literal["penalty", "clip"],
        Field(description="gradient penalty; or clipped weights, with which only ratios of distances mean anything"),
    ] = "penalty"
    penalty: Annotated[float, Field(ge=0, description="lambda")] = 30.0
    clip: Annotated[float, Field(gt=0, description="of the weights, with constraint=clip")] = 0.01
    train_share: Annotated[float, Field(gt=0, lt=1, description="of every set; the rest is scored")] = 0.6
    tolerance: Annotated[float, Field(gt=0, description="epochs with mean gradient norm 1 +- this may be kept")] = 0.2
    window: Annotated[int, Field(ge=2, description="epochs over which the distance must hold still to stop early")] = 10
    device: str = "auto"


class Critic(nn.Module):
    """Strided convolutions down to 8 voxels an axis, then one number. (B, channels, size, size, size) -> (B,); no sigmoid."""

    def __init__(self, channels: int, config: CriticConfig) -> None:
        super().__init__()
        halvings = config.size.bit_length() - 4
        if config.size != 8 << halvings or halvings < 1:
            raise UserError(f"size: expected 16, 32, 64, 128, 256 or 512, got {config.size}")
        three = config.ndim == 3
        width = config.width or min(128, max(32, config.size // 2))
        most = width * (4 if three else 8)
        conv = nn.Conv3d if three else nn.Conv2d
        norm = nn.InstanceNorm3d if three else nn.InstanceNorm2d
        layers: list[nn.Module] = []
        c = channels
        for i in range(halvings):
            out = min(width << i, most)
            strided = conv(c, out, 4, 2, 1)
            nn.init.normal_(strided.weight, 0, 0.02)
            layers.append(spectral_norm(strided) if three and config.constraint == "penalty" else strided)
            if i:
                layers.append(norm(out, affine=True))
            layers.append(nn.LeakyReLU(0.2))
            c = out
        last = conv(c, 1, 8)
        nn.init.normal_(last.weight, 0, 0.02)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found.flatten()


@dataclass
class Score:
    """Of one seed."""

    distance: dict[str, float]  # W on volumes that were held back, by the fakes' name
    train_distance: float  # on those it was trained with, all fakes pooled
    gradient_norm: float
    epoch: int  # that was kept, from 1
    epochs: int  # that were run
    valid: bool  # whether an epoch had a gradient norm within the tolerance
    counts: dict[str, int] = field(default_factory=dict)  # volumes scored, by the fakes' name
    real_count: int = 0


def prepare(volumes: Tensor, config: CriticConfig) -> Tensor:
    """(N, channels, size, size[, size]) in [-1, 1], float16, of (N, channels, H, W, D) in [0, 1]: means over cells, trilinear
    where the size is larger."""
    if config.ndim == 2:
        volumes = volumes[..., volumes.shape[-1] // 2 : volumes.shape[-1] // 2 + 1]
    target = (config.size,) * 3 if config.ndim == 3 else (config.size, config.size, 1)
    moved = volumes.float()
    h, w, d = (min(n, t) for n, t in zip(moved.shape[2:], target, strict=True))
    moved = F.adaptive_avg_pool3d(moved, (h, w, d))
    if (h, w, d) != target:
        moved = F.interpolate(moved, target, mode="trilinear")
    moved = moved.clamp(0, 1) * 2 - 1
    return (moved if config.ndim == 3 else moved[..., 0]).half()


def blurred(volumes: Tensor, sigma: float) -> Tensor:
    """(N, channels, H, W, D), each axis smoothed by a Gaussian of ``sigma`` voxels."""
    taps = 2 * max(1, round(3 * sigma)) + 1
    kernel, x = gaussian(taps, sigma), volumes.float().flatten(0, 1).unsqueeze(1)
    for axis in range(3):
        shape, pad = [1, 1, 1, 1, 1], [0] * 6
        shape[2 + axis] = taps
        pad[4 - 2 * axis] = pad[5 - 2 * axis] = taps // 2
        x = F.conv3d(F.pad(x, pad, mode="replicate"), kernel.view(shape).to(x))
    return x.view(volumes.shape)


def score(
    real: Tensor,
    fakes: Mapping[str, Tensor],
    config: CriticConfig,
    seed: int,
    device: torch.device,
    progress: ProgressCallback | None = None,
) -> Score:
    """Train a critic on real against pooled fakes, and score what was held back. Sets: as ``prepare`` makes them.

    ``progress`` is called after every epoch with "distance", on the training volumes, and "gradient_norm", their mean. Raises
    UserError where a set is small.
    """
    if not fakes:
        raise ValueError("fakes: expected one or more sets, got none")

    def split(name: str, held: Tensor, number: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(held), generator=rng(seed, "critic split", number))
        cut = round(config.train_share * len(held))
        if cut < 1 or cut == len(held):
            raise UserError(f"{name}: {len(held)} volumes are too few to train on {config.train_share:.0%} and score the rest")
        return held[order[:cut]], held[order[cut:]]

    truth, real_left = split("real", real, 0)
    parts = {name: split(name, held[: len(real)], i) for i, (name, held) in enumerate(fakes.items(), 1)}
    pools, left = [train for train, _ in parts.values()], {name: rest for name, (_, rest) in parts.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "critic"))
        critic = Critic(real.shape[1], config).to(device)
    clipped = config.constraint == "clip"
    optimiser: torch.optim.Optimizer
    if clipped:
        optimiser = torch.optim.RMSprop(critic.parameters(), lr=config.lr)
    else:
        optimiser = torch.optim.Adam(critic.parameters(), lr=config.lr, betas=(0.0, 0.9), weight_decay=config.weight_decay)
    best: tuple[float, int, dict[str, Tensor], float] | None = None
    history: list[tuple[float, float, float]] = []  # W, gradient norm, penalty
    epoch = 0
    for epoch in range(1, config.epochs + 1):
        found = _epoch(critic, optimiser, truth, pools, config, seed, epoch, device)
        history.append(found)
        distance, norm, _ = found
        if progress is not None:
            progress(Progress(epoch, config.epochs, {"distance": distance, "gradient_norm": norm}))
        valid = clipped or abs(norm - 1) <= config.tolerance
        if valid and (best is None or distance > best[0]):
            best = (distance, epoch, {k: v.clone() for k, v in critic.state_dict().items()}, norm)
        if _still(history[-config.window :], config) or all(n > 2 for _, n, _ in _last(history, config.window)):
            break
    was_valid = best is not None
    if best is not None:
        critic.load_state_dict(best[2])
    critic.eval()
    with torch.no_grad():
        mean = _mean(critic, real_left, config.batch, device)
        distances = {k: mean - _mean(critic, v, config.batch, device) for k, v in left.items()}
    kept = best or (history[-1][0], epoch, {}, history[-1][1])
    return Score(
        distances, kept[0], kept[3], kept[1], epoch, was_valid, {k: len(v) for k, v in left.items()}, len(real_left),
    )  # fmt: skip


def _epoch(
    critic: Critic,
    optimiser: torch.optim.Optimizer,
    real: Tensor,
    fakes: Sequence[Tensor],
    config: CriticConfig,
    seed: int,
    epoch: int,
    device: torch.device,
) -> tuple[float, float, float]:
    """One pass over the real volumes, with as many fakes, drawn equally from every set. (W, gradient norm, penalty), means."""
    chosen = rng(seed, "critic epoch", epoch)
    order = torch.randperm(len(real), generator=chosen)
    turns = [torch.randperm(len(f), generator=chosen) for f in fakes]
    which = torch.arange(len(real)) % len(fakes)  # set of the i-th fake
    pool = torch.stack([fakes[int(k)][turns[int(k)][(i // len(fakes)) % len(fakes[int(k)])]] for i, k in enumerate(which)])
    pool = pool[torch.randperm(len(pool), generator=chosen)]
    sums, batches = torch.zeros(3, dtype=torch.float64), 0
    for at in range(0, len(real), config.batch):
        a = real[order[at : at + config.batch]].to(device, torch.float32)
        b = pool[at : at + config.batch].to(device, torch.float32)
        u = torch.rand(len(a), generator=chosen).to(device).view(-1, *[1] * (a.dim() - 1))
        distance = critic(a).mean() - critic(b).mean()
        between = (u * a + (1 - u) * b).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=config.constraint == "penalty")
        norms = slope.flatten(1).norm(dim=1)
        penalty = (norms - 1).square().mean() * config.penalty
        loss = -distance + penalty if config.constraint == "penalty" else -distance
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), config.grad_clip)
        optimiser.step()
        if config.constraint == "clip":
            with torch.no_grad():
                for p in critic.parameters():
                    p.clamp_(-config.clip, config.clip)
        sums += torch.tensor([float(distance.detach()), float(norms.detach().mean()), float(penalty.detach())])
        batches += 1
    w, norm, penalty_ = (sums / batches).tolist()
    return w, norm, penalty_


def _last(history: Sequence[tuple[float, float, float]], count: int) -> Sequence[tuple[float, float, float]]:
    """The last ``count``, or, where there are fewer, one that stands for no reason to stop."""
    return history[-count:] if len(history) >= count else [(0.0, 1.0, 0.0)]


def _still(window: Sequence[tuple[float, float, float]], config: CriticConfig) -> bool:
    """Whether the distance holds still, with good gradient norms and small penalties."""
    if len(window) < config.window or config.constraint == "clip":
        return False
    distances = [w for w, _, _ in window]
    mean = statistics.fmean(distances)
    steady = mean > 0 and statistics.stdev(distances) < 0.05 * mean
    valid = all(abs(n - 1) <= config.tolerance for _, n, _ in window)
    return steady and valid and statistics.fmean(p for _, _, p in window) < 0.05 * config.penalty


def _mean(critic: Critic, volumes: Tensor, batch: int, device: torch.device) -> float:
    scores = [critic(volumes[i : i + batch].to(device, torch.float32)) for i in range(0, len(volumes), batch)]
    return float(torch.cat(scores).double().mean())


def halves(real: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """For the controls: two halves of the real volumes, at random."""
    order = torch.randperm(len(real), generator=rng(seed, "critic halves"))
    return real[order[: len(real) // 2]], real[order[len(real) // 2 :]]
