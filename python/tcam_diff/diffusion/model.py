"""Trained diffusion model: averaged network, decoder and metadata, in memory and on disk.

model.json            format, configurations, geometry, intensities, classes, provenance, checksums
network.safetensors   averaged network, mean planes if planes are centred, and the gaussian prior, if any
decoder.safetensors   decoder of stage 1
"""

from __future__ import annotations

import contextlib
import hashlib
import math
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
from tcam_diff.autodecoder.planes import PLANE_NAMES, check_planes, normalise, plane_sizes
from tcam_diff.data.volume import Size, VolumeRecord
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.diffusion.data import Centre, LatentData, typical
from tcam_diff.diffusion.network import TriplaneUNet
from tcam_diff.diffusion.prior import GaussianPrior, Sizes
from tcam_diff.diffusion.process import pack, unpack
from tcam_diff.diffusion.spacing import Spacings, with_spacing
from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder
from tcam_diff.folder import Folder, tensor_bytes
from tcam_diff.machine import products
from tcam_diff.text import shown
from tcam_diff.training.states import load_module

INDEX, NETWORK, DECODER = "model.json", "network.safetensors", "decoder.safetensors"
PATHS = ("latents", "validation", "labels")  # keys of the configuration


class Geometry(VolumeRecord):
    """Metadata of the training volumes, texels of their planes, and classes."""

    texels: tuple[Size, Size, Size]  # along x, y, z
    classes: list[str]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of xy, yz, xz."""
        return plane_sizes(self.texels)


class TriplaneDiffusion(nn.Module):
    """Trained model: network and decoder.

    ``TriplaneDiffusion.load`` reads one, and ``tcam_diff.diffusion.sampling.Sampler`` draws samples from it.

    Args:
        network: trained network with averaged weights.
        decoder: decoder of stage 1.
        config: configuration of the network's training.
        stage1: configuration of the decoder's training, which sets normalisation and type of the products.
        geometry: metadata of volumes and planes.
        centre: centring of the planes; None: planes are not centred.
        provenance: origin of the model, for its index.
        prior: skip around the network; None: its heads are the estimates.
        variances: smallest and largest variance of the states' modes, for the grid of solvers; None: not known.
        consistency: whether the network estimates the planes to which a state's trajectory leads (`tcam distill`), instead of
            the mean of the planes given the state. Needs a prior.
        spacings: voxel sizes of the training volumes, on which the estimates depend; None: they do not.
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
        prior: GaussianPrior | None = None,
        variances: tuple[float, float] | None = None,
        consistency: bool = False,
        spacings: Spacings | None = None,
    ) -> None:
        super().__init__()
        self.consistency, self.spacings = consistency, spacings
        self.network, self.decoder, self.prior, self.variances = network, decoder, prior, variances
        self.config, self.stage1, self.geometry, self.centre = config, stage1, geometry, centre
        self.provenance = provenance or {}
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    @property
    def channels(self) -> int:
        """Channels C of the planes."""
        return self.network.channels

    @property
    def length(self) -> int:
        """Number M of entries of a volume's planes."""
        return self.channels * sum(h * w for h, w in self.geometry.sizes)

    @property
    def decoding(self) -> torch.dtype | None:
        """Type of the decoder's products; None: float32."""
        return decoding_dtype(self.stage1, self.device)

    @property
    def identity(self) -> str:
        """Digest of network, centring, decoder and geometry. With their settings it determines samples."""
        g, info = self.geometry, self.geometry.info
        text = (  # the text of version 0.1.0, to recognise its samples
            f"Geometry(texels={g.texels}, shape={info.shape}, outputs={info.channels}, affine={info.affine.tolist()}, "
            f"intensity={info.intensity}, classes={g.classes})"
        )
        other = info.model_dump(include={"codes", "units"}, exclude_defaults=True)
        digest = hashlib.sha256(f"{text}{other or ''}".encode())
        means = [] if self.centre is None else [*self.centre.mean, torch.tensor(self.centre.scale)]
        means += [] if self.variances is None else [torch.tensor(self.variances)]
        means += [torch.ones(1)] if self.consistency else []
        means += [] if self.spacings is None else [self.spacings.sizes]
        means += [] if self.prior is None else self.prior.state_dict().values()
        for t in (*self.network.state_dict().values(), *means, *self.decoder.state_dict().values()):
            digest.update(t.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def computing(self) -> torch.dtype:
        """Type of the network's products."""
        return products(self.config.compute_dtype, self.device)

    def label(self, name: str | None) -> int | None:
        """Index of a class, or None for no class. Raises UserError if the model does not have it."""
        if name is None:
            return None
        if name not in self.geometry.classes:
            known = ", ".join(self.geometry.classes) or "none: this model was trained without labels"
            raise UserError(f"label: expected one of {known}, got {name}")
        return self.geometry.classes.index(name)

    # ---- states and planes ---------------------------------------------------------------

    def estimate(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, sizes: Tensor | None = None, guidance: float = 1.0
    ) -> Tensor:
        """Estimate noise and planes.

        Args:
            x: states (B, M).
            t: timesteps (B,) in [0, 1000].
            labels: class indices (B,); None: no classes.
            sizes: voxel sizes (B, 3) in mm, of a model with ``spacings``.
            guidance: factor of the network's corrections of the prior's estimates, of a model with a prior.

        Returns:
            (B, 2M), noise, then planes.
        """
        dtype = self.computing
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16), _no_tf32(x.device, dtype):
            state = unpack(x.to(self.network.enter.weight.dtype), self.channels, self.geometry.sizes)
            numbers = None if self.spacings is None or sizes is None else self.spacings.condition(sizes)
            needed = self.prior is not None and (self.config.network.prior_input or not self.consistency)
            own = self.prior.denoised(state, t) if self.prior is not None and needed else None
            noise, x0 = self.network(state, t, labels, numbers, None if own is None else own[1])
            if guidance != 1:
                noise, x0 = ([guidance * head for head in heads] for heads in (noise, x0))
            if self.prior is not None and self.consistency:
                noise, x0 = self.prior.combine_flow(state, t, x0)
            elif self.prior is not None and own is not None:
                noise, x0 = self.prior.combine(own, t, noise, x0)
        return torch.cat([pack(noise), pack(x0)], 1).to(x.dtype)

    def planes(self, x: Tensor) -> list[Tensor]:
        """Convert states (B, M) to normalised planes (B, C, rows, columns) for the decoder."""
        planes = unpack(x, self.channels, self.geometry.sizes)
        return normalise(self.centre.invert(planes) if self.centre is not None else planes, self.stage1.norm)

    def state(self, planes: Sequence[Tensor]) -> Tensor:
        """Convert normalised planes (B, C, rows, columns) to states (B, M)."""
        return pack(self.centre.apply(planes) if self.centre is not None else planes)

    def decode(self, planes: Sequence[Tensor], size: Sequence[int] | None = None) -> Tensor:
        """Decode planes to volumes (B, channels, H, W, D) in [0, 1] at once. ``volume`` decodes large ones slab by slab."""
        values: Tensor = self.decoder(list(planes), tuple(size or self.geometry.info.shape), compute_dtype=self.decoding)
        return values.float().clamp(0, 1)

    def volume(self, planes: Sequence[Tensor], sizes: Sequence[float] | None = None) -> FittedVolume:
        """Planes (1, C, rows, columns) of one volume with the decoder, to decode to any size in physical units.

        ``sizes``: its voxel sizes in mm; None: those of the training volumes' middle one.
        """
        info = self.geometry.info
        return FittedVolume(list(planes), self.decoder, self.stage1, info if sizes is None else with_spacing(info, sizes))

    # ---- files --------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the model. Files appear under their names only when all are written, the index last.

        Args:
            folder: folder of the model.
            dtype: type of the network's weights and the prior's directions, float32 or bfloat16; the rest is float32.
        """
        files = _folder(Path(folder))
        writable_folder(files.path)
        tensors = {n: t.to(dtype) for n, t in self.network.state_dict().items()}
        if self.centre is not None:
            tensors |= {f"centre.{n}": m.float() for n, m in zip(PLANE_NAMES, self.centre.mean, strict=True)}
        if self.config.prior == "gaussian" and self.prior is not None:
            tensors |= {
                f"prior.{n}": t.to(dtype if n == "directions" else torch.float32) for n, t in self.prior.state_dict().items()
            }
        if self.spacings is not None:
            tensors["spacings"] = self.spacings.sizes
        index = {
            "axis_order": "planes xy, yz, xz of volumes (channels, x, y, z) = file axes (i, j, k); first axis first",
            "channels": self.channels,
            "geometry": self.geometry.model_dump(mode="json"),
            "centre_scale": None if self.centre is None else self.centre.scale,
            "variances": self.variances,
            "consistency": self.consistency,
            "config": self.config.model_dump(mode="json"),
            "stage1": self.stage1.model_dump(mode="json"),
            "provenance": self.provenance | {"tcam_ext": tcam_ext.__version__},
        }
        states = {NETWORK: tensor_bytes(tensors), DECODER: tensor_bytes(self.decoder.state_dict(), dtype=torch.float32)}
        files.write(index, states)

    @staticmethod
    def load(
        folder: str | os.PathLike[str], device: str | torch.device = "cpu", compute: str | None = None
    ) -> TriplaneDiffusion:
        """Load a model and compare its files with their checksums.

        Args:
            folder: folder of a model, or of a run of stage 2.
            device: device of the model.
            compute: type of the products of network and decoder: auto, float32 or bfloat16; None: that of training. In float32
                convolutions on GPUs do not use TF32; other products follow torch's switch, which is off by default.

        Raises:
            UserError: there is no model, or a file is missing or damaged.
        """
        files = _folder(find_model(Path(folder)))
        path = str(files / INDEX)
        index = files.read()
        with files.reading():
            sums = index["sha256"]
            geometry = Geometry.model_validate(index["geometry"])
            config = configs.validate(DiffusionConfig, index["config"], path, ())
            stage1 = configs.validate(TrainConfig, index["stage1"], path, ())
            if compute is not None:
                config = config.model_copy(update={"compute_dtype": compute})
                stage1 = stage1.model_copy(update={"compute_dtype": compute})
            tensors = files.read_tensors(NETWORK, sums[NETWORK])
            tensors = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}
            centre = None
            if index["centre_scale"] is not None:
                centre = Centre(
                    [tensors.pop(f"centre.{n}") for n in PLANE_NAMES], list(_numbers("centre_scale", index["centre_scale"], 3))
                )
                check_planes(centre.mean, (stage1.channels,))
                if [tuple(m.shape[1:]) for m in centre.mean] != geometry.sizes:
                    raise ValueError(f"texels: {geometry.texels} are not those of the mean planes")
            spacings = Spacings(tensors.pop("spacings")) if config.spacing else None
            prior = _prior(config, tensors, stage1.channels, geometry.sizes)
            variances = None
            if index.get("variances") is not None:
                smallest, largest = _numbers("variances", index["variances"], 2)
                variances = smallest, largest
            consistency = index.get("consistency", False)
            if not isinstance(consistency, bool) or (consistency and prior is None):
                raise ValueError(f"consistency: expected true, with a prior, or false, got {shown(consistency)}")
            if index["channels"] != stage1.channels:
                raise ValueError(f"channels: {index['channels']} of the network, {stage1.channels} of the decoder")
            provenance = dict(index["provenance"])
            decoder = make_decoder(stage1, geometry.info.channels).float()
            others = files.read_tensors(DECODER, sums[DECODER])
        with files.reading(DECODER):
            load_module(decoder, others)
        with files.reading(NETWORK):
            with torch.device("meta"):  # a damaged configuration may ask for any amount of memory
                expected = TriplaneUNet(stage1.channels, config.network, len(geometry.classes), 3 * config.spacing).state_dict()
            if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in tensors.items()}:
                raise ValueError(f"its tensors are not those of the network in {INDEX}")
            network = TriplaneUNet(stage1.channels, config.network, len(geometry.classes), 3 * config.spacing)
            load_module(network, tensors)
        model = TriplaneDiffusion(
            network, decoder, config, stage1, geometry, centre, provenance, prior, variances, consistency, spacings
        )
        model.network.placed(torch.device(device))
        return model.to(device)


def _numbers(key: str, values: Any, count: int) -> tuple[float, ...]:
    """Values of a key of the index. Raises ValueError unless they are ``count`` positive numbers."""
    numbers = tuple(float(v) for v in values)
    if len(numbers) != count or not all(0 < n < math.inf for n in numbers):
        raise ValueError(f"{key}: expected {count} positive numbers, got {shown(values)}")
    return numbers


def _prior(config: DiffusionConfig, tensors: dict[str, Tensor], channels: int, sizes: Sizes) -> GaussianPrior | None:
    """The prior of a model, from its tensors, which are taken out. Raises ValueError or LookupError if they do not fit."""
    if config.prior == "unit":
        return GaussianPrior.unit(channels, sizes)
    if config.prior == "none":
        return None
    return GaussianPrior(channels, sizes, *(tensors.pop(f"prior.{n}") for n in ("mean", "floor", "directions")))


@contextlib.contextmanager
def _no_tf32(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Turn off TF32 in cuDNN's convolutions, where it is on by default, if products are in float32."""
    if device.type != "cuda" or dtype != torch.float32:
        yield
        return
    flags: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = flags.fp32_precision
    flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = before


def find_model(folder: Path) -> Path:
    """Folder of the model, which is ``folder`` or its subfolder model/. Raises UserError if there is none."""
    for path in (folder, folder / "model"):
        if (path / INDEX).is_file():
            return path
    raise UserError(f"{folder}: no model: expected a run of `tcam train-diffusion` or `tcam distill`, or a model's folder")


def read_index(folder: Path) -> dict[str, Any]:
    """Index of a model in a folder. Raises UserError if it is damaged."""
    files = _folder(folder)
    index = files.read()
    with files.reading():
        dict(index["provenance"])
    return index


def _folder(path: Path) -> Folder:
    remedy = "copy the model again, or write it again with the command that made it and --resume auto"
    return Folder(path, INDEX, "`tcam train-diffusion`", remedy, formats=(1, 2, 3, 4))


def assemble(
    network: TriplaneUNet,
    data: LatentData,
    config: DiffusionConfig,
    centre: Centre | None,
    step: int,
    prior: GaussianPrior | None = None,
    variances: tuple[float, float] | None = None,
    spacings: Spacings | None = None,
) -> TriplaneDiffusion:
    """Make the model of a network that was trained on ``data`` for ``step`` steps."""
    (x, y), (_, z) = data.planes[0].shape[2:], data.planes[1].shape[2:]
    geometry = Geometry(info=typical(data.set.entries), texels=(x, y, z), classes=data.classes)
    # The model does not keep paths of this machine.
    config = config.model_copy(update={k: Path(v).name for k in PATHS if (v := getattr(config, k)) is not None})
    stage1 = {k: v for k, v in data.set.index["provenance"].items() if k not in ("run", "store")}
    provenance = {"step": step, "volumes": len(data), "latents": data.digest, "stage1": stage1}
    decoder = data.set.decoder().to(network.enter.weight.device)
    return TriplaneDiffusion(
        network, decoder, config, data.set.config, geometry, centre, provenance, prior, variances, spacings=spacings
    )
