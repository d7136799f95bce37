"""``tcam sample``: volumes from a trained diffusion model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import say, size_text, stop_on_interrupt, tracked
from tcam_diff.diffusion.config import SampleConfig, Solver
from tcam_diff.errors import UserError
from tcam_diff.files import replacing, sha256, writable_folder, write_text
from tcam_diff.training.ranks import ranks

if TYPE_CHECKING:
    from tcam_diff.diffusion.guidance import ImageGuidance
    from tcam_diff.diffusion.model import TriplaneDiffusion

SHEET = "contact-sheet.png"


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
    guidance_scale: Annotated[float, typer.Option(min=0, help="Of classifier-free guidance; 1: none.")] = 1.0,
    known: Annotated[
        Path | None,
        typer.Option(help="A volume that samples agree with: whole with --mask or --known-channels, or coarse."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="A volume on the grid of --known, not 0 where that is known.")] = None,
    known_channels: Annotated[
        str | None, typer.Option(help="Channels of --known that are known, e.g. 0,2; others are drawn.")
    ] = None,
    known_noise: Annotated[
        float, typer.Option(min=1e-4, help="How closely it is followed: deviation, of a range of 1.")
    ] = 0.02,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples at a time. With 1, a volume is always the same to the bit.")
    ] = 4,
    dtype: Annotated[str, typer.Option(help="float32, int16, uint16 or uint8 (integers with a scale).")] = "float32",
    compute_dtype: Annotated[
        str | None, typer.Option(help="auto, float32 or bfloat16. [default: as in training]", show_default=False)
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
        "solver": solver, "steps": steps, "final": final, "guidance_scale": guidance_scale, "seed": seed,
        "compute_dtype": compute_dtype,
    }  # fmt: skip
    config = configs.validate(SampleConfig, settings, "sample")
    if known is None and (mask is not None or known_channels is not None):
        raise UserError("--mask and --known-channels say what of --known is known: give that too")

    def guide(loaded: TriplaneDiffusion) -> ImageGuidance | None:
        return None if known is None else read_known(loaded, known, mask, known_channels, known_noise)

    draw(model, out, range(first, first + n), config, size, label, guide, batch_size, dtype, device, quiet)


def read_known(
    model: TriplaneDiffusion, known: Path, mask: Path | None = None, channels: str | None = None, noise: float = 0.02
) -> ImageGuidance:
    """Guidance by a file: on the model's grid, or coarser by whole factors. Raises UserError naming the file."""
    import numpy as np
    import torch

    from tcam_diff.data.intensity import to_unit
    from tcam_diff.data.nifti import read_volume
    from tcam_diff.diffusion.guidance import ImageGuidance

    g = model.geometry
    volume = read_volume(known)
    fits = all(n % m == 0 for n, m in zip(g.shape, volume.shape, strict=True))
    if not fits or volume.data.shape[0] != g.outputs:
        raise UserError(
            f"{known}: expected {g.outputs} channel(s) of {size_text(g.shape)} voxels, or whole fractions of these, got "
            f"{volume.data.shape[0]} of {size_text(volume.shape)}; tcam prepare makes volumes of a data set alike"
        )
    factor = tuple(n // m for n, m in zip(g.shape, volume.shape, strict=True))
    held = np.ones_like(volume.data)
    if channels is not None:
        try:
            chosen = {int(c) for c in channels.split(",")}
        except ValueError:
            chosen = {-1}
        if not chosen <= set(range(g.outputs)):
            raise UserError(f"--known-channels: expected numbers from 0 to {g.outputs - 1} with commas, got {channels}")
        held[[c for c in range(g.outputs) if c not in chosen]] = 0
    if mask is not None:
        marked = read_volume(mask)
        if marked.shape != volume.shape or marked.data.shape[0] not in (1, g.outputs):
            raise UserError(f"{mask}: expected the {size_text(volume.shape)} voxels of {known}, got {size_text(marked.shape)}")
        held = held * (marked.data != 0)
    if not held.any():
        raise UserError(f"{mask or known}: nothing is known: the mask is 0 everywhere")
    provenance = {
        "known": sha256(known),
        "mask": None if mask is None else sha256(mask),
        "channels": channels,
        "noise": noise,
    }
    unit = torch.from_numpy(to_unit(volume.data, g.intensity))
    return ImageGuidance(unit, torch.from_numpy(held), factor, noise, provenance=provenance)  # type: ignore[arg-type]


def draw(
    folder: Path,
    out: Path,
    indices: range,
    config: SampleConfig,
    size: tuple[int, int, int] | None = None,
    label: str | None = None,
    guide: Callable[[TriplaneDiffusion], ImageGuidance | None] | None = None,
    batch_size: int = 4,
    dtype: str = "float32",
    device: str = "auto",
    quiet: bool = False,
) -> None:
    """Draw the samples that ``out`` lacks, and the sheet of all."""
    from tcam_diff.diffusion.model import INDEX, TriplaneDiffusion, find
    from tcam_diff.diffusion.sampling import Sampler

    if size is not None and min(size) < 1:
        raise UserError(f"--size: expected three positive numbers, got {size_text(size)}")
    with ranks(device) as group:
        quiet = quiet or not group.first
        model = TriplaneDiffusion.load(folder, group.device)
        chosen = model.label(label)
        guidance = None if guide is None else guide(model)
        writable_folder(out)
        name = f"seed{config.seed}_{config.solver}{config.steps}" + (f"_{label}" if label else "")
        shape = size or model.geometry.shape
        settings: dict[str, Any] = {
            "model": sha256(find(folder) / INDEX),
            "sampling": config.model_dump(mode="json"),
            "label": label,
            "size": list(shape),
            "dtype": dtype,
            "known": None if guidance is None else guidance.provenance,
        }
        files = {i: Files.of(out, i, name) for i in indices}
        mine = list(indices)[group.rank :: group.world]
        missing = [i for i in mine if not files[i].holds(settings)]
        if not quiet:
            kept = len(mine) - len(missing)
            say(
                f"{find(folder)}: {len(indices)} volumes, {size_text(shape)}, {config.solver} with {config.steps} steps"
                + (f"; {kept} are there already" if kept else "")
            )
        sampler = Sampler(model, config)
        stopped = False
        with stop_on_interrupt("the same command goes on") as stop:

            def made() -> Iterator[int]:
                nonlocal stopped
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    residuals: list[float] = []

                    def watch(step: int, total: int, residual: float, residuals: list[float] = residuals) -> None:
                        residuals.append(residual)
                        if stop():
                            raise KeyboardInterrupt

                    correct = None if guidance is None else guidance.bind(model)
                    planes = sampler.sample(batch, chosen, correct, watch)
                    for row, i in enumerate(batch):
                        if stop():
                            raise KeyboardInterrupt
                        files[i].write([p[row : row + 1] for p in planes], model, shape, settings, i, len(batch), residuals)
                        yield i

            try:
                for _ in tracked(made(), len(missing), "sampling", quiet):
                    pass
            except KeyboardInterrupt:
                stopped = True
        if group.any(stopped):
            raise KeyboardInterrupt
        group.barrier()
        if group.first:
            _sheet(out / SHEET, [(f"{i}", files[i].preview) for i in indices])
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

    def holds(self, settings: dict[str, Any]) -> bool:
        """Whether it was made before, alike."""
        try:
            held = json.loads(self.sidecar.read_text())
            return all(held[k] == v for k, v in settings.items()) and self.volume.is_file() and self.preview.is_file()
        except (OSError, ValueError, KeyError):
            return False

    def write(
        self, planes: list[Any], model: Any, size: tuple[int, int, int], settings: dict[str, Any], index: int,
        batch: int, residuals: list[float],
    ) -> None:  # fmt: skip
        import tcam_ext
        from tcam_diff.cli.decode import decode_to_file
        from tcam_diff.diffusion.report import plane_strip
        from tcam_diff.evaluation.picture import sheet
        from tcam_diff.training.records import png

        self.sidecar.unlink(missing_ok=True)
        decode_to_file(model.volume(planes), self.volume, size, settings["dtype"], quiet=True)
        with replacing(self.preview) as file:
            file.write(png(sheet([(self.volume.name.removesuffix(".nii.gz"), plane_strip(model, planes))], 1)))
        g = model.geometry
        found = settings | {
            "index": index,
            "batch": batch,
            "intensity": g.intensity,
            "residual_mean_square": sum(residuals) / len(residuals),
            "sha256": sha256(self.volume),
            "tcam_ext": tcam_ext.__version__,
        }
        write_text(self.sidecar, json.dumps(found, indent=1))


def _sheet(path: Path, previews: list[tuple[str, Path]], most: int = 64) -> None:
    """One picture of the previews, at most ``most``."""
    import numpy as np

    from tcam_diff.autodecoder.report import rgb
    from tcam_diff.evaluation.picture import sheet
    from tcam_diff.training.records import png

    strips = [("", rgb(p.read_bytes()).mean(2).astype(np.uint8)) for _, p in previews[:most]]
    with replacing(path) as file:
        file.write(png(sheet(strips, min(len(strips), 2 if len(strips) < 9 else 4))))
