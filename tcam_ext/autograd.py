"""The torch.autograd.Functions of the ops. They have no ``setup_context``, which takes longer than a small decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tcam_ext import library


def _refuse_second_derivative(op: str) -> None:
    if torch.is_grad_enabled():  # create_graph=True; without this check second derivatives would silently be missing
        raise RuntimeError(f'{op}: the native kernel has no second derivative; impl="reference" has')


def _split(counts: Sequence[int], tensors: Any) -> list[list[Any]]:
    """Groups of ``counts`` tensors, and the rest."""
    groups, at = [], 0
    for n in counts:
        groups.append(list(tensors[at : at + n]))
        at += n
    return [*groups, list(tensors[at:])]


class DecodeGrid(torch.autograd.Function):
    """decode_grid and its gradient. It saves the inputs; backward recomputes everything else.

    ``counts``: the numbers of planes and of weights; ``tensors``: planes, weights, biases, extra (or None; not in ``grid``).
    """

    @staticmethod
    def forward(
        ctx: Any,
        counts: tuple[int, int],
        options: library.KernelOptions,
        grid: library.KernelGrid,
        out_dtype: torch.dtype,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.counts, ctx.options, ctx.grid = (*counts, counts[1]), options, grid._replace(bounds=None)
        ctx.save_for_backward(*tensors, grid.bounds)  # all, so that torch notices changes in place
        *inputs, (extra,) = _split(ctx.counts, tensors)
        return library.decode_grid(*inputs, *options, *grid._replace(extra=extra), out_dtype)

    @staticmethod
    def backward(ctx: Any, grad_volume: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative("decode_grid")
        *inputs, (extra, bounds) = _split(ctx.counts, ctx.saved_tensors)
        grid = ctx.grid._replace(bounds=bounds, extra=extra)
        wanted = _split(ctx.counts, ctx.needs_input_grad[4:])
        flags = any(wanted[0]), any(wanted[1] + wanted[2]), wanted[3][0]
        grads = library.decode_grid_backward(grad_volume, *inputs, *ctx.options, *grid, *flags)
        return *[None] * 4, *_in_order(grads, [*inputs, [extra]], [flags[0], flags[1], flags[1], flags[2]])


class DecodeGridLoss(torch.autograd.Function):
    """decode_grid_loss and its gradient. Forward also computes the gradients of the sum of losses; backward scales them.

    ``divisor``: of the sum, for a mean; the other arguments: see :class:`DecodeGrid`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        counts: tuple[int, int],
        options: library.KernelOptions,
        grid: library.KernelGrid,
        objective: tuple[str, float, bool],
        divisor: int,
        wanted: tuple[bool, bool, bool],
        target: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        *inputs, (extra,) = groups = _split((*counts, counts[1]), tensors)
        grid = grid._replace(extra=extra)
        losses, *grads = library.decode_grid_loss(target, *inputs, *options, *grid, *objective, *wanted)
        ctx.per_object, ctx.divisor, ctx.dtype = objective[2], divisor, groups[0][0].dtype
        ctx.wanted = [wanted[0], wanted[1], wanted[1], wanted[2]]
        ctx.present = [[None if t is None else t.dtype for t in group] for group in groups]
        ctx.save_for_backward(*grads)
        dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        return ((losses if ctx.per_object else losses.sum()) / divisor).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative("decode_grid_loss")
        scale = grad_loss / max(ctx.divisor, 1)  # applied last: a mean over 2^27 voxels would underflow in a half dtype
        scaled: list[Tensor | None] = []
        grads = iter(ctx.saved_tensors)
        for kind, (group, wanted) in enumerate(zip(ctx.present, ctx.wanted, strict=True)):
            for dtype in group:
                if not wanted or dtype is None:
                    scaled.append(None)
                    continue
                g = next(grads)
                s = scale.to(g.dtype)
                if not ctx.per_object:
                    g = g * s
                elif kind in (1, 2):  # decoder: (B, ...) to (...)
                    g = torch.tensordot(s, g, 1)
                else:  # planes and extra features, object by object
                    g = (g.reshape(len(s), g.numel() // max(len(s), 1)) * s.unsqueeze(1)).view(g.shape)
                scaled.append(g.to(dtype))
        return *[None] * 7, *scaled


class DecodePoints(torch.autograd.Function):
    """decode_points and its gradient; without weights sample_points. ``tensors``: planes, weights, biases, extra or None,
    points."""

    @staticmethod
    def forward(
        ctx: Any,
        counts: tuple[int, int],
        options: library.KernelOptions,
        objects: Tensor | None,
        out_dtype: torch.dtype,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.counts, ctx.options = (*counts, counts[1]), options
        ctx.save_for_backward(*tensors, objects)
        *inputs, (extra, points) = _split(ctx.counts, tensors)
        return library.decode_points(*inputs, *options, points, objects, extra, out_dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative("decode_points" if ctx.counts[1] else "sample_points")
        *inputs, (extra, points, objects) = _split(ctx.counts, ctx.saved_tensors)
        wanted = _split(ctx.counts, ctx.needs_input_grad[4:])
        grad_planes, grad_decoder, (grad_extra, grad_points) = any(wanted[0]), any(wanted[1] + wanted[2]), wanted[3]
        grads = library.decode_points_backward(
            grad_out, *inputs, *ctx.options, points, objects, extra, grad_planes, grad_decoder, grad_extra, grad_points
        )
        groups = [*inputs, [extra], [points]]
        return *[None] * 4, *_in_order(grads, groups, [grad_planes, grad_decoder, grad_decoder, grad_extra, grad_points])


class ResampleAxis(torch.autograd.Function):
    """resample_axis, which is linear: its backward is its adjoint, and the backward of the adjoint is resample_axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adjoint: bool, *options: Any) -> Tensor:
        *ctx.options, bounds = options
        ctx.adjoint = adjoint
        ctx.save_for_backward(bounds)
        return library.resample_axis(x, *options, adjoint)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        options = (*ctx.options, *ctx.saved_tensors)
        return ResampleAxis.apply(grad, not ctx.adjoint, *options), None, *[None] * len(options)


def _in_order(gradients: Any, groups: Sequence[Sequence[Any]], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that an op returned, in the order of its inputs: None for groups not wanted and for absent tensors."""
    grads = iter(gradients)
    return [next(grads) if flag and t is not None else None for group, flag in zip(groups, wanted, strict=True) for t in group]
