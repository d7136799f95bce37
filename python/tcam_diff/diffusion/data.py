"""A latent set in memory, as the diffusion model sees it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tcam_diff.autodecoder.latents import Entry, LatentSet
from tcam_diff.autodecoder.planes import PLANE_NAMES
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.diffusion.process import flip
from tcam_diff.errors import UserError


@dataclass
class Centre:
    """x = (F - mean) / scale, plane by plane, and back (algorithm.md 6.5)."""

    mean: list[Tensor]  # (C, rows, columns)
    scale: list[float]

    @staticmethod
    def of(planes: Sequence[Tensor], flips: Sequence[int] = ()) -> Centre:
        """Of planes (N, C, rows, columns): the mean over volumes, and the root mean square of what is left.

        ``flips``: axes along which volumes are mirrored at random. The mean is then over mirrored volumes too: it has their
        symmetry, so that mirrored planes less the mean are the mirrored difference, and decode to the mirrored volume.
        """
        mean = []
        for p in planes:
            total = torch.zeros(p.shape[1:], dtype=torch.float64)
            for one in p:
                total += one.double()
            mean.append(total / len(p))
        for axis in flips:
            mean = [(m + turned) / 2 for m, turned in zip(mean, flip(mean, axis), strict=True)]
        scale = []
        for p, m in zip(planes, mean, strict=True):
            squares = sum(float((one.double() - m).square().mean()) for one in p)
            scale.append(max((squares / len(p)) ** 0.5, 1e-6))
        return Centre([m.float() for m in mean], scale)

    def apply(self, planes: Sequence[Tensor]) -> list[Tensor]:
        """States, of unit energy over the set, of planes (B, C, rows, columns)."""
        return [(p - m.to(p)) / s for p, m, s in zip(planes, self.mean, self.scale, strict=True)]

    def invert(self, planes: Sequence[Tensor]) -> list[Tensor]:
        """Planes of states."""
        return [p * s + m.to(p) for p, m, s in zip(planes, self.mean, self.scale, strict=True)]


class LatentData:
    """All planes of a set, with the labels of its volumes."""

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        labels: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        """``dtype``: of the planes in memory; ``labels``: a CSV of names and labels; ``classes``: those that there are, None:
        those of the set. Raises UserError naming the file."""
        self.set = LatentSet(folder)
        entries = self.set.entries
        if not entries:
            raise UserError(f"{folder}: has no volumes")
        first = self.set.planes(entries[0])
        self.planes = [torch.empty(len(entries), *p.shape, dtype=dtype) for p in first]
        for i, entry in enumerate(entries):
            self.set.verify(entry)
            for name, held, plane in zip(PLANE_NAMES, self.planes, self.set.planes(entry), strict=True):
                if plane.shape != held.shape[1:]:
                    raise UserError(
                        f"{folder}: plane {name} of {entry.name} is {tuple(plane.shape)}, that of {entries[0].name} "
                        f"{tuple(held.shape[1:])}; volumes of one size are needed"
                    )
                held[i] = plane
        self.names = [e.name for e in entries]
        self.digest = hashlib.sha256("".join(e.sha256 for e in entries).encode()).hexdigest()
        self.classes: list[str] = []
        self.labels: Tensor | None = None
        if labels:
            self.classes, self.labels = _labels(labels, self.names, classes)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def channels(self) -> int:
        return self.planes[0].shape[1]

    def rows(self, which: Sequence[int] | Tensor) -> list[Tensor]:
        """Planes of these volumes, in float32."""
        return [p[which].float() for p in self.planes]


def typical(entries: Sequence[Entry]) -> VolumeInfo:
    """For volumes that resemble the set's: the volume with the affine nearest to the median one, and the median of what 0 and 1
    stand for."""
    affines = np.array([e.info.affine for e in entries])
    distance = np.abs(affines - np.median(affines, 0)).sum((1, 2))
    ranges = np.median(np.array([e.info.intensity for e in entries]), 0)
    return entries[int(distance.argmin())].info.replaced(intensity=ranges.tolist(), source="")


def _labels(path: str, names: Sequence[str], among: Sequence[str] | None) -> tuple[list[str], Tensor]:
    """(classes in alphabetical order, or ``among``; the index of each volume's)."""
    try:
        with open(path, newline="") as file:
            table = csv.DictReader(file)
            if not {"name", "label"} <= set(table.fieldnames or []):
                raise ValueError(f"columns {', '.join(table.fieldnames or ['none'])}")
            given = {row["name"]: row["label"] for row in table}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"labels: {path}: expected a CSV file with columns name and label: {error}") from error
    missing = [n for n in names if not given.get(n)]
    if missing:
        raise UserError(f"labels: {path}: no label for {missing[0]} ({len(missing)} of {len(names)} volumes)")
    classes = sorted({given[n] for n in names}) if among is None else list(among)
    foreign = [n for n in names if given[n] not in classes]
    if foreign:
        raise UserError(f"labels: {path}: {foreign[0]} is {given[foreign[0]]}, the training volumes {', '.join(classes)}")
    return classes, torch.tensor([classes.index(given[n]) for n in names])
