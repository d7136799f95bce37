"""Sheets of strips, and tiles of pictures."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from tcam_diff.evaluation.picture import sheet, tiled


def test_titles_of_a_sheet_stay_above_their_strip():
    names = ["sample-0000_seed0_heun25", "W" * 90, "a name of many words " * 6, "$x$_" * 40, ""]
    figure = sheet([(name, np.zeros((128, 384), np.uint8)) for name in names])
    figure.canvas.draw()
    for axis, name in zip(figure.axes, names, strict=False):  # the last row has a place without a strip
        title, box = axis.title.get_window_extent(), axis.get_window_extent()
        assert box.x0 - 1 <= title.x0
        assert title.x1 <= box.x1 + 1
        assert title.y1 <= figure.bbox.y1
        assert axis.get_title() == name or axis.get_title().endswith("...")
    assert figure.axes[0].get_title() == names[0]
    plt.close(figure)


def test_tiles_keep_their_pixels():
    pictures = [np.random.default_rng(i).integers(0, 255, (4 + i, 6, 3), np.uint8) for i in range(3)]
    whole = tiled(pictures, 2)
    assert whole.shape == (12, 12, 3)
    assert (whole[:5, 6:12] == pictures[1]).all()
    assert (whole[6:, :6] == pictures[2]).all()
    assert (whole[6:, 6:] == 255).all()
