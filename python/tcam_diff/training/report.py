"""Plots and HTML reports of runs."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


class Markup(str):
    """HTML, put into a page as it is."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a row of headings."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]


#: What a section of a page shows: HTML, preformatted text, a PNG, a table of two columns or with headings, or several of these.
Content = Markup | str | bytes | Mapping[str, object] | Table | Sequence["Content"]

STYLE = """
:root{color-scheme:light dark;--text:#1d2127;--quiet:#5b6470;--line:#d9dde3;--back:#fff;--panel:#f4f5f7;--accent:#1f6feb}
@media(prefers-color-scheme:dark){:root{--text:#e3e6ea;--quiet:#9aa4b0;--line:#343b45;--back:#14171c;--panel:#1d2229;--accent:#6ea8fe}}
body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:var(--text);background:var(--back)}
h1{font-size:1.6em;margin-bottom:.2em}h2{font-size:1.2em;margin:2em 0 .5em}p{margin:.5em 0;max-width:60em}
img{max-width:100%;border-radius:4px}
table{border-collapse:collapse;margin:.5em 0;display:block;overflow-x:auto}
td,th{padding:.25em 1.2em .25em 0;text-align:left;vertical-align:top;font-variant-numeric:tabular-nums}
th{color:var(--quiet);font-weight:600;border-bottom:1px solid var(--line)}
pre{background:var(--panel);padding:.8em 1em;overflow:auto;border-radius:6px;font-size:13px}
summary{cursor:pointer;color:var(--quiet)}
"""


def page(
    title: str,
    sections: Sequence[tuple[str, Content]],
    style: str = "",
    scripts: Sequence[str] = (),
    introduction: Sequence[str] = (),
) -> str:
    """Self-contained HTML page. Its policy lets a browser reach no network and run no scripts but these.

    Args:
        title: heading of the page.
        sections: headings and what is below them.
        style: more CSS.
        scripts: JavaScript, run in this order when the page is there.
        introduction: paragraphs before the sections.
    """
    parts = [f"<h2>{html.escape(heading)}</h2>{markup(content, heading)}" for heading, content in sections]
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{d}'" for d in digests) or "'none'"
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head><body><h1>{html.escape(title)}</h1>"
        f"{''.join(map(paragraph, introduction))}{''.join(parts)}{''.join(map(_script, scripts))}</body></html>\n"
    )


def markup(content: Content, name: str = "") -> Markup:
    """Content of a section as HTML. ``name`` describes a picture."""
    if isinstance(content, Markup):
        return content
    if isinstance(content, bytes):
        return Markup(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">')
    if isinstance(content, str):
        return Markup(f"<pre>{html.escape(content)}</pre>")
    if isinstance(content, Table | Mapping):
        head, rows = ((), content.items()) if isinstance(content, Mapping) else (content.head, content.rows)
        top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
        cells = ("".join(f"<td>{html.escape(str(v))}</td>" for v in row) for row in rows)
        return Markup(f"<table>{f'<tr>{top}</tr>' if top else ''}{''.join(f'<tr>{c}</tr>' for c in cells)}</table>")
    return Markup("".join(markup(part, name) for part in content))


def paragraph(text: str) -> Markup:
    """A text as a paragraph."""
    return Markup(f"<p>{html.escape(text)}</p>")


def folded(summary: str, content: Content) -> Markup:
    """Content that the reader unfolds."""
    return Markup(f"<details><summary>{html.escape(summary)}</summary>{markup(content, summary)}</details>")


def _script(text: str) -> str:
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("a script that would end its element")
    return f"<script>{text}</script>"
