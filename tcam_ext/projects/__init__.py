"""Modules in place of the sampling and decoding of other projects, made of a project's own decoder.

    decode = tcam_ext.nn.from_eg3d(generator.decoder, box_warp=1.0)
    decode(planes, coordinates)               # before: sample_from_planes, then the decoder: {"rgb": ..., "sigma": ...}
    decode.grid(planes, (512, 512, 512))      # the same at the corners of a grid, without a tensor of coordinates

A module shares the parameters of the decoder that it is given, so either can be trained. Formulas are those of
:mod:`tcam_ext.conventions`; tests/ops/test_projects.py compares each module with its project's code, restated.
"""

from tcam_ext.projects.chains import from_blaze3dm, from_eg3d, from_nfd, from_openlrm, from_semcity, from_triposr
from tcam_ext.projects.decoder import ProjectDecoder
from tcam_ext.projects.kplanes import from_kplanes
from tcam_ext.projects.ssdnerf import from_ssdnerf

__all__ = [
    "ProjectDecoder",
    "from_blaze3dm",
    "from_eg3d",
    "from_kplanes",
    "from_nfd",
    "from_openlrm",
    "from_semcity",
    "from_ssdnerf",
    "from_triposr",
]
