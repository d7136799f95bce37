"""Latent sets in memory, as training data of the diffusion model."""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.autodecoder.planes import PLANE_NAMES
from tcam_diff.data.volume import VolumeInfo, VolumeRecord
from tcam_diff.diffusion.process import flip
from tcam_diff.diffusion.spacing import of_volume
from tcam_diff.errors import UserError


@dataclass
class Centre:
    """Centring x = (F - mean) / scale of planes F, and its inverse (algorithm.md 6.5)."""

    mean: list[Tensor]  # (C, rows, columns)
    scale: list[float]

    @staticmethod
    def from_planes(planes: Sequence[Tensor], flips: Sequence[int] = ()) -> Centre:
        """Compute the mean over volumes and the root mean square of the rest.

        Args:
            planes: (N, C, rows, columns).
            flips: axes along which volumes are mirrored at random. The mean then includes the mirrored volumes, so that
                centring and mirroring commute.
        """
        mean = []
        for p in planes:
            total = torch.zeros(p.shape[1:], dtype=torch.float64)
            for plane in p:
                total += plane.double()
            mean.append(total / len(p))
        for axis in flips:
            mean = [(m + flipped) / 2 for m, flipped in zip(mean, flip(mean, axis), strict=True)]
        scale = []
        for p, m in zip(planes, mean, strict=True):
            squares = sum(float((plane.double() - m).square().mean()) for plane in p)
            scale.append(max((squares / len(p)) ** 0.5, 1e-6))
        return Centre([m.float() for m in mean], scale)

    def apply(self, planes: Sequence[Tensor]) -> list[Tensor]:
        """Centre planes (B, C, rows, columns). Over the set the result has unit energy."""
        return [(p - m.to(p)) / s for p, m, s in zip(planes, self.mean, self.scale, strict=True)]

    def invert(self, planes: Sequence[Tensor]) -> list[Tensor]:
        """Invert :meth:`apply`."""
        return [p * s + m.to(p) for p, m, s in zip(planes, self.mean, self.scale, strict=True)]


class LatentData:
    """All planes of a latent set, with the labels of its volumes.

    Args:
        folder: latent set.
        dtype: type of the planes in memory.
        labels: CSV file with columns name and label; None: no labels.
        classes: possible labels; None: those of the set, in alphabetical order.

    Raises:
        UserError: the set is empty or damaged, its planes differ in size, or labels are missing.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        labels: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.set = LatentSet(folder)
        entries = self.set.entries
        if not entries:
            raise UserError(f"{folder}: the latent set has no volumes")
        first = self.set.planes(entries[0])
        self.planes = [torch.empty(len(entries), *p.shape, dtype=dtype) for p in first]
        for i, entry in enumerate(entries):
            self.set.verify(entry)
            for name, stack, plane in zip(PLANE_NAMES, self.planes, self.set.planes(entry), strict=True):
                if plane.shape != stack.shape[1:]:
                    raise UserError(
                        f"{folder}: plane {name} of {entry.name} is {tuple(plane.shape)}, that of {entries[0].name} "
                        f"{tuple(stack.shape[1:])}; all volumes must have one size"
                    )
                stack[i] = plane
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
        """Channels C of the planes."""
        return self.planes[0].shape[1]

    @functools.cached_property
    def spacings(self) -> Tensor:
        """Voxel sizes of the volumes (N, 3) in mm."""
        return torch.tensor([of_volume(e.info) for e in self.set.entries])

    def rows(self, indices: Sequence[int] | Tensor) -> list[Tensor]:
        """Planes (B, C, rows, columns) of some volumes, in float32."""
        return [p[indices].float() for p in self.planes]


def typical(entries: Sequence[VolumeRecord]) -> VolumeInfo:
    """Metadata for generated volumes: those of the volume nearest to the median affine, with the median intensity ranges."""
    affines = np.array([e.info.affine for e in entries])
    distance = np.abs(affines - np.median(affines, 0)).sum((1, 2))
    ranges = np.median(np.array([e.info.intensity for e in entries]), 0)
    return entries[int(distance.argmin())].info.replaced(intensity=ranges.tolist(), source="")


def _labels(path: str, names: Sequence[str], known: Sequence[str] | None) -> tuple[list[str], Tensor]:
    """Read labels. Returns the classes, which are ``known`` or all labels in alphabetical order, and class indices (N,)."""
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
    classes = sorted({given[n] for n in names}) if known is None else list(known)
    unknown = [n for n in names if given[n] not in classes]
    if unknown:
        raise UserError(f"labels: {path}: {unknown[0]} is {given[unknown[0]]}, the training volumes {', '.join(classes)}")
    return classes, torch.tensor([classes.index(given[n]) for n in names])
