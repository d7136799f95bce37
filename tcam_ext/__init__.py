"""Fused triplane decoding: bilinear sampling of three feature planes, concatenation and a small MLP, in one kernel.

    volume = tcam_ext.decode_grid(planes, weights, biases, size=(128, 128, 128))

See :func:`decode_grid`, :class:`TriplaneDecoder` and ``python -m tcam_ext.info``.
"""

import torch  # first: its OpenMP runtime is the one that the kernels share

from tcam_ext._binary import load as _load

_load(torch)

from tcam_ext import conventions, reference  # noqa: E402
from tcam_ext._version import __version__  # noqa: E402
from tcam_ext.explain import explain  # noqa: E402
from tcam_ext.nn import TriplaneDecoder  # noqa: E402
from tcam_ext.ops import decode_grid, decode_grid_loss, decode_points, sample_grid, sample_points  # noqa: E402
from tcam_ext.slicing import at_time  # noqa: E402

__all__ = [
    "TriplaneDecoder",
    "__version__",
    "at_time",
    "conventions",
    "decode_grid",
    "decode_grid_loss",
    "decode_points",
    "explain",
    "reference",
    "sample_grid",
    "sample_points",
]
