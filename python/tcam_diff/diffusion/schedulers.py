"""The scheduler under its name in the configs/inference.json of bundles of version 0.1."""

from tcam_diff.diffusion.interop import ArcScheduler

__all__ = ["ArcScheduler"]
