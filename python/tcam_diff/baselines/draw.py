"""Reconstructions and samples of rivals as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcam_diff.autodecoder.decode import Decodable, check_output, decode_to_file
from tcam_diff.baselines import gaussian as gaussians
from tcam_diff.baselines import latent_diffusion as ldms
from tcam_diff.baselines.compression import INDEX, Compression, is_compression
from tcam_diff.baselines.gaussian import Gaussian, is_gaussian
from tcam_diff.baselines.latent_diffusion import LatentDiffusion, is_latent_diffusion
from tcam_diff.data.store import Store, unit
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.diffusion.draw import SHEET, Files, contact_sheet
from tcam_diff.errors import UserError
from tcam_diff.evaluation.picture import strip
from tcam_diff.files import locked_folder, sha256
from tcam_diff.progress import Progress, ProgressCallback, StopCallback
from tcam_diff.text import size_text
from tcam_diff.training.distributed import device_of


@dataclass
class PlainVolume:
    """Voxels (channels, H, W, D) in [0, 1] with their metadata, to write to a file of the same size."""

    values: Tensor
    info: VolumeInfo

    def decode(self, size: tuple[int, int, int]) -> Iterator[np.ndarray]:
        """The whole volume in physical units."""
        if tuple(size) != self.info.shape:
            raise ValueError(f"size: expected {self.info.shape}, got {size}")
        yield self.info.to_physical(self.values).numpy()


def reconstruct(
    run: Path,
    store: Store,
    out: Path,
    *,
    split: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> int:
    """Compress the volumes of a store, and write what is left of them as NIfTI under the names of the cases.

    Args:
        run: run of `tcam baseline train` with vae-gan or vq-gan.
        store: volumes with the shape of the training volumes.
        out: folder of the files. Files that exist are written again.
        split: split of the store; None: all.
        dtype: float32, int16, uint16 or uint8.
        device: auto, cpu, cuda, ...
        progress: called after every volume.

    Returns:
        The number of volumes.

    Raises:
        UserError: the run or a volume does not fit.
    """
    check_output((1, 1, 1), dtype)
    where = device_of(device)
    model = Compression.load(run, where)
    records = store.records if split is None else store.in_split(split)
    with locked_folder(out):
        for done, record in enumerate(records, 1):
            if record.info.array_shape != model.info.array_shape:
                raise UserError(
                    f"{record.name}: {record.info.array_shape} voxels (channels first), the volumes of {run} have "
                    f"{model.info.array_shape}"
                )
            volume = unit(torch.tensor(store.volume(record)))[None].to(where)
            values = model.reconstruct(volume)[0].cpu()
            decode_to_file(PlainVolume(values, record.info), out / f"{record.name}.nii.gz", record.info.shape, dtype)
            if progress is not None:
                progress(Progress(done, len(records)))
    return len(records)


def draw(
    run: Path,
    out: Path,
    indices: Sequence[int],
    *,
    seed: int = 0,
    dtype: str = "float32",
    planes: bool = False,
    batch_size: int = 4,
    device: str = "auto",
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> bool:
    """Draw the samples of a rival that are missing in a folder, in the form of ``draw_samples``, and a contact sheet of all.

    Args:
        run: run of `tcam baseline train` with ldm-... or gaussian.
        out: folder of the samples.
        indices: numbers of the samples.
        seed: their seed. Sample i depends on it and on i alone.
        dtype: float32, int16, uint16 or uint8.
        planes: whether to write the planes of each sample, too, for gaussian.
        batch_size: samples drawn at a time.
        device: auto, cpu, cuda, ...
        progress: called after every sample.
        stop: asked before every batch.

    Returns:
        Whether all samples were drawn; False if ``stop`` returned true.

    Raises:
        UserError: the run has no generative model, or the folder has samples with other settings.
    """
    check_output((1, 1, 1), dtype)
    if planes and not is_gaussian(run):
        raise UserError(f"--planes: the samples of {run} have no planes; only those of gaussian have")
    info, model, make = _generator(run, device, seed)
    kind = "gaussian" if is_gaussian(run) else "latent diffusion"
    settings: dict[str, Any] = {
        "rival": kind, "model": model, "sampling": {"seed": seed}, "size": list(info.shape), "dtype": dtype,
    }  # fmt: skip
    with locked_folder(out):
        files = {i: Files.of_sample(out, i, f"seed{seed}", planes) for i in indices}
        missing = [i for i in indices if not files[i].complete(settings)]
        for first in range(0, len(missing), batch_size):
            if stop is not None and stop():
                return False
            batch = missing[first : first + batch_size]
            for k, (i, (volume, values)) in enumerate(zip(batch, make(batch), strict=True), 1):
                files[i].write(volume, strip(values, info.affine), settings, {"index": i})
                if progress is not None:
                    progress(Progress(first + k, len(missing)))
        contact_sheet(out / SHEET, [files[i].preview for i in indices])
    return True


Made = Callable[[Sequence[int]], list[tuple[Decodable, np.ndarray]]]


def _generator(run: Path, device: str, seed: int) -> tuple[VolumeInfo, str, Made]:
    """Metadata of samples, digests of the model's indexes (they have its tensors' digests), and a function that draws: volumes,
    and their first channels."""
    if is_gaussian(run):
        gaussian = Gaussian.load(run)

        def planes(indices: Sequence[int]) -> list[tuple[Decodable, np.ndarray]]:
            volumes = [gaussian.volume(i, seed) for i in indices]
            return [(v, v.whole()[0].numpy()) for v in volumes]

        return gaussian.info, sha256(run / gaussians.INDEX), planes
    if is_latent_diffusion(run):
        ldm = LatentDiffusion.load(run, device_of(device))
        info = ldm.compression.info

        def latents(indices: Sequence[int]) -> list[tuple[Decodable, np.ndarray]]:
            values = ldm.sample(indices, seed).cpu()
            return [(PlainVolume(v, info), v[0].numpy()) for v in values]

        return info, " ".join(sha256(p) for p in (run / ldms.INDEX, run / ldms.AUTOENCODER / INDEX)), latents
    raise UserError(
        f"{run}: no generative model of `tcam baseline train`: expected a run of ldm-... or gaussian"
        + (f", got one of {size_text(Compression.load(run).latent_shape)} latents" if is_compression(run) else "")
    )
