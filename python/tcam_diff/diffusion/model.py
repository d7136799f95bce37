"""A trained model on disk and in hand: the averaged network with the decoder, and all that makes volumes of its planes.

model.json            format, configurations, geometry, intensities, classes, provenance, checksums
network.safetensors   the averaged network, and mean planes where the set was centred
decoder.safetensors   stage 1's decoder
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tcam_ext
from tcam_diff import config as configs
from tcam_diff.autodecoder.artefact import FittedVolume, decoding_dtype
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.objective import make_decoder
from tcam_diff.autodecoder.planes import PLANE_NAMES, normalise, plane_sizes
from tcam_diff.data.volume import VolumeRecord
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.diffusion.data import Centre, LatentData, typical
from tcam_diff.diffusion.network import TriplaneUNet
from tcam_diff.diffusion.process import pack, unpack
from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder
from tcam_diff.folder import Folder, tensor_bytes

INDEX, NETWORK, DECODER = "model.json", "network.safetensors", "decoder.safetensors"
FOLDERS = ("latents", "validation", "labels")  # of a configuration


class Geometry(VolumeRecord):
    """Of the volumes that stage 1 was trained on, and of their planes."""

    texels: tuple[int, int, int]  # along x, y, z
    classes: list[str]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of xy, yz, xz."""
        return plane_sizes(self.texels)


class TriplaneDiffusion(nn.Module):
    """Network and decoder: ``TriplaneDiffusion.load(folder)``; ``Sampler`` of tcam_diff.diffusion.sampling draws from it.

    Args:
        network: the trained network, its weights averaged.
        decoder: stage 1's.
        config: of the training of the network.
        stage1: of the training of the decoder: how planes are normalised, in which type it decodes.
        geometry: of the volumes.
        centre: what was subtracted from planes, and divided by; None: nothing.
        provenance: for the record.
    """

    def __init__(
        self,
        network: TriplaneUNet,
        decoder: tcam_ext.TriplaneDecoder,
        config: DiffusionConfig,
        stage1: TrainConfig,
        geometry: Geometry,
        centre: Centre | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.decoder = network, decoder
        self.config, self.stage1, self.geometry, self.centre = config, stage1, geometry, centre
        self.provenance = provenance or {}
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def channels(self) -> int:
        return self.network.channels

    @property
    def length(self) -> int:
        """M: entries of a volume's planes."""
        return self.channels * sum(h * w for h, w in self.geometry.sizes)

    @property
    def decoding(self) -> torch.dtype | None:
        """Of the decoder's products."""
        return decoding_dtype(self.stage1, self.device)

    @property
    def identity(self) -> str:
        """A digest of network, centre, decoder and geometry: what samples are a function of, beside their settings."""
        g, info = self.geometry, self.geometry.info
        text = (  # as version 0.1.0 wrote it, so that its samples are known again
            f"Geometry(texels={g.texels}, shape={info.shape}, outputs={info.channels}, affine={info.affine.tolist()}, "
            f"intensity={info.intensity}, classes={g.classes})"
        )
        other = info.model_dump(include={"codes", "units"}, exclude_defaults=True)
        digest = hashlib.sha256(f"{text}{other or ''}".encode())
        means = [] if self.centre is None else [*self.centre.mean, torch.tensor(self.centre.scale)]
        for t in (*self.network.state_dict().values(), *means, *self.decoder.state_dict().values()):
            digest.update(t.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def computing(self) -> torch.dtype:
        """Of the network's products."""
        return network_dtype(self.config.compute_dtype, self.device)

    def label(self, name: str | None) -> int | None:
        """The index of a class. Raises UserError."""
        if name is None:
            return None
        if name not in self.geometry.classes:
            known = ", ".join(self.geometry.classes) or "none: this model was trained without labels"
            raise UserError(f"label: expected one of {known}, got {name}")
        return self.geometry.classes.index(name)

    # ---- between states of the diffusion and planes --------------------------------------

    def estimate(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, 2M), noise then planes, for packed states (B, M): what a scheduler's step takes."""
        products = self.computing
        with torch.autocast(x.device.type, torch.bfloat16, enabled=products == torch.bfloat16), _exact(x.device, products):
            state = x.to(self.network.enter.weight.dtype)
            noise, x0 = self.network(unpack(state, self.channels, self.geometry.sizes), t, labels)
        return torch.cat([pack(noise), pack(x0)], 1).to(x.dtype)

    def planes(self, x: Tensor) -> list[Tensor]:
        """Normalised planes (B, C, rows, columns), as the decoder knows them, of states (B, M)."""
        found = unpack(x, self.channels, self.geometry.sizes)
        return normalise(self.centre.invert(found) if self.centre is not None else found, self.stage1.norm)

    def state(self, planes: Sequence[Tensor]) -> Tensor:
        """(B, M) of normalised planes."""
        return pack(self.centre.apply(planes) if self.centre is not None else planes)

    def decode(self, planes: Sequence[Tensor], size: Sequence[int] | None = None) -> Tensor:
        """(B, channels, H, W, D) in [0, 1], at once; see ``volume`` for large ones."""
        values: Tensor = self.decoder(list(planes), tuple(size or self.geometry.info.shape), compute_dtype=self.decoding)
        return values.float().clamp(0, 1)

    def volume(self, planes: Sequence[Tensor]) -> FittedVolume:
        """One volume's planes (1, C, rows, columns), to be decoded to any size slab by slab, in physical units."""
        return FittedVolume(list(planes), self.decoder, self.stage1, self.geometry.info)

    # ---- files --------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model. Its files take their names together, the index with the checksums last, when all are on the disk."""
        files = _folder(Path(folder))
        writable_folder(files.path)
        tensors = dict(self.network.state_dict())
        if self.centre is not None:
            tensors |= {f"centre.{n}": m for n, m in zip(PLANE_NAMES, self.centre.mean, strict=True)}
        index = {
            "axis_order": "planes xy, yz, xz of volumes (channels, x, y, z) = file axes (i, j, k); first axis first",
            "channels": self.channels,
            "geometry": self.geometry.model_dump(mode="json"),
            "centre_scale": None if self.centre is None else self.centre.scale,
            "config": self.config.model_dump(mode="json"),
            "stage1": self.stage1.model_dump(mode="json"),
            "provenance": self.provenance | {"tcam_ext": tcam_ext.__version__},
        }
        held = {NETWORK: tensors, DECODER: self.decoder.state_dict()}
        files.write(index, {name: tensor_bytes(t, dtype=torch.float32) for name, t in held.items()})

    @staticmethod
    def load(
        folder: str | os.PathLike[str], device: str | torch.device = "cpu", compute: str | None = None
    ) -> TriplaneDiffusion:
        """A model's folder, or that of a run that holds one. Every file is compared with its checksum. Raises UserError.

        ``compute``: the type of the products of network and decoder: auto, float32 or bfloat16; None: as in training. In
        float32 convolutions on GPUs take no TF32; other products follow torch's own switch, which is off by default.
        """
        files = _folder(find(Path(folder)))
        path = str(files / INDEX)
        index = files.read()
        with files.reading():
            sums = index["sha256"]
            geometry = Geometry.model_validate(index["geometry"])
            config = configs.validate(DiffusionConfig, index["config"], path)
            stage1 = configs.validate(TrainConfig, index["stage1"], path)
            if compute is not None:
                config = config.model_copy(update={"compute_dtype": compute})
                stage1 = stage1.model_copy(update={"compute_dtype": compute})
            tensors = files.read_tensors(NETWORK, sums[NETWORK])
            centre = None
            if index["centre_scale"] is not None:
                centre = Centre([tensors.pop(f"centre.{n}") for n in PLANE_NAMES], index["centre_scale"])
            network = TriplaneUNet(index["channels"], config.network, len(geometry.classes))
            network.load_state_dict(tensors)
            decoder = make_decoder(stage1, geometry.info.channels).float()
            decoder.load_state_dict(files.read_tensors(DECODER, sums[DECODER]))
        model = TriplaneDiffusion(network, decoder, config, stage1, geometry, centre, index["provenance"])
        model.network.placed(torch.device(device))
        return model.to(device)


@contextlib.contextmanager
def _exact(device: torch.device, products: torch.dtype) -> Iterator[None]:
    """Convolutions on GPUs in float32 proper where that is asked for: cuDNN takes TF32 by default."""
    if device.type != "cuda" or products != torch.float32:
        yield
        return
    flags: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    held = flags.fp32_precision
    flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = held


def find(folder: Path) -> Path:
    """The folder of the model: ``folder`` itself, or model/ in it. Raises UserError."""
    for at in (folder, folder / "model"):
        if (at / INDEX).is_file():
            return at
    raise UserError(f"{folder}: no model: expected a run of `tcam train-diffusion` or a model's folder")


def _folder(path: Path) -> Folder:
    remedy = "copy the model again, or `tcam train-diffusion --resume auto` writes it again"
    return Folder(path, INDEX, "`tcam train-diffusion`", remedy, formats=(1, 2))


def of_data(
    network: TriplaneUNet, data: LatentData, config: DiffusionConfig, centre: Centre | None, step: int
) -> TriplaneDiffusion:
    """The model of a network that was trained on ``data``."""
    (x, y), (_, z) = data.planes[0].shape[2:], data.planes[1].shape[2:]
    geometry = Geometry(info=typical(data.set.entries), texels=(x, y, z), classes=data.classes)
    # no folders of this machine go with the model
    config = config.model_copy(update={k: Path(v).name for k in FOLDERS if (v := getattr(config, k)) is not None})
    stage1 = {k: v for k, v in data.set.index["provenance"].items() if k not in ("run", "store")}
    provenance = {"step": step, "volumes": len(data), "latents": data.digest, "stage1": stage1}
    decoder = data.set.decoder().to(network.enter.weight.device)
    return TriplaneDiffusion(network, decoder, config, data.set.config, geometry, centre, provenance)


def network_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the network's products. "auto": bfloat16 on GPUs."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]
