"""Random problems of the ops: all options, dtypes and layouts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tcam_ext import _C, checks, reference, testing
from tcam_ext.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS
from tcam_ext.losses import LOSSES
from tcam_ext.options import PLANE_AXES

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PARAMETERS = ("leaky_relu(0.2)", "softplus(3)", "sine(2)", "half_sine(1.5)")
OUTPUT_PARAMETERS = ("affine_sigmoid(0.1)", "softplus(-1)", "trunc_exp(-1)")
SMOOTH = sorted(set(ACTIVATIONS) - set(testing.PIECEWISE_LINEAR))


class Draw(random.Random):
    """Random choices."""

    def chance(self, p: float) -> bool:
        return self.random() < p


@dataclass
class AtPoints(testing.Problem):
    """The arguments of a call of decode_points. A call gives the outputs with channels at dimension 1."""

    xyz: Tensor = field(default_factory=lambda: torch.empty(0))

    def call(self, decode: Any, **more: Any) -> Tensor:
        out: Tensor = reference.decode_points(self.planes, self.weights, self.biases, self.xyz, **{**self.options, **more})
        return out.movedim(-1, 1)


@dataclass
class Case:
    """A problem and how it is computed."""

    op: str
    problem: testing.Problem  # float64, with values that ``dtype`` has
    dtype: torch.dtype
    more: dict[str, Any]  # of the call: compute_dtype, out_dtype
    layout: str  # of the planes and weights
    module: bool  # whether a TriplaneDecoder is called
    preactivation: bool
    wanted: list[bool]  # the inputs that require gradients, in the order of Inputs.leaves
    threads: int
    objective: dict[str, Any] = field(default_factory=dict)
    target: torch.dtype = torch.float32
    points: torch.dtype = torch.float32

    @property
    def arithmetic(self) -> str:
        """The limit's name for the dtype that the CPU computes in."""
        asked = str(self.more.get("compute_dtype") or self.dtype).removeprefix("torch.")
        if self.op.startswith("sample"):
            asked = "float64" if asked == "float64" else "float32"
        if asked == "bfloat16" and _C.cpu_has_bf16():
            return asked
        exact = asked == "float64" and not self.problem.options.get("noise_std")  # noise is float32
        return "float64" if exact else "float32"


def draw_case(draw: Draw, op: str) -> Case:
    points, sampled = op.endswith("points"), op.startswith("sample")
    dtype = draw.choice(DTYPES[:2] * 2 + DTYPES)
    compute = None if sampled or draw.chance(0.4) else draw.choice([*DTYPES, "tf32"])
    case = Case(
        op, testing.Problem([], [], [], (1, 1, 1)), dtype, {}, draw.choice(("plain", "plain", "last", "transposed", "strided")),
        not sampled and draw.chance(0.15), draw.chance(0.15), [], 2 if draw.chance(0.1) else 1,
    )  # fmt: skip
    if op == "decode_grid_loss" and dtype == torch.float16 and compute == torch.bfloat16:
        compute = torch.float32  # with bfloat16 products losses are sums, which exceed float16
    if compute is not None:
        case.more["compute_dtype"] = compute
    if op in ("decode_grid", "decode_points") and draw.chance(0.3):
        case.more["out_dtype"] = draw.choice(DTYPES)
    tiny = case.arithmetic == "float64" and dtype == torch.float64 and draw.chance(0.2)
    axes = draw.choice((3, 3, 3, 2, 4)) if points else 3
    options = draw_sampling(draw, axes)
    if sampled and dtype == torch.float16 and options["reduce"] == "prod":
        options["reduce"] = "mean"  # products near the edges of five planes are smaller than the least float16
    widths = (1,)
    if not sampled:
        widths = draw_decoder(draw, case, options)
    batch = draw.choice((1, 1, 1, 2, 2, 3)) if draw.chance(0.98) else 0
    p = testing.make(
        channels=draw.randint(1, 9), texels=tuple(draw.randint(1, 9) for _ in range(axes)), widths=widths,
        size=draw_size(draw, tiny), batch=batch, bias=draw.chance(0.7), **options,
    )  # fmt: skip
    if sampled:
        p.weights, p.biases = [], []
    elif draw.chance(0.3):
        draw_noise(draw, p, case)
    case.problem = at_points(draw, p, case, axes, tiny) if points else on_grid(draw, p)
    if op == "decode_grid_loss":
        case.objective = {
            "loss": draw.choice(sorted(LOSSES)),
            "reduction": draw.choice(checks.REDUCTIONS[:: 2 if dtype == torch.float16 else 1]),
            "beta": draw.choice((0.0, 0.05, 0.3, 2.0)),
        }
        case.target = draw.choice(checks.TARGET_DTYPES)
    draw_extra(draw, case)
    case.problem = rounded(case.problem, dtype)
    case.wanted = [draw.chance(0.7) for _ in range(40)]
    return case


def draw_size(draw: Draw, tiny: bool) -> tuple[int, int, int]:
    """At least 200 voxels, so that the norm of a result is meaningful after rounding."""
    while True:
        h, w, d = (draw.choice((1, 2, draw.randint(1, 14), draw.randint(1, 14), draw.randint(1, 40))) for _ in range(3))
        if (tiny or h * w * d >= 200) and h * w * d <= 5000:
            return h, w, d


def draw_sampling(draw: Draw, axes: int) -> dict[str, Any]:
    pairs = [tuple(draw.sample(range(axes), 2)) for _ in range(draw.randint(1, 5))]
    plane_axes = PLANE_AXES if axes > 2 and draw.chance(0.5) else tuple(pairs)
    reduce = draw.choice(checks.REDUCTIONS_OF_PLANES)
    groups = None
    if not reduce.startswith("concat") and draw.chance(0.5):
        first = draw.randint(1, len(plane_axes))
        groups = (first, len(plane_axes) - first) if first < len(plane_axes) else (first,)
    return {
        "plane_axes": plane_axes,
        "reduce": reduce,
        "groups": groups,
        "align_corners": draw.chance(0.5),
        "padding_mode": draw.choice(checks.PADDING_MODES),
    }


def draw_decoder(draw: Draw, case: Case, options: dict[str, Any]) -> tuple[int, ...]:
    """Add the activations to the options. Returns the widths."""
    if case.arithmetic == "bfloat16":  # as tests/ops/test_emulated.py
        options |= {"activation": draw.choice(sorted(ACTIVATIONS)), "output_activation": "sigmoid"}
        return draw.choice([(128, 128, 128, 128, 1), (37, 21, 3), (96, 60, 16), (9, 2), (5,)])
    widths = (*(draw.randint(1, 40) for _ in range(draw.randint(0, 4))), draw.randint(1, 5))
    names = sorted(ACTIVATIONS) + list(PARAMETERS)
    if len(widths) > 3:  # it amplifies roundings by up to 2 in each layer, in torch's float32 as in the kernel's
        names.remove("sine(2)")
    each = [draw.choice(names) for _ in widths[1:]]
    options["activation"] = each if draw.chance(0.3) else draw.choice(names)
    outputs = sorted(OUTPUT_ACTIVATIONS) + list(OUTPUT_PARAMETERS)
    if torch.float16 in (case.dtype, case.more.get("out_dtype")):  # its largest number is 65504
        outputs = [n for n in outputs if not n.startswith("trunc_exp")]
    options["output_activation"] = draw.choice(outputs)
    return widths


def draw_noise(draw: Draw, p: testing.Problem, case: Case) -> None:
    """Noise, with smooth activations: with kinks, the last bits of the noise put some voxels on the other side."""
    if case.arithmetic == "bfloat16" or case.dtype in (torch.float16, torch.bfloat16):
        return  # noise in the texels is rounded as they are
    p.options |= {
        "noise_std": draw.choice((0.0, 0.32, 2.0)),
        "noise_seed": draw.randrange(2**63),
        "noise_mode": draw.choice(checks.NOISE_MODES),
        "activation": draw.choice(SMOOTH),
        "output_activation": "sigmoid",
    }


def on_grid(draw: Draw, p: testing.Problem) -> testing.Problem:
    """The problem on a part of a grid, or all of it, between bounds."""
    if draw.chance(0.5):
        p.options["grid"] = draw.choice(checks.GRIDS)
    if draw.chance(0.4):
        p.options["bounds"] = draw_bounds(draw, p.planes[0].shape[0], 3, 0.1)
    if draw.chance(0.3):
        box = []
        for n in p.size:
            lo = draw.randrange(max(1, n // 3))
            box.append((lo, draw.randint(max(lo + 1, n - n // 3), n)))
        if (box[0][1] - box[0][0]) * (box[1][1] - box[1][0]) * (box[2][1] - box[2][0]) >= min(200, p.size[0] * p.size[1]):
            p.options["box"] = tuple(box)
    return p


def draw_bounds(draw: Draw, batch: int, axes: int, least: float) -> Any:
    def pair() -> tuple[float, float]:
        lo = draw.uniform(-2, 2)
        return lo, lo + draw.choice((-1, 1)) * draw.uniform(least, 4)

    one = [pair() for _ in range(axes)]
    return [[pair() for _ in range(axes)] for _ in range(batch)] if batch and draw.chance(0.3) else one


def at_points(draw: Draw, p: testing.Problem, case: Case, axes: int, tiny: bool) -> AtPoints:
    """The problem at points, also on edges, outside the planes, and not finite."""
    batch = p.planes[0].shape[0]
    n = draw.randint(1, 20) if tiny else draw.randint(200, 900) // max(batch, 1)
    xyz = (torch.rand(batch, n, axes, dtype=torch.float64) * 2 - 1) * draw.choice((0.9, 1.5, 6.0))
    if draw.chance(0.3):
        special = [-1.0, 1.0, 0.0, 0.5, -2.0]
        if p.options["padding_mode"] != "reflection":  # which would lose the last bits
            special += [1e6, -3e38, float("inf"), -float("inf"), float("nan")]
        some = torch.rand(xyz.shape) < 0.1
        xyz[some] = torch.tensor([draw.choice(special) for _ in range(int(some.sum()))], dtype=torch.float64)
    case.points = draw.choice(DTYPES[:2] * 2 + DTYPES)
    xyz = xyz.to(case.points)
    if draw.chance(0.3):
        p.options["bounds"] = draw_bounds(draw, batch, axes, 1.0)
    if batch and draw.chance(0.3):
        xyz = xyz.flatten(0, 1)
        p.options["batch_index"] = torch.randint(0, batch, (len(xyz),))
    elif draw.chance(0.2) and n % 2 == 0:
        xyz = xyz.unflatten(1, (2, n // 2))
    # A rounded coordinate may cross the kink at a texel's centre; one that float32 has does not.
    return AtPoints(p.planes, p.weights, p.biases, p.size, p.options, xyz.float().double())


def draw_extra(draw: Draw, case: Case) -> None:
    p = case.problem
    if len(p.weights) < 2 or not draw.chance(0.2):
        return
    width = draw.randint(1, 3)
    at_voxels = (p.planes[0].shape[0], width, *grid_shape(p))
    shape = (*p.xyz.shape[:-1], width) if isinstance(p, AtPoints) else at_voxels
    p.options["extra"] = torch.randn(shape, dtype=torch.float64)
    p.weights[0] = torch.cat((p.weights[0], torch.randn(len(p.weights[0]), width, dtype=torch.float64)), 1)


def grid_shape(p: testing.Problem) -> tuple[int, ...]:
    return tuple(hi - lo for lo, hi in p.options["box"]) if "box" in p.options else tuple(p.size)


def rounded(p: testing.Problem, dtype: torch.dtype) -> testing.Problem:
    """The problem with the values of a dtype."""
    p = p.to(dtype).to(torch.float64)
    if "extra" in p.options:
        p.options["extra"] = p.options["extra"].to(dtype).double()
    return p
