"""Atomic writing of files, and checksums."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from tcam_diff.errors import UserError

#: Ending of the names of temporary files.
PART = ".tcam-part"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces ``path`` when the block ends, or is deleted if the block raises.

    Raises OSError with the name of ``path`` if it cannot be written.
    """
    with naming(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
        file = _Output(handle)
        try:
            with file:
                yield cast("IO[bytes]", file)
                file.flush()
                os.fsync(handle)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException as error:
            os.unlink(temporary)
            if isinstance(error, RuntimeError) and file.error is not None:  # torch.save hides the error
                raise file.error from error
            raise


class _Output(io.BufferedIOBase):
    """Binary file that keeps the error of a failed write. numpy writes through ``write``: its own way loses the reason."""

    def __init__(self, handle: int) -> None:
        self.file = os.fdopen(handle, "wb")
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        try:
            super().close()  # flushes
        finally:
            self.file.close()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of a file to errors of writing it: those of a full disk have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of a file."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file by a text in UTF-8."""
    write_bytes(path, text.encode())


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


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Create a folder if it does not exist, and reserve it for this process until the block ends or the process dies.

    Temporary files of a killed process, in the folder and its subfolders, are deleted. File systems without locks let every
    process in. Raises UserError if another process has reserved the folder, or if files cannot be written in it.
    """
    writable_folder(path)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing to it; wait for its end, or choose another folder") from None
        except OSError:
            pass
        for pattern in (f".*{PART}", f"*/.*{PART}"):
            for partial in path.glob(pattern):
                partial.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


_QUIET = threading.RLock()


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Ignore the warnings of a library about a file, which do not name it. Filters of warnings belong to all threads."""
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=library)
        yield


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, as words."""
    text = getattr(error, "strerror", None) or " ".join(map(str, error.args))
    return text.splitlines()[0] if text else type(error).__name__


def fault(error: OSError) -> str:
    """The file of a machine's fault, such as a full disk, and the reason, as one line."""
    return f"{error.filename or 'a file'}: {reason(error)}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
