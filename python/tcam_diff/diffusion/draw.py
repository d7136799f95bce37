"""Samples and interpolations as files: volumes, previews, and how they were drawn."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.decode import check_output, decode_to_file
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.autodecoder.report import rgb
from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.guidance import ImageGuidance
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.report import plane_strip
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.errors import UserError
from tcam_diff.evaluation.picture import sheet
from tcam_diff.files import replacing, sha256, writable_folder, write_text
from tcam_diff.progress import Progress, ProgressCallback, StopCallback
from tcam_diff.text import dtype_text
from tcam_diff.training.distributed import device_of, distributed
from tcam_diff.training.report import png

SHEET = "contact-sheet.png"


@dataclass(frozen=True)
class Output:
    """Where samples go, and as what: a folder, voxels along the axes, and the type in the files.

    Raises UserError where such files cannot be written.
    """

    folder: str | os.PathLike[str]
    size: tuple[int, int, int] | None = None  # None: as the training volumes
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_output(self.size or (1, 1, 1), self.dtype)


def draw_samples(
    folder: str | os.PathLike[str],
    output: Output,
    indices: Sequence[int],
    config: SampleConfig | None = None,
    *,
    label: str | None = None,
    guide: Callable[[TriplaneDiffusion], ImageGuidance | None] | None = None,
    batch_size: int = 4,
    compute: str | None = None,
    device: str = "auto",
    started: Callable[[TriplaneDiffusion, int], None] | None = None,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> bool:
    """Draw the samples that a folder lacks: for each a NIfTI file with the data set's affine and intensities, a preview and a
    JSON file that says how it was drawn; and a contact sheet of all.

    Args:
        folder: of a run of stage 2, or of a model.
        output: the folder for the samples, and their size and type.
        indices: their numbers: sample i depends on the seed and on i alone.
        config: of the integration; default: ``SampleConfig()``.
        label: a class, of a model trained with labels.
        guide: makes the guidance by an image for the model, for example with ``read_known``; samples are then drawn singly.
        batch_size: samples drawn at a time; with 1 a volume is always the same to the bit.
        compute: type of the products: auto, float32 or bfloat16; None: as in training.
        device: auto, cpu, cuda, ...
        started: given the model, and how many of the samples are there already; on the first process.
        progress: called after every sample of the first process.
        stop: asked at every evaluation of the network; true: samples that are finished are kept.

    Returns:
        Whether all are there; False where ``stop`` said so.

    Raises UserError where samples of other settings are in their place, or model and request do not fit.
    """
    config, out = config or SampleConfig(), Path(output.folder)
    with distributed(device, patience=timedelta(days=7)) as group:  # shares differ: the last one may take long
        model = TriplaneDiffusion.load(folder, group.device, compute)
        chosen, guidance = model.label(label), None if guide is None else guide(model)
        writable_folder(out)
        settings = _settings(model, output, config, label, guidance)
        name = f"seed{config.seed}_{config.solver}{config.steps}"
        if label is not None:
            name += "_" + re.sub(r"[^\w.+-]+", "-", label)
        files = {i: Files.of(out, i, name) for i in indices}
        missing = [i for i in indices if not files[i].hold(settings)]
        if started is not None and group.first:
            started(model, len(indices) - len(missing))
        group.barrier()  # all have looked before one writes
        mine = missing[group.rank :: group.world]
        stopped = False
        try:
            drawn = _drawn(Sampler(model, config), mine, chosen, guidance, batch_size, stop)
            for done, (index, planes, about) in enumerate(drawn, 1):
                files[index].write(planes, model, settings, about)
                if progress is not None and group.first:
                    progress(Progress(done, len(mine)))
        except _Stopped:
            stopped = True
        if group.any(stopped):
            return False
        group.barrier()
        if group.first:
            _sheet(out / SHEET, [files[i].preview for i in indices])
        return True


def _settings(
    model: TriplaneDiffusion, output: Output, config: SampleConfig, label: str | None, guidance: ImageGuidance | None
) -> dict[str, Any]:
    """What samples are a function of, beside their numbers."""
    settings = {
        "model": model.identity,
        "sampling": config.model_dump(mode="json"),
        "compute_dtype": dtype_text(model.computing),
        "label": label,
        "size": list(output.size or model.geometry.info.shape),
        "dtype": output.dtype,
        "known": None if guidance is None else guidance.provenance,
    }
    found: dict[str, Any] = json.loads(json.dumps(settings))  # as they are read back
    return found


class _Stopped(Exception):
    """``stop`` said so."""


def _drawn(
    sampler: Sampler,
    indices: Sequence[int],
    label: int | None,
    guidance: ImageGuidance | None,
    batch_size: int,
    stop: StopCallback | None,
) -> Iterator[tuple[int, list[Tensor], dict[str, Any]]]:
    """(number, planes (1, C, rows, columns), what its JSON file tells of it alone) of each sample. Raises _Stopped."""
    correct = None if guidance is None else guidance.bind(sampler.model)
    if guidance is not None:
        batch_size = 1  # rounding grows in its iterations; and the decoder, which they run, gains nothing by more

    def check() -> None:
        if stop is not None and stop():
            raise _Stopped

    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        residuals: list[Tensor] = []

        def watch(step: int, total: int, residual: Tensor, residuals: list[Tensor] = residuals) -> None:
            residuals.append(residual)
            check()

        planes = sampler.sample(batch, label, correct, watch)
        mean = torch.stack(residuals).double().mean(0).tolist()
        for row, i in enumerate(batch):
            check()
            about = {"index": i, "batch": len(batch), "residual_mean_square": mean[row]}
            yield i, [p[row : row + 1] for p in planes], about


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
        decode_to_file(model.volume(planes), self.volume, tuple(settings["size"]), settings["dtype"])
        with replacing(self.preview) as file:
            file.write(png(sheet([(self.volume.name.removesuffix(".nii.gz"), plane_strip(model, planes))], 1)))
        found = (
            settings
            | about
            | model.geometry.info.resized(tuple(settings["size"])).model_dump(mode="json", exclude={"source"})
            | {
                "device": model.device.type,
                "sha256": sha256(self.volume),
                "tcam_ext": tcam_ext.__version__,
            }
        )
        write_text(self.sidecar, json.dumps(found, indent=1))


def draw_between(
    folder: str | os.PathLike[str],
    latents: str | os.PathLike[str],
    a: str,
    b: str,
    output: Output,
    n: int = 7,
    config: SampleConfig | None = None,
    *,
    label: str | None = None,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> None:
    """Write volumes from one of a latent set to another: the noises that their planes come from, the great circle between
    them, and back. A contact sheet shows them, and interpolation.json says how they were made.

    Args:
        folder: of a run of stage 2, or of a model.
        latents: a latent set of the same decoder.
        a, b: names of two volumes of it.
        output: the folder for the volumes, and their size and type.
        n: volumes, the two ends included.
        config: of the integration, both ways; default: heun with 50 steps.
        label: a class of both volumes, of a model trained with labels.
        device: auto, cpu, cuda, ...
        progress: called after every volume.

    Raises UserError where the set's planes are not of the model's kind, or the folder has another interpolation.
    """
    config = (config or SampleConfig()).model_copy(update={"final": "x"})
    if config.solver == "hot":
        raise UserError("--solver: hot is stochastic, and has no inverse: take another")
    model = TriplaneDiffusion.load(folder, device_of(device))
    chosen, latent_set, out = model.label(label), LatentSet(latents), Path(output.folder)
    latent_set.check_decoder(model.decoder, folder)
    entries = [latent_set.entry(name) for name in (a, b)]
    for entry in entries:
        latent_set.verify(entry)
    ends = [[p.unsqueeze(0) for p in latent_set.planes(entry)] for entry in entries]
    want = [(1, model.channels, *s) for s in model.geometry.sizes]
    for name, end in zip((a, b), ends, strict=True):
        found = [tuple(p.shape) for p in end]
        if found != want:
            raise UserError(f"{latents}: its planes are {found} for {name}, those of {folder} {want}")
    shape = output.size or model.geometry.info.shape
    settings = {
        "model": model.identity, "a": a, "b": b, "planes": [e.sha256 for e in entries], "n": n, "size": list(shape),
        "label": label, "solver": config.solver, "steps": config.steps, "dtype": output.dtype,
    }  # fmt: skip
    record = out / "interpolation.json"
    if record.is_file() and record.read_text() != json.dumps(settings, indent=1):
        raise UserError(f"{record}: is there, of another interpolation: choose another folder")
    writable_folder(out)
    write_text(record, json.dumps(settings, indent=1))
    strips: list[tuple[str, np.ndarray]] = []
    for i, planes in enumerate(Sampler(model, config).interpolate(ends[0], ends[1], n, chosen)):
        decode_to_file(model.volume(planes), out / f"{i:02d}-of-{n}.nii.gz", shape, output.dtype)
        strips.append((f"{i / (n - 1):.2f}", plane_strip(model, planes)))
        if progress is not None:
            progress(Progress(i + 1, n))
    with replacing(out / SHEET) as file:
        file.write(png(sheet(strips)))


def _sheet(path: Path, previews: list[Path], most: int = 64) -> None:
    """One picture of the previews, at most ``most``."""
    strips = [("", rgb(p.read_bytes()).mean(2).astype(np.uint8)) for p in previews[:most]]
    with replacing(path) as file:
        file.write(png(sheet(strips, min(len(strips), 2 if len(strips) < 9 else 4))))
