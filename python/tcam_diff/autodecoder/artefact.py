"""Fitted volume on disk: planes, decoder, configuration and metadata."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import tcam_ext
from tcam_diff import config as configs
from tcam_diff.autodecoder.config import AutodecoderConfig, FitConfig
from tcam_diff.autodecoder.objective import make_decoder
from tcam_diff.autodecoder.planes import PLANE_NAMES, check_planes
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.errors import UserError
from tcam_diff.files import locked_folder, reason
from tcam_diff.folder import Folder, tensor_bytes
from tcam_diff.training.states import load_module

if TYPE_CHECKING:
    from tcam_diff.autodecoder.fit import FitResult

AXIS_ORDER = "volume (channels, x, y, z) = file axes (i, j, k); planes xy, yz, xz; first axis first"
_PLANES, _DECODER, _CONFIG = "planes.safetensors", "decoder.safetensors", "config.yaml"


def decoding_dtype(config: AutodecoderConfig, device: torch.device) -> torch.dtype | None:
    """Type of a trained decoder's products: that of training on a GPU, None (float32) on a CPU."""
    return torch.bfloat16 if device.type == "cuda" and config.compute_dtype in ("auto", "bfloat16") else None


@dataclass
class FittedVolume:
    """Planes of one volume with their decoder."""

    planes: list[Tensor]  # (1, C, rows, columns), normalised
    decoder: tcam_ext.TriplaneDecoder
    config: AutodecoderConfig
    info: VolumeInfo  # metadata of the fitted volume

    def decode(self, size: tuple[int, int, int], slab: int | None = None) -> Iterator[np.ndarray]:
        """Decode to any size, in physical units: consecutive slabs (channels, H, W, d). For arguments see ``decode_unit``."""
        for values in self.decode_unit(size, slab):
            yield self.info.to_physical(values).numpy()

    def whole(self) -> Tensor:
        """The volume (channels, H, W, D) in [0, 1] at its own size."""
        return torch.cat(list(self.decode_unit(self.info.shape)), 3)

    @torch.no_grad()
    def decode_unit(self, size: tuple[int, int, int], slab: int | None = None) -> Iterator[Tensor]:
        """Decode to any size.

        Args:
            size: voxels along x, y, z.
            slab: thickness along the last axis; None: about 16 million voxels per slab.

        Yields:
            Consecutive slabs (channels, H, W, d) in [0, 1], float32 in the memory of the CPU.
        """
        if slab is None:
            slab = max(1, min(size[2], (1 << 24) // (size[0] * size[1] * self.info.channels) or 1))
        compute = decoding_dtype(self.config, self.planes[0].device)
        for z in range(0, size[2], slab):
            box = ((0, size[0]), (0, size[1]), (z, min(z + slab, size[2])))
            yield self.decoder(self.planes, size, box=box, compute_dtype=compute)[0].clamp(0, 1).float().cpu()


def save(path: str | os.PathLike[str], result: FitResult, info: VolumeInfo) -> None:
    """Write planes, decoder and configuration of a fit, and a manifest with their checksums."""
    folder = _folder(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    metadata = info.model_dump(mode="json") | {"axis_order": AXIS_ORDER, "format": 1, "tcam_ext": tcam_ext.__version__}
    header = {"tcam": json.dumps(metadata)}
    fit = {
        "steps": result.steps_done,
        "seconds": round(result.seconds, 3),
        "stopped_early": result.stopped,
        "psnr_of_check_slices": result.psnr,
        "history": result.history,
    }
    files = {
        _PLANES: tensor_bytes(dict(zip(PLANE_NAMES, result.planes, strict=True)), header),
        _DECODER: tensor_bytes(result.decoder.state_dict(), header),
        _CONFIG: result.config.yaml().encode(),
    }
    folder.write({"tcam": metadata, "fit": fit}, files)


def save_somewhere(path: str | os.PathLike[str], result: FitResult, info: VolumeInfo) -> None:
    """Write the artefact. Where its folder cannot be written, write it to the temporary folder or the home folder.

    Raises UserError if its folder cannot be written, with the folder that has the artefact instead.
    """
    try:
        return save(path, result, info)
    except OSError as error:
        text = f"{path}: cannot be written: {reason(error)}"
        for place in (Path(tempfile.gettempdir()), Path.home(), Path.cwd()):
            try:
                rescue = Path(tempfile.mkdtemp(prefix="tcam-fit-", dir=place))
            except OSError:
                continue
            try:
                save(rescue, result, info)
            except OSError:
                shutil.rmtree(rescue, ignore_errors=True)
                continue
            raise UserError(f"{text}; the fitted volume is in {rescue}") from error
        raise UserError(f"{text}, nor can {tempfile.gettempdir()}, the home folder or {Path.cwd()}") from error


def load(path: str | os.PathLike[str]) -> FittedVolume:
    """Read a fitted volume and compare its files with their checksums. Raises UserError with the file's name."""
    folder = _folder(path)
    manifest = folder.read()
    with folder.reading():
        for name in (_PLANES, _DECODER, _CONFIG):
            folder.verify(name, manifest["sha256"][name])
        info = VolumeInfo.model_validate(manifest["tcam"])
        if not info.intensity:
            raise KeyError("intensity")
        config = configs.validate(FitConfig, configs.read_settings(folder / _CONFIG), str(folder / _CONFIG), ())
        tensors = folder.read_tensors(_PLANES)
        with folder.reading(_PLANES):
            planes = [tensors[name] for name in PLANE_NAMES]
            check_planes(planes, (1, config.channels))
        decoder = make_decoder(config, info.channels)
        with folder.reading(_DECODER):
            load_module(decoder, folder.read_tensors(_DECODER))
    return FittedVolume(planes, decoder.requires_grad_(False), config, info)


@contextmanager
def reserved(path: str | os.PathLike[str], overwrite: bool) -> Iterator[None]:
    """Reserve a folder for the result of a long fit. Raises UserError if it has a fitted volume, or cannot be written."""
    folder = _folder(path)
    with locked_folder(folder.path):
        if (folder / folder.index).exists() and not overwrite:
            raise UserError(f"{path}: already contains a fitted volume; choose another folder or add --overwrite")
        yield


def _folder(path: str | os.PathLike[str]) -> Folder:
    return Folder(Path(path), "manifest.json", "`tcam fit`", "fit the volume again")
