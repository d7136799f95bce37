"""Plain PyTorch twins of the fused ops: the same signatures, the specification one can read.

They run on any device, in any floating dtype, and can be differentiated any number of times. They hold the concatenated
features and every hidden layer of the box in memory: (3C + widths) numbers a voxel, which is what the fused ops avoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tcam_ext import checks
from tcam_ext.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS
from tcam_ext.losses import LOSSES

#: Texels below and above each voxel of an axis, and their weights.
Taps = tuple[Tensor, Tensor, Tensor, Tensor]


def linear_taps(lo: int, hi: int, voxels: int, texels: int, align_corners: bool, padding_mode: str) -> Taps:
    """Texels below and above voxel centres lo..hi-1 of an axis, and their weights (float64).

    Voxel i of n has its centre at s = (i + 1/2)/n of the axis; in texels that is s*m - 1/2, or s*(m - 1) with
    ``align_corners``. Padding "border" clamps the coordinate, "zeros" gives texels outside the plane weight zero.
    """
    s = (torch.arange(lo, hi, dtype=torch.float64) + 0.5) / voxels
    x = s * (texels - 1) if align_corners else s * texels - 0.5
    if padding_mode == "border":
        x = x.clamp(0, texels - 1)
    below = x.floor()
    above = below + 1
    w_above = x - below
    w_below = 1 - w_above
    if padding_mode == "zeros":
        w_below = w_below * (below >= 0)
        w_above = w_above * (above <= texels - 1)
    return below.clamp(0, texels - 1).long(), above.clamp(0, texels - 1).long(), w_below, w_above


def sample_plane(plane: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Bilinear samples of a plane (B, C, h, w) at every pair of row and column taps: (B, C, rows, columns)."""
    for dim, (below, above, w_below, w_above) in ((2, rows), (3, columns)):
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        wb, wa = (w.to(plane).view(shape) for w in (w_below, w_above))
        plane = plane.index_select(dim, below.to(plane.device)) * wb + plane.index_select(dim, above.to(plane.device)) * wa
    return plane


def decode_grid(
    planes: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    size: Sequence[int],
    *,
    box: Sequence[Sequence[int]] | None = None,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """:func:`tcam_ext.decode_grid` in plain PyTorch. Interpolation is in float32 or better, the MLP in ``compute_dtype``.

    ``options``: activation, output_activation, align_corners, padding_mode, compute_dtype, as there.
    """
    call = checks.decode_grid(planes, weights, biases, size, box, checks.Options(**options), out_dtype)
    storage = torch.float64 if call.compute == "float64" else torch.float32
    compute = storage if "tf32" in call.compute else getattr(torch, call.compute)
    (x0, x1), (y0, y1), (z0, z1) = call.box
    xy, yz, xz = (p.to(storage) for p in call.planes)
    texels = (xy.shape[2], xy.shape[3], yz.shape[3])
    x, y, z = (
        linear_taps(lo, hi, n, m, call.options.align_corners, call.options.padding_mode)
        for (lo, hi), n, m in zip(call.box, call.size, texels, strict=True)
    )
    shape = (xy.shape[0], xy.shape[1], x1 - x0, y1 - y0, z1 - z0)
    features = torch.cat(  # F_xy(x, y), F_yz(y, z), F_xz(x, z), in this order
        (
            sample_plane(xy, x, y).unsqueeze(4).expand(shape),
            sample_plane(yz, y, z).unsqueeze(2).expand(shape),
            sample_plane(xz, x, z).unsqueeze(3).expand(shape),
        ),
        dim=1,
    )
    h = features.movedim(1, -1).to(compute)
    for layer, (w, b) in enumerate(zip(call.weights, call.biases, strict=True)):
        if layer:
            h = ACTIVATIONS[call.options.activation](h)
        h = F.linear(h, w.to(compute), None if b is None else b.to(compute))
    out = OUTPUT_ACTIVATIONS[call.options.output_activation](h.to(storage))
    return out.movedim(-1, 1).to(call.out_dtype).contiguous()


def decode_grid_loss(
    planes: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    size: Sequence[int] | None = None,
    *,
    box: Sequence[Sequence[int]] | None = None,
    loss: str = "smooth_l1",
    beta: float = 0.3,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """:func:`tcam_ext.decode_grid_loss` in plain PyTorch: the volume, the loss of each voxel, their mean. ``options``: see
    :func:`decode_grid`."""
    call, compared = checks.decode_grid_loss(
        planes, weights, biases, target, size, box, loss, beta, reduction, checks.Options(**options)
    )
    dtype = torch.float64 if call.planes[0].dtype == torch.float64 else torch.float32
    volume = decode_grid(
        call.planes, call.weights, call.biases, call.size, box=call.box, out_dtype=dtype, **call.options._asdict()
    )
    want = target.to(dtype) / 255 if target.dtype == torch.uint8 else target.to(dtype)
    each = LOSSES[loss](volume, want, compared.beta)
    return each.flatten(1).mean(1) if reduction == "none_batch" else getattr(each, reduction)()
