"""Modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcam_ext import activations, checks
from tcam_ext.ops import decode_grid, decode_grid_loss, decode_points


class TriplaneDecoder(nn.Module):
    """The MLP that decodes triplane features, run by the fused kernel.

    Its parameters live in ``nn.Linear`` layers named as those of
    ``nn.Sequential(Linear, activation, Linear, ..., Linear)`` are ("0.weight", "0.bias", "2.weight", ...), so that a
    state_dict goes either way.

    Args:
        channels: C of the planes; the first layer reads 3C features of three concatenated planes.
        widths: of the hidden layers, each 1 to 256. TCAM-Diff: (128, 128, 128, 128).
        out_channels: 1 to 64.
        extra_channels: features that voxels or points bring themselves (``extra``).
        plane_axes, reduce, align_corners, padding_mode, activation, output_activation: see :func:`tcam_ext.decode_grid`.
        bias: whether the layers have biases.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (128, 128, 128, 128),
        out_channels: int = 1,
        *,
        extra_channels: int = 0,
        plane_axes: Sequence[tuple[int, int]] = checks.PLANE_AXES,
        reduce: str = "concat",
        align_corners: bool = False,
        padding_mode: str = "border",
        activation: str | Sequence[str] = "relu",
        output_activation: str = "sigmoid",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        activations.hidden_layers(activation, len(widths))
        activations.output("output_activation", output_activation)
        checks.choice("padding_mode", padding_mode, checks.PADDING_MODES)
        checks.choice("reduce", reduce, checks.REDUCTIONS_OF_PLANES)
        self.channels, self.out_channels, self.widths = channels, out_channels, tuple(widths)
        self.activation, self.output_activation = activation, output_activation
        self.align_corners, self.padding_mode = align_corners, padding_mode
        self.plane_axes, self.reduce, self.extra_channels = tuple(plane_axes), reduce, extra_channels
        features = channels * (len(self.plane_axes) if reduce.startswith("concat") else 1) + extra_channels
        sizes = (features, *widths, out_channels)
        for i in range(len(sizes) - 1):
            linear = nn.Linear(sizes[i], sizes[i + 1], bias=bias, device=device, dtype=dtype)
            self.add_module(str(2 * i), linear)

    def layers(self) -> list[nn.Linear]:
        return [m for m in self.children() if isinstance(m, nn.Linear)]

    def forward(
        self,
        planes: Tensor | Sequence[Tensor],
        size: Sequence[int],
        *,
        box: Sequence[Sequence[int]] | None = None,
        grid: str = "cells",
        bounds: Any = None,
        extra: Tensor | None = None,
        compute_dtype: torch.dtype | str | None = None,
        noise_std: float = 0.0,
        noise_seed: int | None = None,
        noise_mode: str = "point",
        out_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Decode a grid of ``size`` voxels, or its ``box``: :func:`tcam_ext.decode_grid` with this MLP."""
        volume: Tensor = decode_grid(
            planes,
            *self._mlp(),
            size,
            box=box,
            grid=grid,
            bounds=bounds,
            extra=extra,
            compute_dtype=compute_dtype,
            noise_std=noise_std,
            noise_seed=noise_seed,
            noise_mode=noise_mode,
            out_dtype=out_dtype,
            impl=impl,
            **self._options(),
        )
        return volume

    def points(
        self,
        planes: Tensor | Sequence[Tensor],
        xyz: Tensor,
        *,
        batch_index: Tensor | None = None,
        extra: Tensor | None = None,
        bounds: Any = None,
        compute_dtype: torch.dtype | str | None = None,
        noise_std: float = 0.0,
        noise_seed: int | None = None,
        noise_mode: str = "point",
        out_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Decode points: :func:`tcam_ext.decode_points` with this MLP."""
        out: Tensor = decode_points(
            planes,
            *self._mlp(),
            xyz,
            batch_index=batch_index,
            extra=extra,
            bounds=bounds,
            compute_dtype=compute_dtype,
            noise_std=noise_std,
            noise_seed=noise_seed,
            noise_mode=noise_mode,
            out_dtype=out_dtype,
            impl=impl,
            **self._options(),
        )
        return out

    def loss(
        self,
        planes: Tensor | Sequence[Tensor],
        target: Tensor,
        size: Sequence[int] | None = None,
        *,
        box: Sequence[Sequence[int]] | None = None,
        grid: str = "cells",
        bounds: Any = None,
        extra: Tensor | None = None,
        loss: str = "smooth_l1",
        beta: float = 0.3,
        reduction: str = "mean",
        compute_dtype: torch.dtype | str | None = None,
        noise_std: float = 0.0,
        noise_seed: int | None = None,
        noise_mode: str = "point",
        impl: str = "auto",
    ) -> Tensor:
        """The loss of the decoded grid against ``target``, in one pass: :func:`tcam_ext.decode_grid_loss` with this MLP."""
        return decode_grid_loss(
            planes,
            *self._mlp(),
            target,
            size,
            box=box,
            grid=grid,
            bounds=bounds,
            extra=extra,
            loss=loss,
            beta=beta,
            reduction=reduction,
            compute_dtype=compute_dtype,
            noise_std=noise_std,
            noise_seed=noise_seed,
            noise_mode=noise_mode,
            impl=impl,
            **self._options(),
        )

    def _mlp(self) -> tuple[list[Tensor], list[Tensor | None]]:
        layers = self.layers()
        return [m.weight for m in layers], [m.bias for m in layers]

    def _options(self) -> dict[str, Any]:
        names = ("plane_axes", "reduce", "align_corners", "padding_mode", "activation", "output_activation")
        return {name: getattr(self, name) for name in names}

    def sequential(self) -> nn.Sequential:
        """The same MLP, without its output activation, as an ``nn.Sequential`` over features, sharing the parameters."""
        *layers, last = self.layers()
        names = activations.hidden_layers(self.activation, len(layers))
        modules: list[nn.Module] = []
        for layer, name in zip(layers, names, strict=True):
            modules += [layer, activations.Elementwise(name)]
        return nn.Sequential(*modules, last)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())
