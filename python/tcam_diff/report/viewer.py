"""The viewer of a page: columns of volumes beside one another, and a picture of them for browsers that cannot show it."""

from __future__ import annotations

import base64
import html
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tcam_diff.errors import UserError
from tcam_diff.evaluation.picture import sheet, strip
from tcam_diff.files import reason
from tcam_diff.report import niivue
from tcam_diff.report.volumes import Shown
from tcam_diff.training.report import Markup, markup, png

STYLE, CODE = (Path(__file__).with_name(name) for name in ("viewer.css", "viewer.js"))
#: Volumes of a column in the picture.
MOST_PICTURED = 4


@dataclass(frozen=True)
class Column:
    """Volumes of one kind, of which a viewer shows one at a time."""

    title: str
    volumes: Sequence[Shown]
    follows: bool = False  # shows the volume with the name that the column before it shows, instead of one to choose


def script(file: Path | None = None) -> str:
    """NiiVue's script: from an npm package, or that of the installed package; "" where it was built without.

    Raises UserError if ``file`` is not the npm package of the right version.
    """
    if file is None:
        return niivue.SCRIPT.read_text() if niivue.SCRIPT.is_file() else ""
    try:
        return niivue.unpack(file.read_bytes())
    except OSError as error:
        raise UserError(f"--niivue {file}: cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise UserError(f"--niivue {file}: {error}; expected the file that `{niivue.PACK}` writes") from error


def live(columns: Sequence[Column], files: Iterator[tuple[Shown, bytes]]) -> Markup:
    """The viewer's element: its volumes, whose files are the next of ``files``, and the picture."""
    content = [
        {
            "title": column.title,
            "follows": column.follows,
            "volumes": [
                {"name": volume.name, "detail": volume.detail, "nifti": base64.b64encode(file).decode()}
                for volume, file in itertools.islice(files, len(column.volumes))
            ],
        }
        for column in columns
    ]
    data = json.dumps({"columns": content}).replace("<", "\\u003c")
    return Markup(f'<div class="viewer"><script type="application/json">{data}</script>{still(columns)}</div>')


def still(columns: Sequence[Column]) -> Markup:
    """A picture of the central slices of the first volumes, a column for each kind."""
    rows = min(MOST_PICTURED, max(len(c.volumes) for c in columns))
    strips = [[strip(v.data.numpy(), v.info.affine) for v in c.volumes[:rows]] for c in columns]
    blank = np.full_like(next(s for column in strips for s in column), 255)
    titled = []
    for row in range(rows):
        for column, of in zip(columns, strips, strict=True):
            there = row < len(of)
            titled.append((f"{column.title}: {column.volumes[row].name}", of[row]) if there else ("", blank))
    picture = markup(png(sheet(titled, len(columns))), "central slices")
    return Markup(f'<div class="still">{picture}<p>{html.escape("Sagittal, coronal and axial slice at the centre.")}</p></div>')
