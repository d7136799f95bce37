"""Finds, checks and binds the compiled module ``tcam_ext._C``."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tcam_ext._version import __version__

_NAME = "tcam_ext._C"


def load(torch: Any) -> None:
    """Import ``tcam_ext._C``, compare its version with this package's, and pass it torch's tensor types."""
    binary = _import()
    if binary.version != __version__:
        raise ImportError(
            f"tcam_ext {__version__} found a compiled module of version {binary.version} at {binary.__file__}; "
            "install again with `pip install .`"
        )
    binary.bind(torch.Tensor, torch.nn.Parameter)
    wanted = os.environ.get("TCAM_CPU_ISA")
    if wanted and wanted != binary.cpu_isa():
        raise ImportError(
            f"TCAM_CPU_ISA={wanted}: not an instruction set that this build and this machine both have; "
            f"unset it to get {binary.cpu_isa()}"
        )


def _import() -> ModuleType:
    try:
        return importlib.import_module(_NAME)
    except ModuleNotFoundError as missing:
        # In a checkout the source folder shadows the installed package. Use the installed binary.
        here = Path(__file__).resolve().parent
        for entry in sys.path:
            for suffix in importlib.machinery.EXTENSION_SUFFIXES:
                path = Path(entry or ".").resolve() / "tcam_ext" / f"_C{suffix}"
                if path.parent != here and path.is_file():
                    spec = importlib.util.spec_from_file_location(_NAME, path)
                    assert spec is not None
                    assert spec.loader is not None
                    module = importlib.util.module_from_spec(spec)
                    sys.modules[_NAME] = module
                    spec.loader.exec_module(module)
                    sys.modules["tcam_ext"]._C = module  # type: ignore[attr-defined]
                    return module
        raise ImportError(
            "tcam_ext: the compiled module is missing; run `pip install .` (or `pip install -e .`) in the source folder"
        ) from missing
