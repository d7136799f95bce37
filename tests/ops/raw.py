"""Calls the extern "C" functions of the kernels through ctypes on CPU tensors, as another host language would.

Outputs and workspaces start as NaN bytes, so that a read of unwritten memory shows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from problems import Problem
from torch import Tensor

from tcam_ext import _C, activations, arguments, checks
from tcam_ext.options import PLANE_AXES

DTYPES = {getattr(torch, name): code for code, name in enumerate(_C.dtypes) if hasattr(torch, name)}


class Activation(ctypes.Structure):  # tcam_activation of problem.h
    _fields_ = [("kind", ctypes.c_int32), ("parameter", ctypes.c_double)]


class Plane(ctypes.Structure):  # tcam_plane
    _fields_ = [
        ("row_axis", ctypes.c_int32),
        ("column_axis", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    ]


_TYPES = {"tcam_activation": Activation, "tcam_plane": Plane, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64,
          "uint64_t": ctypes.c_uint64, "double": ctypes.c_double}  # fmt: skip


class Decode(ctypes.Structure):  # tcam_problem
    _fields_ = [(name, _TYPES[kind] * count if count else _TYPES[kind]) for name, _, _, count, kind in _C.problem_layout()]


assert all(
    (getattr(Decode, name).offset, ctypes.sizeof(_TYPES[kind])) == (at, size) for name, at, size, _, kind in _C.problem_layout()
)


class Inputs(ctypes.Structure):  # tcam_inputs
    _fields_ = [(name, ctypes.c_void_p) for name in ("planes", "weights", "biases", "bounds", "points", "objects", "extra")]


class Gradients(ctypes.Structure):  # tcam_gradients
    _fields_ = [(name, ctypes.c_void_p) for name in ("planes", "weights", "biases", "points", "extra")]


class Resample(ctypes.Structure):  # tcam_resample
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("outer", "inner", "texels", "size", "lo", "hi")),
        *((name, ctypes.c_int32) for name in ("align_corners", "padding", "corners", "adjoint", "dtype", "threads")),
    ]


class Normals(ctypes.Structure):  # tcam_normals
    _fields_ = [
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("objects", "count")),
        *((name, ctypes.c_int32) for name in ("sequence", "threads")),
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
    """The kernels of one device: a loaded library, the suffix of its functions, and their arguments after the workspace."""

    library: ctypes.CDLL
    suffix: str  # "cpu" or "cuda"
    more: tuple[Any, ...] = ()  # cuda: device, stream
    formulation: int = 0  # tcam_formulation

    def _workspace(self, problem: Decode, backward: bool) -> int:
        size_of = getattr(self.library, f"tcam_decode_{self.suffix}_workspace")
        size_of.restype = ctypes.c_int64
        return int(size_of(ctypes.byref(problem), int(backward)))

    def workspace(self, p: Problem, compute: int, backward: bool) -> int:
        """The bytes of workspace for a float32 decode or its backward."""
        return self._workspace(self._problem(p, compute, None, (backward, backward), 2, 0, torch.float32), backward)

    def explain(self, p: Problem, compute: int, output: int, shared_limit: int, warpgroups: bool = True) -> str:
        """tcam_decode_cuda_explain."""
        text = ctypes.create_string_buffer(400)
        problem = self._problem(p, compute, None, (output == 2, output == 2), 2, 0, torch.float32)
        self.library.tcam_decode_cuda_explain(ctypes.byref(problem), output, shared_limit, warpgroups, text, len(text))
        return text.value.decode()

    def _call(self, op: str, problem: Decode, backward: bool, *arguments: Any) -> None:
        raw = np.full(self._workspace(problem, backward) + 256, 0xFF, np.uint8)
        workspace = ctypes.c_void_p((raw.ctypes.data + 255) // 256 * 256)
        status = getattr(self.library, f"tcam_{op}_{self.suffix}")(ctypes.byref(problem), *arguments, workspace, *self.more)
        if status and self.suffix == "cuda":
            raise RuntimeError(f"status {status}")

    def _problem(
        self, p: Problem, compute: int, box: Any, grads: tuple[bool, bool], threads: int, tile: int, out_dtype: torch.dtype
    ) -> Decode:
        defaults = {
            "plane_axes": PLANE_AXES,
            "reduce": "concat",
            "groups": None,
            "activation": "relu",
            "output_activation": "none",
        }
        o = {**defaults, "align_corners": False, "padding_mode": "border", "grid": "cells", **p.options}
        lo, hi = zip(*(box or [(0, n) for n in p.size]), strict=True)
        problem = Decode(
            batch=p.planes[0].shape[0], channels=p.planes[0].shape[1], plane_count=len(p.planes), points=-1, axes=3
        )
        counts = arguments.groups(o["groups"], o["reduce"], len(p.planes))
        problem.group_count = len(counts)
        problem.reduce = {"concat": 0, "sum": 0, "mean": 1, "prod": 2}[o["reduce"]]
        group = [g for g, count in enumerate(counts) for _ in range(count)]
        for q, (plane, axes) in enumerate(zip(p.planes, o["plane_axes"], strict=True)):
            problem.planes[q] = Plane(*axes, group[q], *plane.shape[2:])
        problem.size[:], problem.lo[:], problem.hi[:] = p.size, lo, hi
        problem.corners = o["grid"] == "corners"
        widths = [w.shape[1] for w in p.weights] + [p.weights[-1].shape[0]] if p.weights else []
        problem.width[: len(widths)] = widths
        problem.layers = len(p.weights)
        problem.first_width = p.weights[0].shape[0] if p.weights else 0
        for layer, row in o.get("skips", ()):  # of the first weights, which have the rows of these layers
            problem.width[1], problem.skip[layer] = p.weights[1].shape[1], row
        hidden = max(len(p.weights) - 1, 0)
        for layer, name in enumerate(activations.hidden_layers(o["activation"], hidden)):
            problem.activation[layer] = Activation(*activations.hidden("activation", name)[:2])
        problem.output_activation = Activation(*activations.output("output_activation", o["output_activation"])[:2])
        problem.align_corners = o["align_corners"]
        problem.padding = checks.PADDING_MODES.index(o["padding_mode"])
        problem.noise_std, problem.noise_seed = o.get("noise_std", 0.0), o.get("noise_seed") or 0
        problem.extra = 0 if o.get("extra") is None else o["extra"].shape[1]
        problem.grad_extra = problem.extra > 0
        problem.dtype, problem.compute, problem.out_dtype = DTYPES[p.planes[0].dtype], compute, DTYPES[out_dtype]
        problem.grad_planes, problem.grad_decoder = grads
        problem.threads, problem.tile, problem.formulation = threads, tile, self.formulation
        return problem

    def _inputs(self, p: Problem) -> Any:
        """The struct of inputs, and the arrays that must live as long as it is used."""
        bounds = p.options.get("bounds")
        batch = p.planes[0].shape[0]
        kept = [_pointers(p.planes), _pointers(p.weights), _pointers(p.biases)]
        kept.append(None if bounds is None else torch.tensor(bounds, dtype=torch.float64).expand(batch, 3, 2).contiguous())
        inputs = Inputs(*(ctypes.addressof(k) for k in kept[:3]), None if bounds is None else kept[3].data_ptr())
        extra = p.options.get("extra")  # (B, E, *box)
        if extra is not None:
            kept.append(extra.detach().to(p.planes[0].dtype).movedim(1, -1).contiguous())
            inputs.extra = kept[-1].data_ptr()
        return inputs, kept

    def forward(self, p: Problem, compute: int | None = None, box: Any = None, out_dtype: Any = None, threads=2, tile=0):
        dtype = out_dtype or p.planes[0].dtype
        compute = DTYPES[p.planes[0].dtype] if compute is None else compute
        problem = self._problem(p, compute, box, (False, False), threads, tile, dtype)
        out = _nan(
            (problem.batch, p.weights[-1].shape[0], *(b - a for a, b in zip(problem.lo, problem.hi, strict=True))), dtype
        )
        inputs, _kept = self._inputs(p)
        self._call("decode", problem, False, ctypes.byref(inputs), ctypes.c_void_p(out.data_ptr()))
        return out

    def _gradients(self, p: Problem, grads: tuple[bool, bool], leading: tuple[int, ...] = ()) -> tuple[Any, Any, list[Tensor]]:
        planes = [_nan(t.shape, t.dtype) if grads[0] else None for t in p.planes]
        weights = [_nan((*leading, *t.shape), t.dtype) if grads[1] else None for t in p.weights]
        biases = [None if t is None or not grads[1] else _nan((*leading, *t.shape), t.dtype) for t in p.biases]
        kept = [_pointers(group) for group in (planes, weights, biases)]
        to = Gradients(*(ctypes.addressof(k) for k in kept), None, None)
        results = [t for t in (*planes, *weights, *biases) if t is not None]
        extra = p.options.get("extra")
        if extra is not None:
            kept.append(_nan(extra.movedim(1, -1).shape, p.planes[0].dtype))
            to.extra = kept[-1].data_ptr()
            results.append(kept[-1].movedim(-1, 1))
        return to, kept, results

    def backward(
        self, p: Problem, grad: Tensor, compute: int | None = None, box: Any = None, grads=(True, True), threads=2, tile=0
    ) -> list[Tensor]:
        compute = DTYPES[p.planes[0].dtype] if compute is None else compute
        problem = self._problem(p, compute, box, grads, threads, tile, grad.dtype)
        to, _kept, results = self._gradients(p, grads)
        grad = grad.contiguous()
        inputs, _also_kept = self._inputs(p)
        out = ctypes.c_void_p(grad.data_ptr())
        self._call("decode_backward", problem, True, out, ctypes.byref(inputs), ctypes.byref(to))
        return results

    def loss(
        self, p: Problem, target: Tensor, loss: str, beta=0.3, per_object=False, compute: int | None = None, box: Any = None,
        grads=(True, True), threads=2, tile=0,
    ) -> list[Tensor]:  # fmt: skip
        """The sums of the loss (B,), followed by the gradients."""
        compute = DTYPES[p.planes[0].dtype] if compute is None else compute
        problem = self._problem(p, compute, box, grads, threads, tile, torch.float32)
        target = target.contiguous()
        objective = Objective(target.data_ptr(), DTYPES[target.dtype], _C.losses.index(loss), beta, per_object)
        to, _kept, results = self._gradients(p, grads, (problem.batch,) if per_object else ())
        inputs, _also_kept = self._inputs(p)
        losses = _nan((problem.batch,), torch.float64)
        self._call(
            "decode_loss", problem, any(grads), ctypes.byref(objective), ctypes.byref(inputs),
            ctypes.c_void_p(losses.data_ptr()), ctypes.byref(to),
        )  # fmt: skip
        return [losses, *results]

    def resample(self, x: Tensor, texels: int, size: int, lo: int, hi: int, bounds: Any = None, **options: Any) -> Tensor:
        """tcam_resample_axis of x (outer, n, inner)."""
        o = {"align_corners": False, "padding_mode": "border", "grid": "cells", "adjoint": False, **options}
        problem = Resample(x.shape[0], x.shape[2], texels, size, lo, hi)
        problem.align_corners, problem.padding = o["align_corners"], checks.PADDING_MODES.index(o["padding_mode"])
        problem.corners, problem.adjoint, problem.dtype, problem.threads = (
            o["grid"] == "corners",
            o["adjoint"],
            DTYPES[x.dtype],
            2,
        )
        out = _nan((x.shape[0], texels if o["adjoint"] else hi - lo, x.shape[2]), x.dtype)
        limits = None if bounds is None else (ctypes.c_double * 2)(*bounds)
        arguments = (ctypes.byref(problem), limits, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        status = getattr(self.library, f"tcam_resample_axis_{self.suffix}")(*arguments, *self.more)
        if self.suffix == "cuda":
            assert status == 0
        return out

    def normals(self, objects: int, count: int, sequence: int, seed: int) -> Tensor:
        """tcam_normals."""
        out = _nan((objects, count), torch.float32)
        problem = Normals(seed, objects, count, sequence, 2)
        call = getattr(self.library, f"tcam_normals_{self.suffix}")
        status = call(ctypes.byref(problem), ctypes.c_void_p(out.data_ptr()), *self.more)
        if self.suffix == "cuda":
            assert status == 0
        return out

    def points(
        self, p: Problem, xyz: Tensor, grad: Tensor | None = None, *,
        objects: Tensor | None = None, extra: Tensor | None = None,
        formulation: int = 0, compute: int | None = None, layers: bool = True, tile: int = 0,
    ) -> list[Tensor]:  # fmt: skip
        """decode_points at points (N, axes), or sample_points without ``layers``; with ``grad`` the gradients of planes,
        weights, biases, points and extra."""
        dtype = p.planes[0].dtype
        if not layers:
            p = replace(p, weights=[], biases=[], options={**p.options, "activation": "relu"})
        compute = DTYPES[dtype] if compute is None else compute
        problem = self._problem(p, compute, None, (True, layers), 2, tile, dtype)
        problem.points, problem.axes, problem.formulation = xyz.shape[0], xyz.shape[1], formulation
        problem.extra = 0 if extra is None else extra.shape[1]
        problem.grad_points, problem.grad_extra = 1, extra is not None
        inputs, _kept = self._inputs(p)
        inputs.points, inputs.objects, inputs.extra = (None if t is None else t.data_ptr() for t in (xyz, objects, extra))
        if grad is None:
            n_out = p.weights[-1].shape[0] if layers else problem.group_count * p.planes[0].shape[1]
            out = _nan((xyz.shape[0], n_out), dtype)
            self._call("decode", problem, False, ctypes.byref(inputs), ctypes.c_void_p(out.data_ptr()))
            return [out]
        to, _also_kept, results = self._gradients(p, (True, layers))
        more = [_nan(t.shape, dtype) for t in (xyz, extra) if t is not None]
        to.points, to.extra = more[0].data_ptr(), more[1].data_ptr() if extra is not None else None
        grad = grad.contiguous()
        self._call("decode_backward", problem, True, ctypes.c_void_p(grad.data_ptr()), ctypes.byref(inputs), ctypes.byref(to))
        return [*results, *more]
