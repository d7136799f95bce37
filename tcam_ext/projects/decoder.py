"""A module that samples and decodes as another project does, from the project's own decoder."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tcam_ext import arguments
from tcam_ext.checks import GRIDS
from tcam_ext.conventions import Convention
from tcam_ext.ops import decode_grid, decode_points
from tcam_ext.reference import voxel_coordinates

#: Function that makes a project's result of the outputs before their activation, with channels along an axis.
Finish = Callable[[Any, int], Any]
Source = nn.Module | Mapping[str, Tensor]
Mlp = tuple[list[Tensor], list[Tensor | None]]  # weights, biases


class ProjectDecoder(nn.Module):
    """Sampling and decoding of a project, from planes and coordinates to its result.

    Use a function ``from_...`` to make one.

    Args:
        decoder: the project's module, whose linear layers are taken in order, or its state_dict, which is copied.
        convention: axes, padding, reduction and activations.
        finish: function that makes the result.
        half_width: coordinates at the edges of the planes are -half_width and half_width.
        flip: whether the project's coordinates are in the reverse order of the planes' axes.
        gains: function from a layer to the factors of its weight and its bias; None: 1.
        fourier: frequencies B (C, n) of Fourier features sin(2 pi x B), cos(2 pi x B) before the first layer, or the name under
            which the decoder has them; None: no Fourier features.
        encoding: function from the project's coordinates (..., 3) to further features (..., E) of the first layer; None: no
            such features.
        encoding_first: whether the first layer of the project reads them before the features of the planes.
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
        flip: bool = False,
        gains: Callable[[Any], tuple[float, float]] | None = None,
        fourier: Tensor | str | None = None,
        encoding: Callable[[Tensor], Tensor] | None = None,
        encoding_first: bool = False,
        skips: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not half_width > 0:
            raise ValueError(f"half_width: expected a positive number, got {half_width}")
        self.decoder = decoder if isinstance(decoder, nn.Module) else linears(decoder)
        self.convention, self.finish, self.half_width, self.gains = convention, finish, half_width, gains
        self.flip, self.encoding, self.encoding_first, self.skips = flip, encoding, encoding_first, skips
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

    def _mlp(self) -> Mlp:
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
        if self.encoding is not None and self.encoding_first:
            count = self.encoding(weights[0].new_zeros(1, 3)).shape[-1]
            weights[0] = weights[0].roll(-count, 1)
        return weights, biases

    def _planes(self, planes: Any) -> tuple[Any, bool]:
        """Planes as the ops take them, and whether they are of one object, without an axis of objects."""
        one = isinstance(planes, Tensor) and planes.dim() == 4
        return (planes[None] if one else planes), one

    def _bounds(self) -> list[tuple[float, float]] | None:
        """Coordinates of the edges of the planes, as the ops take them."""
        return None if self.half_width == 1 else [(-self.half_width, self.half_width)] * 3

    def forward(self, planes: Tensor | Sequence[Tensor], coordinates: Tensor, directions: Tensor | None = None) -> Any:
        """Decode points.

        Args:
            planes: (B, planes, C, h, w), or (planes, C, h, w) for one object, or a list as of :func:`tcam_ext.decode_points`.
            coordinates: (B, N, 3), or (..., 3) for one object, from -half_width to half_width where the planes are.
            directions: not read, as in the projects whose decoders take them.

        Returns:
            The project's result, with the shape of the coordinates but for the last axis.
        """
        extra = None if self.encoding is None else self.encoding(coordinates)
        return self.finish(self._points(planes, coordinates, self._mlp(), extra), -1)

    def grid(self, planes: Tensor | Sequence[Tensor], size: Sequence[int], **options: Any) -> Any:
        """Decode a grid over the planes: the project's result, with channels at axis 1 and voxels (B, C, H, W, D) after it.

        Args:
            planes: as in :meth:`forward`.
            size: voxels along the axes.
            options: of :func:`tcam_ext.decode_grid`, such as ``box``. ``bounds`` are in its units, from -1 to 1 at the planes'
                edges, whatever the half width.
        """
        return self.finish(self._grid(planes, size, self._mlp(), options), 1)

    def _points(self, planes: Any, coordinates: Tensor, mlp: Mlp, extra: Tensor | None) -> list[Tensor]:
        """The outputs of decode_points, with the shape of the coordinates but for the last axis."""
        shape = coordinates.shape[:-1]
        planes, one = self._planes(planes)
        if one:
            coordinates = coordinates.reshape(1, shape.numel(), coordinates.shape[-1])
            extra = None if extra is None else extra.reshape(1, shape.numel(), extra.shape[-1])
        coordinates = coordinates.flip(-1) if self.flip else coordinates
        out = decode_points(planes, *mlp, coordinates, bounds=self._bounds(), extra=extra, **self.options)
        return [z[0].reshape(*shape, z.shape[-1]) if one else z for z in (out if isinstance(out, tuple) else (out,))]

    def _grid(self, planes: Any, size: Sequence[int], mlp: Mlp, options: Mapping[str, Any]) -> list[Tensor]:
        """The outputs of decode_grid."""
        planes, _ = self._planes(planes)
        options = {"grid": self.convention.grid, **self.options, **options}
        if self.encoding is not None:
            if options.get("extra") is not None:
                raise ValueError("extra: expected None, because the encoding of the position is the extra features")
            voxels = self._voxels(planes, size, options)
            options["extra"] = self.encoding(voxels.flip(-1) if self.flip else voxels).movedim(-1, 1)
        out = decode_grid(planes, *mlp, size, **options)
        return list(out) if isinstance(out, tuple) else [out]

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


def whole(planes: Any) -> Tensor:
    """Planes as one tensor, of a project that computes with them before they are sampled. Raises TypeError if they are not."""
    if not isinstance(planes, Tensor):
        raise TypeError(f"planes: expected a tensor (B, 3, C, h, w), got {type(planes).__name__}")
    return planes
