"""The ops in plain PyTorch: a readable specification. ``reference.decode_grid(...)`` is
``tcam_ext.decode_grid(..., impl="reference")``, and so for every op.

The reference runs on any device in any floating dtype, and can be differentiated any number of times. It keeps the features of
the planes and every hidden layer of all points in memory, which the fused ops avoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tcam_ext import activations, checks
from tcam_ext.losses import LOSSES


class Taps(NamedTuple):
    """The texels below and above coordinates on an axis, and their weights."""

    below: Tensor
    above: Tensor
    w_below: Tensor
    w_above: Tensor


def taps(coordinates: Tensor, texels: int, align_corners: bool, padding_mode: str) -> Taps:
    """The taps of coordinates c in [-1, 1] on an axis of m texels, as in ``grid_sample``.

    The position in texels is x = ((c + 1) m - 1)/2 or, with ``align_corners``, x = (c + 1)/2 (m - 1). Padding "border" clamps x
    to [0, m - 1]; "reflection" first reflects x about the outer edges of the axis (with ``align_corners`` about the outer
    centres); "zeros" gives texels outside the plane weight zero. NaN counts as -1.
    """
    m = texels
    c = coordinates.nan_to_num(-1.0, posinf=torch.inf, neginf=-torch.inf)
    x = ((c + 1) / 2 * (m - 1)).nan_to_num(0.0, torch.inf, -torch.inf) if align_corners else ((c + 1) * m - 1) / 2
    if padding_mode == "zeros":
        x = x.clamp(-1, m)  # farther out all weights are zero
    else:
        if padding_mode == "reflection":
            begin, span = (0.0, m - 1) if align_corners else (-0.5, m)
            y = (x - begin).abs()
            if span:
                turns = (y.detach() / span).floor()
                y = torch.where(turns % 2 == 1, (turns + 1) * span - y, y - turns * span)
            x = torch.where((y.detach() < (1 << 24) * span), begin + y, torch.zeros_like(y))
        x = x.clamp(0, m - 1)
    below = x.detach().floor()
    above = below + 1
    w_above = x - below
    w_below = 1 - w_above
    w_below = torch.where((below >= 0) & (below <= m - 1), w_below, torch.zeros_like(w_below))
    w_above = torch.where(above <= m - 1, w_above, torch.zeros_like(w_above))
    return Taps(below.clamp(0, m - 1).long(), above.clamp(0, m - 1).long(), w_below, w_above)


def voxel_coordinates(lo: int, hi: int, voxels: int, corners: bool = False, bounds: Tensor | None = None) -> Tensor:
    """The coordinates of voxels lo to hi - 1 of n on an axis, float64: the centres (i + 1/2)/n * 2 - 1 or, with ``corners``,
    i/(n - 1) * 2 - 1, mapped from [-1, 1] to ``bounds`` (2,)."""
    i = torch.arange(lo, hi, dtype=torch.float64, device=None if bounds is None else bounds.device)
    s = i / max(voxels - 1, 1) if corners else (i + 0.5) / voxels
    return 2 * s - 1 if bounds is None else bounds[0] + (bounds[1] - bounds[0]) * s


def linear_taps(lo: int, hi: int, voxels: int, texels: int, align_corners: bool, padding_mode: str) -> Taps:
    """The taps of the centres of voxels lo to hi - 1 of n."""
    return taps(voxel_coordinates(lo, hi, voxels), texels, align_corners, padding_mode)


def sample_plane(plane: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Bilinear samples of a plane (B, C, h, w) at every pair of row and column taps: (B, C, rows, columns)."""
    for dim, t in ((2, rows), (3, columns)):
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        wb, wa = (w.to(plane).view(shape) for w in (t.w_below, t.w_above))
        below, above = t.below.to(plane.device), t.above.to(plane.device)
        plane = plane.index_select(dim, below) * wb + plane.index_select(dim, above) * wa
    return plane


def reduce_planes(samples: list[Tensor], planes: checks.Planes, dim: int) -> Tensor:
    """The features along ``dim`` from the samples of all planes."""
    if planes.reduce == "concat":
        return torch.cat(samples, dim)
    if planes.reduce == "concat_channel_major":
        return torch.stack(samples, dim + 1).flatten(dim, dim + 1)
    left = iter(samples)
    stacks = [torch.stack([next(left) for _ in range(count)]) for count in planes.groups]
    return torch.cat([getattr(each, planes.reduce)(0) for each in stacks], dim)


def _grid_features(planes: checks.Planes, grid: checks.Grid, dtype: torch.dtype) -> Tensor:
    """The features of the planes on a grid, (B, features, *box)."""

    def sampled(tensors: list[Tensor], bounds: Tensor | None) -> Tensor:
        samples = []
        for plane, axes in zip(tensors, planes.plane_axes, strict=True):
            row, column = (
                taps(
                    voxel_coordinates(*grid.box[a], grid.size[a], grid.corners, None if bounds is None else bounds[a]),
                    texels,
                    planes.align_corners,
                    planes.padding_mode,
                )
                for a, texels in zip(axes, plane.shape[2:], strict=True)
            )
            sample = sample_plane(plane, row, column)
            if axes[0] > axes[1]:
                sample = sample.mT
            missing = ({0, 1, 2} - set(axes)).pop()
            samples.append(sample.unsqueeze(2 + missing).expand(*plane.shape[:2], *grid.shape))
        return reduce_planes(samples, planes, 1)

    converted = [p.to(dtype) for p in planes.tensors]
    if grid.bounds is None:
        return sampled(converted, None)
    objects = [sampled([p[b : b + 1] for p in converted], grid.bounds[b]) for b in range(planes.batch)]
    return torch.cat(objects) if objects else sampled(converted, None)


def _point_features(planes: checks.Planes, points: checks.Points, dtype: torch.dtype) -> Tensor:
    """The features of the planes at points, (N, features)."""
    n = points.points.shape[0]
    objects = points.objects
    if objects is None:
        objects = torch.arange(n, device=points.points.device) // max(n // max(planes.batch, 1), 1)
    samples = []
    for plane, axes in zip(planes.tensors, planes.plane_axes, strict=True):
        rows, columns = plane.shape[2:]
        texels = plane.to(dtype).permute(0, 2, 3, 1).flatten(0, 2)
        r, c = (
            taps(points.points[:, a], size, planes.align_corners, planes.padding_mode)
            for a, size in zip(axes, (rows, columns), strict=True)
        )
        sample = texels.new_zeros(n, texels.shape[1])
        for tr, wr in ((r.below, r.w_below), (r.above, r.w_above)):
            for tc, wc in ((c.below, c.w_below), (c.above, c.w_above)):
                sample = sample + (wr * wc).to(dtype).unsqueeze(1) * texels[(objects * rows + tr) * columns + tc]
        samples.append(sample)
    return reduce_planes(samples, planes, 1)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 of four 32-bit words in int64 tensors (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
    1, 2, 3", SC 2011)."""
    mask = 0xFFFFFFFF
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # 64-bit products; the sign is the top bit
        a, b, c, d = (q >> 32) & mask ^ b ^ k0, q & mask, (p >> 32) & mask ^ d ^ k1, p & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [a, b, c, d]


def normals(seed: int, number: Tensor, objects: Tensor, sequence: int, count: int) -> Tensor:
    """Standard normals (n, count), float64, for n voxels or points: those of csrc/maths/noise.h, by log, cos and sin.

    Box-Muller: a word x gives u = (floor(x/2) + 1/2)/2^31, rounded to float32, and the radius r = sqrt(-2 log u). The first two
    bits of a word y count quarter turns of the angle; the other bits, as a signed number, are the rest of it.
    """
    blocks = (count + 3) // 4
    block = torch.arange(blocks, device=number.device)
    number, objects = number.unsqueeze(1), objects.unsqueeze(1)
    counter = [number & 0xFFFFFFFF, number >> 32, objects | sequence << 27, block]
    words = philox(torch.broadcast_tensors(*counter), (seed & 0xFFFFFFFF, seed >> 32))
    out: list[Tensor] = []
    for x, y in (words[:2], words[2:]):
        u = ((x >> 1).float() + 0.5) * 2.0**-31
        rest = (y & 0x3FFFFFFF) - ((y & 0x20000000) << 1)
        angle = ((y >> 30).double() + rest.double() * 2.0**-30) * (torch.pi / 2)
        r = (-2 * u.double().log()).sqrt()
        out += [r * angle.cos(), r * angle.sin()]
    return torch.cat(out, 1)[:, :count]


def texel_normals(like: Tensor, sequence: int, seed: int) -> Tensor:
    """Normals in the shape of a plane, float32: the reference of ``library.normals``."""
    objects = torch.arange(like.shape[0], device=like.device)
    return normals(seed, torch.zeros_like(objects), objects, sequence, like[:1].numel()).view(like.shape).float()


def with_texel_noise(planes: checks.Planes, noise: checks.Noise, normals: Any) -> checks.Planes:
    """The planes, with noise added to their texels in mode "texel"; ``normals``: :func:`texel_normals` or the op."""
    if not noise.std or noise.mode != "texel":
        return planes
    noisy = [p + (noise.std * normals(p.detach(), 1 + q, noise.seed)).to(p.dtype) for q, p in enumerate(planes.tensors)]
    return planes._replace(tensors=noisy)


def _with_point_noise(features: Tensor, planes: checks.Planes, noise: checks.Noise, number: Tensor, objects: Tensor) -> Tensor:
    """The features (n, features of the planes), with noise added in mode "point"."""
    if not noise.std or noise.mode != "point":
        return features
    eps = normals(noise.seed, number, objects, 0, planes.features)  # plane by plane
    if planes.reduce == "concat_channel_major":
        eps = eps.unflatten(1, (len(planes.tensors), -1)).mT.flatten(1)
    return features + (noise.std * eps).to(features)


def _features(request: checks.Request) -> Tensor:
    """The features that the first layer reads, (n, features), for all voxels or points."""
    planes, mlp, where = request
    planes = with_texel_noise(planes, mlp.noise, texel_normals)
    if isinstance(where, checks.Grid):
        dense = _grid_features(planes, where, mlp.storage).movedim(1, -1)
        shape = dense.shape[:-1]
        x, y, z = (torch.arange(lo, hi, device=dense.device) for lo, hi in where.box)
        number = ((x.view(-1, 1, 1) * where.size[1] + y.view(-1, 1)) * where.size[2] + z).expand(shape).reshape(-1)
        objects = torch.arange(shape[0], device=dense.device).view(-1, 1, 1, 1).expand(shape).reshape(-1)
        features = dense.flatten(0, 3)
    else:
        features = _point_features(planes, where, mlp.storage)
        number = torch.arange(features.shape[0], device=features.device)
        if where.objects is None:
            each = max(features.shape[0] // max(planes.batch, 1), 1)
            number, objects = number % each, number // each
        else:
            objects = where.objects
    features = _with_point_noise(features, planes, mlp.noise, number, objects)
    return features if where.extra is None else torch.cat((features, where.extra.to(features)), 1)


def decode(request: checks.Request) -> Tensor:
    """The volume (B, C_out, *box), or the outputs at points."""
    planes, mlp, where = request
    compute = mlp.storage if "tf32" in mlp.compute else getattr(torch, mlp.compute)
    features = h = _features(request).to(compute)
    for layer, (w, b) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
        if layer:
            h = activations.hidden("activation", mlp.activation[layer - 1])(h)
        if layer in mlp.skips:
            h = torch.cat((features, h), 1)
        h = F.linear(h, w.to(compute), None if b is None else b.to(compute))
    out = activations.output("output_activation", mlp.output_activation)(h.to(mlp.storage)).to(mlp.out_dtype)
    if isinstance(where, checks.Points):
        return out.unflatten(0, where.leading)
    return out.view(planes.batch, *where.shape, out.shape[1]).movedim(-1, 1).contiguous()


def loss(request: checks.GridRequest, target: Tensor, objective: checks.Objective) -> Tensor:
    """The loss of the decoded grid."""
    dtype = torch.float64 if request.planes.tensors[0].dtype == torch.float64 else torch.float32
    volume = decode(request._replace(mlp=request.mlp._replace(out_dtype=dtype)))
    want = target.to(dtype) / 255 if target.dtype == torch.uint8 else target.to(dtype)
    each = LOSSES[objective.loss](volume, want, objective.beta)
    return each.flatten(1).mean(1) if objective.per_object else getattr(each, objective.reduction)()


def sample(request: checks.Request) -> Tensor:
    """The features of the planes."""
    planes, mlp, where = request
    if isinstance(where, checks.Grid):
        return _grid_features(planes, where, mlp.storage).to(mlp.out_dtype)
    return _point_features(planes, where, mlp.storage).to(mlp.out_dtype).unflatten(0, where.leading)


def __getattr__(name: str) -> Any:
    """The public ops with impl="reference": they check their arguments and call this module."""
    if name in ("decode_grid", "decode_grid_loss", "decode_points", "sample_grid", "sample_points"):
        from tcam_ext import ops

        return partial(getattr(ops, name), impl="reference")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
