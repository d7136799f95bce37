"""Samples and interpolations as files: volumes, previews and JSON files with their settings."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.artefact import FittedVolume
from tcam_diff.autodecoder.decode import NO_MAPS, Decodable, check_output, decode_to_file
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.autodecoder.planes import FILE_END, PLANE_NAMES
from tcam_diff.autodecoder.report import rgb
from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.guidance import ImageGuidance
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.report import plane_strip
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.diffusion.solver import STOCHASTIC
from tcam_diff.diffusion.spacing import of_volume
from tcam_diff.errors import UserError
from tcam_diff.evaluation.picture import plt, sheet, tiled
from tcam_diff.files import locked_folder, replacing, sha256, write_bytes, write_text
from tcam_diff.folder import tensor_bytes
from tcam_diff.progress import Progress, ProgressCallback, StopCallback
from tcam_diff.text import dtype_text
from tcam_diff.training.distributed import device_of, distributed
from tcam_diff.training.report import png

SHEET, LABELS, LIST = "contact-sheet.png", "labels", "dataset.json"


@dataclass(frozen=True)
class Output:
    """Destination of samples. Raises UserError if files of this size and type cannot be written.

    Args:
        folder: folder of the files.
        size: voxels along x, y, z; None: those of the training volumes.
        dtype: float32, int16, uint16 or uint8.
        planes: whether to write the planes of each sample, too.
        labels: whether to write the labels of each sample, too, as labels/NAME, and a list of all samples, dataset.json, with
            which `tcam prepare` reads the folder.
    """

    folder: str | os.PathLike[str]
    size: tuple[int, int, int] | None = None
    dtype: str = "float32"
    planes: bool = False
    labels: bool = False

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
    """Draw the samples that are missing in a folder, and a contact sheet of all.

    Each sample is a NIfTI file with the affine and intensities of the training data, a preview, and a JSON file with its
    settings.

    Args:
        folder: folder of a run of stage 2, or of a model.
        output: folder, size and type of the samples.
        indices: numbers of the samples. Sample i depends on the seed and on i alone.
        config: integration; default: ``SampleConfig()``.
        label: a class, for models with labels.
        guide: function that makes the guidance by an image for the model, for example with ``read_known``. With guidance
            samples are drawn one at a time.
        batch_size: samples drawn at a time. Only with 1 are results the same to the bit, whichever samples are drawn.
        compute: type of the products: auto, float32 or bfloat16; None: that of training.
        device: auto, cpu, cuda, ...
        started: called on the first process with the model and the number of samples that already exist.
        progress: called after every sample of the first process.
        stop: asked at every evaluation of the network; true: stop and keep finished samples.

    Returns:
        Whether all samples were drawn; False if ``stop`` returned true.

    Raises:
        UserError: the folder has samples with other settings, or model and arguments do not fit.
    """
    config, out = config or SampleConfig(), Path(output.folder)
    patience = timedelta(days=7)  # shares differ: the last one may take long
    with distributed(device, patience) as group, ExitStack() as stack:
        model = TriplaneDiffusion.load(folder, group.device, compute)
        class_index, guidance = model.label(label), None if guide is None else guide(model)
        sampler = Sampler(model, config)
        sampler.check()
        if guidance is not None and (model.spacings is not None or model.consistency):
            what = "depend on voxel sizes (spacing=true)" if model.spacings is not None else "were made by `tcam distill`"
            raise UserError(f"--known: not for models that {what}; take another model")
        listed = output.labels or (out / LIST).is_file()
        if output.labels and not model.geometry.info.label_maps:
            raise UserError(f"--labels: {NO_MAPS}")
        if listed:
            _check_list(out)
        if group.first:
            stack.enter_context(locked_folder(out))
        settings = _settings(model, output, config, label, guidance)
        name = f"seed{config.seed}_{config.solver}{config.steps}"
        if label is not None:
            name += "_" + re.sub(r"[^\w.+-]+", "-", label)
        files = {i: Files.of_sample(out, i, name, output.planes, output.labels) for i in indices}
        missing = [i for i in indices if not files[i].complete(settings)]
        if started is not None and group.first:
            started(model, len(indices) - len(missing))
        group.barrier()  # no process writes before all have listed the missing samples
        mine = missing[group.rank :: group.world]
        stopped = False
        try:
            drawn = _draw(sampler, mine, class_index, guidance, batch_size, stop)
            for done, (index, planes, details) in enumerate(drawn, 1):
                details["device"] = model.device.type
                files[index].write(model.volume(planes, details.get("spacing")), plane_strip(model, planes), settings, details)
                if progress is not None and group.first:
                    progress(Progress(done, len(mine)))
        except _Stopped:
            stopped = True
        if group.any(stopped):
            return False
        group.barrier()
        if group.first:
            contact_sheet(out / SHEET, [files[i].preview for i in indices])
            if listed:
                _write_list(out, model.geometry.info.label_maps)
        return True


def _settings(
    model: TriplaneDiffusion, output: Output, config: SampleConfig, label: str | None, guidance: ImageGuidance | None
) -> dict[str, Any]:
    """Settings that determine samples, apart from their numbers, as JSON values."""
    settings = {
        "model": model.identity,
        "sampling": config.model_dump(mode="json"),
        "compute_dtype": dtype_text(model.computing),
        "label": label,
        "size": list(output.size or model.geometry.info.shape),
        "dtype": output.dtype,
        "known": None if guidance is None else guidance.provenance,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


class _Stopped(Exception):
    """Raised when ``stop`` returns true."""


def _draw(
    sampler: Sampler,
    indices: Sequence[int],
    label: int | None,
    guidance: ImageGuidance | None,
    batch_size: int,
    stop: StopCallback | None,
) -> Iterator[tuple[int, list[Tensor], dict[str, Any]]]:
    """Draw samples. Yields number, planes (1, C, rows, columns) and details for the JSON file of each. Raises _Stopped."""
    correct = None if guidance is None else guidance.bind(sampler.model)
    if guidance is not None:
        batch_size = 1  # guidance amplifies rounding differences, and larger batches do not make its decoder faster

    def check() -> None:
        if stop is not None and stop():
            raise _Stopped

    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        residuals: list[Tensor] = []

        def watch(step: int, total: int, residual: Tensor, residuals: list[Tensor] = residuals) -> None:
            residuals.append(residual)
            check()

        planes, sizes = sampler.sample(batch, label, correct, watch), sampler.sizes(batch)
        mean = torch.stack(residuals).double().mean(0).tolist()
        for row, i in enumerate(batch):
            check()
            details = {"index": i, "batch": len(batch), "residual_mean_square": mean[row]}
            if sizes is not None:
                details["spacing"] = sizes[row].tolist()
            yield i, [p[row : row + 1] for p in planes], details


@dataclass(frozen=True)
class Files:
    """Files of one sample. The JSON file is written last and marks the sample as complete."""

    volume: Path
    preview: Path
    sidecar: Path
    planes: Path | None = None
    labels: Path | None = None

    @staticmethod
    def of_sample(out: Path, index: int, name: str, planes: bool = False, labels: bool = False) -> Files:
        """The files of sample ``index`` in a folder."""
        stem = f"sample-{index:04d}_{name}"
        tensors = out / f"{stem}{FILE_END}" if planes else None
        beside = out / LABELS / f"{stem}.nii.gz" if labels else None
        return Files(out / f"{stem}.nii.gz", out / f"{stem}.png", out / f"{stem}.json", tensors, beside)

    def complete(self, settings: dict[str, Any]) -> bool:
        """Whether the sample exists. Raises UserError if it has other settings."""
        try:
            existing = json.loads(self.sidecar.read_text())
            if isinstance(existing.get("sampling"), dict):  # keys of later versions had their defaults
                defaults = SampleConfig().model_dump(mode="json")
                existing["sampling"] = {k: defaults[k] for k in settings["sampling"]} | existing["sampling"]
            differ = [k for k, v in settings.items() if existing.get(k) != v]
        except (OSError, ValueError, AttributeError):
            return False
        if not (self.volume.is_file() and self.preview.is_file()):
            return False
        if differ:
            changes = []
            for k in differ:
                old, new = existing.get(k), settings[k]
                if isinstance(old, dict) and isinstance(new, dict):
                    changes += [f"{n} {old.get(n)}, now {v}" for n, v in new.items() if old.get(n) != v]
                else:
                    changes.append("another model" if k == "model" else f"{k} {old}, now {new}")
            raise UserError(f"{self.volume}: exists with other settings ({'; '.join(changes)}); choose another folder")
        return all(p is None or p.is_file() for p in (self.planes, self.labels))

    def write(self, volume: Decodable, preview: np.ndarray, settings: dict[str, Any], details: dict[str, Any]) -> None:
        """Decode the volume and write the files. ``preview`` is a strip of slices (rows, columns)."""
        self.sidecar.unlink(missing_ok=True)
        if self.planes is not None:
            assert isinstance(volume, FittedVolume)
            with replacing(self.planes) as file:
                file.write(
                    tensor_bytes({n: p[0] for n, p in zip(PLANE_NAMES, volume.planes, strict=True)}, dtype=torch.float32)
                )
        if self.labels is not None:
            self.labels.parent.mkdir(exist_ok=True)
        decode_to_file(volume, self.volume, tuple(settings["size"]), settings["dtype"], labels=self.labels)
        with replacing(self.preview) as file:
            file.write(png(sheet([(self.volume.name.removesuffix(".nii.gz"), preview)], 1)))
        info = volume.info.of_images().resized(tuple(settings["size"])).model_dump(mode="json", exclude={"source"})
        origin = {"sha256": sha256(self.volume), "tcam_ext": tcam_ext.__version__}
        write_text(self.sidecar, json.dumps(settings | details | info | origin, indent=1))


def _check_list(out: Path) -> None:
    """Raise UserError if a folder has a dataset.json that is not a list of samples."""
    path = out / LIST
    try:
        foreign = path.is_file() and json.loads(path.read_text()).get("name") != "samples"
    except (OSError, ValueError, AttributeError):
        foreign = True
    if foreign:
        raise UserError(f"{path}: is of another data set; choose another folder")


def _write_list(out: Path, maps: Mapping[str, Sequence[int]]) -> None:
    """Write dataset.json, the list of the finished samples in a folder, with labels where they are, as the Decathlon's."""
    finished = {p.name.removesuffix(".json") for p in out.glob("sample-*.json")}
    images = sorted(p.name for p in out.glob("sample-*.nii.gz") if p.name.removesuffix(".nii.gz") in finished)
    training = [{"image": name} | ({"label": f"{LABELS}/{name}"} if (out / LABELS / name).is_file() else {}) for name in images]
    names = {str(codes[0]): name for name, codes in maps.items() if len(codes) == 1}
    content = {"name": "samples", "labels": {"0": "background", **names}, "training": training}
    write_text(out / LIST, json.dumps(content, indent=1))


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
    compute: str = "float32",
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> None:
    """Interpolate between two volumes of a latent set.

    The planes of both volumes are integrated to noise. Points on the great circle between the two noises are integrated back
    and decoded. The folder gets the volumes, a contact sheet and interpolation.json with the settings.

    Args:
        folder: folder of a run of stage 2, or of a model.
        latents: a latent set of the same decoder.
        a, b: names of two volumes of the set.
        output: folder, size and type of the volumes.
        n: number of volumes, including both ends.
        config: integration in both directions; default: heun with 50 steps.
        label: the class of both volumes, for models with labels.
        compute: type of the products, as in ``draw_samples``. With bfloat16 the ends differ more from the two volumes.
        device: auto, cpu, cuda, ...
        progress: called after every volume.

    Raises:
        UserError: the planes do not fit the model, the solver is stochastic, or the folder has another interpolation.
    """
    config = (config or SampleConfig()).model_copy(update={"final": "x"})
    if config.solver in STOCHASTIC:
        raise UserError(f"--solver: {config.solver} is stochastic and has no inverse; choose another solver")
    model = TriplaneDiffusion.load(folder, device_of(device), compute)
    if model.consistency:
        raise UserError(f"{folder}: a model of `tcam distill` has no inverse; take the one that it was distilled from")
    class_index, latent_set, out = model.label(label), LatentSet(latents), Path(output.folder)
    latent_set.check_decoder(model.decoder, folder)
    entries = [latent_set.entry(name) for name in (a, b)]
    for entry in entries:
        latent_set.verify(entry)
    ends = [[p.unsqueeze(0) for p in latent_set.planes(entry)] for entry in entries]
    expected = [(1, model.channels, *s) for s in model.geometry.sizes]
    for name, end in zip((a, b), ends, strict=True):
        shapes = [tuple(p.shape) for p in end]
        if shapes != expected:
            raise UserError(f"{latents}: its planes are {shapes} for {name}, those of {folder} {expected}")
    shape = output.size or model.geometry.info.shape
    settings = {
        "model": model.identity, "a": a, "b": b, "planes": [e.sha256 for e in entries], "n": n, "size": list(shape),
        "label": label, "solver": config.solver, "steps": config.steps, "dtype": output.dtype,
        **({} if config.grid == "auto" else {"grid": config.grid}),
        **{k: v for k in ("prior_guidance", "guidance_scale") if (v := getattr(config, k)) != 1},
        **({} if model.computing == torch.float32 else {"compute_dtype": dtype_text(model.computing)}),
    }  # fmt: skip
    record = out / "interpolation.json"
    with locked_folder(out):
        if record.is_file() and record.read_text() != json.dumps(settings, indent=1):
            raise UserError(f"{record}: exists, of another interpolation; choose another folder")
        write_text(record, json.dumps(settings, indent=1))
        strips: list[tuple[str, np.ndarray]] = []
        sizes = None
        if model.spacings is not None:  # equal ratios from one end to the other
            first, last = (torch.tensor(of_volume(e.info)) for e in entries)
            sizes = [first * (last / first) ** (i / (n - 1)) for i in range(n)]
        for i, planes in enumerate(Sampler(model, config).interpolate(ends[0], ends[1], n, class_index, sizes)):
            volume = model.volume(planes, None if sizes is None else sizes[i].tolist())
            decode_to_file(volume, out / f"{i:02d}-of-{n}.nii.gz", shape, output.dtype)
            strips.append((f"{i / (n - 1):.2f}", plane_strip(model, planes)))
            if progress is not None:
                progress(Progress(i + 1, n))
        with replacing(out / SHEET) as file:
            file.write(png(sheet(strips)))


def contact_sheet(path: Path, previews: Sequence[Path], most: int = 64) -> None:
    """Write a picture of the first ``most`` previews."""
    pictures = [rgb(p.read_bytes()) for p in previews[:most]]
    file = io.BytesIO()
    plt.imsave(file, tiled(pictures, 2 if len(pictures) < 9 else 4), format="png")
    write_bytes(path, file.getvalue())
