"""Synthetic cohort."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from tcam_diff.data import cohort
from tcam_diff.data.cohort import Cohort, make_case, make_cohort
from tcam_diff.data.nifti import read_volume
from tcam_diff.errors import UserError

SMALL = Cohort(n=5, size=40, seed=3, held_out=2)


def checksums(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort") / "made"
    assert list(make_cohort(folder, SMALL, jobs=2)) == list(range(5))
    return folder


def test_the_layout_is_that_of_the_decathlon(made):
    from monai.data import load_decathlon_datalist

    listed = load_decathlon_datalist(made / "dataset.json", True, "training")
    assert len(listed) == 3
    for entry in listed:
        image, label = nib.load(entry["image"]), nib.load(entry["label"])
        assert image.shape == (40, 40, 40, 4)
        assert label.shape == (40, 40, 40)
        np.testing.assert_array_equal(image.affine, label.affine)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1, 2, 3}
    described = json.loads((made / "dataset.json").read_text())
    assert described["modality"]["0"] == "FLAIR"
    assert described["labels"]["1"] == "edema"  # a well-known tutorial has this mapping wrong
    assert len(described["test"]) == 2
    for name in described["test"]:
        volume = read_volume(made / name)  # with all checks
        assert volume.data.shape == (4, 40, 40, 40)


def test_files_depend_on_the_recipe_alone(made, tmp_path):
    again = tmp_path / "again"
    list(make_cohort(again, SMALL, jobs=1))
    assert checksums(again) == checksums(made)
    case = make_case(replace(SMALL, n=1, held_out=0), 0)  # a cohort of another size
    stored = np.asarray(nib.load(made / "imagesTr" / "cohort_0000.nii.gz").dataobj)
    np.testing.assert_array_equal(np.rint(1000 * case.image), np.moveaxis(stored, -1, 0))
    other = make_case(replace(SMALL, seed=4), 0)
    assert np.abs(other.image - case.image).mean() > 0.02


def test_an_interrupted_cohort_is_completed(made, tmp_path):
    folder = tmp_path / "cut"
    cases = make_cohort(folder, SMALL, jobs=1)
    next(cases)
    cases.close()
    assert not (folder / "dataset.json").exists()
    first = folder / "imagesTr" / "cohort_0000.nii.gz"
    before = first.stat().st_mtime_ns
    list(make_cohort(folder, SMALL, jobs=1))
    assert first.stat().st_mtime_ns == before
    assert checksums(folder) == checksums(made)


def test_brains_differ_and_modalities_belong_together():
    cases = [make_case(Cohort(n=4, size=48, held_out=0), i) for i in range(4)]
    for case in cases:
        brain = case.image[0] > 0
        assert 0.1 < brain.mean() < 0.4
        assert case.image.min() == 0
        assert 0.6 < case.image.max() < 3
        for label in (1, 2, 3):
            assert (case.labels == label).sum() > 10
        means = {label: case.image[:, case.labels == label].mean(1) for label in (1, 2, 3)}
        healthy = case.image[:, brain & (case.labels == 0)].mean(1)
        assert means[1][0] > 1.3 * healthy[0]  # oedema is bright in FLAIR
        assert means[3][2] > 1.2 * means[2][2]  # the rim takes up gadolinium, the core does not
        assert means[3][2] > 1.2 * means[3][1]
        assert case.image[:, ~brain].max() == 0
    masks = np.stack([c.image[0] > 0 for c in cases])
    assert (masks.any(0) & ~masks.all(0)).mean() > 0.02  # no two heads are alike


def test_noise_changes_only_the_image():
    quiet = make_case(Cohort(n=1, size=32, held_out=0, noise=0), 0)
    noisy = make_case(Cohort(n=1, size=32, held_out=0, noise=0.2), 0)
    np.testing.assert_array_equal(quiet.labels, noisy.labels)
    brain = quiet.image[0] > 0
    assert 0.001 < np.abs(noisy.image - quiet.image)[:, brain].mean() < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "--n.*0"),
        ({"size": 8}, "--size.*16.*8"),
        ({"seed": -1}, "--seed.*-1"),
        ({"held_out": 6}, "--held-out.*5.*6"),
        ({"noise": float("nan")}, "--noise.*nan"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **change)


def test_a_folder_with_something_else_is_left_alone(made, tmp_path):
    with pytest.raises(UserError, match="another cohort"):
        next(make_cohort(made, replace(SMALL, seed=9)))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="empty folder"):
        next(make_cohort(tmp_path, SMALL))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_template_is_the_brain():
    t = cohort.template()
    assert t.t1.shape == t.grey.shape == t.white.shape == (197, 233, 189)
    assert 0.9 < t.grey.max() <= 1
