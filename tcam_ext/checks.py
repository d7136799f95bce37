"""A checked call: records of planes, decoder, grid or points, and how they are made from the arguments of the ops.

Every check raises ValueError or TypeError with the argument's name, what was expected and what was given.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from tcam_ext import _C, activations, arguments, library
from tcam_ext.losses import LOSSES
from tcam_ext.options import Decoding, Options, resolve

PADDING_MODES = _C.paddings
REDUCTIONS_OF_PLANES = ("concat", "concat_channel_major", "sum", "mean", "prod")
GRIDS = ("cells", "corners")
TARGET_DTYPES = (*arguments.DTYPES, torch.uint8)
NOISE_MODES = ("point", "texel")
REDUCTIONS = ("mean", "sum", "none_batch")
MAX_NOISY_PLANES = 31  # each has a sequence of csrc/maths/noise.h, of which 0 is that of points


class Planes(NamedTuple):
    """Checked planes and how they are sampled."""

    tensors: list[Tensor]  # each (B, C, rows, columns)
    plane_axes: arguments.PlaneAxes
    reduce: str
    groups: tuple[int, ...]  # the number of planes of each group; concatenated planes are groups of one
    align_corners: bool
    padding_mode: str

    @property
    def batch(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def features(self) -> int:
        """The number of features after ``reduce``."""
        return self.tensors[0].shape[1] * len(self.groups)


class Noise(NamedTuple):
    """Normal noise of the features, checked; see :class:`tcam_ext.options.Options`."""

    std: float = 0.0
    seed: int = 0
    mode: str = "point"


class Decoder(NamedTuple):
    """A checked MLP and how it is computed."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    skips: tuple[int, ...]  # indices of the weights that read the features before the layer below
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
    box: arguments.Box
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
    leading: tuple[int, ...]  # shape of the result without its features


class GridRequest(NamedTuple):
    """A call that decodes voxels. Without weights it returns the features of the planes."""

    planes: Planes
    mlp: Decoder
    where: Grid


class PointsRequest(NamedTuple):
    """A call that decodes points. Without weights it returns the features of the planes."""

    planes: Planes
    mlp: Decoder
    where: Points


Request = GridRequest | PointsRequest


def decoder_options(given: Any, layers: int) -> Options:
    """The options of a decoder with ``layers`` hidden layers, checked as far as they can be without tensors."""
    o = resolve(Decoding, given)
    activations.hidden_layers(o.activation, layers)
    activations.output("output_activation", o.output_activation)
    arguments.choice("padding_mode", o.padding_mode, PADDING_MODES)
    arguments.choice("reduce", o.reduce, REDUCTIONS_OF_PLANES)
    arguments.groups(o.groups, o.reduce, len(o.plane_axes))
    arguments.layers_with_skips(o.skips, layers + 1)
    return o


@arguments.takes_plain_tensors
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
    checked, mlp = _decoded(_sampled(planes, options, 3), weights, biases, options, out_dtype, arguments.extra_width(extra, 1))
    return GridRequest(checked, mlp, _grid(checked, size, box, kind, bounds, extra))


@arguments.takes_plain_tensors
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
    checked = _sampled(planes, options, arguments.coordinates(xyz))
    checked, mlp = _decoded(checked, weights, biases, options, out_dtype, arguments.extra_width(extra, -1))
    return PointsRequest(checked, mlp, _points(checked, xyz, batch_index, extra, bounds, mlp.storage))


def _decoded(planes: Planes, weights: Any, biases: Any, options: Options, out_dtype: Any, extra: int) -> tuple[Planes, Decoder]:
    if weights != ():
        return _decoder(planes, weights, biases, options, out_dtype, extra)
    dtype = planes.tensors[0].dtype
    arguments.one_dtype(dtype, planes.tensors[0].device)
    compute = "float64" if dtype == torch.float64 else "float32"
    return planes, Decoder([], [], (), (), "none", compute, dtype)


def _sampled(planes: Any, options: Options, axes: int) -> Planes:
    checked = arguments.planes(planes, options.plane_axes)
    arguments.choice("reduce", options.reduce, REDUCTIONS_OF_PLANES)
    arguments.choice("padding_mode", options.padding_mode, PADDING_MODES)
    if not isinstance(options.align_corners, bool):
        raise TypeError(f"align_corners: expected a bool, got {arguments.type_name(options.align_corners)}")
    plane_axes = arguments.plane_axes(options.plane_axes, axes)
    groups = arguments.groups(options.groups, options.reduce, len(checked))
    return Planes(checked, plane_axes, options.reduce, groups, options.align_corners, options.padding_mode)


def _decoder(
    planes: Planes, weights: Any, biases: Any, options: Options, out_dtype: Any, extra: int = 0
) -> tuple[Planes, Decoder]:
    """The decoder, and the planes in its dtype: under autocast all tensors are promoted to one dtype."""
    checked_weights, checked_biases, skips = arguments.layers(weights, biases, planes.features, extra, options.skips)
    checked_planes = planes.tensors
    device = checked_planes[0].device
    autocast = arguments.autocast_dtype(device)
    if autocast is not None:  # tensors often differ in dtype under autocast
        checked_planes, checked_weights, checked_biases = arguments.promote(checked_planes, checked_weights, checked_biases)
    dtype = checked_planes[0].dtype
    arguments.one_dtype(dtype, device, planes=checked_planes, weights=checked_weights, biases=checked_biases)
    hidden = activations.hidden_layers(options.activation, len(checked_weights) - 1)
    activations.output("output_activation", options.output_activation)
    if out_dtype is not None and out_dtype not in arguments.DTYPES:
        raise TypeError(f"out_dtype: expected None, float32, float64, float16 or bfloat16, got {out_dtype!r}")
    return planes._replace(tensors=checked_planes), Decoder(
        checked_weights,
        checked_biases,
        skips,
        hidden,
        options.output_activation,
        arguments.compute(options.compute_dtype, autocast, dtype, device),
        dtype if out_dtype is None else out_dtype,
        _noise(options, planes),
    )


def _noise(options: Options, planes: Planes) -> Noise:
    std, seed, mode = options.noise_std, options.noise_seed, options.noise_mode
    arguments.choice("noise_mode", mode, NOISE_MODES)
    if isinstance(std, bool) or not isinstance(std, (int, float, np.floating, torch.SymFloat)):
        raise TypeError(f"noise_std: expected a number, got {arguments.type_name(std)}")
    if not 0 <= std < math.inf:
        raise ValueError(f"noise_std: expected a finite number >= 0, got {std}")
    if seed is not None:
        seed = arguments.integer("noise_seed", seed)
        if not 0 <= seed < 2**63:
            raise ValueError(f"noise_seed: expected 0 to 2^63 - 1, got {seed}")
    if std == 0:
        return Noise()
    if seed is None:
        raise ValueError("noise_seed: expected an integer with noise_std > 0 (a new one for each training step), got None")
    if planes.batch > _C.max_noise_objects:
        raise ValueError(f"planes: expected up to {_C.max_noise_objects} objects with noise, got {planes.batch}")
    if mode == "texel" and len(planes.tensors) > MAX_NOISY_PLANES:
        raise ValueError(
            f'planes: expected up to {MAX_NOISY_PLANES} with noise_mode="texel", got {len(planes.tensors)}; '
            'noise_mode="point" has no such limit'
        )
    return Noise(cast(float, std) * 1.0, seed, mode)


def _grid(planes: Planes, size: Any, box: Any, kind: Any, bounds: Any, extra: Any = None) -> Grid:
    checked_size = arguments.size(size)
    arguments.choice("grid", kind, GRIDS)
    device = planes.tensors[0].device
    checked_bounds = None if bounds is None else arguments.bounds(bounds, planes.batch, 3, device)
    checked = Grid(checked_size, arguments.box(box, checked_size), kind == "corners", checked_bounds, None)
    if extra is None:
        return checked
    want = (planes.batch, arguments.extra_width(extra, 1), *checked.shape)
    if tuple(extra.shape) != want:
        part = "size" if box is None else "box"
        raise ValueError(f"extra: expected shape {want}, (B, E) and the voxels of {part}, got {tuple(extra.shape)}")
    arguments.extra_like(extra, device)
    if not want[1]:
        return checked
    return checked._replace(extra=extra.movedim(1, -1).reshape(-1, want[1]))


def _points(planes: Planes, xyz: Any, batch_index: Any, extra: Any, bounds: Any, dtype: torch.dtype) -> Points:
    """``dtype``: of the coordinates in the kernel, float32 or float64."""
    axes, batch, device = xyz.shape[-1], planes.batch, planes.tensors[0].device
    if xyz.device != device:
        raise ValueError(f"xyz: expected device {device} as planes have, got {xyz.device}")
    objects = None
    if batch_index is not None:
        objects = arguments.tensor("batch_index", batch_index, 1, "(N,)")
        if xyz.dim() != 2 or objects.shape[0] != xyz.shape[0]:
            raise ValueError(
                f"batch_index: expected (N,) for xyz (N, {axes}), got {tuple(objects.shape)} for {tuple(xyz.shape)}"
            )
        if objects.dtype != torch.int64 or objects.device != device:
            raise TypeError(f"batch_index: expected int64 on {device}, got {objects.dtype} on {objects.device}")
        objects = objects.contiguous()
        arguments.in_batch(objects, batch)
        leading: tuple[int, ...] = (xyz.shape[0],)
    else:
        leading = tuple(xyz.shape[:-1])
        if leading[0] != batch and not (xyz.dim() == 2 and batch == 1):
            raise ValueError(f"xyz: expected (B, N, {axes}) with B = {batch} as planes have, got {tuple(xyz.shape)}")
    flat = xyz.reshape(-1, axes)
    if bounds is not None and batch:
        flat = _in_unit_box(flat, objects, arguments.bounds(bounds, batch, axes, device), torch.promote_types(xyz.dtype, dtype))
    flat = flat.to(dtype)
    if extra is not None:
        if not isinstance(extra, Tensor) or tuple(extra.shape[:-1]) != leading:
            got = tuple(extra.shape) if isinstance(extra, Tensor) else arguments.type_name(extra)
            raise ValueError(f"extra: expected a tensor {(*leading, 'E')} beside xyz {tuple(xyz.shape)}, got {got}")
        arguments.extra_like(extra, device)
        extra = extra.reshape(flat.shape[0], extra.shape[-1]) if extra.shape[-1] else None
    return Points(flat, objects, extra, leading)


def _in_unit_box(points: Tensor, objects: Tensor | None, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Points (N, axes) mapped from ``bounds`` (B, axes, 2) to [-1, 1], in ``dtype``: the wider one, which resolves points in a
    box far from the origin."""
    batch, axes = bounds.shape[:2]
    lo, per_unit = bounds[..., 0].to(dtype), (2 / (bounds[..., 1] - bounds[..., 0])).to(dtype)
    if objects is not None:
        in_range = objects.clamp(0, batch - 1)  # the kernel handles those out of range
        return (points.to(dtype) - lo[in_range]) * per_unit[in_range] - 1
    each = points.to(dtype).view(batch, -1, axes)
    return ((each - lo.unsqueeze(1)) * per_unit.unsqueeze(1) - 1).view(-1, axes)


class Objective(NamedTuple):
    """The arguments of decode_grid_loss that decode_grid does not have."""

    loss: str
    beta: float
    reduction: str
    divisor: int  # of the sum of losses: values in the mean, channels counted; 1 for a sum

    @property
    def per_object(self) -> bool:
        return self.reduction == "none_batch"


def objective(
    planes: Planes, mlp: Decoder, voxels: Grid, whole: bool, target: Tensor, loss: Any, beta: Any, reduction: Any
) -> Objective:
    """``whole``: the grid has no box."""
    want = (planes.batch, mlp.weights[-1].shape[0], *voxels.shape)
    if tuple(target.shape) != want:
        part = "size" if whole else "box"
        raise ValueError(f"target: expected shape {want}, (B, C_out) and the voxels of {part}, got {tuple(target.shape)}")
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(f"target: expected float32, float64, float16, bfloat16 or uint8 (value/255), got {target.dtype}")
    if target.device != planes.tensors[0].device:
        raise ValueError(f"target: expected device {planes.tensors[0].device} as planes have, got {target.device}")
    if target.requires_grad:
        raise ValueError("target: expected a tensor that requires no grad (the target gets no gradient); detach it")
    arguments.choice("loss", loss, LOSSES)
    arguments.choice("reduction", reduction, REDUCTIONS)
    if isinstance(beta, bool) or not isinstance(beta, (int, float, torch.SymFloat)):
        raise TypeError(f"beta: expected a number, got {arguments.type_name(beta)}")
    if not 0 <= beta < math.inf:  # a SymFloat under torch.compile
        raise ValueError(f"beta: expected a finite number >= 0, got {beta}")
    count = math.prod(want[1:]) if reduction == "none_batch" else math.prod(want) if reduction == "mean" else 1
    return Objective(loss, cast(float, beta) * 1.0, reduction, count)


@arguments.takes_plain_tensors
def target_and_size(target: Any, size: Any, box: Any) -> tuple[Tensor, Any]:
    target = arguments.tensor("target", target, 5, "(B, C_out, H, W, D)")
    if size is None and box is not None:
        raise ValueError("size: expected (H, W, D), the whole volume, where box is given; got None")
    return target, list(target.shape[2:]) if size is None else size


def first_rows(mlp: Decoder) -> list[tuple[int, int]]:
    """The kernels project the features for all layers that read them at once: the rows of a matrix that are a layer's, as pairs
    of the layer's index and its first row. The first layer's begin at 0; others at a multiple of _C.skip_step."""
    rows, row = [(0, 0)], mlp.weights[0].shape[0]
    for layer in mlp.skips:
        row = -(-row // _C.skip_step) * _C.skip_step
        rows.append((layer, row))
        row += mlp.weights[layer].shape[0]
    return rows


def native_limits(planes: Planes, mlp: Decoder) -> None:
    """Raise where the kernels do not serve a request; the message names impl="reference", which has no such limits."""
    advice = 'impl="reference" has no such limit'
    channels, weights = planes.tensors[0].shape[1], mlp.weights
    if channels > _C.max_width:
        raise ValueError(f"planes: the native kernel takes up to {_C.max_width} channels, got {channels}; {advice}")
    if len(planes.tensors) > _C.max_planes:
        raise ValueError(f"planes: the native kernel takes up to {_C.max_planes} planes, got {len(planes.tensors)}; {advice}")
    if len(weights) > _C.max_layers:
        raise ValueError(f"weights: the native kernel takes up to {_C.max_layers} layers, got {len(weights)}; {advice}")
    last = len(weights) - 1
    if mlp.skips:
        layer, row = first_rows(mlp)[-1]
        width = row + weights[layer].shape[0]
        if width > _C.max_width:
            what = f"{_C.max_width} outputs of all layers that read the features (but the last in multiples of {_C.skip_step})"
            raise ValueError(f"skips: the native kernel takes up to {what}, got {width}; {advice}")
    for i, w in enumerate(weights):
        most = _C.max_out if i == last else _C.max_width
        if w.shape[0] > most:
            what = "output channels" if i == last else "wide"
            raise ValueError(f"weights[{i}]: the native kernel takes layers up to {most} {what}, got {w.shape[0]}; {advice}")
    device = planes.tensors[0].device
    if device.type == "cuda" and not _C.has_cuda:
        raise NotImplementedError(
            'tcam_ext was built without CUDA: install it where nvcc is found, or use impl="reference", or CPU tensors'
        )
    if device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f'no native kernel for {device.type} tensors; use impl="reference", or CPU or CUDA tensors')
