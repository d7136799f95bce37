"""Pictures of volumes: comparisons of two volumes, strips of three orthogonal slices, and sheets of strips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
from scipy import ndimage

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from tcam_diff.files import replacing
from tcam_diff.text import shown


def canonical(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Permute and flip the axes of a volume (H, W, D) to right, anterior, superior. Returns it and the spacings along them."""
    orientation = nib.io_orientation(affine)
    x, y, z = nib.affines.voxel_sizes(affine)[np.argsort(orientation[:, 0])]
    return nib.apply_orientation(volume, orientation), (float(x), float(y), float(z))


def compare_picture(
    path: Path,
    a: np.ndarray,
    b: np.ndarray,
    affine: np.ndarray,
    names: tuple[str, str],
    caption: str,
) -> None:
    """Write :func:`comparison` as a PNG."""
    figure = comparison(a, b, affine, names, caption)
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def comparison(a: np.ndarray, b: np.ndarray, affine: np.ndarray, names: tuple[str, str], caption: str) -> Figure:
    """Figure of central slices of a, b (H, W, D) in [0, 1] and their difference.

    Axes point in the nearest anatomical directions, and voxels have their true proportions.
    """
    a, spacing = canonical(a, affine)
    b, _ = canonical(b, affine)
    middle = [n // 2 for n in a.shape]
    views = (  # (title, slice, horizontal axis, vertical axis)
        ("sagittal", lambda v: v[middle[0], :, :], 1, 2),
        ("coronal", lambda v: v[:, middle[1], :], 0, 2),
        ("axial", lambda v: v[:, :, middle[2]], 0, 1),
    )
    difference = b - a
    limit = max(float(np.percentile(np.abs(difference), 99.9)), 1e-3)
    figure, axes = plt.subplots(3, 3, figsize=(10.5, 10.5), facecolor="white", layout="constrained")
    for row, (title, cut, horizontal, vertical) in enumerate(views):
        for column, (volume, colours, low, high) in enumerate(
            ((a, "gray", 0, 1), (b, "gray", 0, 1), (difference, "RdBu_r", -limit, limit))
        ):
            axis = axes[row, column]
            image = axis.imshow(
                cut(volume).T,
                origin="lower",
                cmap=colours,
                vmin=low,
                vmax=high,
                aspect=spacing[vertical] / spacing[horizontal],
                interpolation="nearest",
            )
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(title)
            if row == 0:
                axis.set_title((*names, "difference")[column], fontsize=11)
            if row == 2:
                figure.colorbar(image, ax=axes[:, column], orientation="horizontal", shrink=0.8, pad=0.02)
    figure.suptitle(caption, fontsize=12)
    return figure


def strip(volume: np.ndarray, affine: np.ndarray, height: int = 128) -> np.ndarray:
    """Central sagittal, coronal and axial slices of (H, W, D) in [0, 1], side by side in their true proportions.

    Returns:
        (height, columns) uint8, black outside the slices.
    """
    volume, spacing = canonical(volume, affine)
    extent = [n * s for n, s in zip(volume.shape, spacing, strict=True)]
    scale = height / max(extent[1], extent[2])
    x, y, z = (n // 2 for n in volume.shape)
    parts = []
    for cut, across, up in ((volume[x], 1, 2), (volume[:, y], 0, 2), (volume[:, :, z], 0, 1)):
        size = [max(1, round(extent[a] * scale)) for a in (across, up)]
        sampled = ndimage.zoom(cut.astype(np.float32), [s / n for s, n in zip(size, cut.shape, strict=True)], order=1)
        image = np.zeros((height, sampled.shape[0]), dtype=np.uint8)
        upright = (sampled.T[::-1].clip(0, 1) * 255).round().astype(np.uint8)[:height]
        first = (height - upright.shape[0]) // 2
        image[first : first + upright.shape[0]] = upright
        parts.append(image)
    return np.concatenate(parts, 1)


def tiled(pictures: Sequence[np.ndarray], per_row: int) -> np.ndarray:
    """Pictures (rows, columns, 3) uint8 beside and below one another, pixel by pixel, on white."""
    rows, columns = (max(p.shape[axis] for p in pictures) for axis in (0, 1))
    result = np.full((-(-len(pictures) // per_row) * rows, min(per_row, len(pictures)) * columns, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // per_row * rows, i % per_row * columns
        result[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return result


#: Inches of a strip in a sheet, and points of its title.
WIDTH, TITLE = 4.6, 9


def _fitting(title: str) -> str:
    """A title, shortened to the width of a strip."""
    text = shown(title, 200)
    while text and (width := TextPath((0, 0), text.replace("$", r"\$"), size=TITLE).get_extents().width) > 64 * WIDTH:
        most = min(len(text) - 1, int(len(text) * 64 * WIDTH / width))
        text = shown(title, most)
    return text


def sheet(strips: Sequence[tuple[str, np.ndarray]], per_row: int = 2) -> Figure:
    """Figure of titled strips. Titles that are longer than a strip are shortened."""
    rows = -(-len(strips) // per_row)
    h, w = strips[0][1].shape
    size = (WIDTH * per_row, (WIDTH * h / w + 0.3) * rows)
    figure, axes = plt.subplots(rows, per_row, figsize=size, facecolor="white", layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, image) in zip(axes.flat, strips, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(_fitting(title), fontsize=TITLE, parse_math=False)
    return figure


#: Colours of labels in pictures, in the order of the classes.
LABEL_COLOURS = ("#2ca02c", "#1f77ff", "#e8c500", "#d62728", "#9467bd", "#17becf")


def segmentations(rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray, np.ndarray]]]], labels: Sequence[str]) -> bytes:
    """PNG of slices with labels drawn over them.

    Args:
        rows: for each row its title and, for each panel, a title, a slice (rows, columns) in [0, 1] and its classes, 0 for none
            and i for ``labels[i - 1]``. The titles of panels are printed once, above each column.
        labels: names of the labels.
    """
    from tcam_diff.training.report import png

    titles = list(dict.fromkeys(title for _, panels in rows for title, _, _ in panels))
    size = (2.2 * len(titles), 2.3 * len(rows) + 0.7)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, layout="constrained", squeeze=False)
    colours = [matplotlib.colors.to_rgb(LABEL_COLOURS[i % len(LABEL_COLOURS)]) for i in range(len(labels))]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(_short(title), fontsize=8)
    for (name, panels), line in zip(rows, axes, strict=True):
        by_title = {title: (image, classes) for title, image, classes in panels}
        for axis, title in zip(line, titles, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            if title not in by_title:
                axis.set_box_aspect(panels[0][1].shape[0] / panels[0][1].shape[1])
                continue
            image, classes = by_title[title]
            shown = np.repeat(image.astype(np.float32).clip(0, 1)[..., None], 3, -1)
            for number, colour in enumerate(colours, 1):
                shown[classes == number] = 0.45 * shown[classes == number] + 0.55 * np.array(colour)
            axis.imshow(shown, interpolation="nearest")
        line[0].set_ylabel(name, fontsize=8)
    handles = [matplotlib.patches.Patch(color=c, label=n) for c, n in zip(colours, labels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(labels)), fontsize=8, frameon=False)
    return png(figure)


def _short(title: str, most: int = 30) -> str:
    """A title that fits above a panel: the end of a long one."""
    return title if len(title) <= most else f"...{title[3 - most :]}"
