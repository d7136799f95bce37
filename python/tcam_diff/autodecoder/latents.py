"""Latent set: normalised planes of many volumes with their decoder, the training data of stage 2.

latents.json                configuration, provenance, entries of the volumes, and statistics of the planes
planes/NAME.safetensors     xy, yz, xz: (C, rows, columns) float32, with the volume's entry as metadata
decoder.safetensors         averaged decoder
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import tcam_ext
from tcam_diff import config as configs
from tcam_diff.autodecoder import artefact
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.objective import make_decoder
from tcam_diff.autodecoder.planes import PLANE_NAMES, check_planes
from tcam_diff.data.store import Record
from tcam_diff.data.volume import FileName, VolumeRecord
from tcam_diff.errors import UserError
from tcam_diff.files import replacing, sha256, writable_folder
from tcam_diff.folder import Folder, tensor_bytes
from tcam_diff.training.states import load_module

INDEX, DECODER = "latents.json", "decoder.safetensors"


class Entry(VolumeRecord):
    """Entry of a volume."""

    name: FileName
    split: str
    psnr: float  # dB, of the whole volume, without noise
    steps: int
    sha256: str = ""


class LatentWriter:
    """Writer of a latent set, which may be an unfinished one with the same decoder and settings.

    Args:
        folder: folder of the set.
        config: configuration of the decoder's training.
        decoder: averaged decoder.
        provenance: origin of the planes, for the index; "encode" has the settings of the encoding.

    Raises:
        UserError: the folder has latents of another decoder, or cannot be written.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, decoder: tcam_ext.TriplaneDecoder, provenance: dict[str, Any]
    ) -> None:
        self.folder, self.config, self.provenance = folder, config, provenance
        self.files = _folder(folder)
        writable_folder(folder / "planes")
        weights = tensor_bytes(decoder.state_dict(), dtype=torch.float32)
        self.digest = hashlib.sha256(weights + json.dumps(provenance.get("encode"), sort_keys=True).encode()).hexdigest()
        path = folder / DECODER
        if path.exists() and path.read_bytes() != weights:
            raise UserError(f"{folder}: contains latents of another decoder; choose another folder")
        if not path.exists():
            with replacing(path) as file:
                file.write(weights)

    def path(self, name: str) -> Path:
        """File of a volume's planes."""
        return self.files / _planes(name)

    def find(self, record: Record) -> Entry | None:
        """The entry of a volume that an earlier run wrote with the same decoder and settings, if any."""
        path = self.path(record.name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata()
        except SafetensorError:
            return None
        if meta.get("digest") != self.digest or meta.get("volume") != record.sha256:
            return None
        return Entry.model_validate(json.loads(meta["tcam"]))

    def write(self, record: Record, planes: Sequence[Tensor], psnr: float, steps: int) -> Entry:
        """Write the planes (1, C, rows, columns) of a volume."""
        info = record.info.replaced(source=record.sources[0]["path"] if record.sources else "")
        entry = Entry(info=info, name=record.name, split=record.split, psnr=psnr, steps=steps)
        tensors = {n: p[0] for n, p in zip(PLANE_NAMES, planes, strict=True)}
        meta = {"tcam": json.dumps(entry.model_dump(mode="json")), "digest": self.digest, "volume": record.sha256}
        with replacing(self.path(record.name)) as file:
            file.write(tensor_bytes(tensors, meta, torch.float32))
        return entry

    def finish(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Write the index. Returns the statistics of the planes."""
        statistics = self.statistics(entries)
        self.files.write(
            {
                "planes": "xy, yz, xz of volumes (channels, x, y, z) = file axes (i, j, k); first axis first",
                "config": self.config.model_dump(mode="json"),
                "provenance": self.provenance | {"tcam_ext": tcam_ext.__version__},
                "statistics": statistics,
                "decoder_sha256": sha256(self.folder / DECODER),
                "volumes": [e.model_dump(mode="json") | {"sha256": sha256(self.path(e.name))} for e in entries],
            }
        )
        return statistics

    def statistics(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Statistics of each plane over the set.

        These are the root mean square, that of each channel, and the energy of the mean plane as a share of all energy. If this
        share is large, centring helps the diffusion model (algorithm.md 6.5).
        """
        total: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        for entry in entries:
            for name, plane in self.files.read_tensors(_planes(entry.name)).items():
                plane = plane.double()
                total[name] = total.get(name, 0) + plane
                squares[name] = squares.get(name, 0) + plane.square().mean((1, 2))
        statistics = {}
        for name in PLANE_NAMES:
            mean, energy = total[name] / len(entries), squares[name] / len(entries)
            statistics[name] = {
                "rms": float(energy.mean().sqrt()),
                "channel_rms": [round(float(x), 6) for x in energy.sqrt()],
                "mean_plane_energy_share": float(mean.square().mean() / energy.mean()),
            }
        return statistics


class LatentSet:
    """A latent set, opened for reading. Raises UserError if its index is missing or damaged."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.files = _folder(self.folder)
        self.index = self.files.read()
        with self.files.reading():
            self.entries = [Entry.model_validate(e) for e in self.index["volumes"]]
            self.config = configs.validate(TrainConfig, self.index["config"], str(self.files / INDEX), ())

    def entry(self, name: str) -> Entry:
        """The entry of a volume. Raises UserError if there is none."""
        for e in self.entries:
            if e.name == name:
                return e
        names = ", ".join(e.name for e in self.entries[:5])
        raise UserError(f"{self.folder}: no volume {name!r}; it has {names}{', ...' if len(self.entries) > 5 else ''}")

    def planes(self, entry: Entry) -> list[Tensor]:
        """Planes xy, yz, xz (C, rows, columns) of a volume."""
        name = _planes(entry.name)
        with self.files.reading(name):
            tensors = self.files.read_tensors(name)
            planes = [tensors[name] for name in PLANE_NAMES]
            check_planes(planes, (self.config.channels,))
            return planes

    def verify(self, entry: Entry) -> None:
        """Compare the planes of a volume with their checksum. Raises UserError with the file's name."""
        self.files.verify(_planes(entry.name), entry.sha256)

    def check_volume(self, entry: Entry, record: Record) -> None:
        """Raise UserError if the planes were not made from this volume of a store."""
        path = self.files / _planes(entry.name)
        with self.files.reading(_planes(entry.name)), safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("volume", record.sha256)
        if digest != record.sha256:
            raise UserError(f"{path}: made from another volume than {record.name!r} of the store, or from other preprocessing")

    def decoder(self) -> tcam_ext.TriplaneDecoder:
        """The frozen decoder in float32. Raises UserError if its file is missing or damaged."""
        with self.files.reading():
            decoder = make_decoder(self.config, self.entries[0].info.channels).float()
            tensors = self.files.read_tensors(DECODER, self.index["decoder_sha256"])
        with self.files.reading(DECODER):
            load_module(decoder, tensors)
        return decoder.requires_grad_(False)

    def check_decoder(self, other: tcam_ext.TriplaneDecoder, owner: object) -> None:
        """Raise UserError if ``other`` is not the decoder of this set. ``owner`` names its folder in the message."""
        own, others = self.decoder().state_dict(), other.state_dict()
        same = own.keys() == others.keys() and all(
            v.shape == others[k].shape and torch.equal(v, others[k].to(v)) for k, v in own.items()
        )
        if not same:
            raise UserError(
                f"{self.folder}: planes of another decoder than that of {owner}; encode with the same run of stage 1"
            )

    def fitted(self, name: str) -> artefact.FittedVolume:
        """Planes of a volume with their decoder. Raises UserError if they are missing or damaged."""
        entry = self.entry(name)
        self.verify(entry)
        planes = [p.unsqueeze(0) for p in self.planes(entry)]
        return artefact.FittedVolume(planes, self.decoder(), self.config, entry.info)


def is_latent_set(path: Path) -> bool:
    """Whether a folder is a latent set."""
    return (path / INDEX).is_file()


def _planes(name: str) -> str:
    return f"planes/{name}.safetensors"


def _folder(path: Path) -> Folder:
    return Folder(path, INDEX, "`tcam encode` or `tcam export-latents`", "make the set again", formats=(1, 2))
