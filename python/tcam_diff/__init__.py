"""TCAM-Diff: a triplane autodecoder of 3D medical volumes and a diffusion model of its planes, on the kernels of tcam_ext."""

from tcam_ext import __version__

__all__ = ["__version__"]
