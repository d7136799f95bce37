"""Atomic writing of files, and checksums."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tcam_diff.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces ``path`` when the block ends, or is deleted if the block raises."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:  # as write() raises it on a full disk
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def writable_folder(path: Path) -> None:
    """Create a folder if it does not exist. Raises UserError if files cannot be written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error


_QUIET = threading.RLock()


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Ignore the warnings of a library about a file, which do not name it. Filters of warnings belong to all threads."""
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=library)
        yield


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, as words."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
