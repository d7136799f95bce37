"""Every check of an argument. Each raises ValueError or TypeError with the name, what was expected and what was got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from tcam_ext import _C, activations, library
from tcam_ext import options as option_records
from tcam_ext.losses import LOSSES
from tcam_ext.options import PLANE_AXES as PLANE_AXES
from tcam_ext.options import Options

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PADDING_MODES = _C.paddings
REDUCTIONS_OF_PLANES = ("concat", "concat_channel_major", "sum", "mean", "prod")
GRIDS = ("cells", "corners")
TARGET_DTYPES = (*DTYPES, torch.uint8)
NOISE_MODES = ("point", "texel")
REDUCTIONS = ("mean", "sum", "none_batch")
MAX_AXIS = 2**31 - 1  # voxels or texels

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
PlaneAxes = tuple[tuple[int, int], ...]


class Sampled(NamedTuple):
    """Planes and how they are sampled, checked."""

    planes: list[Tensor]  # each (B, C, rows, columns)
    plane_axes: PlaneAxes
    reduce: str
    align_corners: bool
    padding_mode: str

    @property
    def batch(self) -> int:
        return self.planes[0].shape[0]

    @property
    def features(self) -> int:
        """What the first layer reads of the planes."""
        return self.planes[0].shape[1] * (len(self.planes) if self.reduce.startswith("concat") else 1)


class Noise(NamedTuple):
    """Normal noise of the features, checked; see :func:`tcam_ext.decode_grid`."""

    std: float = 0.0
    seed: int = 0
    mode: str = "point"


class Decoder(NamedTuple):
    """An MLP and how it is computed, checked."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: tuple[str, ...]  # of each hidden layer
    output_activation: str
    compute: str  # "float32", "float64", "float16", "bfloat16", "tf32", "float32 or tf32" (as torch's matmul)
    out_dtype: torch.dtype
    noise: Noise = Noise()

    @property
    def storage(self) -> torch.dtype:
        """The dtype that the kernels read and sum in."""
        return library.storage_dtype(self.compute)


class Grid(NamedTuple):
    """The voxels to decode, checked."""

    size: tuple[int, int, int]
    box: Box
    corners: bool
    bounds: Tensor | None  # (B, 3, 2) float64
    extra: Tensor | None  # (B voxels of the box, E)

    @property
    def shape(self) -> tuple[int, int, int]:
        (x0, x1), (y0, y1), (z0, z1) = self.box
        return x1 - x0, y1 - y0, z1 - z0


class Points(NamedTuple):
    """The points to decode, checked."""

    points: Tensor  # (N, axes), of all objects
    objects: Tensor | None  # (N,)
    extra: Tensor | None  # (N, E)
    leading: tuple[int, ...]  # the shape of the result, without its features


def options(given: Any, layers: int) -> Options:
    """Of a decoder with so many hidden layers: names and choices, without any tensor."""
    o = option_records.of(option_records.Decoding, given)
    activations.hidden_layers(o.activation, layers)
    activations.output("output_activation", o.output_activation)
    choice("padding_mode", o.padding_mode, PADDING_MODES)
    choice("reduce", o.reduce, REDUCTIONS_OF_PLANES)
    return o


class GridRequest(NamedTuple):
    """A call for voxels, checked. Without weights: for the features of the planes."""

    planes: Sampled
    mlp: Decoder
    where: Grid


class PointsRequest(NamedTuple):
    """The same for points."""

    planes: Sampled
    mlp: Decoder
    where: Points


Request = GridRequest | PointsRequest


def grid_request(
    planes: Any,
    weights: Any,
    biases: Any,
    size: Any,
    box: Any,
    kind: Any,
    bounds: Any,
    extra: Any,
    options: Options,
    out_dtype: Any,
) -> GridRequest:
    found, mlp = _decoded(sampled(planes, options, 3), weights, biases, options, out_dtype, extra_width(extra, 1))
    return GridRequest(found, mlp, grid(found, size, box, kind, bounds, extra))


def points_request(
    planes: Any,
    weights: Any,
    biases: Any,
    xyz: Any,
    batch_index: Any,
    bounds: Any,
    extra: Any,
    options: Options,
    out_dtype: Any,
) -> PointsRequest:
    found = sampled(planes, options, coordinates(xyz))
    found, mlp = _decoded(found, weights, biases, options, out_dtype, extra_width(extra, -1))
    return PointsRequest(found, mlp, points(found, xyz, batch_index, extra, bounds, mlp.storage))


def _decoded(
    planes: Sampled, weights: Any, biases: Any, options: Options, out_dtype: Any, extra: int
) -> tuple[Sampled, Decoder]:
    if weights != ():
        return decoder(planes, weights, biases, options, out_dtype, extra)
    dtype = planes.planes[0].dtype
    one_dtype(dtype, planes.planes[0].device)
    compute = "float64" if dtype == torch.float64 else "float32"
    return planes, Decoder([], [], (), "none", compute, dtype)


def sampled(planes: Any, options: Options, axes: int) -> Sampled:
    checked = _planes(planes, options.plane_axes)
    choice("reduce", options.reduce, REDUCTIONS_OF_PLANES)
    choice("padding_mode", options.padding_mode, PADDING_MODES)
    if not isinstance(options.align_corners, bool):
        raise TypeError(f"align_corners: expected a bool, got {_type(options.align_corners)}")
    plane_axes = _plane_axes(options.plane_axes, len(checked), axes)
    return Sampled(checked, plane_axes, options.reduce, options.align_corners, options.padding_mode)


def decoder(
    planes: Sampled, weights: Any, biases: Any, options: Options, out_dtype: Any, extra: int = 0
) -> tuple[Sampled, Decoder]:
    """Check and normalise; under autocast also promote the tensors to one dtype."""
    checked_weights, checked_biases = _layers(weights, biases, planes.features, extra)
    checked_planes = planes.planes
    device = checked_planes[0].device
    autocast = _autocast_dtype(device)
    if autocast is not None:  # tensors of several dtypes are usual there
        checked_planes, checked_weights, checked_biases = _promote(checked_planes, checked_weights, checked_biases)
    dtype = checked_planes[0].dtype
    one_dtype(dtype, device, planes=checked_planes, weights=checked_weights, biases=checked_biases)
    hidden = activations.hidden_layers(options.activation, len(checked_weights) - 1)
    activations.output("output_activation", options.output_activation)
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"out_dtype: expected None, float32, float64, float16 or bfloat16, got {out_dtype!r}")
    return planes._replace(planes=checked_planes), Decoder(
        checked_weights,
        checked_biases,
        hidden,
        options.output_activation,
        _compute(options.compute_dtype, autocast, dtype, device),
        dtype if out_dtype is None else out_dtype,
        _noise(options, planes.batch),
    )


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


def _noise(options: Options, batch: int) -> Noise:
    std, seed, mode = options.noise_std, options.noise_seed, options.noise_mode
    choice("noise_mode", mode, NOISE_MODES)
    if isinstance(std, bool) or not isinstance(std, (int, float, np.floating, torch.SymFloat)):
        raise TypeError(f"noise_std: expected a number, got {_type(std)}")
    if not 0 <= std < math.inf:
        raise ValueError(f"noise_std: expected a finite number >= 0, got {std}")
    if seed is not None:
        seed = integer("noise_seed", seed)
        if not 0 <= seed < 2**63:
            raise ValueError(f"noise_seed: expected 0 to 2^63 - 1, got {seed}")
    if std == 0:
        return Noise()
    if seed is None:
        raise ValueError("noise_seed: expected an integer beside noise_std > 0 (another for each step of a training), got None")
    if batch > _C.max_noise_objects:
        raise ValueError(f"planes: expected up to {_C.max_noise_objects} objects with noise, got {batch}")
    return Noise(cast(float, std) * 1.0, seed, mode)


def grid(planes: Sampled, size: Any, box: Any, kind: Any, bounds: Any, extra: Any = None) -> Grid:
    checked_size = _size(size)
    choice("grid", kind, GRIDS)
    device = planes.planes[0].device
    checked_bounds = None if bounds is None else _bounds(bounds, planes.batch, 3, device)
    checked = Grid(checked_size, _box(box, checked_size), kind == "corners", checked_bounds, None)
    if extra is None:
        return checked
    want = (planes.batch, extra_width(extra, 1), *checked.shape)
    if tuple(extra.shape) != want:
        part = "size" if box is None else "box"
        raise ValueError(f"extra: expected shape {want}, (B, E) and the voxels of {part}, got {tuple(extra.shape)}")
    _check_extra(extra, device)
    if not want[1]:
        return checked
    return checked._replace(extra=extra.movedim(1, -1).reshape(-1, want[1]))


def extra_width(extra: Any, dim: int) -> int:
    """How many features ``extra`` has, along ``dim``."""
    if extra is None:
        return 0
    if not isinstance(extra, Tensor) or not extra.dim():
        raise TypeError(f"extra: expected a tensor, got {_type(extra)}")
    return extra.shape[min(dim, extra.dim() - 1)]


def _check_extra(extra: Tensor, device: torch.device) -> None:
    if extra.device != device or not extra.dtype.is_floating_point:
        raise TypeError(f"extra: expected a floating dtype on {device}, got {extra.dtype} on {extra.device}")


def coordinates(xyz: Any) -> int:
    """How many a point has."""
    axes = xyz.shape[-1] if isinstance(xyz, Tensor) and xyz.dim() else 0
    if not isinstance(xyz, Tensor) or not xyz.dtype.is_floating_point or xyz.dim() < 2 or not 2 <= axes <= _C.max_axes:
        got = f"{tuple(xyz.shape)} of {xyz.dtype}" if isinstance(xyz, Tensor) else _type(xyz)
        raise ValueError(f"xyz: expected floating coordinates (B, N, 3), or (N, 3) with batch_index, got {got}")
    return axes


def points(planes: Sampled, xyz: Any, batch_index: Any, extra: Any, bounds: Any, dtype: torch.dtype) -> Points:
    """``dtype``: of the coordinates in the kernel, float32 or float64."""
    axes, batch, device = xyz.shape[-1], planes.batch, planes.planes[0].device
    if xyz.device != device:
        raise ValueError(f"xyz: expected device {device} as planes have, got {xyz.device}")
    objects = None
    if batch_index is not None:
        objects = _tensor("batch_index", batch_index, 1, "(N,)")
        if xyz.dim() != 2 or objects.shape[0] != xyz.shape[0]:
            raise ValueError(
                f"batch_index: expected (N,) for xyz (N, {axes}), got {tuple(objects.shape)} for {tuple(xyz.shape)}"
            )
        if objects.dtype != torch.int64 or objects.device != device:
            raise TypeError(f"batch_index: expected int64 on {device}, got {objects.dtype} on {objects.device}")
        objects = objects.contiguous()
        _check_objects(objects, batch)
        leading: tuple[int, ...] = (xyz.shape[0],)
    else:
        leading = tuple(xyz.shape[:-1])
        if leading[0] != batch and not (xyz.dim() == 2 and batch == 1):
            raise ValueError(f"xyz: expected (B, N, {axes}) with B = {batch} as planes have, got {tuple(xyz.shape)}")
    flat = xyz.reshape(-1, axes)
    if bounds is not None and batch:
        box = _bounds(bounds, batch, axes, device)
        wide = torch.promote_types(xyz.dtype, dtype)  # a box far from the origin would lose its points in a narrower dtype
        lo, per_unit = box[..., 0].to(wide), (2 / (box[..., 1] - box[..., 0])).to(wide)
        if objects is not None:
            known = objects.clamp(0, batch - 1)  # the kernel says what becomes of the others
            flat = (flat.to(wide) - lo[known]) * per_unit[known] - 1
        else:
            each = flat.to(wide).view(batch, -1, axes)
            flat = ((each - lo.unsqueeze(1)) * per_unit.unsqueeze(1) - 1).view(-1, axes)
    flat = flat.to(dtype)
    if extra is not None:
        if not isinstance(extra, Tensor) or tuple(extra.shape[:-1]) != leading:
            got = tuple(extra.shape) if isinstance(extra, Tensor) else _type(extra)
            raise ValueError(f"extra: expected a tensor {(*leading, 'E')} beside xyz {tuple(xyz.shape)}, got {got}")
        _check_extra(extra, device)
        extra = extra.reshape(flat.shape[0], extra.shape[-1]) if extra.shape[-1] else None
    return Points(flat, objects, extra, leading)


class Objective(NamedTuple):
    """What decode_grid_loss has beside the arguments of decode_grid."""

    loss: str
    beta: float
    reduction: str
    voxels: int  # that a loss is the mean of, channels counted; 1 for a sum

    @property
    def per_object(self) -> bool:
        return self.reduction == "none_batch"


def objective(
    planes: Sampled, mlp: Decoder, voxels: Grid, whole: bool, target: Tensor, loss: Any, beta: Any, reduction: Any
) -> Objective:
    """``whole``: the grid is not a box of a larger one."""
    want = (planes.batch, mlp.weights[-1].shape[0], *voxels.shape)
    if tuple(target.shape) != want:
        part = "size" if whole else "box"
        raise ValueError(f"target: expected shape {want}, (B, C_out) and the voxels of {part}, got {tuple(target.shape)}")
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(f"target: expected float32, float64, float16, bfloat16 or uint8 (value/255), got {target.dtype}")
    if target.device != planes.planes[0].device:
        raise ValueError(f"target: expected device {planes.planes[0].device} as planes have, got {target.device}")
    if target.requires_grad:
        raise ValueError("target: expected a tensor that requires no grad (there is no gradient to the target); detach it")
    choice("loss", loss, LOSSES)
    choice("reduction", reduction, REDUCTIONS)
    if isinstance(beta, bool) or not isinstance(beta, (int, float, torch.SymFloat)):
        raise TypeError(f"beta: expected a number, got {_type(beta)}")
    if not 0 <= beta < math.inf:  # a SymFloat under torch.compile
        raise ValueError(f"beta: expected a finite number >= 0, got {beta}")
    count = math.prod(want[1:]) if reduction == "none_batch" else math.prod(want) if reduction == "mean" else 1
    return Objective(loss, cast(float, beta) * 1.0, reduction, count)


def _check_objects(objects: Tensor, batch: int) -> None:
    """On CUDA this would wait for the device."""
    if objects.device.type != "cpu" or torch.compiler.is_compiling() or not objects.numel():
        return
    wrong = ((objects < 0) | (objects >= batch)).nonzero()
    if len(wrong):
        i = int(wrong[0, 0])
        raise IndexError(f"batch_index[{i}]: expected 0 to {batch - 1}, got {int(objects[i])}")


def target_and_size(target: Any, size: Any, box: Any) -> tuple[Tensor, Any]:
    target = _tensor("target", target, 5, "(B, C_out, H, W, D)")
    if size is None and box is not None:
        raise ValueError("size: expected (H, W, D), the whole volume, where box is given; got None")
    return target, list(target.shape[2:]) if size is None else size


def native_limits(planes: Sampled, weights: Sequence[Tensor]) -> None:
    """What the kernels serve. The message names impl="reference", which has no such limits."""
    advice = 'impl="reference" has no such limit'
    channels = planes.planes[0].shape[1]
    if channels > _C.max_width:
        raise ValueError(f"planes: the native kernel takes up to {_C.max_width} channels, got {channels}; {advice}")
    if len(planes.planes) > _C.max_planes:
        raise ValueError(f"planes: the native kernel takes up to {_C.max_planes} planes, got {len(planes.planes)}; {advice}")
    if len(weights) > _C.max_layers:
        raise ValueError(f"weights: the native kernel takes up to {_C.max_layers} layers, got {len(weights)}; {advice}")
    last = len(weights) - 1
    for i, w in enumerate(weights):
        most = _C.max_out if i == last else _C.max_width
        if w.shape[0] > most:
            what = "output channels" if i == last else "wide"
            raise ValueError(f"weights[{i}]: the native kernel takes layers up to {most} {what}, got {w.shape[0]}; {advice}")
    device = planes.planes[0].device
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


def _planes(planes: Any, plane_axes: Any) -> list[Tensor]:
    count = len(plane_axes) if isinstance(plane_axes, Sequence) else 3
    if isinstance(planes, Tensor):
        p = _tensor("planes", planes, 5, f"(B, {count}, C, h, w)")
        if p.shape[1] != count:
            raise ValueError(
                f"planes: expected one tensor (B, {count}, C, h, w) or {count} tensors, got shape {tuple(p.shape)}"
            )
        checked = list(p.unbind(1))
    else:
        if not isinstance(planes, Sequence):
            raise TypeError(f"planes: expected a tensor (B, {count}, C, h, w) or {count} tensors, got {_type(planes)}")
        if len(planes) != count:
            raise ValueError(f"planes: expected {count} tensors, one for each pair of plane_axes, got {len(planes)}")
        checked = [_tensor(f"planes[{i}]", p, 4, "(B, C, rows, columns)") for i, p in enumerate(planes)]
    if not checked:
        raise ValueError("planes: expected at least one")
    batch, channels = checked[0].shape[:2]
    for i, p in enumerate(checked):
        if p.shape[:2] != (batch, channels):
            raise ValueError(f"planes[{i}]: expected (B, C) = {(batch, channels)} as planes[0] has, got {tuple(p.shape)}")
        if min(p.shape[1:]) < 1:
            raise ValueError(f"planes[{i}]: expected at least one channel and one texel an axis, got {tuple(p.shape)}")
        if p.device != checked[0].device or (p.dtype != checked[0].dtype and _autocast_dtype(p.device) is None):
            first = checked[0]
            raise (ValueError if p.device != first.device else TypeError)(
                f"planes[{i}]: expected {first.dtype} on {first.device} as planes[0] has, got {p.dtype} on {p.device}"
            )
    return checked


def _plane_axes(plane_axes: Any, count: int, axes: int) -> PlaneAxes:
    checked = []
    for i, pair in enumerate(plane_axes):
        if not isinstance(pair, Sequence) or len(pair) != 2 or isinstance(pair, str):
            raise ValueError(f"plane_axes[{i}]: expected a pair (row axis, column axis), got {pair!r}")
        row, column = (integer(f"plane_axes[{i}]", a) for a in pair)
        if not (0 <= row < axes and 0 <= column < axes) or row == column:
            raise ValueError(f"plane_axes[{i}]: expected two different axes of 0 to {axes - 1}, got {(row, column)}")
        checked.append((row, column))
    return tuple(checked)


def _bounds(bounds: Any, batch: int, axes: int, device: torch.device) -> Tensor:
    try:
        b = torch.as_tensor(bounds, dtype=torch.float64, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"bounds: expected numbers ({axes}, 2) or (B, {axes}, 2), got {_type(bounds)}") from error
    if tuple(b.shape) not in ((axes, 2), (batch, axes, 2)):
        raise ValueError(f"bounds: expected shape {(axes, 2)} or {(batch, axes, 2)}, got {tuple(b.shape)}")
    if (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (b.isfinite().all() and (b[..., 0] != b[..., 1]).all())
    ):
        raise ValueError(f"bounds: expected finite pairs (lo, hi) with lo != hi, got {bounds!r}")
    return b.expand(batch, axes, 2).contiguous()


def _layers(weights: Any, biases: Any, features: int, extra: int) -> tuple[list[Tensor], list[Tensor | None]]:
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights: expected a sequence of tensors (n_l, n_(l-1)), got {_type(weights)}")
    if not isinstance(biases, Sequence):
        raise TypeError(f"biases: expected a sequence of tensors (n_l,) or None, got {_type(biases)}")
    if len(weights) < 1:
        raise ValueError("weights: expected at least one layer, got none")
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected one tensor or None for each of {len(weights)} weights, got {len(biases)}")
    features += extra
    checked_weights: list[Tensor] = []
    checked_biases: list[Tensor | None] = []
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        w = _tensor(f"weights[{i}]", w, 2, "(n_l, n_(l-1))")
        if w.shape[1] != features or w.shape[0] < 1:
            what = "the features of the planes (and extra)" if i == 0 else f"the rows of weights[{i - 1}]"
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
