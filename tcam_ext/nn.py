"""Modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tcam_ext import activations, arguments, checks
from tcam_ext.ops import decode_grid, decode_grid_loss, decode_points
from tcam_ext.options import Decoding, GridOptions, LossOptions, PointOptions, documented, takes, with_decoder
from tcam_ext.projects import (
    ProjectDecoder,
    from_blaze3dm,
    from_eg3d,
    from_kplanes,
    from_nfd,
    from_openlrm,
    from_semcity,
    from_ssdnerf,
    from_triposr,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ProjectDecoder",
    "TriplaneDecoder",
    "from_blaze3dm",
    "from_eg3d",
    "from_kplanes",
    "from_nfd",
    "from_openlrm",
    "from_semcity",
    "from_ssdnerf",
    "from_triposr",
]


class TriplaneDecoder(nn.Module):
    """An MLP that decodes triplane features with the fused kernel.

    Its ``nn.Linear`` layers are named as those of ``nn.Sequential(Linear, activation, Linear, ..., Linear)``: "0.weight",
    "0.bias", "2.weight", ... A state_dict of either loads into the other.

    Args:
        channels: C of the planes; the first layer reads 3C features from three concatenated planes.
        widths: of the hidden layers, each 1 to 512. TCAM-Diff: (128, 128, 128, 128).
        out_channels: 1 to 256.
        extra_channels: the number of extra features of voxels or points (``extra``).
        <options>: see :func:`tcam_ext.decode_grid`; output_activation is "sigmoid" unless given.
        bias: whether the layers have biases.
    """

    @takes(Decoding, output_activation="sigmoid")
    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (128, 128, 128, 128),
        out_channels: int = 1,
        *,
        extra_channels: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Decoding],
    ) -> None:
        super().__init__()
        #: The options of every call; those given to a call take precedence.
        self.options: Decoding = {"output_activation": "sigmoid", **options}
        o = checks.decoder_options(self.options, len(widths))
        self.channels, self.out_channels, self.widths = channels, out_channels, tuple(widths)
        self.extra_channels = extra_channels
        features = channels * len(arguments.groups(o.groups, o.reduce, len(o.plane_axes))) + extra_channels
        sizes = (features, *widths, out_channels)
        for i in range(len(sizes) - 1):
            read = sizes[i] + (features if i in o.skips else 0)
            linear = nn.Linear(read, sizes[i + 1], bias=bias, device=device, dtype=dtype)
            self.add_module(str(2 * i), linear)

    def layers(self) -> list[nn.Linear]:
        return [m for m in self.children() if isinstance(m, nn.Linear)]

    @with_decoder(decode_grid)
    def forward(self, planes: Tensor | Sequence[Tensor], size: Sequence[int], **options: Unpack[GridOptions]) -> Any:
        """Decode a grid of ``size`` voxels, or its ``box``: :func:`tcam_ext.decode_grid` with this MLP. An option given here
        replaces the decoder's."""
        all_options: GridOptions = {**self.options, **options}
        return decode_grid(planes, *self._mlp(), size, **all_options)

    @with_decoder(decode_points)
    def points(self, planes: Tensor | Sequence[Tensor], xyz: Tensor, **options: Unpack[PointOptions]) -> Any:
        """Decode points: :func:`tcam_ext.decode_points` with this MLP."""
        all_options: PointOptions = {**self.options, **options}
        return decode_points(planes, *self._mlp(), xyz, **all_options)

    @with_decoder(decode_grid_loss)
    def loss(
        self,
        planes: Tensor | Sequence[Tensor],
        target: Tensor,
        size: Sequence[int] | None = None,
        **options: Unpack[LossOptions],
    ) -> Tensor:
        """The loss of the decoded grid against ``target``: :func:`tcam_ext.decode_grid_loss` with this MLP."""
        all_options: LossOptions = {**self.options, **options}
        return decode_grid_loss(planes, *self._mlp(), target, size, **all_options)

    def _mlp(self) -> tuple[list[Tensor], list[Tensor | None]]:
        layers = self.layers()
        return [m.weight for m in layers], [m.bias for m in layers]

    def sequential(self) -> nn.Sequential:
        """The same MLP without its output activation as an ``nn.Sequential`` over features, with shared parameters.

        Raises:
            ValueError: a layer above the first reads the features (``skips``).
        """
        if self.options.get("skips"):
            raise ValueError(f"skips: expected none for a sequence of layers, got {self.options['skips']!r}")
        *layers, last = self.layers()
        names = activations.hidden_layers(self.options.get("activation", "relu"), len(layers))
        modules: list[nn.Module] = []
        for layer, name in zip(layers, names, strict=True):
            modules += [layer, activations.Elementwise(name)]
        return nn.Sequential(*modules, last)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


TriplaneDecoder.__doc__ = documented(TriplaneDecoder.__doc__ or "", list(Decoding.__annotations__))
