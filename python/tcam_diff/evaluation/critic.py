"""Wasserstein distance of generated volumes from real ones by a critic (WGAN-GP; algorithm.md 5.1; table 3 of the paper).

A critic f is trained to distinguish real volumes from fake ones, max E f(real) - E f(fake) - lambda (|grad f| - 1)^2. The
distance is W = mean f(real) - mean f(fake) of volumes held out from its training. Generators to be compared share one critic.
Values depend on the size and scale of the volumes and on the critic, so those of different runs are not comparable.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from tcam_diff.errors import UserError
from tcam_diff.evaluation.config import CriticConfig
from tcam_diff.evaluation.metrics import gaussian
from tcam_diff.evaluation.sets import resampled
from tcam_diff.progress import Progress, ProgressCallback
from tcam_diff.training.rng import rng, seed_of


class Critic(nn.Module):
    """Critic (B, channels, size, size, size) -> (B,): strided convolutions down to 8 voxels along each axis, then one number.

    Raises UserError if the size is not 8 times a power of 2.
    """

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
        scores: Tensor = self.layers(x)
        return scores.flatten()


@dataclass
class Score:
    """Result of one critic."""

    distance: dict[str, float]  # W on held-out volumes, by the name of the set
    train_distance: float  # W on the training volumes, with all fakes pooled
    gradient_norm: float
    epoch: int  # the epoch used, from 1
    epochs: int  # number of epochs run
    end: str  # why training ended: "steady", "unstable" (gradient norms above 2) or "all epochs"
    valid: bool  # whether an epoch had a gradient norm within the tolerance
    counts: dict[str, int] = field(default_factory=dict)  # number of scored volumes, by the name of the set
    real_count: int = 0  # number of scored real volumes
    history: list[tuple[float, float, float]] = field(default_factory=list)  # W, gradient norm, penalty of every epoch


def prepare(volumes: Tensor, config: CriticConfig) -> Tensor:
    """Resample volumes for the critic, by means over cells, or trilinearly to a larger size.

    Args:
        volumes: (N, channels, H, W, D) in [0, 1].
        config: size and number of dimensions.

    Returns:
        (N, channels, size, size[, size]) in [-1, 1], float16.
    """
    if config.ndim == 2:
        volumes = volumes[..., volumes.shape[-1] // 2 : volumes.shape[-1] // 2 + 1]
    target = (config.size,) * 3 if config.ndim == 3 else (config.size, config.size, 1)
    smaller = resampled(volumes, config.size)
    if smaller.shape[2:] != target:
        smaller = F.interpolate(smaller, target, mode="trilinear")
    smaller = smaller.clamp(0, 1) * 2 - 1
    return (smaller if config.ndim == 3 else smaller[..., 0]).half()


def blurred(volumes: Tensor, sigma: float) -> Tensor:
    """Smooth volumes (N, channels, H, W, D) with a Gaussian of ``sigma`` voxels."""
    taps = 2 * max(1, round(3 * sigma)) + 1
    kernel, x = gaussian(taps, sigma).float(), volumes.float().flatten(0, 1).unsqueeze(1)
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
    """Train a critic on real volumes against all fakes, and score the held-out volumes.

    Args:
        real: real volumes from ``prepare``.
        fakes: sets of generated volumes from ``prepare``, by name.
        config: critic and training.
        seed: seed of split, critic and training.
        device: device of the critic.
        progress: called after every epoch with "distance" and "gradient_norm" of the training volumes.

    Raises:
        UserError: a set is too small.
    """
    if not fakes:
        raise ValueError("fakes: expected one or more sets, got none")

    def split(name: str, volumes: Tensor, number: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(volumes), generator=rng(seed, "critic split", number))
        cut = round(config.train_share * len(volumes))
        if cut < 1 or cut == len(volumes):
            raise UserError(
                f"{name}: {len(volumes)} volumes are too few to train on {config.train_share:.0%} and score the rest"
            )
        return volumes[order[:cut]], volumes[order[cut:]]

    real_train, real_test = split("real", real, 0)
    parts = {name: split(name, volumes[: len(real)], i) for i, (name, volumes) in enumerate(fakes.items(), 1)}
    fakes_train, fakes_test = [train for train, _ in parts.values()], {name: test for name, (_, test) in parts.items()}
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
    epoch, end = 0, "all epochs"
    for epoch in range(1, config.epochs + 1):
        history.append(_epoch(critic, optimiser, real_train, fakes_train, config, seed, epoch, device))
        distance, norm, _ = history[-1]
        if progress is not None:
            progress(Progress(epoch, config.epochs, {"distance": distance, "gradient_norm": norm}))
        valid = clipped or abs(norm - 1) <= config.tolerance
        if valid and (best is None or distance > best[0]):
            best = (distance, epoch, {k: v.clone() for k, v in critic.state_dict().items()}, norm)
        if _steady(history[-config.window :], config):
            end = "steady"
            break
        if not clipped and all(n > 2 for _, n, _ in _last(history, config.window)):
            end = "unstable"
            break
    if best is not None:
        critic.load_state_dict(best[2])
    critic.eval()
    with torch.no_grad():
        mean = _mean(critic, real_test, config.batch, device)
        distances = {k: mean - _mean(critic, v, config.batch, device) for k, v in fakes_test.items()}
    kept = best or (history[-1][0], epoch, {}, history[-1][1])
    counts = {k: len(v) for k, v in fakes_test.items()}
    return Score(distances, kept[0], kept[3], kept[1], epoch, end, best is not None, counts, len(real_test), history)


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
    """Train for one pass over the real volumes, with as many fakes, drawn equally from every set.

    Returns:
        Means over the batches of W, gradient norm and penalty.
    """
    generator = rng(seed, "critic epoch", epoch)
    order = torch.randperm(len(real), generator=generator)
    orders = [torch.randperm(len(f), generator=generator) for f in fakes]
    sets = [i % len(fakes) for i in range(len(real))]  # set of the i-th fake
    pool = torch.stack([fakes[k][orders[k][(i // len(fakes)) % len(fakes[k])]] for i, k in enumerate(sets)])
    pool = pool[torch.randperm(len(pool), generator=generator)]
    sums, batches = torch.zeros(3, dtype=torch.float64), 0
    for at in range(0, len(real), config.batch):
        a = real[order[at : at + config.batch]].to(device, torch.float32)
        b = pool[at : at + config.batch].to(device, torch.float32)
        u = torch.rand(len(a), generator=generator).to(device).view(-1, *[1] * (a.dim() - 1))
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
    """The last ``count`` entries, or, if there are fewer, an entry that does not cause a stop."""
    return history[-count:] if len(history) >= count else [(0.0, 1.0, 0.0)]


def _steady(window: Sequence[tuple[float, float, float]], config: CriticConfig) -> bool:
    """Whether the distance is steady, for a gradient penalty also with valid gradient norms and small penalties."""
    if len(window) < config.window:
        return False
    distances = [w for w, _, _ in window]
    mean = statistics.fmean(distances)
    steady = mean > 0 and statistics.stdev(distances) < 0.05 * mean
    if config.constraint == "clip":
        return steady
    valid = all(abs(n - 1) <= config.tolerance for _, n, _ in window)
    return steady and valid and statistics.fmean(p for _, _, p in window) < 0.05 * config.penalty


def _mean(critic: Critic, volumes: Tensor, batch: int, device: torch.device) -> float:
    scores = [critic(volumes[i : i + batch].to(device, torch.float32)) for i in range(0, len(volumes), batch)]
    return float(torch.cat(scores).double().mean())


def halves(real: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two random halves of the real volumes, for the controls."""
    order = torch.randperm(len(real), generator=rng(seed, "critic halves"))
    return real[order[: len(real) // 2]], real[order[len(real) // 2 :]]
