"""The command ``tcam``, with one module per command. Only these modules parse arguments and print."""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from tcam_diff.compiler import leave_out_folder

#: How long idle threads of libgomp spin. libgomp's default is longer: no faster alone, but it takes the cores from a process
#: beside it. A training step then took 3 to 6 times as long, and 2.2 times with this count (2 cores, one busy process).
SPIN_COUNT = "5000"


def main() -> None:
    """Entry point. Errors that a user can fix are printed in one line, with exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    warnings.showwarning = _show_warning
    if "OMP_WAIT_POLICY" not in os.environ:  # before torch loads libgomp
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    leave_out_folder()
    try:
        from tcam_diff.cli.app import app
        from tcam_diff.cli.common import INTERRUPTED
        from tcam_diff.errors import UserError
        from tcam_diff.files import reason
    except ModuleNotFoundError as missing:
        print(f"tcam: needs the package {missing.name!r}: pip install 'tcam-ext[train]'", file=sys.stderr)
        sys.exit(2)
    try:
        app()
    except UserError as error:
        print(f"tcam: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # the machine's faults: a full disk, a folder that vanished
        print(f"tcam: {error.filename or 'a file'}: {reason(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tcam: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


_package = str(Path(__file__).resolve().parents[1])
_library_warning = warnings.showwarning


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """Print warnings of this package as one line each; those of libraries as Python does."""
    if filename.startswith(_package):
        print(f"tcam: warning: {message}", file=file or sys.stderr)
    else:
        _library_warning(message, category, filename, lineno, file, line)
