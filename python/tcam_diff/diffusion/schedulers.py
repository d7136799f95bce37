"""The scheduler under the name by which bundles of version 0.1 call it in their configs/inference.json."""

from tcam_diff.diffusion.interop import ArcScheduler

__all__ = ["ArcScheduler"]
