"""Checks of single arguments, for checks.py. Each returns the argument in one form, or raises ValueError or TypeError with its
name, what was expected and what was given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tcam_ext import _C
from tcam_ext.options import PLANE_AXES

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_AXIS = 2**31 - 1  # voxels or texels
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
PlaneAxes = tuple[tuple[int, int], ...]

#: Types of arguments that need no look: tensors without metadata, and what is no tensor.
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, dict, torch.dtype, torch.Size}


def plain(value: Any) -> Any:
    """Tensors of subclasses that add metadata, as MONAI's MetaTensor does, as plain tensors; also in a list or tuple.

    Gradients flow to the given tensors. Subclasses that stand for other storage (``__torch_dispatch__``) stay as they are.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        for each in value:
            if type(each) not in _PLAIN:
                return kind(plain(v) for v in value)
        return value
    if not isinstance(value, Tensor) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def takes_plain_tensors(check: F) -> F:
    """A decorator for the checks of a call: tensors of subclasses become plain ones first."""

    @functools.wraps(check)
    def wrapped(*values: Any, **named: Any) -> Any:
        values = tuple([plain(v) for v in values])
        return check(*values, **{name: plain(v) for name, v in named.items()}) if named else check(*values)

    return wrapped  # type: ignore[return-value]


def choice(name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def integer(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return int(value) if isinstance(value, np.integer) else value  # type: ignore[return-value]


def tensor(name: str, value: Any, rank: int, shape: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type_name(value)}")
    if value.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {shape}, got shape {tuple(value.shape)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    return value


def planes(planes: Any, plane_axes: Any) -> list[Tensor]:
    count = len(plane_axes) if isinstance(plane_axes, Sequence) else 3
    if isinstance(planes, Tensor):
        p = tensor("planes", planes, 5, f"(B, {count}, C, h, w)")
        if p.shape[1] != count:
            raise ValueError(
                f"planes: expected one tensor (B, {count}, C, h, w) or {count} tensors, got shape {tuple(p.shape)}"
            )
        checked = list(p.unbind(1))
    else:
        if not isinstance(planes, Sequence):
            raise TypeError(f"planes: expected a tensor (B, {count}, C, h, w) or {count} tensors, got {type_name(planes)}")
        if len(planes) != count:
            raise ValueError(f"planes: expected {count} tensors, one for each pair of plane_axes, got {len(planes)}")
        checked = [tensor(f"planes[{i}]", p, 4, "(B, C, rows, columns)") for i, p in enumerate(planes)]
    if not checked:
        raise ValueError("planes: expected at least one")
    batch, channels = checked[0].shape[:2]
    for i, p in enumerate(checked):
        if p.shape[:2] != (batch, channels):
            raise ValueError(f"planes[{i}]: expected (B, C) = {(batch, channels)} as planes[0] has, got {tuple(p.shape)}")
        if min(p.shape[1:]) < 1:
            raise ValueError(f"planes[{i}]: expected at least one channel and one texel an axis, got {tuple(p.shape)}")
        if p.device != checked[0].device or (p.dtype != checked[0].dtype and autocast_dtype(p.device) is None):
            first = checked[0]
            raise (ValueError if p.device != first.device else TypeError)(
                f"planes[{i}]: expected {first.dtype} on {first.device} as planes[0] has, got {p.dtype} on {p.device}"
            )
    return checked


def plane_axes(plane_axes: Any, axes: int) -> PlaneAxes:
    if plane_axes is PLANE_AXES and axes > 2:
        return PLANE_AXES
    checked = []
    for i, pair in enumerate(plane_axes):
        if not isinstance(pair, Sequence) or len(pair) != 2 or isinstance(pair, str):
            raise ValueError(f"plane_axes[{i}]: expected a pair (row axis, column axis), got {pair!r}")
        row, column = (integer(f"plane_axes[{i}]", a) for a in pair)
        if not (0 <= row < axes and 0 <= column < axes) or row == column:
            raise ValueError(f"plane_axes[{i}]: expected two different axes of 0 to {axes - 1}, got {(row, column)}")
        checked.append((row, column))
    return tuple(checked)


def groups(groups: Any, reduce: str, planes: int) -> tuple[int, ...]:
    """The number of planes of each group; concatenated planes are groups of one."""
    if reduce.startswith("concat"):
        if groups is not None:
            raise ValueError(f'groups: expected None with reduce="{reduce}" (groups are added or multiplied), got {groups!r}')
        return (1,) * planes
    if groups is None:
        return (planes,)
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise TypeError(f"groups: expected None or a sequence of numbers of planes, got {type_name(groups)}")
    checked = tuple(integer(f"groups[{i}]", count) for i, count in enumerate(groups))
    if min(checked, default=0) < 1 or sum(checked) != planes:
        raise ValueError(f"groups: expected numbers of 1 or more that add up to the {planes} planes, got {groups!r}")
    return checked


def layers_with_skips(skips: Any, layers: int) -> tuple[int, ...]:
    if not isinstance(skips, Sequence) or isinstance(skips, str):
        raise TypeError(f"skips: expected a sequence of indices of weights, got {type_name(skips)}")
    checked = tuple(integer(f"skips[{i}]", layer) for i, layer in enumerate(skips))
    for i, layer in enumerate(checked):
        least, most = (checked[i - 1] + 1 if i else 1), layers - 2
        if not least <= layer <= most:
            allowed = f"{least} to {most}, ascending" if least <= most else "none"
            raise ValueError(f"skips[{i}]: expected a hidden layer above the first of {layers} layers ({allowed}), got {layer}")
    return checked


def layers(
    weights: Any, biases: Any, features: int, extra: int, skips: Any = ()
) -> tuple[list[Tensor], list[Tensor | None], tuple[int, ...]]:
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights: expected a sequence of tensors (n_l, n_(l-1)), got {type_name(weights)}")
    if not isinstance(biases, Sequence):
        raise TypeError(f"biases: expected a sequence of tensors (n_l,) or None, got {type_name(biases)}")
    if len(weights) < 1:
        raise ValueError("weights: expected at least one layer, got none")
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected one tensor or None for each of {len(weights)} weights, got {len(biases)}")
    features += extra
    read = features  # by the first layer and by those of skips
    checked_skips = () if isinstance(skips, tuple) and not skips else layers_with_skips(skips, len(weights))
    checked_weights: list[Tensor] = []
    checked_biases: list[Tensor | None] = []
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        w = tensor(f"weights[{i}]", w, 2, "(n_l, n_(l-1))")
        if i in checked_skips:
            features += read
        if w.shape[1] != features or w.shape[0] < 1:
            what = "the features of the planes (and extra)" if i == 0 else f"the rows of weights[{i - 1}]"
            if i in checked_skips:
                what = f"{read} features (skips) and {what}"
            raise ValueError(f"weights[{i}]: expected shape (n, {features}), {features} being {what}, got {tuple(w.shape)}")
        features = w.shape[0]
        if b is not None:
            b = tensor(f"biases[{i}]", b, 1, "(n_l,)")
            if b.shape[0] != features:
                raise ValueError(f"biases[{i}]: expected shape ({features},), got {tuple(b.shape)}")
        checked_weights.append(w)
        checked_biases.append(b)
    return checked_weights, checked_biases, checked_skips


def one_dtype(dtype: torch.dtype, device: torch.device, **groups: Any) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"planes: expected float32, float64, float16 or bfloat16, got {dtype}")
    for name, tensors in groups.items():
        for i, t in enumerate(tensors):
            if t is None:
                continue
            if t.dtype != dtype:
                raise TypeError(f"{name}[{i}]: expected {dtype} as planes have (one dtype for all), got {t.dtype}")
            if t.device != device:
                raise ValueError(f"{name}[{i}]: expected device {device} as planes have, got {t.device}")


def promote(
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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def compute(compute_dtype: Any, autocast: torch.dtype | None, dtype: torch.dtype, device: torch.device) -> str:
    if compute_dtype is None:
        compute_dtype = dtype if autocast is None else autocast
        if compute_dtype == torch.float32 and device.type == "cuda":
            return "float32 or tf32"  # the op reads torch's flag when it runs: torch.compile cannot trace it
    if compute_dtype == "tf32":
        return "tf32"
    if compute_dtype in DTYPES:
        return str(compute_dtype).removeprefix("torch.")
    raise TypeError(f'compute_dtype: expected None, a floating torch.dtype or "tf32", got {compute_dtype!r}')


def size(size: Any) -> tuple[int, int, int]:
    if isinstance(size, (str, bytes)) or not isinstance(size, (Sequence, np.ndarray)) or len(size) != 3:
        raise ValueError(f"size: expected three integers (H, W, D), got {size!r}")
    h, w, d = (integer(f"size[{i}]", n) for i, n in enumerate(size))
    for i, n in enumerate((h, w, d)):
        if n < 1 or n > MAX_AXIS:
            raise ValueError(f"size[{i}]: expected 1 to {MAX_AXIS}, got {n}")
    return h, w, d


def box(box: Any, size: tuple[int, int, int]) -> Box:
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


def bounds(bounds: Any, batch: int, axes: int, device: torch.device) -> Tensor:
    try:
        b = torch.as_tensor(bounds, dtype=torch.float64, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"bounds: expected numbers ({axes}, 2) or (B, {axes}, 2), got {type_name(bounds)}") from error
    if tuple(b.shape) not in ((axes, 2), (batch, axes, 2)):
        raise ValueError(f"bounds: expected shape {(axes, 2)} or {(batch, axes, 2)}, got {tuple(b.shape)}")
    if (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (b.isfinite().all() and (b[..., 0] != b[..., 1]).all())
    ):
        raise ValueError(f"bounds: expected finite pairs (lo, hi) with lo != hi, got {bounds!r}")
    return b.expand(batch, axes, 2).contiguous()


def coordinates(xyz: Any) -> int:
    """The number of coordinates of a point."""
    axes = xyz.shape[-1] if isinstance(xyz, Tensor) and xyz.dim() else 0
    if not isinstance(xyz, Tensor) or not xyz.dtype.is_floating_point or xyz.dim() < 2 or not 2 <= axes <= _C.max_axes:
        got = f"{tuple(xyz.shape)} of {xyz.dtype}" if isinstance(xyz, Tensor) else type_name(xyz)
        raise ValueError(f"xyz: expected floating coordinates (B, N, 3), or (N, 3) with batch_index, got {got}")
    return axes


def in_batch(objects: Tensor, batch: int) -> None:
    """Check the range of batch_index on a CPU. On CUDA the check would wait for the device."""
    if objects.device.type != "cpu" or torch.compiler.is_compiling() or not objects.numel():
        return
    wrong = ((objects < 0) | (objects >= batch)).nonzero()
    if len(wrong):
        i = int(wrong[0, 0])
        raise IndexError(f"batch_index[{i}]: expected 0 to {batch - 1}, got {int(objects[i])}")


def extra_width(extra: Any, dim: int) -> int:
    """The number of extra features, the size of ``extra`` along ``dim``."""
    if extra is None:
        return 0
    if not isinstance(extra, Tensor) or not extra.dim():
        raise TypeError(f"extra: expected a tensor, got {type_name(extra)}")
    return extra.shape[min(dim, extra.dim() - 1)]


def extra_like(extra: Tensor, device: torch.device) -> None:
    if extra.device != device or not extra.dtype.is_floating_point:
        raise TypeError(f"extra: expected a floating dtype on {device}, got {extra.dtype} on {extra.device}")


def type_name(value: Any) -> str:
    return type(value).__name__
