"""Modules in place of the sampling and decoding of other projects, made of a project's own decoder.

    decode = tcam_ext.nn.from_eg3d(generator.decoder, box_warp=1.0)
    decode(planes, coordinates)               # before: sample_from_planes, then the decoder: {"rgb": ..., "sigma": ...}
    decode.grid(planes, (512, 512, 512))      # the same at the corners of a grid, without a tensor of coordinates

A module shares the parameters of the decoder that it is given, so either can be trained. Formulas are those of
:mod:`tcam_ext.conventions`; tests/ops/test_projects.py compares each module with its project's code, restated.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tcam_ext import arguments, conventions
from tcam_ext.checks import GRIDS
from tcam_ext.conventions import Convention
from tcam_ext.ops import decode_grid, decode_points
from tcam_ext.reference import voxel_coordinates

#: Function that makes a project's result of the outputs before their activation, with channels along an axis.
Finish = Callable[[Any, int], Any]
Source = nn.Module | Mapping[str, Tensor]


class ProjectDecoder(nn.Module):
    """Sampling and decoding of a project, from planes and coordinates to its result.

    Use a function ``from_...`` to make one.

    Args:
        decoder: the project's module, whose linear layers are taken in order, or its state_dict, which is copied.
        convention: axes, padding, reduction and activations.
        finish: function that makes the result.
        half_width: coordinates at the edges of the planes are -half_width and half_width.
        gains: function from a layer to the factors of its weight and its bias; None: 1.
        fourier: frequencies B (C, n) of Fourier features sin(2 pi x B), cos(2 pi x B) before the first layer, or the name under
            which the decoder has them; None: no Fourier features.
        encoding: function from coordinates (..., 3) to further features (..., E) of the first layer; None: no such features.
        skips: whether a layer with as many more inputs than the layer below has outputs as there are features reads [features,
            h]; if not, such a decoder is refused.
        options: further options of every call.

    Raises:
        ValueError: the decoder has no linear layers, or a state_dict no weights.
    """

    def __init__(
        self,
        decoder: Source,
        convention: Convention,
        finish: Finish,
        *,
        half_width: float = 1.0,
        gains: Callable[[Any], tuple[float, float]] | None = None,
        fourier: Tensor | str | None = None,
        encoding: Callable[[Tensor], Tensor] | None = None,
        skips: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not half_width > 0:
            raise ValueError(f"half_width: expected a positive number, got {half_width}")
        self.decoder = decoder if isinstance(decoder, nn.Module) else linears(decoder)
        self.convention, self.finish, self.half_width, self.gains = convention, finish, half_width, gains
        self.encoding, self.skips = encoding, skips
        self.name = fourier if isinstance(fourier, str) else None
        self.register_buffer("fourier", fourier.detach().clone() if isinstance(fourier, Tensor) else None)
        found = self.layers()
        hidden = len(found) - (fourier is None)
        activation = ("sine", *["relu"] * (hidden - 1)) if fourier is not None else convention.activation
        again = tuple(i for i, m in enumerate(found[1:], 1) if m.weight.shape[1] != found[i - 1].weight.shape[0])
        self.options = {**convention.options, "activation": activation, "skips": again, **(options or {})}

    def layers(self) -> list[Any]:
        """The linear layers of the decoder, in order. Raises ValueError if there are none, or one does not follow another."""
        found: list[Any] = [
            m for m in self.decoder.modules() if isinstance(w := getattr(m, "weight", None), Tensor) and w.dim() == 2
        ]
        if not found:
            raise ValueError(f"decoder: expected a module with linear layers, got {type(self.decoder).__name__}")
        for i, (a, b) in enumerate(pairwise(found), 1):
            features = found[0].weight.shape[1] if self.skips and i < len(found) - 1 else 0
            if b.weight.shape[1] - a.weight.shape[0] not in (0, features):
                sizes = " and ".join(f"{tuple(m.weight.shape)}" for m in (a, b))
                raise ValueError(
                    f"decoder: expected one chain of linear layers, got weights {sizes} in {type(self.decoder).__name__}; give "
                    "the module of one network"
                )
        return found

    def _frequencies(self) -> Tensor | None:
        """Frequencies of the Fourier features, those that the decoder has now."""
        if self.name is None:
            return self._buffers["fourier"]
        found = frequencies(self.decoder)[1]
        assert found is not None
        return found.detach()

    def _mlp(self) -> tuple[list[Tensor], list[Tensor | None]]:
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        fourier = self._frequencies()
        if fourier is not None:  # a layer of sines: cos(x) = sin(x + pi/2)
            count = fourier.shape[1]
            weights.append(2 * math.pi * torch.cat((fourier.T, fourier.T)))
            biases.append(torch.cat((fourier.new_zeros(count), fourier.new_full((count,), math.pi / 2))))
        for m in self.layers():
            of_weight, of_bias = (1.0, 1.0) if self.gains is None else self.gains(m)
            weights.append(m.weight if of_weight == 1 else m.weight * of_weight)
            biases.append(m.bias if m.bias is None or of_bias == 1 else m.bias * of_bias)
        return weights, biases

    def forward(self, planes: Tensor | Sequence[Tensor], coordinates: Tensor, directions: Tensor | None = None) -> Any:
        """Decode points.

        Args:
            planes: (B, planes, C, h, w), or (planes, C, h, w) for one object, or a list as of :func:`tcam_ext.decode_points`.
            coordinates: (B, N, 3), or (..., 3) for one object, from -half_width to half_width where the planes are.
            directions: not read, as in the projects whose decoders take them.

        Returns:
            The project's result, with the shape of the coordinates but for the last axis.
        """
        weights, biases = self._mlp()
        shape, one = coordinates.shape[:-1], False
        if isinstance(planes, Tensor) and planes.dim() == 4:
            planes, coordinates = planes[None], coordinates.reshape(1, shape.numel(), coordinates.shape[-1])
            one = True
        bounds = None if self.half_width == 1 else [(-self.half_width, self.half_width)] * 3
        extra = None if self.encoding is None else self.encoding(coordinates)
        out = decode_points(planes, weights, biases, coordinates, bounds=bounds, extra=extra, **self.options)
        parts = [z[0].reshape(*shape, z.shape[-1]) if one else z for z in (out if isinstance(out, tuple) else (out,))]
        return self.finish(parts, -1)

    def grid(self, planes: Tensor | Sequence[Tensor], size: Sequence[int], **options: Any) -> Any:
        """Decode a grid over the planes: the project's result, with channels at axis 1 and voxels (B, C, H, W, D) after it.

        Args:
            planes: as in :meth:`forward`.
            size: voxels along the axes.
            options: of :func:`tcam_ext.decode_grid`, such as ``box``. ``bounds`` are in its units, from -1 to 1 at the planes'
                edges, whatever the half width.
        """
        weights, biases = self._mlp()
        if isinstance(planes, Tensor) and planes.dim() == 4:
            planes = planes[None]
        options = {"grid": self.convention.grid, **self.options, **options}
        if self.encoding is not None:
            if options.get("extra") is not None:
                raise ValueError("extra: expected None, because the encoding of the position is the extra features")
            options["extra"] = self.encoding(self._voxels(planes, size, options)).movedim(-1, 1)
        out = decode_grid(planes, weights, biases, size, **options)
        return self.finish(list(out) if isinstance(out, tuple) else [out], 1)

    def _voxels(self, planes: Tensor | Sequence[Tensor], size: Sequence[int], options: Mapping[str, Any]) -> Tensor:
        """Coordinates of the voxels of a grid or its box, (B, H, W, D, 3), float64."""
        like = planes if isinstance(planes, Tensor) else planes[0]
        batch, checked = like.shape[0], arguments.size(size)
        box = arguments.box(options.get("box"), checked)
        given = options.get("bounds")
        bounds = arguments.bounds([(-1, 1)] * 3 if given is None else given, batch, 3, like.device)
        arguments.choice("grid", options["grid"], GRIDS)
        coordinates = like.new_empty(batch, *(hi - lo for lo, hi in box), 3, dtype=torch.float64)
        for b in range(batch):
            for a, (lo, hi) in enumerate(box):
                axis = voxel_coordinates(lo, hi, checked[a], options["grid"] == "corners", bounds[b, a])
                coordinates[b, ..., a] = axis.view([-1 if a == d else 1 for d in range(3)])
        return coordinates * self.half_width


def linears(state: Mapping[str, Tensor]) -> nn.ModuleList:
    """Linear layers with copies of the matrices and biases in a state_dict.

    They are in the order of the state_dict; but where names first differ by a number, its size decides.
    """
    layers = nn.ModuleList()
    for name in _in_order(state):
        weight = state[name]
        if weight.dim() != 2 or not name.endswith("weight"):
            continue
        bias = state.get(f"{name.removesuffix('weight')}bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
        layers.append(layer)
    if not len(layers):
        known = ", ".join(list(state)[:4]) or "none"
        raise ValueError(f"decoder: expected a state_dict with matrices named ...weight, got {known}")
    return layers


def _in_order(names: Iterable[str]) -> list[str]:
    """Names in their order; but where two first differ by a number, the smaller one comes first."""
    seen: dict[tuple[str, ...], dict[str, int]] = {}

    def key(name: str) -> list[int]:
        tokens = re.findall(r"\d+|\D+", name)
        places = []
        for i, token in enumerate(tokens):
            siblings = seen.setdefault(tuple(tokens[:i]), {})
            places.append(int(token) if token.isdigit() else siblings.setdefault(token, len(siblings)))
        return places

    return sorted(names, key=key)


def frequencies(source: Source) -> tuple[str | None, Tensor | None]:
    """Name and value of the matrix ``_B`` or ``B`` of Fourier features in a module or state_dict; None, None without one."""
    if isinstance(source, nn.Module):
        named = [(n, t) for m in source.modules() for n, t in vars(m).items() if isinstance(t, Tensor)]  # plain attributes
        named += [*source.named_parameters(), *source.named_buffers()]
    else:
        named = list(source.items())
    found = {name.rpartition(".")[2]: t for name, t in named}
    return next(((n, found[n]) for n in ("_B", "B") if n in found), (None, None))


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
