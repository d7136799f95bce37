"""The torch.autograd.Function wrappers: they save the inputs, and backward recomputes everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcam_ext import library


class DecodeGrid(torch.autograd.Function):
    """decode_grid and its gradient. Old-style on purpose: ``setup_context`` costs more a call than the small decodes."""

    @staticmethod
    def forward(ctx: Any, layers: int, options: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        """tensors: 3 planes, ``layers`` weights, ``layers`` biases (None: no bias)."""
        ctx.layers, ctx.options = layers, options
        ctx.save_for_backward(*tensors)
        return library.decode_grid(list(tensors[:3]), list(tensors[3 : 3 + layers]), list(tensors[3 + layers :]), *options)

    @staticmethod
    def backward(ctx: Any, grad_volume: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True: without this, second derivatives would silently be missing
            raise RuntimeError('decode_grid: the native kernel has no second derivative; impl="reference" has')
        tensors, layers = ctx.saved_tensors, ctx.layers
        planes, weights, biases = (
            list(tensors[:3]),
            list(tensors[3 : 3 + layers]),
            list(tensors[3 + layers :]),
        )
        needs = ctx.needs_input_grad[2:]
        grad_planes, grad_decoder = any(needs[:3]), any(needs[3:])
        found = iter(
            library.decode_grid_backward(grad_volume, planes, weights, biases, *ctx.options, grad_planes, grad_decoder)
        )
        grads: list[Tensor | None] = [next(found) if grad_planes else None for _ in planes]
        grads += [next(found) if grad_decoder else None for _ in weights]
        grads += [next(found) if grad_decoder and b is not None else None for b in biases]
        return None, None, *grads
