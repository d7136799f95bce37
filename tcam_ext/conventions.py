"""The layouts, sampling and decoding of planes in other triplane projects, as options of the ops.

    tcam_ext.decode_points(planes, weights, biases, xyz, **conventions.eg3d.options)
    tcam_ext.sample_points(planes, xyz, **conventions.eg3d.sampling)
    tcam_ext.decode_grid(planes, weights, biases, size, grid=conventions.nfd.grid, **conventions.nfd.options)

They follow the projects' sources of late 2026; docs/coordinates.md draws them. Coordinates are those of the project, scaled
(with ``bounds``) so that -1 and 1 are the edges of the planes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tcam_ext.options import PLANE_AXES


@dataclass(frozen=True)
class Convention:
    """The options of one project; see :func:`tcam_ext.decode_grid`. ``grid``: that of its dense volumes."""

    name: str
    plane_axes: tuple[tuple[int, int], ...]
    reduce: str
    align_corners: bool
    padding_mode: str
    grid: str
    activation: str | tuple[str, ...] = "relu"
    output_activation: str = "none"
    note: str = ""
    coordinates: str = "xyzt"  # the names of the coordinates, in the project's order
    groups: tuple[int, ...] | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of sample_points and sample_grid."""
        return {name: getattr(self, name) for name in ("plane_axes", "reduce", "groups", "align_corners", "padding_mode")}

    def scales(self, count: int) -> Convention:
        """The same planes at ``count`` scales: all planes of the first scale, then those of the second, and so on.

        The features of a scale, concatenated, added or multiplied as those of one scale, follow those of the scale before.

        Raises:
            ValueError: features are concatenated channel by channel, in which order scales do not follow one another.
        """
        if self.reduce == "concat_channel_major":
            raise ValueError(f"{self.name}: expected a convention whose features are not in the order of channels")
        groups = None if self.reduce == "concat" else (self.groups or (len(self.plane_axes),)) * count
        return replace(self, plane_axes=self.plane_axes * count, groups=groups)

    @property
    def options(self) -> dict[str, Any]:
        """The options of decode_points, decode_grid and decode_grid_loss."""
        return {**self.sampling, "activation": self.activation, "output_activation": self.output_activation}


tcam = Convention(
    "tcam", PLANE_AXES, "concat", False, "border", "cells", "relu", "sigmoid", "TCAM-Diff; the defaults of this package."
)
nfd = Convention(
    "nfd",
    ((1, 0), (2, 1), (2, 0)),
    "sum",
    True,
    "zeros",
    "corners",
    ("sine", "relu", "relu"),
    note="Fourier features are a layer of sines: weights 2 pi B twice, biases 0 and pi/2. NFD's fitting code multiplies the "
    'planes by default: reduce="prod".',
)
eg3d = Convention(
    "eg3d",
    ((1, 0), (2, 0), (1, 2)),
    "mean",
    False,
    "zeros",
    "corners",
    "softplus",
    note="With the plane axes of the fix (issue 67). Colours are affine_sigmoid of the outputs after the first, the density.",
)
eg3d_legacy = Convention(
    "eg3d_legacy",
    ((1, 0), (2, 0), (0, 2)),
    "mean",
    False,
    "zeros",
    "corners",
    "softplus",
    note="As first released, for its checkpoints: two planes over x and z, none over y and z.",
)
openlrm = Convention(
    "openlrm",
    ((1, 0), (2, 0), (1, 2)),
    "concat",
    False,
    "zeros",
    "corners",
    "relu",
    note="InstantMesh and Direct3D too. The density is softplus of the first output minus 1.",
)
triposr = Convention(
    "triposr",
    ((1, 0), (2, 0), (2, 1)),
    "concat",
    False,
    "zeros",
    "corners",
    "silu",
    note="The density is trunc_exp of the first output minus 1, colours are sigmoids. stable-fast-3d has align_corners=True.",
)
ssdnerf = Convention(
    "ssdnerf",
    ((1, 0), (2, 0), (2, 1)),
    "concat_channel_major",
    False,
    "border",
    "corners",
    "silu",
    note="For scenes with different numbers of points use batch_index. The density is trunc_exp of its output.",
)
semcity = Convention(
    "semcity",
    ((0, 1), (0, 2), (1, 2)),
    "sum",
    False,
    "border",
    "corners",
    "relu",
    note="Its positional encoding is `extra`; the middle layer of its decoder reads the features again (skips).",
)
blaze3dm = Convention(
    "blaze3dm",
    ((1, 2), (0, 1), (0, 2)),
    "concat",
    False,
    "zeros",
    "cells",
    "half_sine",
    "half_sine",
    note="Coordinates and volumes in the order z, y, x. The positional encoding is `extra`.",
    coordinates="zyx",
)
kplanes = Convention(
    "kplanes",
    ((1, 0), (2, 0), (2, 1)),
    "prod",
    True,
    "border",
    "corners",
    "relu",
    note="One scale. kplanes.scales(4) has the four scales of the paper, in the order of its grids.",
)
kplanes_4d = Convention(
    "kplanes_4d",
    ((1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)),
    "prod",
    True,
    "border",
    "corners",
    "relu",
    note="Time is the fourth coordinate; see tcam_ext.at_time for grids. scales(4) has planes at four scales.",
)

#: By name.
CONVENTIONS = {
    c.name: c
    for c in (tcam, nfd, eg3d, eg3d_legacy, openlrm, triposr, ssdnerf, semcity, blaze3dm, kplanes, kplanes_4d)
}  # fmt: skip
