"""How far sets of generated volumes are from a real one: critics over several seeds, with controls."""

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
    """Of sets from a real one."""

    volumes: int  # of the real set
    scores: dict[str, list[Score]]  # by the sets' paths and the controls' names: a score for each seed


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
    """The Wasserstein distances of sets from a real one, by critics that all sets share.

    Args:
        real: volumes in any form that ``read_set`` knows.
        fakes: generated ones; {seed} in a path is replaced by each seed.
        config: of the critics; default: ``CriticConfig()``.
        seeds: critics, each with its own start and split.
        split: of ``real``; None: all.
        intensity: physical values at 0 and 1, of files that do not say.
        controls: score also one half of the real volumes against the other, as it is and blurred.
        progress: called after every volume read, and every epoch with "distance"; ``what`` says of which critic.

    Raises UserError where a set cannot be read, is too small, or has other channels than the real one.
    """
    config, given = config or CriticConfig(), [str(Path(f)) for f in fakes]
    device = device_of(config.device)
    if len(set(given)) < len(given):
        raise UserError(f"FAKE2: expected another folder than FAKE, got {given[0]} twice")

    def read(path: Path, part: str | None = None) -> Tensor:
        return read_set(path, lambda v: prepare(v, config), split=part, intensity=intensity, progress=progress)

    truth = read(real, split)
    sets: dict[Path, Tensor] = {}
    rows: dict[str, list[Score]] = {}
    for seed in range(seeds):
        against = {}
        for f in given:
            path = Path(f.replace("{seed}", str(seed)))
            if path not in sets:
                sets[path] = read(path)
                if sets[path].shape[1:] != truth.shape[1:]:
                    raise UserError(f"{path}: its volumes have {sets[path].shape[1]} channels, the real ones {truth.shape[1]}")
            against[f] = sets[path]
        jobs = {"": (truth, against)}
        if controls:
            jobs |= _controls(truth, seed, config)
        for name, (reals, others) in jobs.items():
            what = f"seed {seed}, {name}" if name else f"seed {seed}"

            def show(p: Progress, what: str = what) -> None:
                if progress is not None:
                    progress(replace(p, what=what))

            found = score(reals, others, config, seed, device, show)
            for other in others:
                rows.setdefault(other, []).append(found)
    return Distances(len(truth), rows)


def _controls(real: Tensor, seed: int, config: CriticConfig) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Name -> (real volumes, {name: other real volumes})."""
    a, b = halves(real, seed)
    found = {"control: real": b}
    if config.ndim == 3:
        found |= {f"control: real, blurred by {s:g} voxels": blurred(b, s).half() for s in (1.0, 2.0)}
    return {name: (a, {name: other}) for name, other in found.items()}
