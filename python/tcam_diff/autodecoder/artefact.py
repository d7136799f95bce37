"""A fitted volume on disk: planes, decoder, configuration, metadata; written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.config import FitConfig, ObjectiveConfig
from tcam_diff.autodecoder.objective import make_decoder
from tcam_diff.autodecoder.planes import PLANE_NAMES
from tcam_diff.errors import UserError
from tcam_diff.files import sha256, writable_folder

if TYPE_CHECKING:
    from tcam_diff.autodecoder.fit import FitResult

FORMAT = 1
_PLANES, _DECODER, _CONFIG, _MANIFEST = (
    "planes.safetensors",
    "decoder.safetensors",
    "config.yaml",
    "manifest.json",
)


@dataclass
class Metadata:
    """Everything needed to turn planes back into a file in physical units."""

    shape: tuple[int, int, int]  # (H, W, D) of the volume fitted
    channels: int
    affine: list[list[float]]
    codes: tuple[int, int]  # NIfTI qform and sform codes
    units: tuple[str, str]
    intensity: list[tuple[float, float]]  # per channel: physical values at 0 and at 1
    source: str
    axis_order: str = "volume (channels, x, y, z) = file axes (i, j, k); planes xy, yz, xz; first axis first"
    format: int = FORMAT
    tcam_ext: str = tcam_ext.__version__


def decoding_dtype(config: ObjectiveConfig, device: torch.device) -> torch.dtype | None:
    """Of a trained decoder's products: on a GPU as in training; None, float32, on a CPU."""
    return torch.bfloat16 if device.type == "cuda" and config.compute_dtype in ("auto", "bfloat16") else None


@dataclass
class FittedVolume:
    planes: list[Tensor]  # (1, C, rows, columns), normalised
    decoder: tcam_ext.TriplaneDecoder
    config: ObjectiveConfig
    meta: Metadata

    @torch.no_grad()
    def decode(self, size: tuple[int, int, int], slab: int | None = None) -> Iterator[np.ndarray]:
        """Physical intensities (channels, H, W, d) of consecutive slabs of the last axis."""
        if slab is None:  # about 16 million voxels at a time
            slab = max(1, min(size[2], (1 << 24) // (size[0] * size[1] * self.meta.channels) or 1))
        lo = torch.tensor([a for a, _ in self.meta.intensity]).view(-1, 1, 1, 1)
        hi = torch.tensor([b for _, b in self.meta.intensity]).view(-1, 1, 1, 1)
        compute = decoding_dtype(self.config, self.planes[0].device)
        for z in range(0, size[2], slab):
            box = ((0, size[0]), (0, size[1]), (z, min(z + slab, size[2])))
            values = self.decoder(self.planes, size, box=box, compute_dtype=compute)[0].clamp(0, 1).float().cpu()
            yield (lo + (hi - lo) * values).numpy()


def save(folder: str | os.PathLike[str], result: FitResult, meta: Metadata) -> None:
    """Write the artefact into ``folder``. Each file appears complete; the manifest with their checksums comes last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"tcam": json.dumps(asdict(meta))}
    planes = {name: p.detach().contiguous() for name, p in zip(PLANE_NAMES, result.planes, strict=True)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as staging:
        stage = Path(staging)
        save_file(planes, stage / _PLANES, metadata=header)
        save_file(dict(result.decoder.state_dict()), stage / _DECODER, metadata=header)
        (stage / _CONFIG).write_text(yaml.safe_dump(result.config.model_dump(mode="json"), sort_keys=False))
        manifest = {
            "format": FORMAT,
            "tcam": asdict(meta),
            "fit": {
                "steps": result.steps_done,
                "seconds": round(result.seconds, 3),
                "stopped_early": result.stopped,
                "psnr_of_check_slices": result.psnr,
                "history": result.history,
            },
            "sha256": {name: sha256(stage / name) for name in (_PLANES, _DECODER, _CONFIG)},
        }
        (stage / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        (folder / _MANIFEST).unlink(missing_ok=True)  # no manifest, no artefact: never old sums beside new files
        for name in (_PLANES, _DECODER, _CONFIG, _MANIFEST):
            with open(stage / name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(stage / name, folder / name)


def load(folder: str | os.PathLike[str]) -> FittedVolume:
    """Read an artefact; every file is compared with its checksum. Raises UserError naming the file."""
    folder = Path(folder)
    manifest = _read_manifest(folder / _MANIFEST)
    for name, want in manifest["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing; fit the volume again")
        if sha256(path) != want:
            raise UserError(f"{path}: its content does not match the checksum in {_MANIFEST}: the file was changed or damaged")
    try:
        meta = Metadata(**manifest["tcam"])
        config = FitConfig.model_validate(yaml.safe_load((folder / _CONFIG).read_text()))
        planes = read_tensors(folder / _PLANES)
        state = read_tensors(folder / _DECODER)
        decoder = make_decoder(config, meta.channels)
        decoder.load_state_dict(state)
        ordered = [planes[name] for name in PLANE_NAMES]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: not a volume that this version of tcam fitted: {error}") from error
    return FittedVolume(ordered, decoder.requires_grad_(False), config, meta)


def prepare(folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Check that an artefact can be written before hours are spent on it."""
    folder = Path(folder)
    if (folder / _MANIFEST).exists() and not overwrite:
        raise UserError(f"{folder}: holds a fitted volume already; choose another folder or add --overwrite")
    writable_folder(folder)
    for left in folder.glob(".writing-*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent}: not a folder that `tcam fit` finished ({path.name} is missing)")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
        if set(manifest["sha256"]) != {_PLANES, _DECODER, _CONFIG}:
            raise KeyError("sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
    checked: dict[str, Any] = manifest
    return checked


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises UserError naming it."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
