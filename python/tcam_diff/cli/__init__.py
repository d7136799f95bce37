"""The command ``tcam``, with one module per command. Only these modules parse arguments and print."""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from tcam_diff.environment import prepare_environment
from tcam_diff.errors import out_of_memory

#: Advice of the line that says that memory ran out.
MORE_MEMORY = "what was written is intact; end other programs, or lower sizes (batch, channels, plane_size, --size, --jobs)"


def main() -> None:
    """Entry point. Errors that a user can fix are printed in one line, with exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    warnings.showwarning = _show_warning
    threading.excepthook = _thread_error
    prepare_environment()
    try:
        from tcam_diff.cli.app import app
        from tcam_diff.cli.common import INTERRUPTED
        from tcam_diff.errors import UserError
        from tcam_diff.files import fault
    except ModuleNotFoundError as missing:
        print(f"tcam: needs the package {missing.name!r}: pip install 'tcam-ext[train]'", file=sys.stderr)
        sys.exit(2)
    try:
        app()
    except UserError as error:
        print(f"tcam: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # the machine's faults: a full disk, a folder that vanished
        print(f"tcam: {fault(error)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not _says_out_of_memory(error):
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        print("tcam: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _thread_error(error: threading.ExceptHookArgs) -> None:
    """Print errors of threads, but for TensorBoard's: its next call in the main thread raises them again.

    Out of memory ends the process, because the main thread may wait for ever for a thread of a process pool.
    """
    if error.exc_value is not None and _says_out_of_memory(error.exc_value):
        sys.stderr.flush()
        os._exit(2)
    if not type(error.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(error)


def _says_out_of_memory(error: BaseException) -> bool:
    """Print the line of an error that says that memory ran out. Returns whether it is one."""
    text = out_of_memory(error)
    if text is not None:
        print(f"tcam: out of memory: {text}; {MORE_MEMORY}", file=sys.stderr)
    return text is not None


_package = str(Path(__file__).resolve().parents[1])
_library_warning = warnings.showwarning


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """Print warnings of this package as one line each; those of libraries as Python does."""
    if filename.startswith(_package):
        print(f"tcam: warning: {message}", file=file or sys.stderr)
    else:
        _library_warning(message, category, filename, lineno, file, line)
