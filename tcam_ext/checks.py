"""Every check of an argument. Each raises ValueError or TypeError with the name, what was expected and what was got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from tcam_ext import _C
from tcam_ext.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS
from tcam_ext.losses import LOSSES

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PADDING_MODES = ("border", "zeros")
TARGET_DTYPES = (*DTYPES, torch.uint8)
REDUCTIONS = ("mean", "sum", "none_batch")
MAX_LAYERS = 6
MAX_WIDTH = 256
MAX_OUT = 16
MAX_AXIS = 2**31 - 1

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


class Options(NamedTuple):
    """How every op samples and decodes; see :func:`tcam_ext.decode_grid`."""

    activation: str = "relu"
    output_activation: str = "none"
    align_corners: bool = False
    padding_mode: str = "border"
    compute_dtype: torch.dtype | str | None = None


class DecodeGrid(NamedTuple):
    """The arguments of decode_grid, checked and brought to one form."""

    planes: list[Tensor]  # 3 x (B, C, rows, columns)
    weights: list[Tensor]
    biases: list[Tensor | None]
    size: tuple[int, int, int]
    box: Box
    options: Options
    compute: str  # "float32", "float64", "float16", "bfloat16", "tf32", "float32 or tf32" (as torch's matmul)
    out_dtype: torch.dtype


def decode_grid(planes: Any, weights: Any, biases: Any, size: Any, box: Any, options: Options, out_dtype: Any) -> DecodeGrid:
    """Check and normalise; under autocast also promote the tensors to one dtype."""
    checked_planes = _planes(planes)
    checked_weights, checked_biases = _layers(weights, biases, 3 * checked_planes[0].shape[1])
    device = checked_planes[0].device
    autocast = _autocast_dtype(device)
    if autocast is not None:  # tensors of several dtypes are usual there
        checked_planes, checked_weights, checked_biases = _promote(checked_planes, checked_weights, checked_biases)
    dtype = checked_planes[0].dtype
    if dtype not in DTYPES:
        raise TypeError(f"planes: expected float32, float64, float16 or bfloat16, got {dtype}")
    for name, tensors in (
        ("planes", checked_planes),
        ("weights", checked_weights),
        ("biases", checked_biases),
    ):
        for i, t in enumerate(tensors):
            if t is None:
                continue
            if t.dtype != dtype:
                raise TypeError(f"{name}[{i}]: expected {dtype} as planes have (one dtype for all), got {t.dtype}")
            if t.device != device:
                raise ValueError(f"{name}[{i}]: expected device {device} as planes have, got {t.device}")
    checked_size = _size(size)
    checked_box = _box(box, checked_size)
    choice("activation", options.activation, ACTIVATIONS)
    choice("output_activation", options.output_activation, OUTPUT_ACTIVATIONS)
    choice("padding_mode", options.padding_mode, PADDING_MODES)
    if not isinstance(options.align_corners, bool):
        raise TypeError(f"align_corners: expected a bool, got {_type(options.align_corners)}")
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"out_dtype: expected None, float32, float64, float16 or bfloat16, got {out_dtype!r}")
    return DecodeGrid(
        checked_planes,
        checked_weights,
        checked_biases,
        checked_size,
        checked_box,
        options,
        _compute(options.compute_dtype, autocast, dtype, device),
        dtype if out_dtype is None else out_dtype,
    )


class Objective(NamedTuple):
    """What decode_grid_loss has beside the arguments of decode_grid."""

    beta: float
    voxels: int  # that a loss is the mean of, channels counted; 1 for a sum


def decode_grid_loss(
    planes: Any,
    weights: Any,
    biases: Any,
    target: Any,
    size: Any,
    box: Any,
    loss: Any,
    beta: Any,
    reduction: Any,
    options: Options,
) -> tuple[DecodeGrid, Objective]:
    target = _tensor("target", target, 5, "(B, C_out, H, W, D)")
    if size is None:
        if box is not None:
            raise ValueError("size: expected (H, W, D), the whole volume, where box is given; got None")
        size = list(target.shape[2:])
    call = decode_grid(planes, weights, biases, size, box, options, None)
    want = (call.planes[0].shape[0], call.weights[-1].shape[0], *(hi - lo for lo, hi in call.box))
    if tuple(target.shape) != want:
        part = "size" if box is None else "box"
        raise ValueError(f"target: expected shape {want}, (B, C_out) and the voxels of {part}, got {tuple(target.shape)}")
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(f"target: expected float32, float64, float16, bfloat16 or uint8 (value/255), got {target.dtype}")
    if target.device != call.planes[0].device:
        raise ValueError(f"target: expected device {call.planes[0].device} as planes have, got {target.device}")
    if target.requires_grad:
        raise ValueError("target: expected a tensor that requires no grad (there is no gradient to the target); detach it")
    choice("loss", loss, LOSSES)
    choice("reduction", reduction, REDUCTIONS)
    if isinstance(beta, bool) or not isinstance(beta, (int, float, torch.SymFloat)):
        raise TypeError(f"beta: expected a number, got {_type(beta)}")
    if not 0 <= beta < math.inf:  # a SymFloat under torch.compile
        raise ValueError(f"beta: expected a finite number >= 0, got {beta}")
    count = math.prod(want[1:]) if reduction == "none_batch" else math.prod(want) if reduction == "mean" else 1
    return call, Objective(cast(float, beta) * 1.0, count)


def native_limits(call: DecodeGrid) -> None:
    """What the kernels serve. The message names impl="reference", which has no such limits."""
    advice = 'impl="reference" has no such limit'
    channels = call.planes[0].shape[1]
    if channels > MAX_WIDTH:
        raise ValueError(f"planes: the native kernel takes up to {MAX_WIDTH} channels, got {channels}; {advice}")
    if len(call.weights) > MAX_LAYERS:
        raise ValueError(f"weights: the native kernel takes up to {MAX_LAYERS} layers, got {len(call.weights)}; {advice}")
    last = len(call.weights) - 1
    for i, w in enumerate(call.weights):
        most = MAX_OUT if i == last else MAX_WIDTH
        if w.shape[0] > most:
            what = "output channels" if i == last else "wide"
            raise ValueError(f"weights[{i}]: the native kernel takes layers up to {most} {what}, got {w.shape[0]}; {advice}")
    device = call.planes[0].device
    if device.type == "cuda" and not _C.has_cuda:
        raise NotImplementedError(
            'tcam_ext was built without CUDA: install it where nvcc is found, or use impl="reference", or CPU tensors'
        )
    if device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f'no native kernel for {device.type} tensors; use impl="reference", or CPU or CUDA tensors')


def choice(name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return int(value) if isinstance(value, np.integer) else value  # type: ignore[return-value]


def _type(value: Any) -> str:
    return type(value).__name__


def _tensor(name: str, value: Any, rank: int, shape: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {_type(value)}")
    if value.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {shape}, got shape {tuple(value.shape)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    return value


def _planes(planes: Any) -> list[Tensor]:
    if isinstance(planes, Tensor):
        p = _tensor("planes", planes, 5, "(B, 3, C, R, R)")
        if p.shape[1] != 3 or p.shape[3] != p.shape[4]:
            raise ValueError(f"planes: expected one tensor (B, 3, C, R, R) or three tensors, got shape {tuple(p.shape)}")
        checked = list(p.unbind(1))
    else:
        if not isinstance(planes, Sequence):
            raise TypeError(f"planes: expected a tensor (B, 3, C, R, R) or three tensors, got {_type(planes)}")
        if len(planes) != 3:
            raise ValueError(f"planes: expected three tensors (xy, yz, xz), got {len(planes)}")
        names = ("(B, C, h, w)", "(B, C, w, d)", "(B, C, h, d)")
        checked = [_tensor(f"planes[{i}]", p, 4, names[i]) for i, p in enumerate(planes)]
    batch, channels, h, w = checked[0].shape
    d = checked[1].shape[3]
    for i, want in enumerate(((batch, channels, h, w), (batch, channels, w, d), (batch, channels, h, d))):
        if tuple(checked[i].shape) != want:
            raise ValueError(
                f"planes[{i}]: expected shape {want} to agree with planes (B, C, h, w), (B, C, w, d), (B, C, h, d), "
                f"got {tuple(checked[i].shape)}"
            )
    if channels < 1 or h < 1 or w < 1 or d < 1:
        raise ValueError(f"planes: expected at least one channel and one texel an axis, got C, h, w, d = {channels, h, w, d}")
    return checked


def _layers(weights: Any, biases: Any, features: int) -> tuple[list[Tensor], list[Tensor | None]]:
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights: expected a sequence of tensors (n_l, n_(l-1)), got {_type(weights)}")
    if not isinstance(biases, Sequence):
        raise TypeError(f"biases: expected a sequence of tensors (n_l,) or None, got {_type(biases)}")
    if len(weights) < 1:
        raise ValueError("weights: expected at least one layer, got none")
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected one tensor or None for each of {len(weights)} weights, got {len(biases)}")
    checked_weights: list[Tensor] = []
    checked_biases: list[Tensor | None] = []
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        w = _tensor(f"weights[{i}]", w, 2, "(n_l, n_(l-1))")
        if w.shape[1] != features or w.shape[0] < 1:
            what = "3C, three times the channels of planes" if i == 0 else f"the rows of weights[{i - 1}]"
            raise ValueError(f"weights[{i}]: expected shape (n, {features}), {features} being {what}, got {tuple(w.shape)}")
        features = w.shape[0]
        if b is not None:
            b = _tensor(f"biases[{i}]", b, 1, "(n_l,)")
            if b.shape[0] != features:
                raise ValueError(f"biases[{i}]: expected shape ({features},), got {tuple(b.shape)}")
        checked_weights.append(w)
        checked_biases.append(b)
    return checked_weights, checked_biases


def _size(size: Any) -> tuple[int, int, int]:
    if isinstance(size, (str, bytes)) or not isinstance(size, (Sequence, np.ndarray)) or len(size) != 3:
        raise ValueError(f"size: expected three integers (H, W, D), got {size!r}")
    h, w, d = (integer(f"size[{i}]", n) for i, n in enumerate(size))
    for i, n in enumerate((h, w, d)):
        if n < 1 or n > MAX_AXIS:
            raise ValueError(f"size[{i}]: expected 1 to {MAX_AXIS}, got {n}")
    return h, w, d


def _box(box: Any, size: tuple[int, int, int]) -> Box:
    if box is None:
        return (0, size[0]), (0, size[1]), (0, size[2])
    if isinstance(box, (str, bytes)) or not isinstance(box, (Sequence, np.ndarray)) or len(box) != 3:
        raise ValueError(f"box: expected None or ((x0, x1), (y0, y1), (z0, z1)), got {box!r}")
    checked = []
    for i, pair in enumerate(box):
        if isinstance(pair, (str, bytes)) or not isinstance(pair, (Sequence, np.ndarray)) or len(pair) != 2:
            raise ValueError(f"box[{i}]: expected a pair of integers (lo, hi), got {pair!r}")
        lo, hi = integer(f"box[{i}][0]", pair[0]), integer(f"box[{i}][1]", pair[1])
        if not 0 <= lo < hi <= size[i]:
            raise ValueError(f"box[{i}]: expected 0 <= lo < hi <= {size[i]} (size[{i}]), got ({lo}, {hi})")
        checked.append((lo, hi))
    return checked[0], checked[1], checked[2]


def _compute(compute_dtype: Any, autocast: torch.dtype | None, dtype: torch.dtype, device: torch.device) -> str:
    if compute_dtype is None:
        compute_dtype = dtype if autocast is None else autocast
        if compute_dtype == torch.float32 and device.type == "cuda":
            return "float32 or tf32"  # the op looks at torch's flag when it runs: torch.compile cannot trace the question
    if compute_dtype == "tf32":
        return "tf32"
    for known in DTYPES:
        if compute_dtype == known:
            return str(known).removeprefix("torch.")
    raise TypeError(f'compute_dtype: expected None, a floating torch.dtype or "tf32", got {compute_dtype!r}')


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _promote(
    planes: list[Tensor], weights: list[Tensor], biases: list[Tensor | None]
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    dtype = planes[0].dtype
    for t in (*planes, *weights, *biases):
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return (
        [t.to(dtype) for t in planes],
        [t.to(dtype) for t in weights],
        [None if t is None else t.to(dtype) for t in biases],
    )
