"""The command ``tcam``. One file a command; the only place that parses arguments or prints."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: errors that a user can mend end in one line and exit status 2."""
    try:
        from tcam_diff.cli.app import app
        from tcam_diff.cli.common import INTERRUPTED
        from tcam_diff.errors import UserError
    except ModuleNotFoundError as missing:
        print(f"tcam: needs the package {missing.name!r}: pip install 'tcam-ext[train]'", file=sys.stderr)
        sys.exit(2)
    try:
        app()
    except UserError as error:
        print(f"tcam: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tcam: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
