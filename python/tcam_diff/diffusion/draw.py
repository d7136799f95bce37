"""Samples as files: volumes, previews, and how each was drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.decode import check_output, decode_to_file
from tcam_diff.autodecoder.report import rgb
from tcam_diff.cli.common import say, size_text, stop_on_interrupt, tracked
from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.guidance import ImageGuidance
from tcam_diff.diffusion.model import TriplaneDiffusion, find
from tcam_diff.diffusion.report import plane_strip
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.errors import UserError
from tcam_diff.evaluation.picture import sheet
from tcam_diff.files import replacing, sha256, writable_folder, write_text
from tcam_diff.training.distributed import distributed
from tcam_diff.training.report import png

SHEET = "contact-sheet.png"


@dataclass(frozen=True)
class Output:
    """Where samples go, and as what. Raises UserError where that cannot be."""

    folder: Path
    size: tuple[int, int, int] | None = None  # None: as the training volumes
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_output(self.size or (1, 1, 1), self.dtype)


def draw(
    folder: Path,
    output: Output,
    indices: range,
    config: SampleConfig,
    label: str | None = None,
    guide: Callable[[TriplaneDiffusion], ImageGuidance | None] | None = None,
    batch_size: int = 4,
    compute: str | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> None:
    """Draw the samples that the folder lacks, and the sheet of all."""
    with distributed(device, patience=timedelta(days=7)) as group:  # shares differ: the last one may take long
        quiet = quiet or not group.first
        out = output.folder
        model = TriplaneDiffusion.load(folder, group.device, compute)
        chosen = model.label(label)
        guidance = None if guide is None else guide(model)
        writable_folder(out)
        name = f"seed{config.seed}_{config.solver}{config.steps}"
        if label is not None:
            name += "_" + re.sub(r"[^\w.+-]+", "-", label)
        shape = output.size or model.geometry.shape
        settings: dict[str, Any] = {
            "model": model.identity,
            "sampling": config.model_dump(mode="json"),
            "compute_dtype": str(model.computing).removeprefix("torch."),
            "label": label,
            "size": list(shape),
            "dtype": output.dtype,
            "known": None if guidance is None else guidance.provenance,
        }
        settings = json.loads(json.dumps(settings))  # as they are read back
        files = {i: Files.of(out, i, name) for i in indices}
        missing = [i for i in indices if not files[i].hold(settings)]
        if not quiet:
            kept = len(indices) - len(missing)
            say(
                f"{find(folder)}: {len(indices)} volumes, {size_text(shape)}, {config.solver} with {config.steps} steps"
                + (f"; {kept} are there already" if kept else "")
            )
        group.barrier()  # all have looked before one writes
        mine = missing[group.rank :: group.world]
        if guidance is not None:
            batch_size = 1  # rounding grows in its iterations; and the decoder, which they run, gains nothing by more
        sampler = Sampler(model, config)
        correct = None if guidance is None else guidance.bind(model)
        stopped = False
        with stop_on_interrupt("the same command goes on") as stop:

            def made() -> Iterator[int]:
                for start in range(0, len(mine), batch_size):
                    batch = mine[start : start + batch_size]
                    residuals: list[Tensor] = []

                    def watch(step: int, total: int, residual: Tensor, residuals: list[Tensor] = residuals) -> None:
                        residuals.append(residual)
                        if stop():
                            raise KeyboardInterrupt

                    planes = sampler.sample(batch, chosen, correct, watch)
                    mean = torch.stack(residuals).double().mean(0).tolist()
                    for row, i in enumerate(batch):
                        if stop():
                            raise KeyboardInterrupt
                        about = {"index": i, "batch": len(batch), "residual_mean_square": mean[row]}
                        files[i].write([p[row : row + 1] for p in planes], model, settings, about)
                        yield i

            try:
                for _ in tracked(made(), len(mine), "sampling", quiet):
                    pass
            except KeyboardInterrupt:
                stopped = True
        if group.any(stopped):
            raise KeyboardInterrupt
        group.barrier()
        if group.first:
            _sheet(out / SHEET, [files[i].preview for i in indices])
        if not quiet:
            say(f"{out}: {len(indices)} volumes; {out / SHEET}")


@dataclass(frozen=True)
class Files:
    """Of one sample. The JSON file comes last: without it the sample is not there."""

    volume: Path
    preview: Path
    sidecar: Path

    @staticmethod
    def of(out: Path, index: int, name: str) -> Files:
        stem = f"sample-{index:04d}_{name}"
        return Files(out / f"{stem}.nii.gz", out / f"{stem}.png", out / f"{stem}.json")

    def hold(self, settings: dict[str, Any]) -> bool:
        """Whether the sample was made before. Raises UserError where one of other settings is in its place."""
        try:
            held = json.loads(self.sidecar.read_text())
            differ = [k for k, v in settings.items() if held.get(k) != v]
        except (OSError, ValueError, AttributeError):
            return False
        if not (self.volume.is_file() and self.preview.is_file()):
            return False
        if differ:
            told = []
            for k in differ:
                old, new = held.get(k), settings[k]
                if isinstance(old, dict) and isinstance(new, dict):
                    told += [f"{n} {old.get(n)}, now {v}" for n, v in new.items() if old.get(n) != v]
                else:
                    told.append("another model" if k == "model" else f"{k} {old}, now {new}")
            raise UserError(f"{self.volume}: is there, made with {'; '.join(told)}: choose another folder")
        return True

    def write(self, planes: list[Tensor], model: TriplaneDiffusion, settings: dict[str, Any], about: dict[str, Any]) -> None:
        self.sidecar.unlink(missing_ok=True)
        decode_to_file(model.volume(planes), self.volume, tuple(settings["size"]), settings["dtype"], quiet=True)
        with replacing(self.preview) as file:
            file.write(png(sheet([(self.volume.name.removesuffix(".nii.gz"), plane_strip(model, planes))], 1)))
        found = (
            settings
            | about
            | {
                "intensity": model.geometry.intensity,
                "device": model.device.type,
                "sha256": sha256(self.volume),
                "tcam_ext": tcam_ext.__version__,
            }
        )
        write_text(self.sidecar, json.dumps(found, indent=1))


def _sheet(path: Path, previews: list[Path], most: int = 64) -> None:
    """One picture of the previews, at most ``most``."""
    strips = [("", rgb(p.read_bytes()).mean(2).astype(np.uint8)) for p in previews[:most]]
    with replacing(path) as file:
        file.write(png(sheet(strips, min(len(strips), 2 if len(strips) < 9 else 4))))
