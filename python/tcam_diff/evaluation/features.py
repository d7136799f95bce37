"""Features of volumes, and distances of sets of volumes in their space: FID and MMD.

The network that gives the features is one of two:

    a folder of `tcam features train`    encoder of an autoencoder of the data set's own training volumes
    a file of MedicalNet                 ResNet trained on 23 data sets (Chen 2019), for each channel by itself

Feature i of the encoder is the mean over space of a channel of its layers. It is scaled to mean 0 and variance 1 over the
training volumes, so that every channel counts alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tcam_diff.data.store import Store, volumes_digest
from tcam_diff.errors import UserError
from tcam_diff.evaluation.config import FeaturesConfig
from tcam_diff.evaluation.reconstruction import Mean
from tcam_diff.evaluation.sets import read_set, resampled
from tcam_diff.files import reason, sha256
from tcam_diff.folder import Folder, tensor_bytes
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.loop import Outcome
from tcam_diff.training.networks import NetworksTask
from tcam_diff.training.rng import in_epochs, seed_of
from tcam_diff.training.run import train

INDEX, NETWORK = "features.json", "features.safetensors"


class FeatureNetwork(nn.Module):
    """Network that gives features (N, F) of volumes (N, channels, H, W, D) in [0, 1].

    Args:
        network: network of volumes of at most ``size`` voxels along each axis.
        size: number of voxels.
        description: the network in words, for tables.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], size: int | None, description: str) -> None:
        super().__init__()
        self.network, self.size, self.description = network, size, description

    @torch.no_grad()
    def forward(self, volumes: Tensor, batch: int = 8) -> Tensor:
        parts = []
        for part in volumes.split(batch):
            x = part.float() if self.size is None else resampled(part, self.size)
            parts.append(self.network(x).double())
        return torch.cat(parts)


class _Encoder(nn.Module):
    """Means over space of all layers of an encoder, scaled by their statistics over the training volumes."""

    mean: Tensor
    std: Tensor

    def __init__(self, layers: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("mean", torch.zeros(sum(channels)))
        self.register_buffer("std", torch.ones(sum(channels)))

    def raw(self, x: Tensor) -> Tensor:
        means = []
        for layer in self.layers:  # type: ignore[attr-defined]
            x = layer(x)
            means.append(x.mean((2, 3, 4)))
        return torch.cat(means, 1)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = (self.raw(x) - self.mean) / self.std
        return scaled


def _padded(volumes: Tensor, config: FeaturesConfig) -> Tensor:
    """Volumes with zeros at the end of axes that the layers cannot halve."""
    fold = 2 ** len(config.channels)
    return F.pad(volumes, [p for n in reversed(volumes.shape[2:]) for p in (0, -n % fold)])


def _autoencoder(channels: int, config: FeaturesConfig) -> Any:
    from monai.networks.nets import AutoEncoder

    # Instance normalisation would remove the energies that tell sharp volumes from smooth ones.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "features"))
        return AutoEncoder(
            3, channels, channels, config.channels, [2] * len(config.channels), norm=("GROUP", {"num_groups": 1})
        )


class FeaturesTraining(NetworksTask):
    """Training of an autoencoder with the mean square error."""

    score = "-error"

    def __init__(self, config: FeaturesConfig, group: Distributed, folder: Path) -> None:
        store = Store(config.data)
        super().__init__(config, group, volumes_digest(store.in_split(config.split)))
        self.config, self.folder = config, folder

        def small(volumes: Tensor) -> Tensor:
            return _padded(resampled(volumes, config.size), config).half()

        self.volumes = read_set(store.folder, small, split=config.split).volumes
        self.network = _autoencoder(self.volumes.shape[1], config).to(group.device)
        self.modules = {"autoencoder": self.network}
        self.adam("autoencoder", self.network, config.lr)

    def step(self, index: int) -> dict[str, Tensor]:
        c = self.config
        chosen = [in_epochs(index * c.batch + i, len(self.volumes), c.seed) for i in range(c.batch)]
        x = self.volumes[chosen].to(self.group.device, torch.float32)
        loss = (self.network(x) - x).square().mean()
        self.update("autoencoder", loss, c.lr, index)
        return {"loss": loss.detach()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        x = self.volumes[: self.config.batch].to(self.group.device, torch.float32)
        return {"error": float((self.network(x) - x).square().mean())}

    def finish(self, outcome: Outcome) -> None:
        if outcome.stopped:
            return
        c = self.config
        encoder = _Encoder(self.network.encode.cpu(), c.channels).eval()
        with torch.no_grad():
            raw = torch.cat([encoder.raw(v.float()) for v in self.volumes.split(c.batch)])
        encoder.mean.copy_(raw.mean(0))
        encoder.std.copy_(raw.std(0).clamp_min(1e-6))
        config = c.model_copy(update={"data": Path(c.data).name})
        index = {
            "config": config.model_dump(mode="json"),
            "channels": self.volumes.shape[1],
            "volumes": len(self.volumes),
            "data": self.data,
        }
        _folder(self.folder).write(index, {NETWORK: tensor_bytes(encoder.state_dict())})


def train_features(
    config: FeaturesConfig,
    out: Path,
    resume: str | None = None,
    *,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> Outcome:
    """Train a feature network on the volumes of a store.

    Args:
        config: for example ``FeaturesConfig.load("default", ["data=STORE"])``.
        out: folder of the run, for ``load_features``.
        resume: "auto", a checkpoint's folder, or None, as in ``train_autodecoder``.
        progress: called after every step.
        stop: asked before every step.

    Raises:
        UserError: the store cannot be read, or ``out`` has a run that would be overwritten.
    """
    return train(FeaturesTraining, config, out, resume, None, progress, stop)


def load_features(path: Path) -> FeatureNetwork:
    """Load a feature network: a folder of `tcam features train`, or a file of MedicalNet.

    Raises UserError if it is neither, or damaged.
    """
    return _load_encoder(path) if path.is_dir() else _load_medicalnet(path)


def _load_encoder(path: Path) -> FeatureNetwork:
    files = _folder(path)
    index = files.read()
    with files.reading():
        config, channels = FeaturesConfig.model_validate(index["config"]), int(index["channels"])
        checksum, count = index["sha256"][NETWORK], int(index["volumes"])
    tensors = files.read_tensors(NETWORK, checksum)
    with files.reading(NETWORK):
        encoder = _Encoder(_autoencoder(channels, config).encode, config.channels)
        encoder.load_state_dict(tensors)
    text = f"encoder of an autoencoder of {count} volumes of {config.data}, {sum(config.channels)} features"

    def padded(x: Tensor) -> Tensor:
        if x.shape[1] != channels:
            raise UserError(f"{path}: made for volumes of {channels} channels, got {x.shape[1]}")
        features: Tensor = encoder(_padded(x, config))
        return features

    encoder.eval()
    return FeatureNetwork(padded, config.size, text)


def _load_medicalnet(path: Path) -> FeatureNetwork:
    """MedicalNet's ResNet with the weights in a file, whose depth is told by its layers."""
    from monai.networks.nets import resnet

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = {k.removeprefix("module."): v for k, v in content.get("state_dict", content).items()}
        blocks = tuple(len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
        bottleneck = "layer1.0.conv3.weight" in state
        depths: dict[tuple[int, ...], int] = {
            (1, 1, 1, 1): 10, (2, 2, 2, 2): 18, (3, 4, 6, 3): 50 if bottleneck else 34,
            (3, 4, 23, 3): 101, (3, 8, 36, 3): 152,
        }  # fmt: skip
        depth = depths[blocks]
        network = getattr(resnet, f"resnet{depth}")(
            spatial_dims=3, n_input_channels=1, feed_forward=False, bias_downsample=False,
            shortcut_type="B" if any("downsample" in k for k in state) else "A",
        )  # fmt: skip
        network.load_state_dict({k: v for k, v in state.items() if k in network.state_dict()})
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}; expected a folder of `tcam features train` or a file of "
                        "MedicalNet's weights") from error  # fmt: skip
    except Exception as error:  # torch.load and a foreign state raise many kinds
        raise UserError(
            f"{path}: no weights of a MedicalNet ResNet (resnet_10 to resnet_152, 23 data sets): {type(error).__name__}"
        ) from error
    network.eval()

    def each_channel(x: Tensor) -> Tensor:
        features = network(x.flatten(0, 1).unsqueeze(1))
        while isinstance(features, list | tuple):
            features = features[-1]
        mean: Tensor = features.flatten(1).view(len(x), x.shape[1], -1).mean(1)
        return mean

    return FeatureNetwork(each_channel, None, f"MedicalNet resnet{depth}, file {path.name}, sha256 {sha256(path)[:12]}")


# ---- distances ---------------------------------------------------------------------------------


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of features (N, F) and (M, F).

    |mean a - mean b|^2 + tr A + tr B - 2 tr (A B)^(1/2). The last trace is the sum of the singular values of a_c b_c^T /
    sqrt((N - 1)(M - 1)) with centred features, which is exact where there are fewer volumes than features and covariances are
    singular. MONAI's FIDMetric takes a square root of A B instead, which then has no stable result.
    """
    centred = [x.double() - x.double().mean(0) for x in (a, b)]
    scaled = [x / (len(x) - 1) ** 0.5 for x in centred]
    cross = torch.linalg.svdvals(scaled[0] @ scaled[1].T).sum()
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum()
    return float(shift + scaled[0].square().sum() + scaled[1].square().sum() - 2 * cross)


def mmd(a: Tensor, b: Tensor, degree: int = 3) -> float:
    """Squared maximum mean discrepancy of features, unbiased, with the kernel (x . y / F + 1)^degree of KID (Binkowski 2018).

    Up to the factor F and constants, degree 1 is the linear kernel of MONAI's MMDMetric, which sees means alone.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / x.shape[1] + 1) ** degree

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def jackknifed(function: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor, groups: int = 10) -> Mean:
    """A distance of two sets with a 95 % interval, 1.96 standard errors of the jackknife that leaves out a tenth of both sets.

    A bootstrap would repeat volumes, which adds to these distances.
    """
    value, groups = function(a, b), min(groups, len(a), len(b))
    parts = [torch.arange(len(x)) % groups for x in (a, b)]
    left = np.array([function(a[parts[0] != g], b[parts[1] != g]) for g in range(groups)])
    error = float(np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    return Mean(min(len(a), len(b)), value, value - 1.96 * error, value + 1.96 * error)


def _folder(path: Path) -> Folder:
    return Folder(path, INDEX, "`tcam features train`", "train the feature network again")
