"""Wasserstein distances of sets of generated volumes from a real set, over several seeds and with controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from tcam_diff.errors import UserError
from tcam_diff.evaluation.critic import CriticConfig, Score, blurred, halves, prepare, score
from tcam_diff.evaluation.sets import read_set
from tcam_diff.progress import Progress, ProgressCallback
from tcam_diff.training.distributed import device_of


@dataclass
class Distances:
    """Distances of sets from a real one."""

    volumes: int  # number of real volumes
    scores: dict[str, list[Score]]  # a score per seed, by the path of the set or the name of the control


def distances(
    real: Path,
    fakes: Sequence[str | Path],
    config: CriticConfig | None = None,
    *,
    seeds: int = 3,
    split: str | None = None,
    intensity: tuple[float, float] | None = None,
    controls: bool = True,
    progress: ProgressCallback | None = None,
) -> Distances:
    """Compute the Wasserstein distances of sets from a real one, with one critic per seed for all sets.

    Args:
        real: real volumes in any form that ``read_set`` reads.
        fakes: sets of generated volumes; {seed} in a path is replaced by each seed.
        config: critic and training; default: ``CriticConfig()``.
        seeds: number of critics, each with its own initial weights and split.
        split: split of ``real``; None: all.
        intensity: physical values at 0 and 1, for files without this information.
        controls: whether to score one half of the real volumes against the other half, unchanged and blurred.
        progress: called after every volume read, and after every epoch with "distance"; ``what`` names the critic.

    Raises:
        UserError: a set cannot be read, is too small, or has another number of channels than the real one.
    """
    config, names = config or CriticConfig(), [str(Path(f)) for f in fakes]
    device = device_of(config.device)
    if len(set(names)) < len(names):
        raise UserError(f"FAKE2: expected another folder than FAKE, got {names[0]} twice")

    def read(path: Path, part: str | None = None) -> Tensor:
        return read_set(path, lambda v: prepare(v, config), split=part, intensity=intensity, progress=progress)

    truth = read(real, split)
    sets: dict[Path, Tensor] = {}
    rows: dict[str, list[Score]] = {}
    for seed in range(seeds):
        against = {}
        for name in names:
            path = Path(name.replace("{seed}", str(seed)))
            if path not in sets:
                sets[path] = read(path)
                if sets[path].shape[1:] != truth.shape[1:]:
                    raise UserError(f"{path}: its volumes have {sets[path].shape[1]} channels, the real ones {truth.shape[1]}")
            against[name] = sets[path]
        jobs = {"": (truth, against)}
        if controls:
            jobs |= _controls(truth, seed, config)
        for job, (reals, others) in jobs.items():
            what = f"seed {seed}, {job}" if job else f"seed {seed}"

            def show(p: Progress, what: str = what) -> None:
                if progress is not None:
                    progress(replace(p, what=what))

            result = score(reals, others, config, seed, device, show)
            for other in others:
                rows.setdefault(other, []).append(result)
    return Distances(len(truth), rows)


def _controls(real: Tensor, seed: int, config: CriticConfig) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Real volumes, and sets to score against them, by the names of the controls."""
    a, b = halves(real, seed)
    others = {"control: real": b}
    if config.ndim == 3:
        others |= {f"control: real, blurred by {s:g} voxels": blurred(b, s).half() for s in (1.0, 2.0)}
    return {name: (a, {name: other}) for name, other in others.items()}
