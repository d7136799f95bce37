"""TCAM-Diff: a triplane autodecoder and (in later versions) a diffusion model of 3D medical volumes, on tcam_ext's kernels."""

from tcam_ext import __version__

__all__ = ["__version__"]
