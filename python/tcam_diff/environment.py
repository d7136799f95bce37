"""Environment variables that commands set before torch is imported, for programs of their own: none of it on ``import``."""

from __future__ import annotations

import os
import tempfile

#: How long idle threads of libgomp spin before they sleep. docs/performance.md, "A busy machine", has the measurements.
SPIN_COUNT = "20000"

#: Cache folder of torch's compiler.
COMPILER_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def prepare_environment() -> None:
    """Set what torch and libgomp read once, unless the user has set it.

    GOMP_SPINCOUNT: libgomp's default spins longer, so that a process beside this one waits for the cores, and both are slow.

    TORCHINDUCTOR_CACHE_DIR: a folder that exists. Otherwise torch makes one in the temporary directory when its compiler is
    imported, which optimisers and torchvision do, also where nothing is compiled.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        os.environ.setdefault(COMPILER_FOLDER, tempfile.gettempdir())
    except OSError:  # there is no temporary directory
        pass


def restore_compiler_folder() -> None:
    """Give torch's compiler its own folder again, before something is compiled."""
    if os.environ.get(COMPILER_FOLDER) == tempfile.gettempdir():
        del os.environ[COMPILER_FOLDER]
