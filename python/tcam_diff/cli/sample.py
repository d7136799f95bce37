"""``tcam sample``: volumes from a trained diffusion model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import say, size_text, stop_on_interrupt, tracked
from tcam_diff.cli.decode import check_output
from tcam_diff.diffusion.config import SampleConfig, Solver
from tcam_diff.errors import UserError
from tcam_diff.files import replacing, sha256, writable_folder, write_text
from tcam_diff.training.ranks import ranks

if TYPE_CHECKING:
    from torch import Tensor

    from tcam_diff.diffusion.guidance import ImageGuidance
    from tcam_diff.diffusion.model import TriplaneDiffusion

SHEET = "contact-sheet.png"
ComputeDtype = Literal["auto", "float32", "bfloat16"]


def sample(
    model: Annotated[Path, typer.Argument(help="A run of `tcam train-diffusion`, or a model's folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the volumes; those that are there are kept.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many.")] = 4,
    first: Annotated[int, typer.Option(min=0, help="Number of the first: sample i is the same in any command.")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Voxels along the axes. [default: as the training volumes]", show_default=False),
    ] = None,
    solver: Annotated[Solver, typer.Option(help="Of the ODE; hot is stochastic.")] = "heun",
    steps: Annotated[int, typer.Option(min=1, help="Intervals; heun and midpoint take two evaluations, rk4 four.")] = 50,
    final: Annotated[str, typer.Option(help="x0: the last estimate of the planes; x: the integrated state.")] = "x0",
    label: Annotated[str | None, typer.Option(help="A class, of a model trained with labels.")] = None,
    hot_k: Annotated[int, typer.Option(min=1, help="Intervals that hot jumps ahead before it adds noise.")] = 2,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Of classifier-free guidance, with --label; 1: none.")] = 1.0,
    known: Annotated[
        Path | None,
        typer.Option(help="A volume that samples agree with: whole with --mask or --known-channels, or coarse."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="A volume on the grid of --known, not 0 where that is known.")] = None,
    known_channels: Annotated[
        str | None, typer.Option(help="Channels of --known that are known, e.g. 0,2; others are drawn.")
    ] = None,
    known_range: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Intensities of --known at 0 and 1. [default: the data set's]", show_default=False),
    ] = None,
    known_noise: Annotated[
        float, typer.Option(min=1e-4, help="How closely it is followed: deviation, of a range of 1.")
    ] = 0.02,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples at a time; 1 with --known. With 1, a volume is always the same to the bit.")
    ] = 4,
    dtype: Annotated[str, typer.Option(help="float32, int16, uint16 or uint8 (integers with a scale).")] = "float32",
    compute_dtype: Annotated[
        ComputeDtype | None,
        typer.Option(help="Of the products. [default: as in training; auto: bfloat16 on GPUs]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Draw volumes from MODEL: NIfTI files with the data set's affine and intensities, JSON and a preview for each, and a
    contact sheet.

    Sample i depends on the seed and on i alone. Ctrl-C stops; the same command goes on with those that are missing. Under
    torchrun they are shared among its processes.
    """
    settings = {
        "solver": solver, "steps": steps, "final": final, "guidance_scale": guidance_scale, "seed": seed, "hot_k": hot_k,
    }  # fmt: skip
    config = configs.validate(SampleConfig, settings, "sample")
    if guidance_scale != 1 and label is None:
        raise UserError(f"--guidance-scale {guidance_scale:g}: guides towards a class: give --label, or leave it out")
    if known is None and (mask is not None or known_channels is not None or known_range is not None):
        raise UserError("--mask, --known-channels and --known-range say what of --known is known: give that too")

    def guide(loaded: TriplaneDiffusion) -> ImageGuidance | None:
        return None if known is None else read_known(loaded, known, mask, known_channels, known_noise, known_range)

    output = Output(out, size, dtype)
    draw(model, output, range(first, first + n), config, label, guide, batch_size, compute_dtype, device, quiet)


@dataclass(frozen=True)
class Output:
    """Where samples go, and as what. Raises UserError where that cannot be."""

    folder: Path
    size: tuple[int, int, int] | None = None  # None: as the training volumes
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_output(self.size or (1, 1, 1), self.dtype)


def read_known(
    model: TriplaneDiffusion,
    known: Path,
    mask: Path | None = None,
    channels: str | None = None,
    noise: float = 0.02,
    intensity: tuple[float, float] | None = None,
) -> ImageGuidance:
    """Guidance by a file: on the model's grid, or coarser by whole factors; its axes are turned to the model's by its affine.
    Raises UserError naming the file."""
    import numpy as np
    import torch

    from tcam_diff.data.nifti import read_volume
    from tcam_diff.data.volume import oriented
    from tcam_diff.diffusion.guidance import ImageGuidance

    info = model.geometry.info
    volume = oriented(read_volume(known), info.affine)
    shape = volume.info.shape
    fits = all(n % m == 0 for n, m in zip(info.shape, shape, strict=True))
    if not fits or volume.info.channels != info.channels:
        raise UserError(
            f"{known}: expected {info.channels} channel(s) of {size_text(info.shape)} voxels, or whole fractions of these, got "
            f"{volume.info.channels} of {size_text(shape)}; tcam prepare makes volumes of a data set alike"
        )
    factor = tuple(n // m for n, m in zip(info.shape, shape, strict=True))
    held = np.ones_like(volume.data)
    if channels is not None:
        try:
            chosen = {int(c) for c in channels.split(",")}
        except ValueError:
            chosen = {-1}
        if not chosen <= set(range(info.channels)):
            raise UserError(f"--known-channels: expected numbers from 0 to {info.channels - 1} with commas, got {channels}")
        held[[c for c in range(info.channels) if c not in chosen]] = 0
    if mask is not None:
        marked = oriented(read_volume(mask), info.affine)
        if not np.allclose(marked.info.affine, volume.info.affine, atol=0.01 * max(volume.info.spacing)):
            raise UserError(f"{mask}: its affine is not that of {known}: save the mask on the grid of that volume")
        if marked.info.shape != shape or marked.info.channels not in (1, info.channels):
            raise UserError(f"{mask}: expected the {size_text(shape)} voxels of {known}, got {size_text(marked.info.shape)}")
        held = held * (marked.data != 0)
    if not held.any():
        raise UserError(f"{mask or known}: nothing is known: the mask is 0 everywhere")
    provenance = {
        "known": sha256(known),
        "mask": None if mask is None else sha256(mask),
        "channels": channels,
        "noise": noise,
        "range": intensity,
    }
    scale = info if intensity is None else info.replaced(intensity=[intensity] * info.channels)
    unit = torch.from_numpy(scale.to_unit(volume.data))
    return ImageGuidance(unit, torch.from_numpy(held), factor, noise, provenance=provenance)  # type: ignore[arg-type]


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
    import torch

    from tcam_diff.diffusion.model import TriplaneDiffusion, find
    from tcam_diff.diffusion.sampling import Sampler

    with ranks(device, patience=timedelta(days=7)) as group:  # shares differ: the last one may take long
        quiet = quiet or not group.first
        out = output.folder
        model = TriplaneDiffusion.load(folder, group.device, compute)
        chosen = model.label(label)
        guidance = None if guide is None else guide(model)
        writable_folder(out)
        name = f"seed{config.seed}_{config.solver}{config.steps}"
        if label is not None:
            name += "_" + re.sub(r"[^\w.+-]+", "-", label)
        shape = output.size or model.geometry.info.shape
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
        import tcam_ext
        from tcam_diff.cli.decode import decode_to_file
        from tcam_diff.diffusion.report import plane_strip
        from tcam_diff.evaluation.picture import sheet
        from tcam_diff.training.records import png

        self.sidecar.unlink(missing_ok=True)
        decode_to_file(model.volume(planes), self.volume, tuple(settings["size"]), settings["dtype"], quiet=True)
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


def _sheet(path: Path, previews: list[Path], most: int = 64) -> None:
    """One picture of the previews, at most ``most``."""
    import numpy as np

    from tcam_diff.autodecoder.report import rgb
    from tcam_diff.evaluation.picture import sheet
    from tcam_diff.training.records import png

    strips = [("", rgb(p.read_bytes()).mean(2).astype(np.uint8)) for p in previews[:most]]
    with replacing(path) as file:
        file.write(png(sheet(strips, min(len(strips), 2 if len(strips) < 9 else 4))))
