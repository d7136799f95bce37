"""The backend of the kernels: converts a request to the form that the kernels take, and their results back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcam_ext import checks, library
from tcam_ext.autograd import DecodeGrid, DecodeGridLoss, DecodePoints, ResampleAxis
from tcam_ext.reference import reduce_planes, with_texel_noise


def decode(request: checks.Request) -> Tensor:
    """The volume (B, C_out, *box), or the outputs at points."""
    _, mlp, where = request
    tensors, counts, options, extra = _canonical(request)
    if isinstance(where, checks.Grid):
        volume: Tensor = DecodeGrid.apply(counts, options, _kernel_grid(where), mlp.out_dtype, *tensors, extra)
        return volume
    out: Tensor = DecodePoints.apply(counts, options, where.objects, mlp.out_dtype, *tensors, extra, where.points)
    return out.reshape(*where.leading, out.shape[1])


def loss(request: checks.GridRequest, target: Tensor, objective: checks.Objective) -> Tensor:
    """The loss of the decoded grid, with its gradients computed in the same pass."""
    planes, mlp, grid = request
    recording = torch.is_grad_enabled()
    wanted = (
        recording and any(p.requires_grad for p in planes.tensors),
        recording and any(t is not None and t.requires_grad for t in (*mlp.weights, *mlp.biases)),
        recording and grid.extra is not None and grid.extra.requires_grad,
    )
    tensors, counts, options, extra = _canonical(request)
    kind = objective.loss, objective.beta, objective.per_object
    result: Tensor = DecodeGridLoss.apply(
        counts, options, _kernel_grid(grid), kind, objective.divisor, wanted, target, *tensors, extra
    )
    return result


def sample(request: checks.Request) -> Tensor:
    """The features of the planes."""
    if isinstance(request, checks.GridRequest):
        return _sample_grid(request)
    out, planes = decode(request), request.planes
    if planes.reduce == "concat_channel_major":
        out = out.unflatten(-1, (len(planes.tensors), -1)).mT.flatten(-2)
    return out


def _sample_grid(request: checks.GridRequest) -> Tensor:
    """Each plane resampled along its two axes, then spread along the third."""
    planes, _, grid = request
    dtype = planes.tensors[0].dtype
    wide = torch.promote_types(dtype, torch.float32)

    def resample(x: Tensor, dim: int, axis: int, limits: Tensor | None) -> Tensor:
        lo, hi = grid.box[axis]
        bounds = None if limits is None else limits[axis]
        y: Tensor = ResampleAxis.apply(
            x.reshape(-1, x.shape[dim], x.shape[3] if dim == 2 else 1), False, x.shape[dim], grid.size[axis], lo, hi,
            planes.align_corners, planes.padding_mode, grid.corners, bounds,
        )  # fmt: skip
        return y.view(*x.shape[:dim], hi - lo, *x.shape[dim + 1 :])

    samples = []
    for plane, (row, column) in zip(planes.tensors, planes.plane_axes, strict=True):
        plane = plane.to(wide)
        if grid.bounds is None:
            sample = resample(resample(plane, 2, row, None), 3, column, None)
        else:
            parts = [
                resample(resample(plane[b : b + 1], 2, row, limits), 3, column, limits) for b, limits in enumerate(grid.bounds)
            ]
            shape = plane.shape[0], plane.shape[1], grid.shape[row], grid.shape[column]
            sample = torch.cat(parts) if parts else plane.new_zeros(shape)
        if row > column:
            sample = sample.mT
        missing = ({0, 1, 2} - {row, column}).pop()
        samples.append(sample.unsqueeze(2 + missing).expand(*plane.shape[:2], *grid.shape))
    if planes.reduce.startswith("concat"):
        return reduce_planes([s.to(dtype) for s in samples], planes, 1)
    parts, left = [], iter(samples)
    for count in planes.groups:
        features = next(left)
        for _ in range(count - 1):  # in place of a stack, which would hold all volumes at once
            features = features * next(left) if planes.reduce == "prod" else features + next(left)
        parts.append((features / count if planes.reduce == "mean" else features).to(dtype))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()


def _kernel_grid(grid: checks.Grid) -> library.KernelGrid:
    return library.KernelGrid(list(grid.size), [x for pair in grid.box for x in pair], grid.corners, grid.bounds, None)


def _canonical(
    request: checks.Request,
) -> tuple[list[Tensor | None], tuple[int, int], library.KernelOptions, Tensor | None]:
    """The tensors as the kernels take them (planes, weights, biases), the numbers of planes and of weights, the options, and
    the extra features.

    In this form the first layer reads one plane after the other, and for grids on CUDA rows run over the lower axis.
    """
    mlp, extra = request.mlp, request.where.extra
    planes = with_texel_noise(request.planes, mlp.noise, library.normals)
    extra = None if extra is None else extra.to(planes.tensors[0].dtype)
    tensors, axes = [], []
    weights, biases, skips = _first_matrix(mlp)
    ordered = isinstance(request.where, checks.Grid) and library.orders_planes(planes.tensors[0].device)
    for p, (row, column) in zip(planes.tensors, planes.plane_axes, strict=True):
        swap = ordered and row > column
        tensors.append(p.mT if swap else p)
        axes += [column, row] if swap else [row, column]
    count = len(tensors)
    if planes.reduce == "concat_channel_major" and weights:
        first, rest = weights[0][:, : planes.features], weights[0][:, planes.features :]
        weights[0] = torch.cat((first.unflatten(1, (-1, count)).mT.flatten(1), rest), 1)
    reduce = {"prod": "product", "mean": "mean"}.get(planes.reduce, "sum")
    converted: dict[str, Any] = {  # the fields that the kernels take in another form than the request has
        "plane_axes": axes,
        "groups": list(planes.groups),
        "reduce": reduce if max(planes.groups) > 1 else "sum",
        "padding": planes.padding_mode,
        "skips": skips,
        "activation": list(mlp.activation),
        "noise_std": mlp.noise.std if mlp.noise.mode == "point" else 0.0,
        "noise_seed": mlp.noise.seed,
    }
    fields = {**planes._asdict(), **mlp._asdict(), **converted}
    options = library.KernelOptions(*[fields[name] for name in library.KernelOptions._fields])
    return [*tensors, *weights, *biases], (count, len(weights)), options, extra


def _first_matrix(mlp: checks.Decoder) -> tuple[list[Tensor], list[Tensor | None], list[int]]:
    """Weights and biases in which the first matrix has the rows of all layers that read the features, and pairs of such a layer
    above the first and its first row."""
    weights, biases = list(mlp.weights), list(mlp.biases)
    skips: list[int] = []
    if not mlp.skips:
        return weights, biases, skips
    first = weights[0]
    features = first.shape[1]
    for layer, row in checks.first_rows(mlp)[1:]:
        first = torch.cat((first, first.new_zeros(row - first.shape[0], features), weights[layer][:, :features]))
        weights[layer] = weights[layer][:, features:]
        skips += [layer + 1, row]
    if (bias := biases[0]) is not None:
        biases[0] = torch.cat((bias, bias.new_zeros(first.shape[0] - bias.shape[0])))
    return [first, *weights[1:]], biases, skips
