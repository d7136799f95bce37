"""Which kernels a call uses, and why no faster ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from tcam_ext import _C, library

#: KiB of shared memory a block, by compute capability (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_KIB = {"80": 163, "86": 99, "87": 163, "89": 99, "90": 227, "100": 227, "103": 227, "120": 99, "121": 99}


def explain(
    op: Callable[..., Any], *arguments: Any, device: str | torch.device | None = None, **options: Any
) -> dict[str, str]:
    """Tell which kernels a call uses and, if they are not the fastest, why. Nothing is computed.

    >>> tcam_ext.explain(tcam_ext.decode_grid, planes, weights, biases, (512, 512, 512), compute_dtype=torch.bfloat16)
    >>> tcam_ext.explain(decoder, planes, size=(512, 512, 512), device="sm_86")

    Args:
        op: :func:`decode_grid`, :func:`decode_grid_loss`, :func:`decode_points`, or a function or module that calls one of them
            once, such as a :class:`TriplaneDecoder`.
        arguments, options: those of the call, checked as the call checks them.
        device: "cpu", "cuda", "cuda:1", or a compute capability such as "sm_86", for which no GPU need be present. None: the
            device of the planes.

    Returns:
        A sentence for "values" (the volume, the points, or the loss alone) and one for "gradients" (of planes, weights and
        biases).

    Raises:
        ValueError: ``device`` is none of these, or ``op`` calls no kernel or more than one.
        RuntimeError: ``device`` is a CUDA device, and tcam_ext was built without CUDA.
        TypeError, ValueError: an argument of the call is wrong.
    """
    calls: list[Any] = []
    token = library.explaining.set(calls)
    try:
        with torch.no_grad():
            op(*arguments, **options)
    finally:
        library.explaining.reset(token)
    if len(calls) != 1:
        got = f"{len(calls)} calls" if calls else 'none (impl="reference" is plain PyTorch)'
        raise ValueError(f"op: expected one call of decode_grid, decode_grid_loss or decode_points, got {got}")
    limit, warpgroups = _device(calls[0].device if device is None else device)
    values = 1 if calls[0].is_loss else 0
    return {"values": calls[0].explain(values, limit, warpgroups), "gradients": calls[0].explain(2, limit, warpgroups)}


def _device(device: str | torch.device) -> tuple[int, bool]:
    """Bytes of shared memory a block on the device, 0 on a CPU; and whether it runs kernels with wgmma."""
    if match := re.fullmatch(r"sm_(\d+)[af]?", str(device)):
        if match[1] not in SHARED_KIB:
            raise ValueError(f"device: expected one of sm_{', sm_'.join(SHARED_KIB)}, got {device}")
        return SHARED_KIB[match[1]] << 10, str(device) == "sm_90a"
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device: expected "cpu", "cuda", "cuda:1", or for example "sm_86", got {device!r}') from error
    if known.type == "cpu":
        return 0, False
    if known.type != "cuda" or (known.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'device: expected a device of this machine, or a compute capability such as "sm_86", got {device}')
    return _C.cuda_device(torch.cuda.current_device() if known.index is None else known.index)
