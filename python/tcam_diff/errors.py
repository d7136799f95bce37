"""Errors that a user can fix, which the command line prints in one line without a traceback."""

from __future__ import annotations

import re


class UserError(Exception):
    """Error with a message that names the file or argument, what was expected, what was found, and what to do."""


#: Texts of libraries: of torch, safetensors, C++, Python (starting a thread), oneDNN and matplotlib, in this order.
_NO_MEMORY = (
    "(can't|cannot) allocate memory|out of memory|bad_alloc|can't start new thread|could not create a primitive|"
    "could not be made C-contiguous"
)


def out_of_memory(error: BaseException) -> str | None:
    """Message of an error that says that memory ran out; None for other errors.

    Python and numpy raise MemoryError; torch and safetensors raise errors of other types with one of a few texts. Errors that
    such an error caused, for example in closing a pool, count too.
    """
    text = str(error)
    line = re.search(f".*({_NO_MEMORY}).*", text, re.I)
    if line is not None:
        return re.sub(r"^\[enforce fail[^]]*\]\s*\.?\s*", "", line[0])
    if isinstance(error, MemoryError):
        return text or "no memory is left"
    return None if error.__context__ is None else out_of_memory(error.__context__)
