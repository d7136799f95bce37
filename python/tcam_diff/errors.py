"""Errors that a user can mend: the command line prints them in one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Names the file or argument, what was expected, what was found and what to do."""


def require(package: str, extra: str = "train") -> UserError:
    """The one sentence for a missing optional package."""
    return UserError(f"this command needs the package {package!r}: pip install 'tcam-ext[{extra}]'")
