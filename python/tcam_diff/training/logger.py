"""The log of a run: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tcam_diff.files import write_text

METRICS = "metrics.jsonl"


class Logger:
    """Scalars and pictures of a run, for metrics.jsonl and, where the package is there, TensorBoard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Lines of steps after ``first_step``, of a run that was stopped, are dropped: they will come again."""
        self.path = folder / METRICS
        kept = [r for r in read_metrics(folder) if r["step"] <= first_step]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.file = open(self.path, "a")  # noqa: SIM115
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        except ImportError:
            pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        plain = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self.file.write(json.dumps({"step": step, **plain}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """(rows, columns, 3), uint8."""
        if self.board is not None:
            self.board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was cut off is left out."""
    path = folder / METRICS
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
