"""TCAM-Diff: a triplane autodecoder of 3D medical volumes, and a diffusion model of its planes, on tcam_ext's kernels."""

from typing import Any

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # with torch, which the help of the commands does not need
        from tcam_ext import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
