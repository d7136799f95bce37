"""Random decode_grid problems, their float64 reference, and limits of the error (docs/performance.md, "Accuracy").

For the tests of the ops and for ``python -m tcam_ext.selftest``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tcam_ext import activations, arguments, reference
from tcam_ext.options import PLANE_AXES

FORWARD_LIMIT = {"float64": 1e-12, "float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
GRADIENT_LIMIT = {"float64": 1e-11, "float32": 1e-4, "tf32": 1e-3, "bfloat16": 1e-2}
PIECEWISE_LINEAR = ("relu", "leaky_relu")


@dataclass
class Problem:
    """The arguments of a call of decode_grid."""

    planes: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]
    size: tuple[int, int, int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.planes, *self.weights, *(b for b in self.biases if b is not None)]

    def to(self, dtype: torch.dtype, requires_grad: bool = False, device: str = "cpu") -> Problem:
        def copy(t: Tensor) -> Tensor:
            return t.detach().to(device, dtype, copy=True).requires_grad_(requires_grad)

        return replace(
            self,
            planes=[copy(t) for t in self.planes],
            weights=[copy(t) for t in self.weights],
            biases=[None if b is None else copy(b) for b in self.biases],
        )

    def call(self, decode: Any, **more: Any) -> Tensor:
        return decode(self.planes, self.weights, self.biases, self.size, **{**self.options, **more})


@dataclass
class AtVoxels(Problem):
    """A problem at some voxels only, indices (n, 3); a call gives the reference at them, (B, C_out, n)."""

    voxels: Tensor = field(default_factory=lambda: torch.empty(0, 3))

    @classmethod
    def of(cls, p: Problem, voxels: Tensor) -> AtVoxels:
        return cls(p.planes, p.weights, p.biases, p.size, p.options, voxels)

    def call(self, decode: Any, **more: Any) -> Tensor:
        xyz = (self.voxels.to(self.planes[0]) + 0.5) / torch.tensor(self.size).to(self.planes[0]) * 2 - 1
        xyz = xyz.expand(self.planes[0].shape[0], -1, -1)
        out: Tensor = reference.decode_points(self.planes, self.weights, self.biases, xyz, **{**self.options, **more})
        return out.movedim(-1, 1)


def make(
    channels: int = 5,
    texels: tuple[int, int, int] = (5, 6, 7),
    widths: tuple[int, ...] = (16, 12, 2),
    size: tuple[int, int, int] = (6, 7, 8),
    batch: int = 1,
    bias: bool = True,
    **options: Any,
) -> Problem:
    """A random problem in float64, with activations of order one in every layer."""
    axes = options.get("plane_axes", PLANE_AXES)
    planes = [torch.randn(batch, channels, *(texels[a] for a in pair), dtype=torch.float64) for pair in axes]
    if options.get("reduce") == "prod":  # a product of five normals reaches 50, after which an exp has no relative accuracy
        planes = [p.sign() * (0.5 + 0.5 * p.abs().tanh()) for p in planes]
    n = (features(channels, options), *widths)
    weights = [torch.randn(n[i + 1], n[i], dtype=torch.float64) * (2 / n[i]) ** 0.5 for i in range(len(widths))]
    biases: list[Tensor | None] = [0.2 * torch.randn(m, dtype=torch.float64) if bias else None for m in widths]
    return Problem(planes, weights, biases, size, options)


def features(channels: int, options: dict[str, Any]) -> int:
    """The number of features of the planes that the first layer reads."""
    planes = len(options.get("plane_axes", PLANE_AXES))
    return channels * len(arguments.groups(options.get("groups"), options.get("reduce", "concat"), planes))


def relative(got: Tensor, want: Tensor, terms: Tensor | None = None) -> float:
    """The norm of the error relative to that of ``want``. With ``terms`` (:func:`terms_of`), it is relative to at least a
    tenth of their norm, for outputs that cancel: FORWARD_LIMIT of a tenth is 16 roundings of float32."""
    floor = 1e-30 if terms is None else max(1e-30, 0.1 * float(terms.norm()))
    return float((got.detach().cpu().double() - want.detach()).norm() / want.detach().norm().clamp_min(floor))


def terms_of(p: Problem, xyz: Tensor | None = None) -> Tensor:
    """(|W_L| |h_(L-1)| + |b_L|) times the slope of the output activation, for a grid or points: the sum of the magnitudes of
    the terms of an output. Rounding errors are relative to it, however far the terms cancel."""
    op, place, channels = ("grid", p.size, 1) if xyz is None else ("points", xyz, -1)
    options = {k: v for k, v in p.options.items() if k not in ("activation", "output_activation")}
    names = activations.hidden_layers(p.options.get("activation", "relu"), len(p.weights) - 1)
    with torch.no_grad():
        if names:
            decode = getattr(reference, f"decode_{op}")
            h = decode(p.planes, p.weights[:-1], p.biases[:-1], place, activation=names[:-1], **options)
            h = activations.hidden("activation", names[-1])(h)
        else:
            h = getattr(reference, f"sample_{op}")(p.planes, place, **options)
        h = h.movedim(channels, -1)
        w, b = p.weights[-1], p.biases[-1]
        z = torch.nn.functional.linear(h, w, b)
        magnitudes = torch.nn.functional.linear(h.abs(), w.abs(), None if b is None else b.abs())
    z.requires_grad_()
    output = activations.output("output_activation", p.options.get("output_activation", "none"))(z)
    (slope,) = torch.autograd.grad(output.sum(), z)
    return magnitudes * slope.abs()


def gradient_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error of a gradient. Errors are relative to at least a hundredth of the largest gradient, for
    gradients that cancel: GRADIENT_LIMIT of a hundredth is 16 roundings, the best that a sum of rounded terms can do."""
    floor = 1e-2 * max(float(w.norm()) for w in want)
    return max(
        float((g.cpu().double() - w).norm()) / max(float(w.norm()), floor, 1e-30) for g, w in zip(got, want, strict=True)
    )


def round_bfloat16(t: Tensor) -> Tensor:
    return t.to(torch.bfloat16).to(t.dtype)


def round_tensor_float(t: Tensor) -> Tensor:
    """Round to TensorFloat-32: 10 bits of mantissa, half away from zero."""
    return ((t.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(t.dtype)


def masked_reference(
    problem: Problem, rounding: Any = None, margin: float = 1e-5, preactivations: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The float64 volume with the slopes of relu and leaky_relu fixed to those of a mirror, and a mask of the voxels to trust.

    A mirror is a model of the kernel with its roundings. It rounds hidden activations and weights by ``rounding`` (None: not at
    all), or is given by its ``preactivations``, (B, H, W, D, width) for each layer. The mask is 0 at voxels with a mirror
    pre-activation within ``margin`` of zero, where an equally good kernel may lie on the other side of the kink and no limit
    applies. Multiply grad_output by it.
    """
    act = problem.options.get("activation", "relu")
    names = [act] * (len(problem.weights) - 1) if isinstance(act, str) else act
    r = rounding or (lambda t: t)
    options = {k: v for k, v in problem.options.items() if k not in ("activation", "output_activation")}

    def first(p: Problem) -> Tensor:
        return (
            replace(p, weights=p.weights[:1], biases=p.biases[:1], options=options).call(reference.decode_grid).movedim(1, -1)
        )

    given = [t.double() for t in preactivations or []]
    z, mirror_z = first(problem), given.pop(0) if given else first(problem.to(torch.float64)).detach()
    trusted = torch.ones(z.shape[:-1], dtype=torch.float64)
    for name, w, b in zip(names, problem.weights[1:], problem.biases[1:], strict=True):
        apply = activations.hidden("activation", name)
        leak = 0.0 if name == "relu" else apply.parameter
        trusted *= (mirror_z.abs() > margin).all(-1)
        mirror_h = r(apply(mirror_z))
        slope = leak + (1 - leak) * (mirror_z > 0).to(z)
        h = z * slope if name.split("(")[0] in PIECEWISE_LINEAR else apply(z)
        z = torch.nn.functional.linear(h, w, b)
        bias = None if b is None else b.detach()
        mirror_z = given.pop(0) if given else torch.nn.functional.linear(mirror_h, r(w.detach()), bias)
    out_name = problem.options.get("output_activation", "none")
    if out_name == "clamp":  # kinks at 0 and 1
        near = torch.minimum(mirror_z.abs(), (mirror_z - 1).abs()) > margin
        trusted *= near.all(-1)
        inside = (mirror_z >= 0) & (mirror_z <= 1)
        out = torch.where(inside, z, mirror_z.clamp(0, 1))
    else:
        out = activations.output("output_activation", out_name)(z)
    return out.movedim(-1, 1), trusted.unsqueeze(1)


# ---- the fused CUDA kernels -----------------------------------------------------------------

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: Shapes that the fused kernels serve.
FUSED_FORWARD = [
    dict(channels=5, texels=(4, 5, 6), widths=(128, 128, 128, 128, 1), size=(3, 5, 37)),
    dict(channels=3, texels=(4, 5, 6), widths=(100, 70, 128, 2), size=(13, 4, 33), batch=2, bias=False),
    dict(channels=2, texels=(5, 3, 4), widths=(64, 33, 1), size=(26, 3, 16), align_corners=True),
    dict(channels=4, texels=(4, 6, 9), widths=(20, 64, 50, 64, 4), size=(2, 9, 97), padding_mode="zeros"),
]
FUSED_BACKWARD = [
    dict(channels=5, texels=(4, 5, 6), widths=(128, 128, 128, 128, 1), size=(5, 4, 37)),
    dict(channels=3, texels=(4, 5, 6), widths=(100, 70, 128, 2), size=(5, 3, 33), batch=2, bias=False),
    dict(channels=2, texels=(5, 3, 4), widths=(64, 33, 1), size=(13, 3, 16), align_corners=True),
    dict(channels=4, texels=(4, 6, 9), widths=(20, 64, 50, 64, 4), size=(2, 9, 67), padding_mode="zeros"),
    dict(channels=3, texels=(3, 4, 5), widths=(90, 128, 30, 1), size=(1, 19, 40), batch=2),
    dict(channels=2, texels=(3, 4, 5), widths=(128, 17, 3), size=(6, 6, 6)),
]


def fused_mirror(p: Problem, dtype: torch.dtype, voxels: Tensor | None = None) -> list[Tensor]:
    """The fused kernel in plain PyTorch: float32 sums, rounded where the kernel rounds. Returns the pre-activations of each
    layer, (B, H, W, D, width), or (B, n, width) at ``voxels``, indices (n, 3)."""

    def r(t: Tensor) -> Tensor:
        return t.to(dtype).float()

    o = {"align_corners": False, "padding_mode": "border", **p.options}
    texels = (p.planes[0].shape[2], p.planes[0].shape[3], p.planes[1].shape[3])
    taps = [
        reference.linear_taps(0, n, n, m, o["align_corners"], o["padding_mode"]) for n, m in zip(p.size, texels, strict=True)
    ]
    maps = []
    for q, (plane, w) in enumerate(zip(p.planes, p.weights[0].split(p.planes[0].shape[1], 1), strict=True)):
        projected = torch.nn.functional.linear(plane.movedim(1, -1), w).movedim(-1, 1)
        rows, columns = ((0, 1), (1, 2), (0, 2))[q]
        sampled = reference.sample_plane(projected, taps[rows], taps[columns]).movedim(1, -1)
        maps.append(r(sampled + p.biases[0] if q == 0 and p.biases[0] is not None else sampled))
    if voxels is None:
        a, b, g = maps[0].unsqueeze(3), maps[1].unsqueeze(1), maps[2].unsqueeze(2)
    else:
        x, y, z = voxels.unbind(1)
        a, b, g = maps[0][:, x, y], maps[1][:, y, z], maps[2][:, x, z]
    return _fused_layers(p, r(r(a + g) + b), dtype)


def fused_points_mirror(p: Problem, dtype: torch.dtype, projected: bool) -> list[Tensor]:
    """The same for a grid decoded voxel by voxel. The first layer is a product in TensorFloat-32 of all features or, with
    ``projected`` planes, of the extra features."""
    options = {k: v for k, v in p.options.items() if k not in ("activation", "output_activation")}
    count = p.weights[0].shape[1]
    read = replace(p, weights=[torch.eye(count)], biases=[None], options=options).call(reference.decode_grid)
    exact = plane_features(p) if projected else 0
    f, w = read.detach().movedim(1, -1), p.weights[0]
    z = torch.nn.functional.linear(round_tensor_float(f[..., exact:]), round_tensor_float(w[:, exact:]), p.biases[0])
    first = z + torch.nn.functional.linear(f[..., :exact], w[:, :exact])
    return _fused_layers(p, first.to(dtype).float(), dtype)


def plane_features(p: Problem) -> int:
    """The number of features of the planes that the first layer of a problem reads."""
    return features(p.planes[0].shape[1], p.options)


def _fused_layers(p: Problem, first: Tensor, dtype: torch.dtype) -> list[Tensor]:
    def r(t: Tensor) -> Tensor:
        return t.to(dtype).float()

    z = [first]
    for w, bias in zip(p.weights[1:-1], p.biases[1:-1], strict=True):
        z.append(torch.nn.functional.linear(r(z[-1].relu()), r(w), bias))
    w, high = p.weights[-1], r(p.weights[-1])
    return [*z, torch.nn.functional.linear(r(z[-1].relu()), high + r(w - high), p.biases[-1])]


def fused_reference(p: Problem, dtype: torch.dtype) -> tuple[Problem, Tensor, Tensor]:
    """The problem in float64, its volume with the mirror's masks, and a mask of the voxels to trust."""
    exact = p.to(torch.float64, requires_grad=True)
    return exact, *masked_reference(exact, margin=1e-4, preactivations=fused_mirror(p.to(torch.float32), dtype))
