"""Gaussian with the mean and the covariance of the planes of a latent set (algorithm.md section 11): what costs nothing.

gaussian.json           format, configuration, metadata of the volumes, checksums
gaussian.safetensors    mean planes, and directions (K, numbers) scaled to their standard deviations
decoder.safetensors     decoder of stage 1
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tcam_ext
from tcam_diff.autodecoder.artefact import FittedVolume
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.objective import make_decoder
from tcam_diff.autodecoder.planes import normalise
from tcam_diff.baselines.config import GaussianConfig
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.diffusion.data import LatentData, typical
from tcam_diff.diffusion.prior_fit import principal
from tcam_diff.diffusion.process import pack, unpack
from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder
from tcam_diff.folder import Folder, tensor_bytes
from tcam_diff.training.loop import peak_memory
from tcam_diff.training.rng import rng
from tcam_diff.training.states import load_module

INDEX, TENSORS, DECODER = "gaussian.json", "gaussian.safetensors", "decoder.safetensors"


@dataclass
class Gaussian:
    """Mean (numbers,) and scaled directions (K, numbers) of packed planes, with their decoder."""

    mean: Tensor
    directions: Tensor
    decoder: tcam_ext.TriplaneDecoder
    stage1: TrainConfig
    info: VolumeInfo
    sizes: list[tuple[int, int]]  # rows and columns of xy, yz, xz

    @staticmethod
    def fit(config: GaussianConfig) -> Gaussian:
        """Mean and covariance of a latent set of at least two volumes."""
        data = LatentData(config.latents)
        if len(data) < 2:
            raise UserError(f"{config.latents}: {len(data)} volume; a covariance needs at least two")
        p = principal(pack([p.float() for p in data.planes]), config.directions)
        sizes = [(p.shape[2], p.shape[3]) for p in data.planes]
        info = typical(data.set.entries)
        return Gaussian(p.mean, p.variances[:, None].sqrt() * p.directions, data.set.decoder(), data.set.config, info, sizes)

    def draw(self, index: int, seed: int) -> Tensor:
        """Packed planes (numbers,) of sample ``index`` of a seed: normals times the directions, about the mean."""
        z = torch.randn(len(self.directions), generator=rng(seed, "sample", index))
        return self.mean + z @ self.directions

    def volume(self, index: int, seed: int) -> FittedVolume:
        """Sample ``index`` of a seed, as normalised planes with their decoder."""
        planes = unpack(self.draw(index, seed)[None], self.stage1.channels, self.sizes)
        return FittedVolume(normalise(planes, self.stage1.norm), self.decoder, self.stage1, self.info)

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Write the Gaussian. The index appears last."""
        files = {
            TENSORS: tensor_bytes({"mean": self.mean, "directions": self.directions}),
            DECODER: tensor_bytes(self.decoder.state_dict()),
        }
        index = {
            "stage1": self.stage1.model_dump(mode="json"),
            "info": self.info.model_dump(mode="json", exclude={"source"}),
            "sizes": self.sizes,
            "provenance": provenance | {"tcam_ext": tcam_ext.__version__},
        }
        writable_folder(folder)
        _folder(folder).write(index, files)

    @staticmethod
    def load(folder: Path) -> Gaussian:
        """Load a Gaussian. Raises UserError if it is missing or damaged."""
        files = _folder(folder)
        index = files.read()
        with files.reading():
            stage1, info = TrainConfig.model_validate(index["stage1"]), VolumeInfo.model_validate(index["info"])
            sizes = [(int(r), int(c)) for r, c in index["sizes"]]
            sums = index["sha256"]
        tensors = files.read_tensors(TENSORS, sums[TENSORS])
        decoder = make_decoder(stage1, info.channels).float()
        with files.reading(DECODER):
            load_module(decoder, files.read_tensors(DECODER, sums[DECODER]))
        with files.reading(TENSORS):
            numbers = stage1.channels * sum(r * c for r, c in sizes)
            if tensors["mean"].shape != (numbers,) or tensors["directions"].shape[1:] != (numbers,):
                raise ValueError(f"expected planes of {numbers} numbers")
        return Gaussian(tensors["mean"], tensors["directions"], decoder, stage1, info, sizes)


def fit_gaussian(config: GaussianConfig, out: Path) -> Gaussian:
    """Fit a Gaussian to a latent set and write it. Raises UserError as ``Gaussian.fit`` does."""
    start = time.monotonic()
    made = Gaussian.fit(config)
    made.save(out, {"seconds": time.monotonic() - start, "memory_gb": peak_memory(torch.device("cpu")) / 1e9})
    return made


def is_gaussian(path: Path) -> bool:
    """Whether a folder has a Gaussian."""
    return (path / INDEX).is_file()


def _folder(path: Path) -> Folder:
    return Folder(path, INDEX, "`tcam baseline train gaussian`", "fit it again")
