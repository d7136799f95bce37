"""Downstream segmentation (table 2 of the paper): networks trained on originals, applied to originals and reconstructions.

Each label is compared with two references: the ground truth, and the segmentation of the original by the same network. The
paper does not say which of them is its reference (algorithm.md 5.3).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.data.labels import class_numbers, classes
from tcam_diff.data.store import Record, Store
from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import label_counts, label_metrics
from tcam_diff.evaluation.reconstruction import Reconstruction, find_reconstructions, read_checked
from tcam_diff.evaluation.segmenter import (
    SegmentationTraining,
    SegmentConfig,
    Segmenter,
    labelled_records,
    load_segmenter,
    train_segmenter,
)
from tcam_diff.files import locked_folder, writable_folder, write_bytes, write_text
from tcam_diff.progress import Progress, ProgressCallback, StopCallback
from tcam_diff.training.distributed import device_of

#: Metrics of a label: name, title. Higher is better for all of them.
METRICS = {
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "specificity": "specificity",
    "accuracy": "accuracy",
}
TRUTH, ORIGINAL = "truth", "original"  # references
ORIGINALS = "originals"  # images of the rows that are the ceiling


@dataclass(frozen=True)
class VolumeRow:
    """Counts of voxels and metrics of a label in one volume. NaN: 0/0."""

    name: str
    split: str
    images: str  # ORIGINALS, or the path of reconstructions
    group: str  # kind of reconstruction; "" for originals
    reference: str  # TRUTH or ORIGINAL
    repeat: int  # from 1
    label: str
    tp: int
    fp: int
    tn: int
    fn: int
    precision: float
    recall: float
    specificity: float
    accuracy: float
    f1: float


@dataclass(frozen=True)
class Row:
    """Means of a label's metrics over volumes, then over repeats, with the standard deviation over repeats."""

    split: str
    images: str
    group: str
    reference: str
    label: str
    volumes: int
    metrics: dict[str, tuple[float, float]]  # mean and standard deviation; NaN: not defined in any volume, or one repeat
    share: tuple[float, float]  # F1 over that of the same volumes' originals, against the truth, as metrics; else NaN


@dataclass(frozen=True)
class Result:
    """Result of ``segment``."""

    labels: list[str]
    trained_on: int  # number of volumes
    trained: str | None  # split of the measured volumes that the networks were trained on; None: they were on another store
    seconds: list[float]  # of each training
    volumes: list[VolumeRow]
    rows: list[Row]


@dataclass(frozen=True)
class Pictured:
    """A slice of a volume for the picture: titles, and the image and the classes (rows, columns) under each."""

    name: str
    panels: list[tuple[str, np.ndarray, np.ndarray]]


def segment(
    store: Store,
    reconstructions: Sequence[Path],
    config: SegmentConfig,
    out: Path,
    repeats: int = 4,
    *,
    training: Store | None = None,
    started: Callable[[SegmentationTraining], None] | None = None,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> Result | None:
    """Train networks on the originals of a store, or on another, and measure how they segment reconstructions of its volumes.

    Args:
        store: originals with labels.
        reconstructions: runs, latent sets or folders of volumes, as ``find_reconstructions`` takes them. Without any, the
            networks are measured on the originals that they were not trained on.
        config: network and training; ``data`` is replaced by the folder of the training volumes.
        out: folder for a run per repeat (repeat-1, ...), segmentation.json, volumes.csv and segmentation.png. Finished repeats
            in it are not trained again.
        repeats: number of trainings, with the seeds config.seed, config.seed + 1, ...
        training: store whose volumes the networks are trained on, for example of generated pairs; None: ``store``.
        started, progress, stop: callbacks of ``train_segmenter``; the last two also for every volume that is measured.

    Returns:
        The metrics of all volumes, and their means; None if ``stop`` ended the work.

    Raises:
        UserError: the store has no labels, a path holds no reconstruction of its volumes, or configuration and data do not fit.
    """
    writable_folder(out)
    training = training or store
    if classes(training.label_names.values()) != classes(store.label_names.values()):
        got, expected = (", ".join(classes(s.label_names.values())) or "none" for s in (training, store))
        raise UserError(f"{training.folder}: expected the labels of {store.folder}, {expected}, got {got}")
    if training.records[0].info.images != store.records[0].info.images:
        got, expected = (str(s.records[0].info.images) for s in (training, store))
        raise UserError(f"{training.folder}: expected the {expected} channel(s) of {store.folder}, got {got}")
    config = config.model_copy(update={"data": str(training.folder)})
    trained_on = labelled_records(training, config.split)
    trained = config.split if training.folder.resolve() == store.folder.resolve() else None
    work = _volumes(store, reconstructions, trained)
    seconds, networks = [], []
    for repeat in range(1, repeats + 1):
        settings = config.model_copy(update={"seed": config.seed + repeat - 1})
        folder = out / f"repeat-{repeat}"
        outcome = train_segmenter(settings, folder, "auto", started=started, progress=progress, stop=stop)
        if outcome.stopped:
            return None
        seconds.append(outcome.seconds)
        networks.append(load_segmenter(folder, device_of(config.device)))
    measurement, pictured = _Measurement(store, networks), _pictured(work)
    for done, (record, images) in enumerate(work, 1):
        if stop is not None and stop():
            return None
        measurement.add(record, images, record.name in pictured)
        if progress is not None:
            progress(Progress(done, len(work), what="measuring"))
    names = networks[0].names
    result = Result(names, len(trained_on), trained, seconds, measurement.rows, means(measurement.rows))
    _write(out, store, reconstructions, config, result, measurement.pictures)
    return result


Images = list[tuple[str, Reconstruction]]


def _volumes(store: Store, paths: Sequence[Path], trained: str | None) -> list[tuple[Record, Images]]:
    """The volumes to measure, in the store's order, with the reconstructions that each path has of them.

    Without paths these are the labelled volumes outside the split ``trained``, or all.
    """
    titles = [str(p) for p in paths]
    twice = next((t for i, t in enumerate(titles) if t in titles[:i]), None)
    if twice is not None or ORIGINALS in titles:
        raise UserError(f"{twice or ORIGINALS}: expected reconstructions with other names, each once")
    found: dict[str, Images] = {}
    for title, path in zip(titles, paths, strict=True):
        for reconstruction in find_reconstructions(store, path):
            found.setdefault(reconstruction.record.name, []).append((title, reconstruction))
    if not paths:
        found = {r.name: [] for r in store.records if r.split != trained and r.labels_sha256 is not None}
        if not found:
            outside = "" if trained is None else f" outside the split {trained!r}"
            raise UserError(f"{store.folder}: has no labelled volume{outside}; name reconstructions")
    return [(r, found[r.name]) for r in store.records if r.name in found]


def _pictured(work: Sequence[tuple[Record, Images]], most: int = 2) -> set[str]:
    """Names of the first volumes of each split."""
    splits = {r.split: [s.name for s, _ in work if s.split == r.split] for r, _ in work}
    return {name for names in splits.values() for name in names[:most]}


class _Measurement:
    """Rows and pictures of volumes, as they are segmented by the networks of all repeats."""

    def __init__(self, store: Store, networks: Sequence[Segmenter]) -> None:
        self.store, self.networks, self.names = store, networks, networks[0].names
        self.numbers = class_numbers(store.label_names)
        self.rows: list[VolumeRow] = []
        self.pictures: list[Pictured] = []

    def add(self, record: Record, images: Images, pictured: bool) -> None:
        """Segment a volume and its reconstructions, and compare."""
        volume = self.store.images(record)
        truth = None
        if record.labels_sha256 is not None:
            truth = torch.from_numpy(self.numbers[self.store.labels(record)])
        of_original = [network(volume) for network in self.networks]
        shown = [] if truth is None else [("ground truth", volume, truth)]
        shown.append(("segmentation of the original", volume, of_original[0]))
        self._compare(record, ORIGINALS, "", TRUTH, of_original, truth)
        for title, reconstruction in images:
            reconstructed = read_checked(reconstruction, self.store)
            classes = [network(reconstructed) for network in self.networks]
            self._compare(record, title, reconstruction.group, TRUTH, classes, truth)
            self._compare(record, title, reconstruction.group, ORIGINAL, classes, of_original)
            shown.append((title, reconstructed, classes[0]))
        if pictured:
            self.pictures.append(_cut(record, volume, shown))

    def _compare(
        self,
        record: Record,
        images: str,
        group: str,
        reference: str,
        classes: Sequence[Tensor],
        references: Tensor | Sequence[Tensor] | None,
    ) -> None:
        """Add rows of the segmentations by all networks, each beside its reference; none without a reference."""
        for repeat, got in enumerate(classes if references is not None else [], 1):
            beside = references if isinstance(references, Tensor) else references[repeat - 1]  # type: ignore[index]
            counts = label_counts(got, beside, len(self.names))
            values = label_metrics(counts)
            for i, label in enumerate(self.names):
                figures = {metric: float(v[i]) for metric, v in values.items()}
                tp, fp, tn, fn = counts[i].tolist()
                self.rows.append(
                    VolumeRow(record.name, record.split, images, group, reference, repeat, label, tp, fp, tn, fn, **figures)
                )


def means(rows: Sequence[VolumeRow]) -> list[Row]:
    """Means of the metrics over the volumes of a split, without those that are NaN, then over repeats."""
    groups: dict[tuple[str, str, str, str, str], list[VolumeRow]] = {}
    for row in rows:
        groups.setdefault((row.split, row.images, row.group, row.reference, row.label), []).append(row)
    result = []
    for key, own in groups.items():
        split, images, _, reference, label = key
        names = {r.name for r in own}
        figures = {metric: _mean(own, metric) for metric in METRICS}
        share = math.nan, math.nan
        if images != ORIGINALS and reference == TRUTH:
            ceiling = [r for r in groups[split, ORIGINALS, "", TRUTH, label] if r.name in names]
            share = _share(own, ceiling)
        result.append(Row(*key, len(names), figures, share))
    return result


def _mean(rows: Sequence[VolumeRow], metric: str) -> tuple[float, float]:
    """Mean over repeats of the means over volumes, and the standard deviation over repeats (n - 1)."""
    repeats = sorted({r.repeat for r in rows})
    values = [[v for r in rows if r.repeat == n and not math.isnan(v := getattr(r, metric))] for n in repeats]
    of_repeats = [float(np.mean(v)) for v in values if v]
    mean = float(np.mean(of_repeats)) if of_repeats else math.nan
    return mean, float(np.std(of_repeats, ddof=1)) if len(of_repeats) > 1 else math.nan


def _share(rows: Sequence[VolumeRow], ceiling: Sequence[VolumeRow]) -> tuple[float, float]:
    """Mean F1 of rows over that of the originals, and the standard deviation of this share over repeats."""
    best = _mean(ceiling, "f1")[0]
    if not best > 0:
        return math.nan, math.nan
    of_repeats = []
    for n in sorted({r.repeat for r in rows}):
        own, top = (_mean([r for r in of if r.repeat == n], "f1")[0] for of in (rows, ceiling))
        of_repeats.append(own / top if top > 0 else math.nan)
    deviation = float(np.std(of_repeats, ddof=1)) if len(of_repeats) > 1 else math.nan
    return _mean(rows, "f1")[0] / best, deviation


def blocks(result: Result) -> Iterator[tuple[str, str, list[Row]]]:
    """Split, reference and rows of each block of a table: those that can be compared with each other."""
    for split in dict.fromkeys(r.split for r in result.rows):
        for reference in (TRUTH, ORIGINAL):
            rows = [r for r in result.rows if (r.split, r.reference) == (split, reference)]
            if rows:
                yield split, reference, rows


def _cut(record: Record, volume: Tensor, shown: Sequence[tuple[str, Tensor, Tensor]]) -> Pictured:
    """The axial slice with most voxels that have a label in the first of the segmentations shown."""
    from tcam_diff.evaluation.picture import canonical

    def axial(volume: Tensor, at: int) -> np.ndarray:
        return canonical(volume.numpy(), record.info.affine)[0][:, :, at].T[::-1]

    at = int((canonical(shown[0][2].numpy(), record.info.affine)[0] > 0).sum((0, 1)).argmax())
    plain = np.zeros(axial(volume[0], at).shape, np.uint8)
    panels = [("original", axial(volume[0], at), plain)]
    panels += [(title, axial(image[0], at), axial(classes, at)) for title, image, classes in shown]
    return Pictured(f"{record.name}, split {record.split}", panels)


def _write(
    out: Path, store: Store, paths: Sequence[Path], config: SegmentConfig, result: Result, pictures: Sequence[Pictured]
) -> None:
    """Write segmentation.json, volumes.csv (a row for each volume, repeat, reference and label) and segmentation.png."""
    from tcam_diff.evaluation.picture import segmentations

    protocol = {
        "store": str(store.folder),
        "preprocessing": store.config,
        "labels": {str(code): name for code, name in store.label_names.items()},
        "reconstructions": [str(p) for p in paths],
        "network": "MONAI's SegResNet, softmax over background and labels, DiceCE loss, trained on the volumes of trained_on",
        "config": config.model_dump(mode="json"),
        "trained_on": {"store": config.data, "split": config.split, "volumes": result.trained_on},
        "seeds": [config.seed + i for i in range(len(result.seconds))],
        "seconds": result.seconds,
        "references": {TRUTH: "labels of the store", ORIGINAL: "segmentation of the original by the same network"},
        "metrics": "of each label, from the voxels of a whole volume; higher is better; mean over volumes, without 0/0, then "
        "mean and standard deviation (n - 1) over repeats",
        "share": "mean F1 over that of the same volumes' originals, against the truth; standard deviation over repeats",
        "tcam_ext": tcam_ext.__version__,
    }
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(VolumeRow.__dataclass_fields__))
    table.writeheader()
    table.writerows(asdict(r) for r in result.volumes)
    with locked_folder(out):
        write_text(out / "volumes.csv", text.getvalue())
        write_text(
            out / "segmentation.json", json.dumps({"protocol": protocol, "rows": list(map(_plain, result.rows))}, indent=1)
        )
        write_bytes(out / "segmentation.png", segmentations([(p.name, p.panels) for p in pictures], result.labels))


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON values, with null for NaN."""

    def number(x: float) -> float | None:
        return None if math.isnan(x) else x

    figures = {m: {"mean": number(mean), "std": number(std)} for m, (mean, std) in row.metrics.items()}
    share = None if math.isnan(row.share[0]) else {"mean": row.share[0], "std": number(row.share[1])}
    return {**asdict(row), "metrics": figures, "share": share}
