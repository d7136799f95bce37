"""Errors that a user can mend: the command line prints them in one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Names the file or argument, what was expected, what was found and what to do."""
