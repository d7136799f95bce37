"""Calls the extern "C" layer of the kernels through ctypes, on CPU tensors: what any other host would do.

Outputs and workspaces start as NaN bytes, so that reading what was not written shows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from problems import Problem
from torch import Tensor

from tcam_ext import _C

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}


class DecodeGrid(ctypes.Structure):  # tcam_decode_grid of problem.h
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("planes", ctypes.c_int64 * 3),
        ("size", ctypes.c_int64 * 3),
        ("lo", ctypes.c_int64 * 3),
        ("hi", ctypes.c_int64 * 3),
        ("width", ctypes.c_int64 * 7),
        ("layers", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("output_activation", ctypes.c_int32),
        ("align_corners", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("compute", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("grad_planes", ctypes.c_int32),
        ("grad_decoder", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("tile", ctypes.c_int32),
    ]


class Objective(ctypes.Structure):  # tcam_objective
    _fields_ = [
        ("target", ctypes.c_void_p),
        ("target_dtype", ctypes.c_int32),
        ("loss", ctypes.c_int32),
        ("beta", ctypes.c_double),
        ("per_object", ctypes.c_int32),
    ]


def _pointers(tensors: list[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def _nan(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


@dataclass
class Kernels:
    """One implementation: a loaded library, the suffix of its functions, and what they take after the workspace."""

    library: ctypes.CDLL
    suffix: str  # "cpu" or "cuda"
    more: tuple[Any, ...] = ()  # cuda: device, stream

    def _workspace(self, problem: DecodeGrid, backward: bool) -> int:
        size_of = getattr(self.library, f"tcam_decode_grid_{self.suffix}_workspace")
        size_of.restype = ctypes.c_int64
        return int(size_of(ctypes.byref(problem), int(backward)))

    def workspace(self, p: Problem, compute: int, backward: bool) -> int:
        """Bytes that a float32 decode, or its backward, asks for."""
        return self._workspace(self._problem(p, compute, None, (backward, backward), 2, 0, torch.float32), backward)

    def _call(self, op: str, problem: DecodeGrid, backward: bool, *arguments: Any) -> None:
        raw = np.full(self._workspace(problem, backward) + 256, 0xFF, np.uint8)
        workspace = ctypes.c_void_p((raw.ctypes.data + 255) // 256 * 256)
        status = getattr(self.library, f"tcam_{op}_{self.suffix}")(ctypes.byref(problem), *arguments, workspace, *self.more)
        if self.suffix == "cuda":
            assert status == 0

    def _problem(
        self, p: Problem, compute: int, box: Any, grads: tuple[bool, bool], threads: int, tile: int, out_dtype: torch.dtype
    ) -> DecodeGrid:
        o = {"activation": "relu", "output_activation": "none", "align_corners": False, "padding_mode": "border", **p.options}
        c, h, w = p.planes[0].shape[1:]
        widths = [3 * c, *(m.shape[0] for m in p.weights)]
        lo, hi = zip(*(box or [(0, n) for n in p.size]), strict=True)
        return DecodeGrid(
            p.planes[0].shape[0],
            c,
            (h, w, p.planes[1].shape[3]),
            p.size,
            lo,
            hi,
            (*widths, *[0] * (7 - len(widths))),
            len(p.weights),
            _C.activations.index(o["activation"]),
            _C.output_activations.index(o["output_activation"]),
            o["align_corners"],
            ["border", "zeros"].index(o["padding_mode"]),
            DTYPES[p.planes[0].dtype],
            compute,
            DTYPES[out_dtype],
            *grads,
            threads,
            tile,
        )

    def _inputs(self, p: Problem) -> tuple[Any, Any, Any]:
        return _pointers(p.planes), _pointers(p.weights), _pointers(p.biases)

    def forward(self, p: Problem, compute: int | None = None, box: Any = None, out_dtype: Any = None, threads=2, tile=0):
        dtype = out_dtype or p.planes[0].dtype
        compute = DTYPES[p.planes[0].dtype] if compute is None else compute
        problem = self._problem(p, compute, box, (False, False), threads, tile, dtype)
        out = _nan(
            (problem.batch, p.weights[-1].shape[0], *(b - a for a, b in zip(problem.lo, problem.hi, strict=True))), dtype
        )
        self._call("decode_grid", problem, False, *self._inputs(p), ctypes.c_void_p(out.data_ptr()))
        return out

    def _gradients(self, p: Problem, grads: tuple[bool, bool], leading: tuple[int, ...] = ()) -> tuple[list[Any], list[Tensor]]:
        planes = [_nan(t.shape, t.dtype) if grads[0] else None for t in p.planes]
        weights = [_nan((*leading, *t.shape), t.dtype) if grads[1] else None for t in p.weights]
        biases = [None if t is None or not grads[1] else _nan((*leading, *t.shape), t.dtype) for t in p.biases]
        return [_pointers(planes), _pointers(weights), _pointers(biases)], [
            t for t in (*planes, *weights, *biases) if t is not None
        ]

    def backward(
        self, p: Problem, grad: Tensor, compute: int | None = None, box: Any = None, grads=(True, True), threads=2, tile=0
    ) -> list[Tensor]:
        compute = DTYPES[p.planes[0].dtype] if compute is None else compute
        problem = self._problem(p, compute, box, grads, threads, tile, grad.dtype)
        pointers, found = self._gradients(p, grads)
        grad = grad.contiguous()
        self._call("decode_grid_backward", problem, True, ctypes.c_void_p(grad.data_ptr()), *self._inputs(p), *pointers)
        return found

    def loss(
        self, p: Problem, target: Tensor, loss: str, beta=0.3, per_object=False, compute: int | None = None, box: Any = None,
        grads=(True, True), threads=2, tile=0,
    ) -> list[Tensor]:  # fmt: skip
        """The sums of the loss (B,), then the gradients."""
        compute = DTYPES[p.planes[0].dtype] if compute is None else compute
        problem = self._problem(p, compute, box, grads, threads, tile, torch.float32)
        target = target.contiguous()
        objective = Objective(target.data_ptr(), DTYPES[target.dtype], _C.losses.index(loss), beta, per_object)
        pointers, found = self._gradients(p, grads, (problem.batch,) if per_object else ())
        losses = _nan((problem.batch,), torch.float64)
        self._call(
            "decode_grid_loss", problem, any(grads), ctypes.byref(objective), *self._inputs(p),
            ctypes.c_void_p(losses.data_ptr()), *pointers,
        )  # fmt: skip
        return [losses, *found]
