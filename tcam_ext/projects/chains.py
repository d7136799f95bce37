"""Modules for projects whose decoder is one chain of linear layers."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tcam_ext import conventions
from tcam_ext.projects.decoder import ProjectDecoder, Source, frequencies, whole


def _colours(parts: list[Tensor], axis: int) -> dict[str, Tensor]:
    """EG3D's and OpenLRM's result: colours in (-0.001, 1.001) of the outputs after the first, which is the density."""
    (z,) = parts
    count = z.shape[axis]
    return {"rgb": torch.sigmoid(z.narrow(axis, 1, count - 1)) * 1.002 - 0.001, "sigma": z.narrow(axis, 0, 1)}


def _eg3d_gains(layer: Any, lr_multiplier: float) -> tuple[float, float]:
    """Factors of a FullyConnectedLayer, or of one of a state_dict."""
    if hasattr(layer, "weight_gain"):
        return float(layer.weight_gain), float(layer.bias_gain)
    return lr_multiplier / math.sqrt(layer.weight.shape[1]), lr_multiplier


def _query_triplane(parts: list[Tensor], axis: int) -> dict[str, Tensor]:
    """TripoSR's result, of the density and of the outputs before their activation."""
    act, z = parts
    features = z.narrow(axis, 1, z.shape[axis] - 1)
    return {
        "density": z.narrow(axis, 0, 1),
        "features": features,
        "density_act": act.narrow(axis, 0, 1),
        "color": torch.sigmoid(features),
    }


def _first(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0]


def from_eg3d(decoder: Source, box_warp: float = 1.0, *, legacy: bool = True, lr_multiplier: float = 1.0) -> ProjectDecoder:
    """EG3D's ``sample_from_planes`` and OSGDecoder. The result is {"rgb": (B, N, 32), "sigma": (B, N, 1)}.

    Args:
        decoder: the OSGDecoder, or its state_dict.
        box_warp: ``rendering_kwargs["box_warp"]``, the width of the cube of the planes.
        legacy: the plane axes of the released checkpoints; False: those of the fix in EG3D's issue 67.
        lr_multiplier: ``decoder_lr_mul``, for a state_dict: a module knows its gains.
    """

    gains = functools.partial(_eg3d_gains, lr_multiplier=lr_multiplier)
    of = conventions.eg3d_legacy if legacy else conventions.eg3d
    return ProjectDecoder(decoder, of, _colours, half_width=box_warp / 2, gains=gains)


def from_openlrm(decoder: Source, box_warp: float = 2.0) -> ProjectDecoder:
    """OpenLRM's ``sample_from_planes`` and OSGDecoder, and those of its descendants.

    The result is {"rgb": (B, N, 3), "sigma": (B, N, 1)}.

    Args:
        decoder: the OSGDecoder, or its state_dict.
        box_warp: the width of the cube of the planes.
    """
    return ProjectDecoder(decoder, conventions.openlrm, _colours, half_width=box_warp / 2)


def from_triposr(decoder: Source, radius: float = 0.87) -> ProjectDecoder:
    """TripoSR's ``query_triplane`` and NeRFMLP.

    The result is {"density", "features", "density_act", "color"}, with density_act = trunc_exp(density - 1) and color =
    sigmoid(features).

    Args:
        decoder: the NeRFMLP with silu, as in the released configuration, or its state_dict.
        radius: ``radius`` of the renderer's configuration, half the width of the cube of the planes.
    """

    options = {"output_activation": "trunc_exp(-1)", "return_preactivation": True}
    return ProjectDecoder(decoder, conventions.triposr, _query_triplane, half_width=radius, options=options)


def from_nfd(net: Source, fourier: Tensor | str | None = None) -> ProjectDecoder:
    """NFD's sum of planes, Fourier features and network. The result is the network's output (B, N, channels).

    Args:
        net: the network ``MultiTriplane.net``, or its state_dict.
        fourier: frequencies (C, n); None: the matrix ``_B`` or ``B`` in the network or state_dict, if there is one.
    """
    name, known = frequencies(net)
    if fourier is None:  # a module's are looked up in every call, a state_dict's copied
        fourier = known if name is None or not isinstance(net, nn.Module) else name
    options = {} if fourier is not None else {"activation": "relu"}
    return ProjectDecoder(net, conventions.nfd, _first, fourier=fourier, options=options)


def _sines(frequencies: int, coordinates: Tensor) -> Tensor:
    """SemCity's positional encoding of coordinates x: for f = 0, 1, ...: sin(2^f x), then cos(2^f x)."""
    waves = [wave(2.0**f * coordinates) for f in range(frequencies) for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, -1)


def from_semcity(decoder: Source, frequencies: int = 6) -> ProjectDecoder:
    """SemCity's sum of planes, positional encoding and DecoderMLPSkipConcat, whose middle layer reads its input again.

    Planes are those of ``geo_convs``: over (x, y), (x, z), (y, z). The result is the logits of the classes (B, N, classes).

    Args:
        decoder: the module ``geo_decoder``, or its state_dict.
        frequencies: ``pos_num_freq`` of the positional encoding; 0 for a model without it (``pos``).
    """
    encoding = functools.partial(_sines, frequencies) if frequencies else None
    return ProjectDecoder(decoder, conventions.semcity, _first, encoding=encoding, skips=True)


def _nerf_encoding(frequencies: int, coordinates: Tensor) -> Tensor:
    """Blaze3DM's positional encoding: x, then for f = 0, 1, ... and each coordinate sin(2^f pi x), cos(2^f pi x)."""
    if not frequencies:
        return coordinates
    angles = torch.stack([2.0**f * math.pi * coordinates for f in range(frequencies)], -2)
    waves = torch.stack((angles.sin(), angles.cos()), -1)  # (..., frequencies, 3, 2)
    return torch.cat((coordinates, waves.flatten(-3)), -1)


class _Blaze3dm(ProjectDecoder):
    """With the convolution across planes and the tanh that come before sampling."""

    def __init__(self, decoder: Source, reduce: str, frequencies: int) -> None:
        if isinstance(decoder, nn.Module):
            net: Source = getattr(decoder, "net", decoder)
        else:
            net = {k.removeprefix("net."): v for k, v in decoder.items() if k.startswith("net.")} or decoder
        super().__init__(
            net,
            replace(conventions.blaze3dm, reduce=reduce),
            _first,
            flip=True,
            encoding=functools.partial(_nerf_encoding, frequencies),
            encoding_first=True,
        )
        self.conv = getattr(decoder, "conv", None)
        self.use_tanh = bool(getattr(decoder, "use_tanh", False))

    def _planes(self, planes: Any) -> tuple[Any, bool]:
        planes, one = super()._planes(whole(planes))
        if self.conv is not None:
            planes = self.conv(planes) + planes
        return (planes.tanh() if self.use_tanh else planes), one


def from_blaze3dm(decoder: Source, reduce: str = "concat", frequencies: int = 10) -> ProjectDecoder:
    """Blaze3DM's TriplaneConvAutoDecoder: its call ``decoder(triplanes, coordinates)``.

    Planes are (B, 3, C, h, w), over (x, y), (y, z), (x, z). Points have coordinates in the order x, y, z, as in the call. A
    grid is a volume as the project stores it, with axes z, y, x. The result is the intensity, (B, N, 1).

    Args:
        decoder: the module, whose convolution and tanh of the planes come first; or its ``net`` or a state_dict, with which
            ``decode`` takes the planes after them.
        reduce: ``aggregate_fn``: "concat", "sum" or "prod".
        frequencies: of the positional encoding.

    Raises:
        ValueError: ``reduce`` is another, or the decoder has no chain of linear layers.
    """
    if reduce not in ("concat", "sum", "prod"):
        raise ValueError(f'reduce: expected "concat", "sum" or "prod", got {reduce!r}')
    return _Blaze3dm(decoder, reduce, frequencies)
