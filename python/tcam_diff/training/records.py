"""What a run leaves to look at: metrics.jsonl, TensorBoard, pictures, and one page of HTML at the end."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tcam_diff.files import write_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

METRICS = "metrics.jsonl"


class Records:
    """Scalars and pictures of a run, for metrics.jsonl and, where the package is there, TensorBoard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Lines of steps after ``first_step``, of a run that was stopped, are dropped: they will come again."""
        self.path = folder / METRICS
        kept = [r for r in read(folder) if r["step"] <= first_step]
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


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was cut off is left out."""
    path = folder / METRICS
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def curves(metrics: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> bytes:
    """A PNG: one panel for each group of names, over steps."""
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3), layout="constrained", squeeze=False)
    for axis, group in zip(axes[0], names, strict=True):
        lowest = math.inf
        for name in group:
            points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, label=name, marker="." if len(points) < 30 else None)
                lowest = min(lowest, *values)
        if 0 < lowest < math.inf and "psnr" not in group:
            axis.set_yscale("log")
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return png(figure)


def png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    plt.close(figure)
    return out.getvalue()


def page(title: str, sections: Sequence[tuple[str, str | bytes | Mapping[str, object]]]) -> str:
    """One self-contained page: each section text (shown as it is), a PNG, or a table of two columns."""
    parts = []
    for heading, content in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        if isinstance(content, bytes):
            parts.append(f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">')
        elif isinstance(content, str):
            parts.append(f"<pre>{html.escape(content)}</pre>")
        else:
            rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in content.items())
            parts.append(f"<table>{rows}</table>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
        "img{max-width:100%}td{padding:.1em 1em .1em 0;vertical-align:top}pre{background:#f5f5f5;padding:1em;overflow:auto}"
        "h1{font-size:1.6em}h2{font-size:1.2em;margin-top:1.6em}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
