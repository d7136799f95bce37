"""SSDNeRF: a density and a colour that depends on the direction of view, from one layer of the features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcam_ext import activations, conventions
from tcam_ext.projects.decoder import Mlp, ProjectDecoder, Source, linears, whole

ACTIVATIONS = {nn.SiLU: lambda m: "silu", nn.ReLU: lambda m: "relu", nn.Softplus: lambda m: f"softplus({m.beta})"}


def spherical_harmonics(directions: Tensor) -> Tensor:
    """Real spherical harmonics of degrees 0 to 3 of unit vectors (..., 3): (..., 16), in the order and signs of SHEncoder.

    That of degree l and order m, from -l to l, is at l^2 + l + m. With the Condon-Shortley phase: odd orders have a minus.
    """
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z

    def k(numerator: float, denominator: float) -> float:
        return math.sqrt(numerator / (denominator * math.pi))

    values = [
        k(1, 4) * torch.ones_like(x),
        -k(3, 4) * y,
        k(3, 4) * z,
        -k(3, 4) * x,
        k(15, 4) * x * y,
        -k(15, 4) * y * z,
        k(5, 16) * (3 * zz - 1),
        -k(15, 4) * x * z,
        k(15, 16) * (xx - yy),
        k(35, 32) * y * (yy - 3 * xx),
        k(105, 4) * x * y * z,
        k(21, 32) * y * (1 - 5 * zz),
        k(7, 16) * z * (5 * zz - 3),
        k(21, 32) * x * (1 - 5 * zz),
        k(105, 16) * z * (xx - yy),
        k(35, 32) * x * (3 * yy - xx),
    ]
    return torch.stack(values, -1)


class _SsdNerf(ProjectDecoder):
    """With h = W_b f, the density is that of a(h) and the colour that of a(h + W_d e), for the encoded direction e.

    Both are one decoder of the features [f, e]: a first layer [[W_b, 0], [W_b, W_d]], and layers of two blocks above it.
    """

    def __init__(self, decoder: Source) -> None:
        if isinstance(decoder, nn.Module):
            parts: Any = decoder
        else:
            parts = nn.ModuleDict()
            for name in ("base_net", "density_net", "color_net", "dir_net"):
                state = {k: v for k, v in decoder.items() if k.startswith(name + ".")}
                if state:
                    parts[name] = linears(state)
            if "scene_base" in decoder:
                parts.scene_base = nn.Parameter(decoder["scene_base"].detach().clone())
        missing = [n for n in ("base_net", "density_net", "color_net") if not isinstance(getattr(parts, n, None), nn.Module)]
        if missing:
            raise ValueError(f"decoder: expected a TriPlaneDecoder or its state_dict, got one without {' and '.join(missing)}")
        activation = getattr(decoder, "base_activation", nn.SiLU())
        if type(activation) not in ACTIVATIONS:
            raise ValueError(f"decoder: expected an activation silu, relu or softplus, got {type(activation).__name__}")
        options = {"activation": ACTIVATIONS[type(activation)](activation), "skips": ()}
        super().__init__(parts, conventions.ssdnerf, self._densities, options=options)
        self.saturation = float(getattr(decoder, "sigmoid_saturation", 0.001))
        self.flip_z = bool(getattr(decoder, "flip_z", False))
        density, colour = self._chain("density_net"), self._chain("color_net")
        wider = colour[0].weight.shape[1] > density[0].weight.shape[1]
        self.views = isinstance(getattr(parts, "dir_net", None), nn.Module)  # whether h has a part of the direction
        self.encoded = self.views or wider  # whether colours depend on the direction
        for name in ("base_net", "dir_net") if self.views else ():
            if len(self._chain(name)) != 1:
                raise ValueError(f"decoder: expected one layer in {name}, got {len(self._chain(name))}")
        if len(density) != len(colour):
            raise ValueError(
                f"decoder: expected as many layers in density_net as in color_net, got {len(density)}, {len(colour)}"
            )

    def _chain(self, name: str) -> list[Any]:
        found: list[Any] = [m for m in getattr(self.decoder, name).modules() if isinstance(m, nn.Linear)]
        return found

    def layers(self) -> list[Any]:
        return [*self._chain("base_net"), *self._chain("density_net")]

    def _both(self) -> Mlp:
        """The decoder of density and colour together."""
        base, pairs = self._chain("base_net"), list(zip(self._chain("density_net"), self._chain("color_net"), strict=True))
        weights, biases = [m.weight for m in base], [m.bias for m in base]
        if self.views:
            (around,) = self._chain("dir_net")
            zero = weights[0].new_zeros(weights[0].shape[0], around.weight.shape[1])
            weights = [torch.cat((torch.cat((weights[0], zero), 1), torch.cat((weights[0], around.weight), 1)))]
            biases = [torch.cat((biases[0], biases[0] + around.bias))]
        for i, pair in enumerate(pairs):
            shared = i == 0 and not self.views  # both read the same h
            of_pair = [m.weight for m in pair]
            weights.append(torch.cat(of_pair) if shared else torch.block_diag(*of_pair))
            biases.append(torch.cat([m.bias for m in pair]))
        return weights, biases

    def _densities(self, parts: list[Tensor], axis: int) -> dict[str, Tensor]:
        """The density, with the decoder's own activation (TruncExp, or another sigma_activation)."""
        last = list(self.decoder.density_net.modules())[-1]  # type: ignore[union-attr]
        activate = activations.output("activation", "trunc_exp") if isinstance(last, nn.Linear) else last
        return {"sigma": activate(parts[0].narrow(axis, 0, 1))}

    def _results(self, parts: list[Tensor], axis: int) -> dict[str, Tensor]:
        z = parts[0]
        rgb = torch.sigmoid(z.narrow(axis, 1, z.shape[axis] - 1)) * (1 + 2 * self.saturation) - self.saturation
        return {**self._densities(parts, axis), "rgb": rgb}

    def _planes(self, planes: Any) -> tuple[Any, bool]:
        planes, one = super()._planes(whole(planes))
        if (dropout := getattr(self.decoder, "code_dropout", None)) is not None:
            planes = dropout(planes.flatten(0, 1)).view_as(planes)
        base = getattr(self.decoder, "scene_base", None)
        return (planes if base is None else planes + base), one

    def _bounds(self) -> list[tuple[float, float]] | None:
        return [(-1.0, 1.0), (-1.0, 1.0), (1.0, -1.0)] if self.flip_z else None

    def forward(self, planes: Any, coordinates: Tensor, directions: Tensor | None = None) -> Any:
        """Decode points: the decoder's ``point_decode``, or without directions its ``point_density_decode``.

        Args:
            planes: the codes (B, 3, C, h, w).
            coordinates: (B, N, 3), from -1 to 1. Scenes of different numbers of points: one call each, or
                :func:`tcam_ext.decode_points` with ``batch_index``.
            directions: unit vectors (B, N, 3); None: the density alone, but of a decoder without directions the colours too.
        """
        if directions is None and self.encoded:
            return super().forward(planes, coordinates)
        if directions is not None and self.encoded and not self.views:
            raise ValueError("directions: expected None, because this decoder has no dir_net (dir_layers)")
        if directions is not None and directions.shape != coordinates.shape:
            raise ValueError(f"directions: expected {tuple(coordinates.shape)} as coordinates, got {tuple(directions.shape)}")
        extra = spherical_harmonics(directions) if directions is not None and self.views else None
        return self._results(self._points(planes, coordinates, self._both(), extra), -1)

    def grid(self, planes: Any, size: Sequence[int], **options: Any) -> Any:
        """Decode a grid, as :meth:`ProjectDecoder.grid`: the density, and the colours of a decoder without directions."""
        if self.flip_z:
            given = options.get("bounds")
            bounds = torch.as_tensor([(-1.0, 1.0)] * 3 if given is None else given, dtype=torch.float64)
            options["bounds"] = bounds * torch.tensor([[1.0], [1.0], [-1.0]], dtype=bounds.dtype, device=bounds.device)
        if self.encoded:
            return super().grid(planes, size, **options)
        return self._results(self._grid(planes, size, self._both(), options), 1)


def from_ssdnerf(decoder: Source) -> ProjectDecoder:
    """SSDNeRF's TriPlaneDecoder: ``point_decode`` and ``point_density_decode``.

    The result is {"sigma": (B, N, 1)} and, with directions or of a decoder without them, {"rgb": (B, N, 3)}.

    Args:
        decoder: the TriPlaneDecoder, or its state_dict, which is taken to have silu, a density exp(z), a
            ``sigmoid_saturation`` of 0.001 and no ``flip_z``.

    Raises:
        ValueError: the decoder has no density, or layers of other numbers than the published models'.
    """
    return _SsdNerf(decoder)
