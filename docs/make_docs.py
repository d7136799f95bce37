"""Writes docs/ops.md from the docstrings, and docs/conventions.png and its table in docs/coordinates.md from conventions.py.

python docs/make_docs.py [--check]
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import tcam_ext
from tcam_ext.conventions import CONVENTIONS

HERE = Path(__file__).resolve().parent
OPS = (
    tcam_ext.decode_grid,
    tcam_ext.decode_grid_loss,
    tcam_ext.decode_points,
    tcam_ext.sample_grid,
    tcam_ext.sample_points,
    tcam_ext.at_time,
    tcam_ext.TriplaneDecoder,
    tcam_ext.explain,
)


def section(thing: Any) -> str:
    signature = inspect.signature(thing)
    parts, by_name = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not by_name:
            by_name = True
            if parts and not parts[-1].startswith("*"):
                parts.append("*")
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        parts.append(f"{star}{p.name}: {p.annotation}{default}".replace("((0, 1), (1, 2), (0, 2))", "PLANE_AXES"))
    returned = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    call = f"{thing.__name__}(\n    " + ",\n    ".join(parts) + f",\n){returned}"
    text = inspect.cleandoc(thing.__doc__)
    text = re.sub(r":(?:func|class|meth|mod):`~?(?:tcam_ext\.)?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r":math:`([^`]+)`", r"$`\1`$", text)

    def display(match: re.Match[str]) -> str:
        body = inspect.cleandoc(match[1])
        return f"```math\n{body if 'aligned' in body or '&' not in body else _aligned(body)}\n```\n"

    text = re.sub(r"\.\. math::\n((?:    .*\n|\n)+?)(?=\S)", display, text)
    body, *rest = re.split(r"^(Args|Returns|Raises):\n", text, flags=re.M)
    lines = [f"## {thing.__name__}", "", f"```python\n{call}\n```", "", body.strip(), ""]
    for title, content in zip(rest[::2], rest[1::2], strict=True):
        inside = re.match(r"(?:[ ]{4}.*\n?|\n)*", content)[0]  # type: ignore[index]
        lines += [f"**{title}**", "", items(inspect.cleandoc(inside), title), ""]
        if after := content[len(inside) :].strip():
            lines += [after, ""]
    return "\n".join(lines)


def _aligned(body: str) -> str:
    return "\\begin{aligned}\n" + body + "\n\\end{aligned}"


def items(text: str, title: str) -> str:
    """ "name: what it is" becomes a list; what Returns says stays a paragraph."""
    if title == "Returns":
        return text
    joined = re.sub(r",\n(?=[\w, ]+: see)", ", ", re.sub(r"\n\s+", " ", text))
    return re.sub(r"^([\w, ]+):", r"* `\1`:", joined, flags=re.M)


def ops_page() -> str:
    intro = (
        "# The ops\n\n"
        "Made from the docstrings by `python docs/make_docs.py`. `PLANE_AXES` is `((0, 1), (1, 2), (0, 2))`: xy, yz, xz.\n"
        "What an option costs is in [performance.md](performance.md); what it means for coordinates in\n"
        "[coordinates.md](coordinates.md).\n\n"
    )
    return intro + "\n".join(section(op) for op in OPS)


def conventions_table() -> str:
    lines = [
        "| preset | planes (rows, columns) | features | align_corners | padding | dense grid | hidden; output activation | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in CONVENTIONS.values():
        pairs = " ".join(f"({c.coordinates[r]}, {c.coordinates[k]})" for r, k in c.plane_axes)
        hidden = c.activation if isinstance(c.activation, str) else ", ".join(c.activation)
        lines.append(
            f"| `{c.name}` | {pairs} | {c.reduce} | {c.align_corners} | {c.padding_mode} | {c.grid} | {hidden}; "
            f"{c.output_activation} | {c.note} |"
        )
    return "\n".join(lines)


def picture(path: Path) -> None:
    """Each preset's planes: rows run down, columns to the right, as the tensors are printed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip("xyzt", ("tab:red", "tab:green", "tab:blue", "tab:purple"), strict=True))
    most = max(len(c.plane_axes) for c in CONVENTIONS.values())
    width, height = 1.9 * most + 2.6, 1.8 * len(CONVENTIONS) + 0.2
    figure = plt.figure(figsize=(0.62 * width, 0.62 * height))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(-2.6, width - 2.6), ylim=(height - 0.7, -0.7), aspect="equal")
    panel.set_axis_off()
    for line, c in enumerate(CONVENTIONS.values()):
        y = 1.8 * line
        panel.text(-2.5, y + 0.4, c.name, fontsize=11, weight="bold", va="center")
        panel.text(-2.5, y + 0.75, c.reduce, fontsize=8, color="0.35", va="center")
        for q, (row, column) in enumerate(c.plane_axes):
            x = 1.9 * q + 0.3
            panel.add_patch(plt.Rectangle((x, y), 1, 1, facecolor="0.93", edgecolor="0.6"))
            panel.text(x + 0.5, y + 0.5, f"plane {q}", ha="center", va="center", fontsize=8, color="0.35")
            for axis, start, end, label in (
                (c.coordinates[column], (x, y - 0.13), (x + 1.05, y - 0.13), (x + 0.5, y - 0.34)),
                (c.coordinates[row], (x - 0.13, y), (x - 0.13, y + 1.05), (x - 0.34, y + 0.5)),
            ):
                panel.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colours[axis], "lw": 1.6})
                panel.text(*label, axis, color=colours[axis], ha="center", va="center", fontsize=12, weight="bold")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    check = parser.parse_args().check
    page = (HERE / "coordinates.md").read_text()
    filled = re.sub(
        r"<!-- conventions -->\n.*?<!-- end -->",
        lambda _: f"<!-- conventions -->\n{conventions_table()}\n<!-- end -->",
        page,
        flags=re.S,
    )
    pages = {HERE / "ops.md": ops_page(), HERE / "coordinates.md": filled}
    if check:
        stale = [p.name for p, text in pages.items() if not p.exists() or p.read_text() != text]
        sys.exit(f"docs/{', docs/'.join(stale)}: run python docs/make_docs.py" if stale else 0)
    for path, text in pages.items():
        path.write_text(text)
    picture(HERE / "conventions.png")


if __name__ == "__main__":
    main()
