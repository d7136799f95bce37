"""Modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcam_ext import checks
from tcam_ext.activations import ACTIVATIONS, MODULES, OUTPUT_ACTIVATIONS
from tcam_ext.ops import decode_grid, decode_grid_loss


class TriplaneDecoder(nn.Module):
    """The MLP that decodes triplane features, run by the fused kernel.

    Its parameters live in ``nn.Linear`` layers named as those of
    ``nn.Sequential(Linear, activation, Linear, ..., Linear)`` are ("0.weight", "0.bias", "2.weight", ...), so that a
    state_dict goes either way.

    Args:
        channels: C of the planes; the first layer reads 3C features.
        widths: of the hidden layers, each 1 to 256. TCAM-Diff: (128, 128, 128, 128).
        out_channels: 1 to 16.
        activation, output_activation, align_corners, padding_mode: see :func:`tcam_ext.decode_grid`.
        bias: whether the layers have biases.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (128, 128, 128, 128),
        out_channels: int = 1,
        *,
        activation: str = "relu",
        output_activation: str = "sigmoid",
        align_corners: bool = False,
        padding_mode: str = "border",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.choice("activation", activation, ACTIVATIONS)
        checks.choice("output_activation", output_activation, OUTPUT_ACTIVATIONS)
        checks.choice("padding_mode", padding_mode, checks.PADDING_MODES)
        self.channels, self.out_channels, self.widths = channels, out_channels, tuple(widths)
        self.activation, self.output_activation = activation, output_activation
        self.align_corners, self.padding_mode = align_corners, padding_mode
        sizes = (3 * channels, *widths, out_channels)
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
        compute_dtype: torch.dtype | str | None = None,
        out_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Decode a grid of ``size`` voxels, or its ``box``: :func:`tcam_ext.decode_grid` with this MLP."""
        return decode_grid(
            planes, *self._mlp(), size, box=box, compute_dtype=compute_dtype, out_dtype=out_dtype, impl=impl, **self._options()
        )

    def loss(
        self,
        planes: Tensor | Sequence[Tensor],
        target: Tensor,
        size: Sequence[int] | None = None,
        *,
        box: Sequence[Sequence[int]] | None = None,
        loss: str = "smooth_l1",
        beta: float = 0.3,
        reduction: str = "mean",
        compute_dtype: torch.dtype | str | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """The loss of the decoded grid against ``target``, in one pass: :func:`tcam_ext.decode_grid_loss` with this MLP."""
        return decode_grid_loss(
            planes,
            *self._mlp(),
            target,
            size,
            box=box,
            loss=loss,
            beta=beta,
            reduction=reduction,
            compute_dtype=compute_dtype,
            impl=impl,
            **self._options(),
        )

    def _mlp(self) -> tuple[list[Tensor], list[Tensor | None]]:
        layers = self.layers()
        return [m.weight for m in layers], [m.bias for m in layers]

    def _options(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "output_activation": self.output_activation,
            "align_corners": self.align_corners,
            "padding_mode": self.padding_mode,
        }

    def sequential(self) -> nn.Sequential:
        """The same MLP as an ``nn.Sequential`` over features ``(..., 3C)``, sharing the parameters."""
        modules: list[nn.Module] = []
        for layer in self.layers():
            modules += [layer, MODULES[self.activation]()]
        return nn.Sequential(*modules[:-1])

    def extra_repr(self) -> str:
        return f"activation={self.activation}, output_activation={self.output_activation}"
