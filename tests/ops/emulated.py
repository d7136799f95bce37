"""A replacement of tcam_ext._C with which the ops run the CUDA kernels on the emulator of tests/simt."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import raw
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tcam_ext import _C

SHARED = 227 << 10


def _at(tensors: Any) -> Any:
    """An array of pointers, which must live as long as it is used."""
    return (ctypes.c_void_p * max(len(tensors), 1))(*[None if t is None else t.data_ptr() for t in tensors])


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class Emulated:
    """The functions of _C that library.py calls, on a library built by simt.build."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.tcam_decode_cuda_workspace.restype = ctypes.c_int64

    def __getattr__(self, name: str) -> Any:
        return getattr(_C, name)

    def _run(self, function: str, *arguments: Any) -> None:
        status = getattr(self.library, function)(*arguments, 0, None)
        if status:
            raise RuntimeError(f"{function}: status {status}")

    def Call(self, *arguments: Any) -> EmulatedCall:
        return EmulatedCall(self, *arguments)

    def normals(self, out: Tensor, sequence: int, seed: int, threads: int) -> None:
        problem = raw.Normals(seed, out.shape[0], out[0].numel(), sequence, threads)
        self._run("tcam_normals_cuda", ctypes.byref(problem), ctypes.c_void_p(out.data_ptr()))

    def resample_axis(self, x: Tensor, out: Tensor, texels: int, size: int, lo: int, hi: int, align_corners: bool,
                      padding: int, corners: bool, bounds: Tensor | None, adjoint: bool, threads: int) -> None:  # fmt: skip
        problem = raw.Resample(
            x.shape[0], x.shape[2], texels, size, lo, hi, align_corners, padding, corners, adjoint, raw.DTYPES[x.dtype], threads
        )
        pointers = [ctypes.c_void_p(_address(t)) for t in (bounds, x, out)]
        self._run("tcam_resample_axis_cuda", ctypes.byref(problem), *pointers)


class EmulatedCall:
    """_C.Call without its checks."""

    def __init__(self, module: Emulated, planes: Any, weights: Any, biases: Any, bounds: Any, points: Any, objects: Any,
                 extra: Any, o: Any) -> None:  # fmt: skip
        self.module = module
        self.p = p = raw.Decode(batch=planes[0].shape[0], channels=planes[0].shape[1], plane_count=len(planes))
        for name, *_ in _C.problem_layout():
            if hasattr(o, name) and not isinstance(getattr(o, name), (list, tuple)):
                setattr(p, name, getattr(o, name))
        group = [g for g, count in enumerate(o.groups) for _ in range(count)]
        p.group_count = len(o.groups)
        for q, (plane, axes) in enumerate(zip(planes, o.plane_axes, strict=True)):
            p.planes[q] = raw.Plane(*axes, group[q], *plane.shape[2:])
        p.points = -1 if points is None else points.shape[0]
        if points is None:
            p.size[:], p.lo[:], p.hi[:] = o.size, o.box[::2], o.box[1::2]
        p.extra = 0 if extra is None else extra.shape[1]
        p.layers = len(weights)
        features = p.channels * p.group_count + p.extra
        for layer, width in enumerate([features, *(w.shape[0] for w in weights)]):
            p.width[layer] = width
        p.first_width = weights[0].shape[0] if weights else 0
        for layer, row in o.skips:
            p.width[1], p.skip[layer] = weights[1].shape[1], row
        for layer, activation in enumerate(o.activation):
            p.activation[layer] = raw.Activation(*activation)
        p.output_activation = raw.Activation(*o.output_activation)
        p.dtype = raw.DTYPES[planes[0].dtype]
        p.grad_points, p.grad_extra = o.grad_points and points is not None, o.grad_extra and extra is not None
        self.kept = [planes, weights, biases, bounds, points, objects, extra, _at(planes), _at(weights), _at(biases)]
        addresses = [ctypes.addressof(k) for k in self.kept[-3:]]
        self.inputs = raw.Inputs(*addresses, *(_address(t) for t in (bounds, points, objects, extra)))

    def workspace(self, backward: bool) -> int:
        return int(self.module.library.tcam_decode_cuda_workspace(ctypes.byref(self.p), int(backward))) + 256

    def explain(self, output: int, shared_limit: int, warpgroups: bool) -> str:
        p = raw.Decode.from_buffer_copy(self.p)
        if output == 2:
            p.grad_planes, p.grad_decoder = 1, p.layers > 0
        text = ctypes.create_string_buffer(400)
        self.module.library.tcam_decode_cuda_explain(ctypes.byref(p), output, SHARED, True, text, len(text))
        return text.value.decode()

    def _aligned(self, workspace: Tensor) -> Any:
        workspace.fill_(255)
        return ctypes.c_void_p((workspace.data_ptr() + 255) // 256 * 256)

    def _gradients(self, planes: Any, decoder: Any, points: Any, extra: Any) -> tuple[Any, Any]:
        layers = self.p.layers
        kept = [_at(planes), _at(decoder[:layers]), _at(decoder[layers:])]
        return raw.Gradients(*(ctypes.addressof(k) for k in kept), _address(points), _address(extra)), kept

    def forward(self, out: Tensor, workspace: Tensor) -> None:
        self.module._run("tcam_decode_cuda", ctypes.byref(self.p), ctypes.byref(self.inputs), ctypes.c_void_p(out.data_ptr()),
                         self._aligned(workspace))  # fmt: skip

    def backward(self, grad: Tensor, planes: Any, decoder: Any, points: Any, extra: Any, workspace: Tensor) -> None:
        to, _kept = self._gradients(planes, decoder, points, extra)
        self.module._run("tcam_decode_backward_cuda", ctypes.byref(self.p), ctypes.c_void_p(grad.data_ptr()),
                         ctypes.byref(self.inputs), ctypes.byref(to), self._aligned(workspace))  # fmt: skip

    def loss(self, target: Tensor, loss: int, beta: float, per_object: bool, losses: Tensor, planes: Any, decoder: Any,
             extra: Any, workspace: Tensor) -> None:  # fmt: skip
        to, _kept = self._gradients(planes, decoder, None, extra)
        objective = raw.Objective(target.data_ptr(), raw.DTYPES[target.dtype], loss, beta, per_object)
        self.module._run("tcam_decode_loss_cuda", ctypes.byref(self.p), ctypes.byref(objective), ctypes.byref(self.inputs),
                         ctypes.c_void_p(losses.data_ptr()), ctypes.byref(to), self._aligned(workspace))  # fmt: skip


class OnCpu(TorchFunctionMode):
    """Keeps tensors that a test moves to "cuda" on the CPU, where the emulated kernels read them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.cuda:
            return args[0]

        def here(x: Any) -> Any:
            return "cpu" if str(x).startswith("cuda") and isinstance(x, (str, torch.device)) else x

        return function(*(here(x) for x in args), **{k: here(v) for k, v in (kwargs or {}).items()})


def replace_kernels(monkeypatch: Any, path: Path) -> None:
    """Make the ops run on the emulator, with CPU tensors."""
    from tcam_ext import library

    emulated = Emulated(path)
    monkeypatch.setattr(library, "_C", emulated)
    monkeypatch.setattr(library, "orders_planes", lambda device: True)
    monkeypatch.setattr(library, "_workspaces", library._Workspaces())
