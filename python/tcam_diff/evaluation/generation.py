"""Sets of generated volumes beside the real ones of a store: spread, nearest training volumes, FID, MMD and critics."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.latents import LatentSet, is_latent_set
from tcam_diff.data.store import Store
from tcam_diff.errors import UserError
from tcam_diff.evaluation.config import CriticConfig
from tcam_diff.evaluation.content import BANDS, contents, told_apart
from tcam_diff.evaluation.critic import Score
from tcam_diff.evaluation.distances import altered, distances
from tcam_diff.evaluation.features import FeatureNetwork, frechet, jackknifed, mmd
from tcam_diff.evaluation.metrics import scales
from tcam_diff.evaluation.reconstruction import Mean
from tcam_diff.evaluation.sets import HELD_OUT, VolumeSet, read_planes, read_set, resampled
from tcam_diff.evaluation.spread import MODES, TRAINING, latent_modes, nearest, similarity, spreads
from tcam_diff.files import locked_folder, write_bytes, write_text
from tcam_diff.progress import Progress, ProgressCallback

#: Statistics of a set: name, title, and what a good generator shows.
STATISTICS = {
    "variance": ("variance about the mean", "that of held-out volumes"),
    "pairwise": ("mean RMS difference of pairs", "that of held-out volumes"),
    "modes": (f"variance in the first {MODES} modes of the training volumes, their own = 1", "that of held-out volumes"),
    "latent_modes": (
        f"variance of planes in the first {MODES} modes of the training planes, their own = 1",
        "that of held-out planes",
    ),
    "ms_ssim": ("mean MS-SSIM of pairs; higher: less diverse", "that of held-out volumes"),
    "foreground": ("foreground, mL", "that of held-out volumes"),
    "foreground_sd": ("standard deviation of the foreground, mL", "that of held-out volumes"),
    "bright": ("bright voxels, mL", "that of held-out volumes"),
    "bright_sd": ("standard deviation of the bright voxels, mL", "that of held-out volumes"),
    **{
        f"power_{name}": (
            f"power at {low:g} to {high:g} cycles per voxel, of the training volumes = 1",
            "that of held-out volumes",
        )
        for name, (low, high) in BANDS.items()
    },
    "nearest": ("median RMS difference from the nearest training volume", "not below that of held-out volumes"),
    "fid": ("3D FID", "low: that of the training volumes"),
    "mmd": ("MMD, squared, cubic kernel", "low: that of the training volumes"),
}


@dataclass
class Generation:
    """Result of ``evaluate_sets``."""

    size: tuple[int, ...]  # voxels of the volumes that were compared
    counts: dict[str, int]  # number of volumes of every set
    figures: dict[str, dict[str, Mean]]  # statistics by set and name
    rows: list[dict[str, Any]]  # a row for every generated and held-out volume
    compared: int = 0  # volumes of each set for FID and MMD
    features: str = ""  # feature network
    critics: dict[str, list[Score]] = field(default_factory=dict)  # scores by set
    critic_real: str = ""  # set that is real for critic, FID and MMD
    told_apart: dict[str, dict[str, float]] = field(default_factory=dict)  # p-values by set and reference


def evaluate_sets(
    store: Store,
    paths: Sequence[str],
    *,
    size: int = 64,
    features: FeatureNetwork | None = None,
    critics: int = 0,
    critic: CriticConfig | None = None,
    controls: bool = True,
    intensity: tuple[float, float] | None = None,
    progress: ProgressCallback | None = None,
) -> Generation:
    """Compare sets of generated volumes with the volumes of a store.

    Held-out volumes, those of every split but train, are real for FID, MMD and the critic, so that copies of training volumes
    gain nothing; without any, training volumes are.

    Args:
        store: real volumes, of the split train and others.
        paths: folders of volumes or latent sets; {seed} in a path is replaced by 0, 1, ..., and critic k scores the set of its
            number. Modes of planes are those of the latent set of training volumes.
        size: voxels along each axis, at most, to which all volumes are resampled by means over cells.
        features: network for FID and MMD; None: without.
        critics: number of critics; 0: without.
        critic: critic and training; default: ``CriticConfig(size=size)``.
        controls: whether to compare training volumes that were blurred or made noisy, and real volumes by the critic.
        intensity: physical values at 0 and 1, for files without this information.
        progress: called after every volume read and every epoch.

    Raises:
        UserError: a set cannot be read, is too small, or has another size or number of channels than the training volumes.
    """
    if len(set(paths)) < len(paths):
        raise UserError(f"FAKE: expected different folders, got {' '.join(paths)}")

    def read(path: Path, split: str | None = None) -> VolumeSet:
        return read_set(path, lambda v: resampled(v, size).half(), split=split, intensity=intensity, progress=progress)

    def read_seeds(path: str) -> list[VolumeSet]:
        return [read(Path(p)) for p in dict.fromkeys(path.replace("{seed}", str(s)) for s in range(max(1, critics)))]

    fakes = {path: read_seeds(path) for path in paths}
    training = read(store.folder, "train")
    held_out = read(store.folder, HELD_OUT) if any(r.split != "train" for r in store.records) else None
    pooled = {
        p: VolumeSet([n for s in sets for n in s.names], torch.cat([s.volumes for s in sets])) for p, sets in fakes.items()
    }
    if held_out is not None:
        pooled[HELD_OUT] = held_out
    sets = {name: s.volumes for name, s in pooled.items()}
    voxel = _millilitres(store) / math.prod(training.volumes.shape[2:])
    content = contents({**sets, TRAINING: training.volumes}, TRAINING, voxel)
    figures = spreads(sets, training.volumes, content)
    latents = [p for p in paths if is_latent_set(Path(p))]
    trained = next((p for p in latents if all(e.split == "train" for e in LatentSet(p).entries)), None)
    if trained is not None:
        states = {p: s for p in paths if "{seed}" not in p and (s := read_planes(Path(p))) is not None}
        fitting = {p: s for p, s in states.items() if len(s) > 1 and s.shape[1] == states[trained].shape[1]}
        for name, figure in latent_modes(fitting, trained).items():
            figures[name]["latent_modes"] = figure
    references = [TRAINING, *([HELD_OUT] if held_out is not None else []), *latents]
    if scales(min(training.volumes.shape[2:])) > 1:
        for done, (name, volumes) in enumerate({**sets, TRAINING: training.volumes}.items(), 1):
            figures[name]["ms_ssim"] = similarity(volumes)
            if progress is not None:
                progress(Progress(done, len(sets) + 1, what="MS-SSIM of pairs"))
    result = Generation(
        size=tuple(training.volumes.shape[2:]),
        counts={name: len(v) for name, v in {**sets, TRAINING: training.volumes}.items()},
        figures=figures,
        rows=_rows(pooled, training),
        critic_real=TRAINING if held_out is None else HELD_OUT,
        told_apart=told_apart(content, references),
    )
    real = training.volumes if held_out is None else held_out.volumes
    if features is not None:
        others = {k: v for k, v in {**sets, TRAINING: training.volumes}.items() if k != result.critic_real}
        if controls:
            others |= {f"{TRAINING}, {name}": v for name, v in altered(training.volumes).items()}
        _compare_features(result, features, real, others, progress)
    if critics:
        config = critic or CriticConfig(size=size)
        split = {name: [s.volumes for s in of] for name, of in fakes.items()}
        result.critics = distances(real, split, config, seeds=critics, controls=controls, progress=progress)
    return result


def _millilitres(store: Store) -> float:
    """Median field of view of a store's volumes in mL, for affines in mm."""
    return float(np.median([abs(np.linalg.det(r.info.affine[:3, :3])) * math.prod(r.info.shape) / 1000 for r in store.records]))


def _rows(pooled: Mapping[str, VolumeSet], training: VolumeSet) -> list[dict[str, Any]]:
    rows = []
    for name, volumes in pooled.items():
        distances, numbers = nearest(volumes.volumes, training.volumes)
        for volume, distance, number in zip(volumes.names, distances, numbers, strict=True):
            near = training.names[int(number)]
            rows.append({"set": name, "name": volume, "nearest_training_volume": near, "rms_difference": float(distance)})
    return rows


def _compare_features(
    result: Generation,
    network: FeatureNetwork,
    real: Tensor,
    sets: Mapping[str, Tensor],
    progress: ProgressCallback | None,
) -> None:
    """FID and MMD of equal numbers of volumes of every set, because FID falls as numbers grow."""
    result.features = network.description
    result.compared = min(len(real), *(len(v) for v in sets.values()))
    if result.compared < 4:
        raise UserError(f"FID and MMD need at least 4 volumes of every set, got {result.compared}")
    of_real = network(real[: result.compared])
    for done, (name, volumes) in enumerate(sets.items(), 1):
        of_set = network(volumes[: result.compared])
        for statistic, function in (("fid", frechet), ("mmd", mmd)):
            result.figures.setdefault(name, {})[statistic] = jackknifed(function, of_set, of_real)
        if progress is not None:
            progress(Progress(done, len(sets), what="features"))


def protocol(store: Store, paths: Sequence[str], size: int, critic: CriticConfig | None = None) -> dict[str, Any]:
    """How generated volumes were compared with those of a store, for ``write``."""
    return {
        "real": str(store.folder),
        "fake": [str(p) for p in paths],
        "preprocessing": store.config,
        "size": size,
        "interval": "95 %: percentile bootstrap over volumes, seed 0; for FID and MMD the jackknife by tenths",
        "critic": None if critic is None else critic.model_dump(mode="json"),
    }


def write(out: Path, result: Generation, protocol: dict[str, Any]) -> None:
    """Write summary.json, volumes.csv, statistics.png and, with critics, critics.png to a folder."""
    with locked_folder(out):
        content = {
            "protocol": protocol | {"tcam_ext": tcam_ext.__version__, "voxels": result.size, "features": result.features},
            "counts": result.counts,
            "volumes_for_fid_and_mmd": result.compared,
            "real": result.critic_real,
            "sets": {name: {n: asdict(f) for n, f in of.items()} for name, of in result.figures.items()},
            "told_apart": result.told_apart,
            "critics": {name: [asdict(s) for s in scores] for name, scores in result.critics.items()},
        }
        write_text(out / "summary.json", json.dumps(content, indent=1))
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=list(result.rows[0]))
        table.writeheader()
        table.writerows(result.rows)
        write_text(out / "volumes.csv", text.getvalue())
        write_bytes(out / "statistics.png", statistics_picture(result.figures))
        if result.critics:
            write_bytes(out / "critics.png", critics_picture(result.critics))


def statistics_picture(figures: Mapping[str, Mapping[str, Mean]]) -> bytes:
    """PNG with a panel for each statistic: its value and interval for every set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from tcam_diff.training.report import png

    shown = [s for s in STATISTICS if any(s in of for of in figures.values())]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, (1.2 + 0.28 * len(figures)) * rows), layout="constrained", squeeze=False
    )
    names = [Path(n).name if "/" in n else n for n in figures]
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for i, (axis, statistic) in enumerate(zip(axes.flat, shown, strict=False)):
        for row, of in enumerate(figures.values()):
            if statistic in of:
                m = of[statistic]
                axis.errorbar(m.mean, row, xerr=[[m.mean - m.low], [m.high - m.mean]], fmt="o", capsize=3, color=f"C{row}")
        axis.set_yticks(range(len(names)), names if i % columns == 0 else [""] * len(names), fontsize=7)
        axis.set_ylim(len(names) - 0.5, -0.5)
        title, wanted = STATISTICS[statistic]
        axis.set_title(f"{title}\n(good: {wanted})", fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(alpha=0.3)
    return png(figure)


def critics_picture(scores: Mapping[str, Sequence[Score]]) -> bytes:
    """PNG of the critics' distances and gradient norms on the training volumes over epochs, with the chosen epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from tcam_diff.training.report import png

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    drawn: set[int] = set()
    for colour, (name, of) in enumerate(scores.items()):
        for k, score in enumerate(of):
            if id(score) in drawn or not score.history:  # one critic scores several sets
                continue
            drawn.add(id(score))
            label = (name if "control" in name else "generated sets") if k == 0 else None
            values = np.array(score.history)
            for axis, column in zip(axes, (0, 1), strict=True):
                axis.plot(range(1, len(values) + 1), values[:, column], color=f"C{colour}", label=label, lw=1)
                axis.plot(score.epoch, values[score.epoch - 1, column], "o", color=f"C{colour}", ms=4)
    for axis, title in zip(
        axes, ("W on the training volumes; dots: chosen epochs", "gradient norm; valid near 1"), strict=True
    ):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return png(figure)
