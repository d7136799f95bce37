"""Plots and HTML reports of runs."""

from __future__ import annotations

import base64
import html
import io
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch

import tcam_ext
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.loop import Outcome

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def facts(outcome: Outcome, group: Distributed) -> dict[str, object]:
    """Rows of the result table that all reports have."""
    return {
        "steps": outcome.step,
        "time": f"{outcome.seconds / 60:.1f} min",
        "rate": f"{outcome.metrics.get('steps_per_second', 0):.2f} steps/s at the end",
        "peak memory": f"{outcome.metrics.get('memory_gb', 0):.2f} GB",
        "machine": f"{platform.machine()}, {group.world} process(es) on {group.device.type}, torch {torch.__version__}, "
        f"tcam_ext {tcam_ext.__version__}",
    }


def curves(metrics: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> bytes:
    """PNG of metrics over steps, with one panel per group of names."""
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
    """PNG of a matplotlib figure, which is closed."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    plt.close(figure)
    return out.getvalue()


def page(title: str, sections: Sequence[tuple[str, str | bytes | Mapping[str, object]]]) -> str:
    """Self-contained HTML page. A section is preformatted text, a PNG, or a table with two columns."""
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
