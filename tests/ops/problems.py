"""hypothesis strategies for the random problems of tcam_ext.testing, which tests import from here."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from tcam_ext import checks
from tcam_ext.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS
from tcam_ext.options import PLANE_AXES
from tcam_ext.testing import (  # noqa: F401
    FORWARD_LIMIT,
    FUSED_BACKWARD,
    FUSED_FORWARD,
    GRADIENT_LIMIT,
    HALF,
    PIECEWISE_LINEAR,
    Problem,
    features,
    fused_mirror,
    fused_points_mirror,
    fused_reference,
    gradient_error,
    make,
    masked_reference,
    plane_features,
    relative,
    round_bfloat16,
    round_tensor_float,
    terms_of,
)

#: Devices of the property tests: @pytest.mark.parametrize("device", problems.DEVICES).
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

#: TCAM-Diff's decoder with small planes and a small volume.
SMALL_OPERATING_POINT = dict(channels=42, texels=(16, 16, 16), widths=(128, 128, 128, 128, 1), size=(11, 13, 17))

#: Activations with parameters other than the default.
PARAMETERS = ["leaky_relu(0.2)", "softplus(3)", "sine(2)", "half_sine(1.5)"]
OUTPUT_PARAMETERS = ["affine_sigmoid(0.1)", "softplus(-1)", "trunc_exp(-1)"]
#: The coordinates over rows and columns of planes: also repeated and swapped pairs, a single plane, missing pairs.
axes = st.lists(st.permutations(range(3)).map(lambda p: tuple(p[:2])), min_size=1, max_size=5).map(tuple)


@st.composite
def sampling(draw: Any) -> dict[str, Any]:
    pairs = draw(st.one_of(st.just(PLANE_AXES), axes))
    reduce = draw(st.sampled_from(checks.REDUCTIONS_OF_PLANES))
    ends = [0, *(q for q in range(1, len(pairs)) if draw(st.booleans())), len(pairs)]
    groups = tuple(b - a for a, b in pairwise(ends))
    return {
        "plane_axes": pairs,
        "reduce": reduce,
        "groups": None if reduce.startswith("concat") else draw(st.sampled_from([None, groups])),
        "align_corners": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(checks.PADDING_MODES)),
    }


bounds = st.one_of(
    st.none(),
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)).filter(lambda b: abs(b[0] - b[1]) > 0.1), min_size=3, max_size=3),
)


@st.composite
def problems(draw: Any, **fixed: Any) -> Problem:
    """Random shapes, widths and options, with at least 200 voxels, so that the norm of a result is meaningful."""
    axis = st.integers(1, 9)
    size = draw(
        st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 14)).filter(lambda s: s[0] * s[1] * s[2] >= 200)
    )
    widths = tuple(draw(st.lists(st.integers(1, 40), max_size=4))) + (draw(st.integers(1, 5)),)
    # "sine(2)" amplifies roundings by up to 2 in each layer.
    activations = [a for a in sorted(ACTIVATIONS) + PARAMETERS if a != "sine(2)" or len(widths) < 4]
    options = {
        "activation": draw(st.sampled_from(activations)),
        "output_activation": draw(st.sampled_from(sorted(OUTPUT_ACTIVATIONS) + OUTPUT_PARAMETERS)),
        **draw(sampling()),
        "grid": draw(st.sampled_from(checks.GRIDS)),
        "bounds": draw(bounds),
    }
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return make(
        channels=draw(st.integers(1, 9)),
        texels=draw(st.tuples(axis, axis, axis)),
        widths=widths,
        size=size,
        batch=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        **{**options, **fixed},
    )


def flat_options(problem: Problem, compute: str = "float64") -> tuple[Any, ...]:
    """The arguments of options and grid for library.decode_grid, with three concatenated planes."""
    o = {
        "activation": "relu",
        "output_activation": "none",
        "align_corners": False,
        "padding_mode": "border",
        **problem.options,
    }
    box = [x for n in problem.size for x in (0, n)]
    activation = [o["activation"]] * (len(problem.weights) - 1)
    return (
        [0, 1, 1, 2, 0, 2], [1, 1, 1], "sum", o["align_corners"], o["padding_mode"], [], activation, o["output_activation"],
        compute, 0.0, 0, list(problem.size), box, False, None, None,
    )  # fmt: skip


def examples(count: int) -> Any:
    """hypothesis settings with ``count`` examples, or the profile's number if it is lower (`--hypothesis-profile=card`)."""
    return settings(max_examples=min(count, settings.default.max_examples))


def away_from_kinks(xyz: torch.Tensor, p: Problem) -> torch.Tensor:
    """Whether coordinates have no kink within rounding distance (kinks are at texel centres and at the planes' edges)."""
    away = torch.ones_like(xyz, dtype=torch.bool)
    for plane, axes in zip(p.planes, p.options["plane_axes"], strict=True):
        for a, m in zip(axes, plane.shape[2:], strict=True):
            x = (xyz[..., a] + 1) / 2 * (m - 1) if p.options["align_corners"] else ((xyz[..., a] + 1) * m - 1) / 2
            away[..., a] &= (x - x.round()).abs() > 1e-4
    return away
