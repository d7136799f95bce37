"""Reconstructions beside their originals: metrics of every volume, and means with intervals (algorithm.md 5.2)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.artefact import FittedVolume
from tcam_diff.autodecoder.encode import load_run
from tcam_diff.autodecoder.latents import LatentSet, is_latent_set
from tcam_diff.autodecoder.perceptual import Perceptual
from tcam_diff.autodecoder.planes import normalise
from tcam_diff.baselines.compression import Compression, is_compression
from tcam_diff.data.readers import read_case
from tcam_diff.data.sources import Case, find_cases
from tcam_diff.data.store import Record, Store, unit
from tcam_diff.errors import UserError
from tcam_diff.evaluation import metrics
from tcam_diff.evaluation.content import BANDS, detail
from tcam_diff.files import locked_folder, write_bytes, write_text
from tcam_diff.progress import Progress, ProgressCallback

#: Metrics of a volume: name, title, which values are better.
METRICS = {
    "mse": ("MSE", "lower"),
    "psnr": ("PSNR, dB", "higher"),
    "ssim": ("3D SSIM", "higher"),
    "ms_ssim": ("3D MS-SSIM", "higher"),
    "lpips": ("LPIPS of slices", "lower"),
    **{
        f"{figure}_{band}": (f"{figure} at {low} to {high} cycles per voxel", better)
        for band, (low, high) in list(BANDS.items())[1:]
        for figure, better in (("power", "nearest 1"), ("coherence", "higher"))
    },
}
FITTED = "fitted with the decoder"
TRAINED = "trained on"


@dataclass(frozen=True)
class Reconstruction:
    """A volume of a store and a way to get its reconstruction."""

    record: Record
    group: str  # kind of reconstruction; means are of one group
    read: Callable[[], Tensor]  # (channels, H, W, D) in [0, 1], with or without label maps


@dataclass(frozen=True)
class Row:
    """Metrics of a volume. NaN: not defined for its size, or not asked for."""

    name: str
    split: str
    group: str
    mse: float
    psnr: float
    ssim: float
    ms_ssim: float
    lpips: float
    power_middle: float = math.nan
    coherence_middle: float = math.nan
    power_high: float = math.nan
    coherence_high: float = math.nan


@dataclass(frozen=True)
class Mean:
    """Mean of a metric over the volumes of a group, with a bootstrap interval (95 %, percentiles)."""

    volumes: int
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


def is_generated(store: Store, path: Path) -> bool:
    """Whether a folder has volumes of which none has the name of a case of the store: no reconstructions of them."""
    if is_latent_set(path) or (path / "config.yaml").is_file() or is_compression(path):
        return False
    names = {r.name for r in store.records}
    return not any(case.name in names for case in find_cases(path).cases)


def find_reconstructions(store: Store, path: Path, split: str | None = None) -> list[Reconstruction]:
    """Find the reconstructions of a store's volumes.

    Args:
        store: original volumes.
        path: a run of `tcam train-autodecoder` or `tcam baseline train`, a latent set, or volumes in any layout with the names
            of the store's cases.
        split: split of the store; None: all.

    Raises:
        UserError: ``path`` is none of these, was made from other volumes, or has no volume of the split.
    """
    if is_latent_set(path):
        found = _of_latents(store, LatentSet(path))
    elif is_compression(path):
        found = _of_compression(store, path)
    elif (path / "config.yaml").is_file():
        found = _of_run(store, path)
    else:
        found = _of_files(store, path)
    chosen = [r for r in found if split is None or r.record.split == split]
    if not chosen:
        raise UserError(
            f"{path}: no reconstruction of a volume of {store.folder}" + (f" in the split {split}" if split else "")
        )
    return chosen


def evaluate(
    reconstructions: Sequence[Reconstruction],
    store: Store,
    lpips: Perceptual | None = None,
    progress: ProgressCallback | None = None,
) -> list[Row]:
    """Compute the metrics of reconstructions against the volumes of a store, both in the store's [0, 1].

    Args:
        reconstructions: result of ``find_reconstructions``.
        store: original volumes.
        lpips: network for LPIPS; None: without.
        progress: called after every volume, with its "psnr".

    Raises:
        UserError: a reconstruction cannot be read or has another shape than its original.
    """
    rows: list[Row] = []
    for reconstruction in reconstructions:
        record = reconstruction.record
        truth, got = store.images(record), read_checked(reconstruction, store)
        error, size = metrics.mse(got, truth), min(truth.shape[1:])
        figures = {
            "mse": error,
            "psnr": metrics.psnr_of_mse(error),
            "ssim": metrics.ssim3d(got, truth) if size >= metrics.WINDOW else math.nan,
            "ms_ssim": metrics.ms_ssim3d(got, truth) if metrics.scales(size) > 1 else math.nan,
            "lpips": metrics.lpips_of_slices(lpips, got, truth) if lpips is not None else math.nan,
        }
        figures |= {name: value for name, value in detail(got[0], truth[0]).items() if name in METRICS}
        rows.append(Row(name=record.name, split=record.split, group=reconstruction.group, **figures))
        if progress is not None:
            progress(Progress(len(rows), len(reconstructions), {"psnr": rows[-1].psnr}))
    return rows


def read_checked(reconstruction: Reconstruction, store: Store) -> Tensor:
    """Read a reconstruction (images, H, W, D). Raises UserError if it has another shape than its original."""
    info = reconstruction.record.info
    got, shape = reconstruction.read()[: info.images], (info.images, *info.shape)
    if tuple(got.shape) != shape:
        raise UserError(
            f"{reconstruction.record.name}: the reconstruction has shape {tuple(got.shape)}, the volume of {store.folder} "
            f"{shape}; channels first"
        )
    return got


def means(rows: Sequence[Row], resamples: int = 9999, seed: int = 0) -> dict[str, dict[str, Mean]]:
    """Means with intervals, by group and metric. Metrics that are NaN for a volume of a group are left out."""
    from scipy.stats import bootstrap

    result: dict[str, dict[str, Mean]] = {}
    for group in sorted({r.group for r in rows}):
        result[group] = {}
        for metric in METRICS:
            values = np.array([getattr(r, metric) for r in rows if r.group == group])
            if np.isnan(values).any():
                continue
            low = high = float(values.mean())
            if len(values) > 1 and np.isfinite(values).all() and values.std() > 0:
                interval = bootstrap((values,), np.mean, method="percentile", n_resamples=resamples, rng=seed)
                low, high = (float(x) for x in interval.confidence_interval)
            result[group][metric] = Mean(len(values), float(values.mean()), low, high)
    return result


def protocol(
    store: Store, fake: Path, found: Sequence[Reconstruction], split: str | None = None, lpips: Path | None = None
) -> dict[str, Any]:
    """How reconstructions were compared with the volumes of a store, for ``write``. Arguments: those of the functions above."""
    smallest = min(min(r.record.info.shape) for r in found)
    return {
        "real": str(store.folder),
        "fake": str(fake),
        "preprocessing": store.config,
        "split": split,
        "range": "the store's [0, 1], reconstructions clamped; no mask",
        "ssim": f"Gaussian window of {metrics.WINDOW} voxels, sigma {metrics.SIGMA}, inside the volume",
        "ms_ssim": f"as many scales as fit, at most 5; {metrics.scales(smallest)} for the smallest volume",
        "lpips": None if lpips is None else str(lpips),
        "power, coherence": "of the first channel, by bands of frequency in cycles per voxel: power over the original's, "
        "and correlation of the Fourier coefficients; noise raises power, and lowers coherence",
        "interval": "95 %, percentile bootstrap over volumes, 9999 resamples, seed 0",
    }


def write(out: Path, rows: Sequence[Row], protocol: dict[str, Any]) -> None:
    """Write volumes.csv (a row a volume), summary.json (means, intervals and ``protocol``) and metrics.png to a folder."""
    with locked_folder(out):
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=list(asdict(rows[0])))
        table.writeheader()
        table.writerows(asdict(r) for r in rows)
        write_text(out / "volumes.csv", text.getvalue())
        summary = {g: {m: asdict(v) for m, v in of.items()} for g, of in means(rows).items()}
        content = {"protocol": protocol | {"tcam_ext": tcam_ext.__version__}, "groups": summary}
        write_text(out / "summary.json", json.dumps(content, indent=1))
        write_bytes(out / "metrics.png", _picture(rows))


def _of_latents(store: Store, latents: LatentSet) -> list[Reconstruction]:
    encoded = latents.index.get("provenance", {}).get("encode") is not None
    found = []
    for record, entry in _pairs(store, latents.entries, latents.folder):
        latents.check_volume(entry, record)
        group = f"encoded, split {record.split}" if encoded else FITTED
        found.append(Reconstruction(record, group, lambda n=entry.name: latents.fitted(n).whole()))  # type: ignore[misc]
    return found


def _of_run(store: Store, path: Path) -> list[Reconstruction]:
    run = load_run(path)
    if run.digest != store.digest:
        raise UserError(f"{store.folder}: prepared differently from the data of {path}; take the store of its config.yaml")
    by_name, raw = {r.name: r for r in store.records}, run.raw_planes()
    missing = [n for n in run.objects if n not in by_name]
    if missing:
        raise UserError(f"{store.folder}: has no case {missing[0]!r}, which {path} was trained on")

    def read(record: Record) -> Tensor:
        return FittedVolume(normalise(raw[record.name], run.config.norm), run.decoder, run.config, record.info).whole()

    return [Reconstruction(r, FITTED, lambda r=r: read(r)) for r in map(by_name.__getitem__, run.objects)]  # type: ignore[misc]


def _of_compression(store: Store, path: Path) -> list[Reconstruction]:
    model, provenance = Compression.load(path), Compression.provenance(path)
    if provenance.get("preprocessing") != store.digest:
        raise UserError(f"{store.folder}: prepared differently from the data of {path}; take the store of its config.yaml")
    trained = set(provenance.get("objects", ()))

    def read(record: Record) -> Tensor:
        return model.reconstruct(unit(torch.tensor(store.volume(record)))[None])[0]

    groups = [(r, TRAINED if r.name in trained else f"held out, split {r.split}") for r in store.records]
    return [Reconstruction(r, group, lambda r=r: read(r)) for r, group in groups]  # type: ignore[misc]


def _of_files(store: Store, path: Path) -> list[Reconstruction]:
    cases = find_cases(path).cases

    def read(case: Case, record: Record) -> Tensor:
        data, images = read_case(case).data, record.info.of_images()
        channels = images.channels
        if len(data) != channels:
            raise UserError(
                f"{case.images[0]}: expected {channels} channel(s), as {record.name} of {store.folder} has, got {len(data)}"
            )
        return torch.from_numpy(images.to_unit(data)).clamp(0, 1)

    pairs = _pairs(store, cases, path)
    return [Reconstruction(r, f"files, split {r.split}", lambda c=c, r=r: read(c, r)) for r, c in pairs]  # type: ignore[misc]


def _pairs(store: Store, named: Iterable[Any], path: Path) -> list[tuple[Record, Any]]:
    """The records of a store with what has the same name. Raises UserError if a name is not in the store."""
    by_name = {r.name: r for r in store.records}
    pairs = []
    for item in named:
        if item.name not in by_name:
            names = ", ".join(list(by_name)[:3])
            raise UserError(f"{path}: {item.name!r} is no case of {store.folder}, which has {names}, ...")
        pairs.append((by_name[item.name], item))
    return pairs


def _picture(rows: Sequence[Row]) -> bytes:
    """PNG with a panel for each metric: its value for every volume, by group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from tcam_diff.training.report import png

    groups = sorted({r.group for r in rows})
    shown = [m for m in METRICS if not any(math.isnan(getattr(r, m)) for r in rows)]
    figure, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 3.2), layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], shown, strict=True):
        values = [[getattr(r, metric) for r in rows if r.group == g] for g in groups]
        axis.boxplot(values, showmeans=True)
        axis.set_xticklabels(groups, rotation=20, ha="right", fontsize=7)
        title, better = METRICS[metric]
        axis.set_title(f"{title} ({better} is better)", fontsize=9)
    return png(figure)
