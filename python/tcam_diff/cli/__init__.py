"""The command ``tcam``, with one module per command. Only these modules parse arguments and print."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. Errors that a user can fix are printed in one line, with exit status 2."""
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
