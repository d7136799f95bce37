"""Names of labels: one mapping, whatever codes a data set has."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tcam_diff.data.cohort import LABELS, LESION, TISSUES
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.labels import BRATS, class_numbers, classes, label_names, listed_names
from tcam_diff.data.prepare import prepare_cases
from tcam_diff.data.sources import find_cases
from tcam_diff.data.store import Store

#: The entry of dataset.json in the Decathlon's Task01, letter for letter.
TASK01 = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}


def test_the_mapping():
    """MONAI's tutorial takes 2 of Task01 for the enhancing tumour and 3 for the core; Task01 says the opposite."""
    assert listed_names(TASK01) == {1: "ED", 2: "NCR/NET", 3: "ET"}
    assert dict(BRATS) == {1: "NCR/NET", 2: "ED", 3: "ET", 4: "ET"}
    assert listed_names({str(i): name for i, name in enumerate(LABELS)}) == listed_names(TASK01)


def test_the_cohort_paints_what_its_labels_say():
    """Only the enhancing tumour is bright in T1gd beside T1w, edema is brightest in FLAIR, and the core is dark in T1gd."""
    names = listed_names({str(i): name for i, name in enumerate(LABELS)})
    flair, t1, t1gd, _ = (dict(zip(LESION, of, strict=True)) for of in zip(*LESION.values(), strict=True))
    assert names[max(t1gd, key=lambda k: t1gd[k] - t1[k])] == "ET"
    assert names[max(flair, key=flair.__getitem__)] == "ED"
    assert names[min(t1gd, key=t1gd.__getitem__)] == "NCR/NET"
    assert all(v <= 1 for v in TISSUES["grey"])


@pytest.mark.parametrize(
    ("codes", "want"),
    [
        ((0, 1, 2, 4), {1: "NCR/NET", 2: "ED", 4: "ET"}),
        ((0, 1, 2, 3), {1: "NCR/NET", 2: "ED", 3: "ET"}),
        ((0, 1, 2, 3, 4), {1: "NCR/NET", 2: "ED", 3: "ET", 4: "RC"}),
        ((0, 2, 9), {2: "ED", 9: "label 9"}),
    ],
)
def test_releases_of_brats(codes, want):
    assert label_names(BRATS, codes) == want


@pytest.mark.parametrize(
    ("entry", "want"),
    [
        ({"0": "background", "1": "pancreas", "2": "cancer"}, {1: "pancreas", 2: "cancer"}),
        ({"background": 0, "Oedema": 1, "NCR/NET": 2, "enhancing_tumour": 3}, {1: "ED", 2: "NCR/NET", 3: "ET"}),
        ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3]}, {}),
        ({"1": 7, "-1": "x", "2000": "y", "a": True, "": 3}, {7: "1"}),
        (None, {}),
        (["edema"], {}),
    ],
)
def test_names_in_dataset_json(entry, want):
    assert listed_names(entry) == want


def test_codes_become_classes_in_the_order_of_the_table():
    assert classes(["x", "ET", "ED", "ET", "NCR/NET"]) == ["ED", "NCR/NET", "ET", "x"]
    for names in ({1: "ED", 2: "NCR/NET", 3: "ET"}, {1: "NCR/NET", 2: "ED", 4: "ET"}, dict(BRATS)):
        table = class_numbers(names)
        assert {names[c]: int(table[c]) for c in names} == {"ED": 1, "NCR/NET": 2, "ET": 3}
        assert table[0] == 0
        assert table.dtype == np.uint8


def write(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, np.eye(4))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def test_both_layouts_give_the_same_classes(tmp_path):
    """One patient as a BraTS folder with codes 1, 2, 4 and in the Decathlon's layout with 1, 2, 3."""
    rng = np.random.default_rng(0)
    parts = rng.integers(0, 4, (8, 8, 8)).astype(np.uint8)  # 0, ED, NCR/NET, ET
    image = rng.random((8, 8, 8, 4)).astype(np.float32)
    brats, task = tmp_path / "brats", tmp_path / "task"
    for channel, name in enumerate(("flair", "t1", "t1ce", "t2")):
        write(brats / "p" / f"p_{name}.nii.gz", image[..., channel])
    write(brats / "p" / "p_seg.nii.gz", np.array([0, 2, 1, 4], np.uint8)[parts])
    write(task / "imagesTr" / "p.nii.gz", image)
    write(task / "labelsTr" / "p.nii.gz", parts)
    listed = [{"image": "imagesTr/p.nii.gz", "label": "labelsTr/p.nii.gz"}]
    (task / "dataset.json").write_text(json.dumps({"labels": TASK01, "training": listed}))
    for folder in (brats, task):
        data = find_cases(folder)
        list(prepare_cases(data.cases, folder / "store", PrepareConfig.load("cohort"), names=data.label_names))
        store = Store(folder / "store")
        assert classes(store.label_names.values()) == ["ED", "NCR/NET", "ET"]
        np.testing.assert_array_equal(class_numbers(store.label_names)[store.labels(store.records[0])], parts)
