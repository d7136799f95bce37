"""What the kernels do with a request: the arguments in the form they take, and what they return in the caller's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcam_ext import checks, library
from tcam_ext.autograd import DecodeGrid, DecodeGridLoss, DecodePoints, ResampleAxis
from tcam_ext.reference import reduce_planes, with_texel_noise


def decode(request: checks.Request) -> Tensor:
    _, mlp, where = request
    tensors, counts, sampling, own = _canonical(request)
    if isinstance(where, checks.Grid):
        volume: Tensor = DecodeGrid.apply(counts, sampling, _grid(where), mlp.out_dtype, *tensors, own)
        return volume
    out: Tensor = DecodePoints.apply(counts, sampling, where.objects, mlp.out_dtype, *tensors, own, where.points)
    return out.reshape(*where.leading, out.shape[1])


def loss(request: checks.GridRequest, target: Tensor, objective: checks.Objective) -> Tensor:
    planes, mlp, voxels = request
    recording, own = torch.is_grad_enabled(), voxels.extra
    wanted = (
        recording and any(p.requires_grad for p in planes.planes),
        recording and any(t is not None and t.requires_grad for t in (*mlp.weights, *mlp.biases)),
        recording and own is not None and own.requires_grad,
    )
    tensors, counts, sampling, own = _canonical(request)
    kind = objective.loss, objective.beta, objective.per_object
    found: Tensor = DecodeGridLoss.apply(counts, sampling, _grid(voxels), kind, objective.voxels, wanted, target, *tensors, own)
    return found


def sample(request: checks.Request) -> Tensor:
    """The features of the planes."""
    if isinstance(request, checks.GridRequest):
        return _sample_grid(request)
    out, planes = decode(request), request.planes
    if planes.reduce == "concat_channel_major":
        out = out.unflatten(-1, (len(planes.planes), -1)).mT.flatten(-2)
    return out


def _sample_grid(request: checks.GridRequest) -> Tensor:
    """Each plane resampled along its two axes, then spread along the third."""
    sampled, _, voxels = request
    dtype = sampled.planes[0].dtype
    wide = torch.promote_types(dtype, torch.float32)

    def resample(x: Tensor, dim: int, axis: int, limits: Tensor | None) -> Tensor:
        lo, hi = voxels.box[axis]
        bounds = None if limits is None else limits[axis]
        y: Tensor = ResampleAxis.apply(
            x.reshape(-1, x.shape[dim], x.shape[3] if dim == 2 else 1), False, x.shape[dim], voxels.size[axis], lo, hi,
            sampled.align_corners, sampled.padding_mode, voxels.corners, bounds,
        )  # fmt: skip
        return y.view(*x.shape[:dim], hi - lo, *x.shape[dim + 1 :])

    samples = []
    for plane, (row, column) in zip(sampled.planes, sampled.plane_axes, strict=True):
        plane = plane.to(wide)
        if voxels.bounds is None:
            sample = resample(resample(plane, 2, row, None), 3, column, None)
        else:
            parts = [
                resample(resample(plane[b : b + 1], 2, row, limits), 3, column, limits)
                for b, limits in enumerate(voxels.bounds)
            ]
            shape = plane.shape[0], plane.shape[1], voxels.shape[row], voxels.shape[column]
            sample = torch.cat(parts) if parts else plane.new_zeros(shape)
        if row > column:
            sample = sample.mT
        missing = ({0, 1, 2} - {row, column}).pop()
        samples.append(sample.unsqueeze(2 + missing).expand(*plane.shape[:2], *voxels.shape))
    if sampled.reduce.startswith("concat"):
        return reduce_planes([s.to(dtype) for s in samples], sampled.reduce, 1)
    features = samples[0]
    for sample in samples[1:]:  # one volume at a time
        features = features * sample if sampled.reduce == "prod" else features + sample
    return (features / len(samples) if sampled.reduce == "mean" else features).to(dtype).contiguous()


def _grid(voxels: checks.Grid) -> library.Grid:
    return library.Grid(list(voxels.size), [x for pair in voxels.box for x in pair], voxels.corners, voxels.bounds, None)


_FIELDS = library.Sampling._fields


def _owner(name: str, sampled: checks.Sampled, mlp: checks.Decoder) -> Any:
    return sampled if name in checks.Sampled._fields else mlp


def _canonical(
    request: checks.Request,
) -> tuple[list[Tensor | None], tuple[int, int], library.Sampling, Tensor | None]:
    """Planes, weights and biases as the kernels take them, how many there are of the first two, the options, and ``extra``.

    Rows run over the lower axis, and the first layer reads plane by plane.
    """
    mlp, own = request.mlp, request.where.extra
    sampled = with_texel_noise(request.planes, mlp.noise, library.normals)
    own = None if own is None else own.to(sampled.planes[0].dtype)
    planes, axes, weights = [], [], list(mlp.weights)
    for p, (row, column) in zip(sampled.planes, sampled.plane_axes, strict=True):
        planes.append(p if row < column else p.mT)
        axes += sorted((row, column))
    count = len(planes)
    if sampled.reduce == "concat_channel_major" and weights:
        first, rest = weights[0][:, : sampled.features], weights[0][:, sampled.features :]
        weights[0] = torch.cat((first.unflatten(1, (-1, count)).mT.flatten(1), rest), 1)
    reduce = {"prod": "product", "sum": "sum", "mean": "sum"}.get(sampled.reduce, "concat")
    converted: dict[str, Any] = {  # what the kernels take otherwise than a caller gives it
        "plane_axes": axes,
        "reduce": reduce if count > 1 else "concat",
        "plane_scale": 1 / count if sampled.reduce == "mean" else 1.0,
        "padding": sampled.padding_mode,
        "activation": list(mlp.activation),
        "noise_std": mlp.noise.std if mlp.noise.mode == "point" else 0.0,
        "noise_seed": mlp.noise.seed,
    }
    sampling = library.Sampling(*[converted[n] if n in converted else getattr(_owner(n, sampled, mlp), n) for n in _FIELDS])
    return [*planes, *weights, *mlp.biases], (count, len(weights)), sampling, own
