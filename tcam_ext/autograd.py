"""The torch.autograd.Function wrappers. Old-style on purpose: ``setup_context`` costs more a call than the small decodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcam_ext import library


def _refuse_second_derivative(op: str) -> None:
    if torch.is_grad_enabled():  # create_graph=True: without this, second derivatives would silently be missing
        raise RuntimeError(f'{op}: the native kernel has no second derivative; impl="reference" has')


def _split(layers: int, tensors: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """3 planes, ``layers`` weights, ``layers`` biases (None: no bias)."""
    return list(tensors[:3]), list(tensors[3 : 3 + layers]), list(tensors[3 + layers :])


class DecodeGrid(torch.autograd.Function):
    """decode_grid and its gradient: saves the inputs, and backward recomputes everything else."""

    @staticmethod
    def forward(ctx: Any, layers: int, options: tuple[Any, ...], out_dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        ctx.layers, ctx.options = layers, options
        ctx.save_for_backward(*tensors)
        return library.decode_grid(*_split(layers, tensors), *options, out_dtype)

    @staticmethod
    def backward(ctx: Any, grad_volume: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative("decode_grid")
        planes, weights, biases = _split(ctx.layers, ctx.saved_tensors)
        wanted = _split(ctx.layers, ctx.needs_input_grad[3:])
        grad_planes, grad_decoder = any(wanted[0]), any(wanted[1] + wanted[2])
        found = library.decode_grid_backward(grad_volume, planes, weights, biases, *ctx.options, grad_planes, grad_decoder)
        return None, None, None, *_in_order(found, planes, weights, biases, grad_planes, grad_decoder)


class DecodeGridLoss(torch.autograd.Function):
    """decode_grid_loss: forward computes the gradients too, undivided; backward scales them.

    ``voxels``, channels counted, is what the loss (a scalar, or one an object) is a mean of.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: int,
        options: tuple[Any, ...],
        voxels: int,
        grad_planes: bool,
        grad_decoder: bool,
        target: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        planes, weights, biases = _split(layers, tensors)
        losses, *grads = library.decode_grid_loss(target, planes, weights, biases, *options, grad_planes, grad_decoder)
        ctx.layers, ctx.voxels, ctx.wanted = layers, voxels, (grad_planes, grad_decoder)
        ctx.per_object = options[-1]
        ctx.has_bias = [b is not None for b in biases]
        ctx.dtype = planes[0].dtype
        ctx.save_for_backward(*grads)
        dtype = torch.float64 if planes[0].dtype == torch.float64 else torch.float32
        return ((losses if ctx.per_object else losses.sum()) / voxels).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative("decode_grid_loss")
        grads = ctx.saved_tensors
        scale = grad_loss / max(ctx.voxels, 1)  # last: a mean over 2^27 voxels must not pass through a half dtype
        planes = 3 if ctx.wanted[0] else 0
        scaled = []
        for i, g in enumerate(grads):
            if not ctx.per_object:
                g = g * scale.to(g.dtype)
            elif i < planes:  # (B, C, rows, columns)
                g = g * scale.to(g.dtype).view(-1, 1, 1, 1)
            else:  # (B, ...) to (...)
                g = torch.tensordot(scale.to(g.dtype), g, 1)
            scaled.append(g.to(ctx.dtype))
        weights, biases = [True] * ctx.layers, [True if has else None for has in ctx.has_bias]
        return *[None] * 6, *_in_order(scaled, [True] * 3, weights, biases, *ctx.wanted)


def _in_order(
    grads: Any, planes: list[Any], weights: list[Any], biases: list[Any], grad_planes: bool, grad_decoder: bool
) -> list[Tensor | None]:
    """Gradients that an op returned (planes if wanted, then weights and the biases there are) at their inputs' places."""
    found = iter(grads)
    ordered: list[Tensor | None] = [next(found) if grad_planes else None for _ in planes]
    ordered += [next(found) if grad_decoder else None for _ in weights]
    return ordered + [next(found) if grad_decoder and b is not None else None for b in biases]
