"""Spinning of idle threads."""

from __future__ import annotations

import os

#: How long idle threads of libgomp spin before they sleep. docs/performance.md, "A busy machine", has the measurements.
SPIN_COUNT = "20000"


def bound_spinning() -> None:
    """Set GOMP_SPINCOUNT for this process, unless the user has set it or OMP_WAIT_POLICY. Works before torch is imported.

    libgomp's default spins longer: a process beside it then waits for the cores, and both are slow.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
