"""Log of a run in metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tcam_diff.files import naming, write_text

METRICS = "metrics.jsonl"


class Logger:
    """Log of scalars and pictures, in metrics.jsonl and, if the package is installed, in TensorBoard.

    Args:
        folder: folder of the run.
        first_step: step at which the run starts. Records of later steps, from before an interruption, are deleted.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / METRICS
        kept = [r for r in read_metrics(folder) if r["step"] <= first_step]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.file = open(self.path, "a")  # noqa: SIM115
        self.board: Any = None
        self.board_folder = folder / "tensorboard"
        try:
            from torch.utils.tensorboard import SummaryWriter

            with naming(self.board_folder):
                self.board = SummaryWriter(str(self.board_folder), purge_step=first_step + 1)
        except ImportError:
            pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write a record. Values that are not finite become null in metrics.jsonl."""
        plain = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        with naming(self.path):
            self.file.write(json.dumps({"step": step, **plain}) + "\n")
            self.file.flush()
        if self.board is not None:
            with naming(self.board_folder):
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a picture (rows, columns, 3) uint8 to TensorBoard."""
        if self.board is not None:
            with naming(self.board_folder):
                self.board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Close the files. Raises OSError if their last records cannot be written."""
        with naming(self.path):
            self.file.close()
        if self.board is not None:
            with naming(self.board_folder):
                self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl, without damaged ones such as a truncated last one. Empty if there is no file."""
    path = folder / METRICS
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        numbers = isinstance(record, dict) and all(v is None or isinstance(v, int | float) for v in record.values())
        if numbers and isinstance(record.get("step"), int):
            records.append(record)
    return records
