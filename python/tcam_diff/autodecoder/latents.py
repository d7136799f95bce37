"""The latent set: normalised planes of many volumes with the decoder that they belong to. What stage 2 is trained on.

latents.json                what, from where, every volume's geometry, intensities, PSNR, and the planes' statistics
planes/NAME.safetensors     xy, yz, xz: (C, rows, columns) float32, with the volume's entry as metadata
decoder.safetensors         the averaged decoder
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
from tcam_diff.autodecoder.planes import PLANE_NAMES
from tcam_diff.data.store import Record
from tcam_diff.data.volume import VolumeRecord
from tcam_diff.errors import UserError
from tcam_diff.files import replacing, sha256, writable_folder
from tcam_diff.folder import Folder, tensor_bytes

INDEX, DECODER = "latents.json", "decoder.safetensors"


class Entry(VolumeRecord):
    """A volume of the set."""

    name: str
    split: str
    psnr: float  # dB, of the whole volume, without noise
    steps: int
    sha256: str = ""


class LatentWriter:
    """Fills a set volume by volume; one that was begun with the same decoder and settings is gone on with."""

    def __init__(
        self, folder: Path, config: TrainConfig, decoder: tcam_ext.TriplaneDecoder, provenance: dict[str, Any]
    ) -> None:
        self.folder, self.config, self.provenance = folder, config, provenance
        self.files = _folder(folder)
        writable_folder(folder / "planes")
        weights = tensor_bytes(decoder.state_dict(), dtype=torch.float32)
        self.digest = hashlib.sha256(weights + json.dumps(provenance.get("encode"), sort_keys=True).encode()).hexdigest()
        held = folder / DECODER
        if held.exists() and hashlib.sha256(held.read_bytes()).hexdigest() != hashlib.sha256(weights).hexdigest():
            raise UserError(f"{folder}: holds the latents of another decoder; choose another folder")
        if not held.exists():
            with replacing(held) as file:
                file.write(weights)

    def path(self, name: str) -> Path:
        return self.files / _planes(name)

    def find(self, record: Record) -> Entry | None:
        """What an earlier run made of the same stored volume."""
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
        info = record.info.replaced(source=record.sources[0]["path"] if record.sources else "")
        entry = Entry(info=info, name=record.name, split=record.split, psnr=psnr, steps=steps)
        tensors = {n: p[0] for n, p in zip(PLANE_NAMES, planes, strict=True)}
        meta = {"tcam": json.dumps(entry.model_dump(mode="json")), "digest": self.digest, "volume": record.sha256}
        with replacing(self.path(record.name)) as file:
            file.write(tensor_bytes(tensors, meta, torch.float32))
        return entry

    def finish(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Write the index, with the statistics of the planes; returns those."""
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
        """Of each plane over the set: root mean square, that of each channel, and the share of the energy that is in the mean
        plane (algorithm.md 6.5: much of it means that centring would help the diffusion model)."""
        total: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        for entry in entries:
            for name, plane in self.files.read_tensors(_planes(entry.name)).items():
                plane = plane.double()
                total[name] = total.get(name, 0) + plane
                squares[name] = squares.get(name, 0) + plane.square().mean((1, 2))
        found = {}
        for name in PLANE_NAMES:
            mean, energy = total[name] / len(entries), squares[name] / len(entries)
            found[name] = {
                "rms": float(energy.mean().sqrt()),
                "channel_rms": [round(float(x), 6) for x in energy.sqrt()],
                "mean_plane_energy_share": float(mean.square().mean() / energy.mean()),
            }
        return found


class LatentSet:
    """An opened set."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.files = _folder(self.folder)
        self.index = self.files.read()
        with self.files.reading():
            self.entries = [Entry.model_validate(e) for e in self.index["volumes"]]
            self.config = configs.validate(TrainConfig, self.index["config"], str(self.files / INDEX))

    def entry(self, name: str) -> Entry:
        for e in self.entries:
            if e.name == name:
                return e
        names = ", ".join(e.name for e in self.entries[:5])
        raise UserError(f"{self.folder}: no volume {name!r}; it has {names}{', ...' if len(self.entries) > 5 else ''}")

    def planes(self, entry: Entry) -> list[Tensor]:
        """xy, yz, xz: (C, rows, columns)."""
        held = self.files.read_tensors(_planes(entry.name))
        return [held[name] for name in PLANE_NAMES]

    def verify(self, entry: Entry) -> None:
        self.files.verify(_planes(entry.name), entry.sha256)

    def decoder(self) -> tcam_ext.TriplaneDecoder:
        made = make_decoder(self.config, self.entries[0].info.channels).float()
        with self.files.reading():
            made.load_state_dict(self.files.read_tensors(DECODER, self.index["decoder_sha256"]))
        return made.requires_grad_(False)

    def check_decoder(self, other: tcam_ext.TriplaneDecoder, whose: object) -> None:
        """Raises UserError where this set's planes are of another decoder: they would decode to something else."""
        mine, theirs = self.decoder().state_dict(), other.state_dict()
        same = mine.keys() == theirs.keys() and all(
            v.shape == theirs[k].shape and torch.equal(v, theirs[k].to(v)) for k, v in mine.items()
        )
        if not same:
            raise UserError(
                f"{self.folder}: planes of another decoder than that of {whose}; encode with the same run of stage 1"
            )

    def fitted(self, name: str) -> artefact.FittedVolume:
        """A volume, ready to be decoded."""
        entry = self.entry(name)
        self.verify(entry)
        planes = [p.unsqueeze(0) for p in self.planes(entry)]
        return artefact.FittedVolume(planes, self.decoder(), self.config, entry.info)


def _planes(name: str) -> str:
    return f"planes/{name}.safetensors"


def _folder(path: Path) -> Folder:
    return Folder(path, INDEX, "`tcam encode` or `tcam export-latents`", "make the set again", formats=(1, 2))
