"""The cache folder of torch's compiler.

torch makes it in the temporary directory when its compiler is imported, which optimisers and torchvision do, also where nothing
is compiled.
"""

from __future__ import annotations

import os
import tempfile

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def leave_out_folder() -> None:
    """Name a folder that exists as the cache, so that the import makes none. A folder that the user has set stays.

    Call this before torch is imported.
    """
    try:
        os.environ.setdefault(VARIABLE, tempfile.gettempdir())
    except OSError:  # there is no temporary directory
        pass


def restore_folder() -> None:
    """Give the compiler its own folder again, before something is compiled."""
    if os.environ.get(VARIABLE) == tempfile.gettempdir():
        del os.environ[VARIABLE]
