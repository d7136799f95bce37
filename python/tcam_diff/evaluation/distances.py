"""Critics of sets of generated volumes, over several seeds and with controls."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tcam_diff.evaluation.config import CriticConfig
from tcam_diff.evaluation.critic import Score, blurred, halves, prepare, score
from tcam_diff.progress import Progress, ProgressCallback
from tcam_diff.training.distributed import device_of
from tcam_diff.training.rng import rng

#: Standard deviation of the noise of a control.
NOISE = 0.1


def altered(volumes: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Volumes (N, channels, H, W, D) in [0, 1] made worse, to see whether a distance tells: blurred by 1 and 2 voxels, and with
    Gaussian noise of standard deviation 0.1."""
    noise = torch.empty(volumes.shape).normal_(0, NOISE, generator=rng(seed, "control noise"))
    sets = {f"blurred by {s:g} voxel{'s' if s > 1 else ''}": blurred(volumes, s) for s in (1.0, 2.0)}
    return sets | {f"with noise of {NOISE}": (volumes.float() + noise).clamp(0, 1)}


def distances(
    real: Tensor,
    fakes: Mapping[str, Sequence[Tensor]],
    config: CriticConfig,
    *,
    seeds: int = 3,
    controls: bool = True,
    progress: ProgressCallback | None = None,
) -> dict[str, list[Score]]:
    """Compute the Wasserstein distances of sets from real volumes, with one critic per seed for all sets.

    Args:
        real: real volumes (N, channels, H, W, D) in [0, 1].
        fakes: for each set its volumes, or those of every seed.
        config: critic and training.
        seeds: number of critics, each with its own initial weights and split.
        controls: whether to score one half of the real volumes against the other half, unchanged and altered.
        progress: called after every epoch with "distance"; ``what`` names the critic.

    Returns:
        A score per seed, by the name of the set or of the control.

    Raises:
        UserError: a set is too small.
    """
    device, rows = device_of(config.device), dict[str, list[Score]]()
    for seed in range(seeds):
        jobs = {"": (real, {name: sets[seed % len(sets)] for name, sets in fakes.items()})}
        if controls:
            a, b = halves(real, seed)
            jobs["control: real"] = (a, {"control: real": b})
            for how, other in altered(b, seed).items():
                jobs[f"control: real, {how}"] = (a, {f"control: real, {how}": other})
        for job, (reals, others) in jobs.items():
            what = f"critic {seed}, {job}" if job else f"critic {seed}"

            def show(p: Progress, what: str = what) -> None:
                if progress is not None:
                    progress(replace(p, what=what))

            prepared = {name: prepare(v, config) for name, v in others.items()}
            result = score(prepare(reals, config), prepared, config, seed, device, show)
            for name in others:
                rows.setdefault(name, []).append(result)
    return rows


def convergence(name: str, scores: Sequence[Score]) -> str:
    """Distance of a set over the seeds with its standard deviation, and how the critics' training went, in one line."""
    values = [s.distance[name] for s in scores]
    spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    norm, trained = (statistics.fmean(x) for x in ([s.gradient_norm for s in scores], [s.train_distance for s in scores]))
    ends = ", ".join(f"{s.end} ({s.epoch} of {s.epochs})" for s in scores)
    doubt = "" if all(s.valid for s in scores) else "; NOT CONVERGED: no epoch had a gradient norm near 1"
    counts = f"{scores[0].real_count} real, {scores[0].counts[name]} other volumes scored"
    return (
        f"{statistics.fmean(values):.4g}{spread}   ({counts}; while training {trained:.4g}, gradient norm {norm:.2f}; "
        f"ended, best epoch: {ends}{doubt})"
    )
