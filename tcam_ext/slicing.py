"""Planes over space and time at one time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcam_ext import arguments, checks, reference
from tcam_ext.options import Sampling, resolve, takes

if TYPE_CHECKING:
    from typing_extensions import Unpack

TIME = 3


@takes(Sampling)
def at_time(
    planes: Tensor | Sequence[Tensor], time: Tensor | float, **options: Unpack[Sampling]
) -> tuple[list[Tensor], dict[str, Any]]:
    r"""Planes over (x, y, z, t) at one time, to decode grids of space with.

    .. math::
        F_{tx}(t, x) \to F'_{tx}(x) = F_{tx}(t_0, x)

    A plane over a coordinate a of space and t becomes a line over a: a plane with one texel along another coordinate of space,
    along which it is constant.

    >>> planes, sampling = tcam_ext.at_time(planes, 0.3, **conventions.kplanes_4d.sampling)
    >>> volume = tcam_ext.decode_grid(planes, weights, biases, (128, 128, 128), grid="corners", **sampling)

    Args:
        planes: see :func:`decode_points`; ``plane_axes`` may name coordinates 0 to 3.
        time: a number, or one for each object, ``(B,)``; -1 and 1 are the edges of the planes, as for the other coordinates.
        <options>: see :func:`decode_points`.

    Returns:
        The planes, differentiable with respect to the given planes and ``time``, and the options with which they are sampled.

    Raises:
        ValueError, TypeError: an argument is wrong; ValueError also for padding_mode "zeros" without align_corners, with which
            a texel does not reach the edge of a plane.
    """
    o = resolve(Sampling, options)
    tensors = arguments.planes(arguments.plain(planes), o.plane_axes)
    axes = arguments.plane_axes(o.plane_axes, TIME + 1)
    arguments.choice("padding_mode", o.padding_mode, checks.PADDING_MODES)
    if o.padding_mode == "zeros" and not o.align_corners:
        raise ValueError('padding_mode: expected "border" or "reflection", or align_corners=True, got "zeros" without it')
    batch, device = tensors[0].shape[0], tensors[0].device
    at = torch.as_tensor(time, dtype=None if isinstance(time, Tensor) else torch.float64, device=device)
    if not at.dtype.is_floating_point or tuple(at.shape) not in ((), (batch,)):
        raise ValueError(f"time: expected a number or a floating tensor ({batch},), got {tuple(at.shape)} of {at.dtype}")
    at = at.double().expand(batch)
    sliced, pairs = [], []
    for plane, (row, column) in zip(tensors, axes, strict=True):
        if TIME not in (row, column):
            sliced.append(plane)
            pairs.append((row, column))
            continue
        space = column if row == TIME else row
        rows = plane if row == TIME else plane.mT
        taps = reference.taps(at, rows.shape[2], o.align_corners, o.padding_mode)
        wide = torch.promote_types(rows.dtype, torch.float32)
        line = torch.zeros_like(rows[:, :, 0], dtype=wide)
        for texel, weight in ((taps.below, taps.w_below), (taps.above, taps.w_above)):
            line = line + weight.to(wide).view(-1, 1, 1) * rows[torch.arange(batch, device=device), :, texel].to(wide)
        sliced.append(line.unsqueeze(2).to(rows.dtype))
        pairs.append(((space + 1) % 3, space))
    return sliced, {**options, "plane_axes": tuple(pairs)}
