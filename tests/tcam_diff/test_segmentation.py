"""``tcam segment``: metrics of labels, the training of a segmenter, and the table of originals and reconstructions."""

from __future__ import annotations

import csv
import json
import math
import shutil

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from monai.metrics import compute_confusion_matrix_metric, get_confusion_matrix
from monai.transforms import NormalizeIntensity
from tcam_diff import config as configs
from tcam_diff.data.store import Store, StoreWriter, quantise, unit
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import label_counts, label_metrics
from tcam_diff.evaluation.segmentation import ORIGINALS, TRUTH, VolumeRow, means, segment
from tcam_diff.evaluation.segmenter import (
    SegmentationTraining,
    SegmentConfig,
    load_segmenter,
    normalised,
    statistics,
    train_segmenter,
)
from tcam_diff.training.distributed import Distributed

SIZE = (16, 18, 20)
NAMES = {1: "ED", 2: "NCR/NET", 4: "ET"}
TINY = ("blocks_down=[1, 1]", "blocks_up=[1]", "crop=[8, 8, 8]", "batch=2", "steps=4", "evaluate_volumes=1", "device=cpu")


# ---- metrics -------------------------------------------------------------------------------------


def segmentations(seed=0, shape=(6, 7, 5)):
    generator = np.random.default_rng(seed)
    return [torch.from_numpy(generator.integers(0, 4, shape).astype(np.uint8)) for _ in range(2)]


def test_counts_are_those_of_a_loop_over_voxels():
    got, truth = segmentations()
    for label, counts in enumerate(label_counts(got, truth, 3).tolist(), 1):
        want = [0, 0, 0, 0]
        for a, b in zip((got == label).flatten().tolist(), (truth == label).flatten().tolist(), strict=True):
            want[{(True, True): 0, (True, False): 1, (False, False): 2, (False, True): 3}[a, b]] += 1
        assert counts == want


def test_metrics_are_those_of_monai():
    got, truth = segmentations(1)
    one_hot = [torch.nn.functional.one_hot(x.long(), 4).movedim(-1, 0)[None] for x in (got, truth)]
    matrix = get_confusion_matrix(*one_hot, include_background=False)[0]
    counts = label_counts(got, truth, 3)
    torch.testing.assert_close(counts.float(), matrix.float())
    for name, values in label_metrics(counts).items():
        theirs = compute_confusion_matrix_metric({"f1": "f1 score"}.get(name, name), matrix)
        torch.testing.assert_close(values.float(), theirs.float())


def test_a_perfect_segmentation_has_1_and_a_missing_label_nan():
    _, truth = segmentations(2)
    assert all((v == 1).all() for v in label_metrics(label_counts(truth, truth, 3)).values())
    truth[truth == 2] = 0
    metrics = label_metrics(label_counts(truth, truth, 3))
    assert [bool(v) for v in metrics["f1"].isnan()] == [False, True, False]
    assert bool(metrics["precision"][1].isnan())
    assert bool(metrics["recall"][1].isnan())
    assert metrics["specificity"][1] == metrics["accuracy"][1] == 1
    got = truth.clone()
    got[0, 0, 0] = 2
    metrics = label_metrics(label_counts(got, truth, 3))
    assert metrics["f1"][1] == metrics["precision"][1] == 0  # an invented label counts
    assert bool(metrics["recall"][1].isnan())


def test_counts_are_exact_above_the_integers_of_float32():
    truth = torch.ones(2**24 + 3, dtype=torch.uint8)
    assert label_counts(truth, truth, 1).tolist() == [[2**24 + 3, 0, 0, 0]]


def row(name, repeat, f1, images=ORIGINALS, label="ED"):
    group = "" if images == ORIGINALS else "files, split test"
    return VolumeRow(name, "test", images, group, TRUTH, repeat, label, 0, 0, 0, 0, f1, f1, f1, f1, f1)


def test_means_are_over_volumes_and_then_over_repeats():
    """NaN is left out; the share has the same volumes' originals below it."""
    rows = [
        row("a", 1, 0.8), row("b", 1, 0.6), row("c", 1, math.nan), row("a", 2, 0.9), row("b", 2, math.nan), row("c", 2, 0.1),
        row("a", 1, 0.4, "x"), row("a", 2, 0.45, "x"),
        row("a", 1, math.nan, "x", "ET"), row("a", 1, 0.0, ORIGINALS, "ET"),
    ]  # fmt: skip
    originals, x, absent, _ = means(rows)
    assert originals.metrics["f1"] == pytest.approx((0.6, np.std([0.7, 0.5], ddof=1)))
    assert (originals.volumes, x.volumes) == (3, 1)
    assert all(math.isnan(v) for v in originals.share)
    assert x.metrics["recall"] == pytest.approx((0.425, np.std([0.4, 0.45], ddof=1)))
    assert x.share == pytest.approx((0.425 / 0.85, 0), abs=1e-12)  # half of the originals' F1 in both repeats
    assert all(math.isnan(v) for v in (*absent.metrics["f1"], *absent.share))


def test_the_z_score_is_monais_where_the_background_is_0():
    volume = torch.rand(2, 6, 5, 4)
    volume[:, :2] = 0
    volume[1] = 0.5 * volume[1] + 0.2 * (volume[1] > 0)
    theirs = NormalizeIntensity(nonzero=True, channel_wise=True)(volume.clone())
    torch.testing.assert_close(normalised(volume, *statistics(volume, 0.0), 0.0), torch.as_tensor(theirs), atol=1e-5, rtol=1e-5)
    faint = torch.where(volume == 0, 0.01, volume)  # as the background of a reconstruction
    torch.testing.assert_close(
        normalised(faint, *statistics(faint, 0.02), 0.02), normalised(volume, *statistics(volume, 0.02), 0.02)
    )
    constant = torch.full((1, 3, 3, 3), 0.5)
    assert not normalised(constant, *statistics(constant, 0.0), 0.0).any()
    assert not normalised(0 * constant, *statistics(0 * constant, 0.0), 0.0).any()


# ---- training ------------------------------------------------------------------------------------


def make_store(folder, held_out=2, labels=True, codes=(1, 2, 4), size=SIZE):
    """Store of bright blobs on a dark ground with a label for each, three to train on, of which the last has none."""
    writer, records = StoreWriter(folder, {"percentiles": [0.0, 100.0]}), []
    for i in range(3 + held_out):
        generator = np.random.default_rng(i)
        values, classes = np.zeros((2, *size), np.float32), np.zeros(size, np.uint8)
        axes = np.meshgrid(*map(np.arange, size), indexing="ij")
        values[:, axes[0] > 1] = 0.3
        for code in codes:
            centre = generator.uniform(5, np.array(size) - 5)
            blob = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < 12
            values[0, blob], values[1, blob], classes[blob] = 0.5 + code / 10, 1 - code / 10, code
        info = VolumeInfo(channels=2, shape=size, affine=np.diag([-1.0, 1.5, 2.0, 1.0]), intensity=[(0.0, 1.0)] * 2)
        split = "train" if i < 3 else "test"
        kept = classes if labels and i != 2 else None
        records.append(writer.write(f"b{i}", split, quantise(values, "uint8"), info, [], kept))
    writer.finish(records, NAMES)
    return Store(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, and a folder with copies of two of its volumes, one of them held out."""
    folder = tmp_path_factory.mktemp("segment")
    store = make_store(folder / "store")
    (folder / "copies").mkdir()
    for i in (0, 3):
        save(store, i, folder / "copies")
    return folder


def save(store, number, folder, change=lambda x: x):
    record = store.records[number]
    voxels = change(unit(torch.tensor(store.volume(record))).numpy())
    image = nib.Nifti1Image(np.moveaxis(voxels, 0, -1), record.info.affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, folder / f"{record.name}.nii")


def load(*overrides):
    return SegmentConfig.load("small", [*TINY, *overrides])


def test_presets():
    assert configs.presets("segment") == ["brats", "small"]
    config = SegmentConfig.load("brats")
    assert (config.blocks_down, config.blocks_up, config.init_filters, config.dropout) == ([1, 2, 2, 4], [1, 1, 1], 16, 0.2)
    assert (config.lr, config.weight_decay, config.schedule, config.crop) == (1e-4, 1e-5, "cosine", None)
    assert SegmentConfig.load("small").init_filters == 8


def test_samples_are_parts_of_the_volumes(made):
    """Without augmentation a sample is a crop of an image with the classes beneath it, and ``labelled`` crops have a label."""
    store = Store(made / "store")
    config = load(f"data={store.folder}", "flip=0", "scale=0", "shift=0", "labelled=1")
    task = SegmentationTraining(config, Distributed(), made)
    assert [r.name for r in task.records] == ["b0", "b1"]  # those with labels
    seen = set()
    for step in range(12):
        image, labels = task.sample(step, 0)
        assert (image.shape, labels.shape) == ((2, 8, 8, 8), (1, 8, 8, 8))
        seen |= set(labels.unique().tolist())
        assert (labels > 0).any()
        torch.testing.assert_close(image, task.sample(step, 0)[0])
        record = task.records[task.volume(step * config.batch)]
        volume = unit(torch.tensor(store.volume(record)))
        whole = normalised(volume, *statistics(volume, config.foreground), config.foreground)
        classes = torch.from_numpy(task.numbers[store.labels(record)])
        windows = whole.unfold(1, 8, 1).unfold(2, 8, 1).unfold(3, 8, 1)
        places = (windows == image[:, None, None, None]).all(-1).all(-1).all(-1).all(0).nonzero()
        assert any(torch.equal(classes[x : x + 8, y : y + 8, z : z + 8], labels[0]) for x, y, z in places.tolist())
    assert seen == {0, 1, 2, 3}
    turned = SegmentationTraining(load(f"data={store.folder}", "flip=1", "scale=0", "shift=0"), Distributed(), made)
    plain = SegmentationTraining(load(f"data={store.folder}", "flip=0", "scale=0", "shift=0"), Distributed(), made)
    for a, b in zip(turned.sample(0, 1), plain.sample(0, 1), strict=True):
        torch.testing.assert_close(a, b.flip([1, 2, 3]))


def test_a_segmenter_learns_and_a_resumed_one_is_the_same(made):
    """Blobs of different brightness are told apart after a few steps; a stop in between changes no bit."""
    torch.set_num_threads(1)
    config = load(f"data={made / 'store'}", "steps=60", "lr=2e-2", "labelled=1", "evaluate_every=60", "checkpoint_every=60")
    whole = train_segmenter(config, made / "whole")
    assert whole.metrics["f1"] > 0.3, whole.metrics  # 0.41 to 0.45 with other rates and steps
    asked = iter([False] * 23 + [True])
    assert train_segmenter(config, made / "parts", stop=lambda: next(asked)).stopped
    assert train_segmenter(config, made / "parts", "auto").step == 60
    a, b = (load_segmenter(made / name) for name in ("whole", "parts"))
    assert (a.names, a.config.seed) == (["ED", "NCR/NET", "ET"], 0)
    for key, value in a.network.state_dict().items():
        assert torch.equal(value, b.network.state_dict()[key]), key


def test_a_segmenter_takes_any_size(made):
    """Sizes need not be multiples of the network's, and larger volumes are segmented in windows."""
    train_segmenter(load(f"data={made / 'store'}", "steps=1"), made / "brief")
    segmenter = load_segmenter(made / "brief")
    volume = torch.rand(2, 9, 17, 30)
    whole = segmenter(volume)
    assert (whole.shape, whole.dtype) == ((9, 17, 30), torch.uint8)
    segmenter.config = segmenter.config.model_copy(update={"window": (8, 8, 8)})
    assert segmenter(volume).shape == (9, 17, 30)


# ---- the command ---------------------------------------------------------------------------------


def test_the_table_of_originals_and_copies(made):
    """Copies of the originals have their figures; both references, the splits apart; finished repeats are kept."""
    out = made / "out"
    command = ("segment", made / "store", made / "copies", "--out", out, "--repeats", 2, *TINY)
    said = runs.tcam(*command)
    assert "2 training(s) on 2 volumes of the split train" in said
    assert "higher is better" in said
    assert "split train, which the networks were trained on; against the ground truth" in said
    assert "split test, held out from the networks' training; against the segmentation of the original" in said
    assert "files, split test), 1 volumes" in said
    rows = list(csv.DictReader((out / "volumes.csv").open()))
    assert len(rows) == 2 * 2 * 3 * 3  # volumes, repeats, labels; originals and copies against truth, copies against originals
    assert {r["split"] for r in rows if r["name"] == "b3"} == {"test"}
    assert all(float(r["f1"]) in (1.0,) or r["f1"] == "nan" for r in rows if r["reference"] == "original")
    for r in rows:
        assert sum(int(r[k]) for k in ("tp", "fp", "tn", "fn")) == math.prod(SIZE)
    content = json.loads((out / "segmentation.json").read_text())
    assert content["protocol"]["labels"] == {"1": "ED", "2": "NCR/NET", "4": "ET"}
    assert content["protocol"]["seeds"] == [0, 1]
    table = {(r["split"], r["images"], r["reference"], r["label"]): r for r in content["rows"]}
    for label in NAMES.values():
        copy, original = (table["test", images, "truth", label] for images in (str(made / "copies"), ORIGINALS))
        assert copy["metrics"] == original["metrics"]
        share = copy["share"] if copy["share"] is None else copy["share"]["mean"]
        assert share == (1 if original["metrics"]["f1"]["mean"] else None)
        of = [float(r["recall"]) for r in rows if (r["name"], r["images"], r["label"]) == ("b3", ORIGINALS, label)]
        assert original["metrics"]["recall"]["std"] == pytest.approx(np.std(of, ddof=1))
    assert (out / "segmentation.png").read_bytes()[:4] == b"\x89PNG"
    times = [p.stat().st_mtime_ns for p in sorted(out.glob("repeat-*/checkpoints/*/shared.pt"))]
    seen = []
    again = segment(Store(made / "store"), [made / "copies"], load(), out, 2, progress=seen.append)
    assert again is not None
    assert all(p.what == "measuring" for p in seen)
    assert times == [p.stat().st_mtime_ns for p in sorted(out.glob("repeat-*/checkpoints/*/shared.pt"))]
    assert [r["f1"] for r in rows] == [str(r.f1) for r in again.volumes]


def test_a_stopped_command_continues(made):
    """Stopped in the second of two repeats, and again between them."""
    store, config = Store(made / "store"), load()
    asked = iter([False] * 6 + [True])
    assert segment(store, [], config, made / "stopped", 2, stop=lambda: next(asked)) is None
    assert not (made / "stopped" / "segmentation.json").exists()
    first = (made / "stopped" / "repeat-1" / "checkpoints" / "step-00000004" / "shared.pt").stat().st_mtime_ns
    result = segment(store, [], config, made / "stopped", 2)
    assert result is not None
    assert {r.name for r in result.volumes} == {"b3", "b4"}  # without reconstructions, the held-out originals
    assert (made / "stopped" / "repeat-1" / "checkpoints" / "step-00000004" / "shared.pt").stat().st_mtime_ns == first
    whole = segment(store, [], config, made / "unstopped", 2)
    assert whole is not None
    assert [r.tp for r in whole.volumes] == [r.tp for r in result.volumes]


def test_worse_images_and_volumes_without_truth(made, tmp_path):
    """Noise is segmented otherwise than the original; a volume without labels is compared with that alone."""
    store = Store(made / "store")
    generator = np.random.default_rng(0)
    save(store, 2, tmp_path, lambda x: generator.random(x.shape, dtype=np.float32))
    result = segment(store, [tmp_path], load("steps=12", "lr=1e-2", "labelled=1"), made / "noise", 1)
    assert result is not None
    assert {(r.name, r.images, r.reference) for r in result.volumes} == {("b2", str(tmp_path), "original")}
    assert all(math.isnan(r.share[0]) and math.isnan(r.metrics["f1"][1]) for r in result.rows)
    assert any(not r.metrics["f1"][0] > 0.9 for r in result.rows)


def test_bad_input_is_named(made, tmp_path):
    out = ("--out", tmp_path / "out", *TINY)
    unlabelled = make_store(tmp_path / "unlabelled", labels=False)
    assert "b0 has no labels" in runs.tcam("segment", unlabelled.folder, *out, fails=True)
    empty = make_store(tmp_path / "empty", codes=())
    assert "every label in the split 'train' is 0" in runs.tcam("segment", empty.folder, *out, fails=True)
    alone = make_store(tmp_path / "alone", held_out=0)
    assert "no labelled volume outside the split 'train'" in runs.tcam("segment", alone.folder, *out, fails=True)
    store = made / "store"
    assert "steps" in runs.tcam("segment", store, *out, "step=3", fails=True)
    assert "crop: expected at most" in runs.tcam("segment", store, *out, "crop=[32, 8, 8]", fails=True)
    assert "crop: expected multiples of 2, got (9, 8, 8)" in runs.tcam("segment", store, *out, "crop=[9, 8, 8]", fails=True)
    assert "window: expected multiples of 2" in runs.tcam("segment", store, *out, "window=[9, 8, 8]", fails=True)
    whole = runs.tcam("segment", store, *out, "crop=null", "blocks_down=[1,1,1]", "blocks_up=[1,1]", fails=True)
    assert "crop: expected a size" in whole
    assert "16 x 18 x 20" in whole
    assert "blocks_up: expected one number fewer" in runs.tcam("segment", store, *out, "blocks_up=[1,1]", fails=True)
    assert "no such file or folder" in runs.tcam("segment", store, tmp_path / "gone", *out, fails=True)
    assert "each once" in runs.tcam("segment", store, made / "copies", made / "copies", *out, fails=True)
    shutil.copytree(made / "copies", tmp_path / "copies")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "copies" / "b0.nii")
    other = make_store(tmp_path / "other", size=(16, 16, 16))
    train_segmenter(load(f"data={other.folder}", "steps=1"), tmp_path / "out" / "repeat-1", "auto")
    with pytest.raises(UserError, match=r"steps: the run in .*repeat-1 began with 1"):
        segment(other, [], load("steps=2"), tmp_path / "out", 1)
    with pytest.raises(UserError, match="not those with which the run began"):
        segment(make_store(tmp_path / "third", codes=(1,)), [], load("steps=1"), tmp_path / "out", 1)
    with pytest.raises(UserError, match=r"b0\.nii: expected 2 channel\(s\), as b0 of .*store has, got 1"):
        segment(Store(store), [tmp_path / "copies"], load("steps=1"), tmp_path / "shapes", 1)
