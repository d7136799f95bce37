"""K-Planes: products of planes at several scales, a density network, and time."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tcam_ext import conventions
from tcam_ext.projects.decoder import Mlp, ProjectDecoder, Source, linears
from tcam_ext.slicing import at_time


def _padded(n: int, to: int = 16) -> int:
    return -(-n // to) * to


def _matrices(flat: Tensor, features: int, width: int, outputs: int) -> list[Any]:
    """The layers of a tinycudann network from its parameters, by rows without biases: a hidden layer of ``width``, or none.

    tinycudann pads inputs with ones, so that the padded columns of the first layer add up to a bias, and outputs, whose padded
    rows are not read.
    """
    columns = _padded(features)
    if flat.numel() in (_padded(outputs) * columns, _padded(outputs, 8) * columns):
        layers = [flat.view(-1, columns)]
    elif flat.numel() == width * columns + _padded(outputs) * width:
        layers = [flat[: width * columns].view(width, columns), flat[width * columns :].view(-1, width)]
    else:
        raise ValueError(
            f"field: expected the parameters of a network of {features} features, a hidden layer of {width} or none, and "
            f"{outputs} output(s), got {flat.numel()} numbers; see the arguments hidden and concat_features"
        )
    first, bias = layers[0][:, :features], layers[0][:, features:].sum(1) if columns > features else None
    if len(layers) == 1:
        return [SimpleNamespace(weight=first[:outputs], bias=None if bias is None else bias[:outputs])]
    return [SimpleNamespace(weight=first, bias=bias), SimpleNamespace(weight=layers[1][:outputs], bias=None)]


class _KPlanes(ProjectDecoder):
    """The density of a field; see :func:`from_kplanes`."""

    def __init__(self, field: Source, hidden: int, concat_features: bool, relu: bool) -> None:
        state = field.state_dict() if isinstance(field, nn.Module) else field
        counts: dict[str, int] = {}
        channels = 0
        for name, tensor in state.items():
            parts = name.split(".")
            if parts[0] == "grids" and len(parts) == 3:
                counts[parts[1]] = counts.get(parts[1], 0) + 1
                channels = tensor.shape[-3]
        if set(counts.values()) not in ({3}, {6}):
            raise ValueError(f"field: expected grids of 3 or 6 planes at each scale, got {list(counts.values()) or 'none'}")
        self.scales, self.time = len(counts), set(counts.values()) == {6}
        concatenated = bool(getattr(field, "concat_features", concat_features))
        self.added = self.scales > 1 and not concatenated
        self.features, self.hidden, self.relu = channels * (self.scales if concatenated else 1), hidden, relu
        net: Any = getattr(field, "sigma_net", None) if isinstance(field, nn.Module) else None
        params = state.get("sigma_net.params")
        if net is None and params is not None:
            net = nn.Module()
            net.register_parameter("params", nn.Parameter(params.detach().clone()))
        elif net is None:
            layers = {k: v for k, v in state.items() if k.startswith("sigma_net.")}
            if not layers:
                raise ValueError("field: expected a KPlaneField or its state_dict, got one without sigma_net")
            net = linears(layers)
        linear = params is not None and params.numel() <= _padded(1) * _padded(self.features)
        self.outputs = 1 if getattr(field, "linear_decoder", linear) else 16
        convention = conventions.kplanes_4d if self.time else conventions.kplanes
        options = {"output_activation": "none" if relu else "trunc_exp(-1)", "return_preactivation": not relu}
        super().__init__(net, convention.scales(self.scales), self._densities, options=options)
        box: Any = state.get("aabb") if not isinstance(field, nn.Module) else getattr(field, "aabb", None)
        if isinstance(field, nn.Module) or box is None:
            self.aabb = box  # shared, as the weights are
        else:
            self.aabb = nn.Parameter(box.detach().clone(), requires_grad=False)
        distortion: Any = getattr(field, "spatial_distortion", None)
        self.distortion = distortion

    def layers(self) -> list[Any]:
        params = getattr(self.decoder, "params", None)
        if params is None:
            return super().layers()
        return _matrices(params, self.features, self.hidden, self.outputs)

    def _mlp(self) -> Mlp:
        weights, biases = super()._mlp()
        if self.added:  # W (f + g) = [W, W] [f, g]
            weights[0] = torch.cat([weights[0]] * self.scales, 1)
        return weights, biases

    def _densities(self, parts: list[Tensor], axis: int) -> dict[str, Tensor]:
        z = parts[-1]
        last = z.shape[axis] - 1
        density = parts[0].narrow(axis, last, 1)
        out = {"density": torch.relu(density) if self.relu else density}
        return out if last == 0 else {**out, "features": z.narrow(axis, 0, last)}

    def _planes(self, planes: Any) -> tuple[Any, bool]:
        flat: list[Tensor] = []
        for p in planes:
            flat.extend([p] if isinstance(p, Tensor) else p)
        flat = [p[None] if p.dim() == 3 else p for p in flat]
        return flat, all(p.shape[0] == 1 for p in flat)

    def _bounds(self) -> list[tuple[float, float]] | None:
        if self.distortion is not None or self.aabb is None:
            return None
        aabb: Any = self.aabb
        box = aabb.T.tolist()
        return [*((lo, hi) for lo, hi in box), *([(-1.0, 1.0)] if self.time else [])]

    def forward(self, planes: Any, coordinates: Tensor, timestamps: Tensor | None = None) -> Any:
        """Decode points: the field's ``get_density``.

        Args:
            planes: ``field.grids``.
            coordinates: (rays, samples, 3), or (..., 3), in the units of ``aabb``.
            timestamps: one for each ray, from -1 to 1, of a field over space and time.
        """
        if (timestamps is None) == self.time:
            raise ValueError(f"timestamps: expected {'one for each ray' if self.time else 'None'}, got {timestamps}")
        if self.distortion is not None:
            coordinates = self.distortion(coordinates) / 2
        if timestamps is not None:
            shape = [*timestamps.shape, *[1] * (coordinates.dim() - timestamps.dim())]
            time = timestamps.to(coordinates).view(shape).expand(*coordinates.shape[:-1], 1)
            coordinates = torch.cat((coordinates, time), -1)
        return super().forward(planes, coordinates)

    def grid(self, planes: Any, size: Sequence[int], time: Tensor | float | None = None, **options: Any) -> Any:
        """Decode a grid over the planes, as :meth:`ProjectDecoder.grid`.

        Args:
            time: the time of the grid, from -1 to 1, of a field over space and time.
        """
        if (time is None) == self.time:
            raise ValueError(f"time: expected {'a number' if self.time else 'None'}, got {time}")
        if time is None:
            return super().grid(planes, size, **options)
        at, sampling = at_time(self._planes(planes)[0], time, **self.convention.sampling)
        return super().grid(at, size, **{**sampling, **options})


def from_kplanes(
    field: Source, *, hidden: int = 64, concat_features: bool = True, density_activation: str = "trunc_exp"
) -> ProjectDecoder:
    """K-Planes' ``KPlaneField.get_density`` over 3 or 4 coordinates. The planes are ``field.grids``.

    The result is {"density": (..., 1), "features": (..., 15)}, of which a linear decoder has the density alone (its features
    are those of :func:`tcam_ext.sample_points`). Colours depend on the direction of view and remain the field's.

    >>> decode = tcam_ext.nn.from_kplanes(field)
    >>> density = decode(field.grids, points, timestamps)["density"]
    >>> volume = decode.grid(field.grids, (256, 256, 256), time=0.3)["density"]

    Args:
        field: the KPlaneField, or its state_dict. ``sigma_net`` is a network of tinycudann or of linear layers. Points outside
            ``aabb`` are moved to its edge. A ``spatial_distortion`` is applied to points; grids are in the distorted space.
        hidden: width of the hidden layer of a network of tinycudann.
        concat_features: whether features are concatenated over scales, or added, of a state_dict: a module knows it
            (``concat_features_across_scales``).
        density_activation: "trunc_exp" or "relu".

    Raises:
        ValueError: the grids are not of 3 or 6 planes, or the parameters of ``sigma_net`` do not fit them.
    """
    if density_activation not in ("trunc_exp", "relu"):
        raise ValueError(f'density_activation: expected "trunc_exp" or "relu", got {density_activation!r}')
    return _KPlanes(field, hidden, concat_features, density_activation == "relu")
