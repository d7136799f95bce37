"""Errors that a user can fix, which the command line prints in one line without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Error with a message that names the file or argument, what was expected, what was found, and what to do."""
