"""Label maps as further channels: from prepared volumes to pairs of generated images and labels."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import SMALL, SMALL_DIFFUSION, command, tcam
from tcam_diff.autodecoder.config import EncodeConfig, TrainConfig
from tcam_diff.autodecoder.encode import load_run
from tcam_diff.autodecoder.objective import Lattice, TrainingObjective, make_decoder
from tcam_diff.autodecoder.planes import init_planes, normalise
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.labels import label_maps, labels_of_maps
from tcam_diff.data.store import Store
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.diffusion.interop import Autoencoder, physical
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.errors import UserError
from tcam_diff.evaluation.segmentation import segment as segment_function
from tcam_diff.evaluation.segmenter import SegmentConfig
from tcam_diff.evaluation.sets import read_set
from tcam_diff.training.rng import rng

SIZE = (16, 14, 12)
MAPS = {"ED": [1], "core": [2, 3], "ET": [3]}  # one map inside another
CODES = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumor"}


# ---- labels and maps -----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([MAPS, {"a": [1], "b": [2], "c": [3]}, {"all": [1, 2, 3], "b": [2], "c": [3]}]))
def test_maps_have_the_labels(seed, maps):
    """Also if a map's probabilities are only on the right side of one half."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, (3, 4, 5)).astype(np.uint8)
    values = label_maps(labels, maps)
    assert values.shape == (3, 3, 4, 5)
    np.testing.assert_array_equal(labels_of_maps(values, maps), labels)
    np.testing.assert_array_equal(labels_of_maps(np.where(values > 0, 0.55, 0.45), maps), labels)


def test_the_likeliest_of_two_labels_is_taken():
    values = np.array([0.9, 0.6, 0.2], np.float32).reshape(3, 1, 1, 1)
    maps = {"a": [1], "b": [2], "c": [3]}
    assert labels_of_maps(values, maps).item() == 1
    assert labels_of_maps(0.4 * values, maps).item() == 0


def test_metadata_tell_images_from_maps():
    info = VolumeInfo(channels=5, shape=(2, 2, 2), affine=np.eye(4), intensity=[(0, 9), (0, 7), *[(0, 1)] * 3], label_maps=MAPS)
    assert info.images == 2
    images = info.of_images()
    assert (images.channels, images.intensity, images.label_maps) == (2, [(0, 9), (0, 7)], {})
    assert "label_maps" not in images.model_dump()
    assert VolumeInfo.model_validate(info.model_dump(mode="json")) == info
    with pytest.raises(ValueError, match="label_maps: expected fewer than the 3 channels"):
        VolumeInfo(channels=3, shape=(2, 2, 2), affine=np.eye(4), label_maps=MAPS)


# ---- the loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("region", ["lattice", "box"])
def test_the_loss_is_cross_entropy_and_dice_of_the_decoded_maps(region):
    settings = [
        "data=x", "channels=4", "widths=[8]", "compute_dtype=float64", "tv_weight=0", "label_weight=0.7", f"region={region}",
        "stride=2",
    ]  # fmt: skip
    config = TrainConfig.load("fast", settings)
    objective, decoder = TrainingObjective(config, SIZE, maps=2), make_decoder(config, 3)
    planes = [p.double() for p in init_planes(4, objective.texels, 1.0, rng(0, "planes"))]
    volume = np.random.default_rng(0).random((3, *SIZE))
    volume[1:] = volume[1:] > 0.8
    visit = objective.read(objective.visit(0, 0), volume.astype(np.float32))
    loss, terms = objective.losses(planes, decoder, [visit], noise=False)
    (at,) = visit.regions
    whole = decoder(normalise(planes, config.norm), SIZE, compute_dtype=torch.float64)[0, 1:]
    part = (
        tuple(slice(s, None, at.stride) for s in at.start)
        if isinstance(at, Lattice)
        else tuple(slice(*range_) for range_ in at)
    )
    part = (slice(None), *part)
    p, t = whole[part].flatten(1), torch.from_numpy(volume[1:])[part].flatten(1)
    entropy = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    dice = 1 - ((2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()
    torch.testing.assert_close(terms["labels"][0].double(), (entropy + dice).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss[0], (terms["data"] + 0.7 * terms["labels"])[0].to(loss), rtol=1e-6, atol=0)
    loss.sum().backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in decoder.parameters())


# ---- the whole way -------------------------------------------------------------------------


def write_cases(folder: Path, train: int = 8, test: int = 2, seed: int = 0) -> Path:
    """Decathlon folder of spheres, brighter inside, with the labels of their shells."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij"))
    generator, content = np.random.default_rng(seed), {"labels": CODES, "training": [], "test": []}
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)
    for i in range(train + test):
        centre = np.array(SIZE) / 2 + generator.uniform(-2, 2, 3)
        radius = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(0))
        labels = np.digitize(-radius, [-5, -3.5, -2]).astype(np.uint8)
        image = np.array([10.0, 60.0, 80.0, 100.0])[labels].astype(np.float32)
        part, key = ("Tr", "training") if i < train else ("Ts", "test")
        for kind, array in (("images", image), ("labels", labels)):
            nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1])), folder / f"{kind}{part}" / f"case{i}.nii.gz")
        image_path = f"imagesTr/case{i}.nii.gz"
        content[key].append(
            {"image": image_path, "label": f"labelsTr/case{i}.nii.gz"} if part == "Tr" else f"imagesTs/case{i}.nii.gz"
        )
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


PREPARE = ("--preset", "cohort", "label_maps={ED: [1], core: [2, 3], ET: [3]}")
STAGE1 = (*SMALL, "channels=8", "steps=400", "checkpoint_every=200", "evaluate_every=200", "label_weight=0.01", "plane_size=8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with cases, store, run of stage 1 and its latents, run of stage 2, and samples with labels."""
    at = tmp_path_factory.mktemp("labels")
    tcam("prepare", write_cases(at / "cases"), "--out", at / "store", "-q", *PREPARE)
    tcam("train-autodecoder", "fast", f"data={at / 'store'}", *STAGE1, "--out", at / "run", "-q")
    tcam("export-latents", at / "run", "--out", at / "latents", "-q")
    tcam("train-diffusion", "tiny", f"latents={at / 'latents'}", *SMALL_DIFFUSION, "--out", at / "diffusion", "-q")
    tcam("sample", at / "diffusion", "--n", 4, "--steps", 3, "--labels", "--out", at / "samples", "-q")
    return at


def test_a_store_has_the_maps_after_the_images(made):
    store = Store(made / "store")
    for record in store.records:
        assert (record.info.images, record.info.label_maps) == (1, MAPS)
        assert record.info.intensity[1:] == [(0.0, 1.0)] * 3
        volume = store.volume(record)
        np.testing.assert_array_equal(volume[1:], 255 * label_maps(store.labels(record), MAPS))


def test_stage_1_learns_the_maps(made):
    """The labels of decoded training volumes are mostly the true ones, and the image file has no maps."""
    store, record = Store(made / "store"), Store(made / "store").in_split("train")[0]
    tcam(
        "decode",
        made / "latents",
        "--volume",
        record.name,
        "--out",
        made / "image.nii.gz",
        "--labels",
        made / "seg.nii.gz",
        "-q",
    )
    image, labels = nib.load(made / "image.nii.gz"), nib.load(made / "seg.nii.gz")
    assert image.shape == labels.shape == SIZE
    got, want = np.asarray(labels.dataobj), store.labels(record)
    inside = (got > 0) | (want > 0)
    assert (got == want)[inside].mean() > 0.5
    assert (got == want).mean() > 0.9


def test_samples_are_pairs_that_can_be_prepared(made):
    pairs = json.loads((made / "samples" / "dataset.json").read_text())
    assert len(pairs["training"]) == 4
    for pair in pairs["training"]:
        image, labels = (nib.load(made / "samples" / pair[k]) for k in ("image", "label"))
        np.testing.assert_allclose(image.affine, labels.affine)
        assert image.shape == labels.shape == SIZE
        assert set(np.unique(labels.dataobj)) <= {0, 1, 2, 3}
    tcam("prepare", made / "samples", "--out", made / "pairs", "-q", *PREPARE)
    assert all(r.labels_sha256 is not None for r in Store(made / "pairs").records)
    assert "4 already exist" in tcam(
        "sample", made / "diffusion", "--n", 4, "--steps", 3, "--labels", "--out", made / "samples"
    )


def test_maps_are_not_compared(made):
    names = [str(made / "store"), str(made / "latents"), str(made / "samples")]
    assert all(read_set(Path(n), lambda v: v).volumes.shape[1:] == (1, *SIZE) for n in names)
    said = tcam("evaluate", made / "store", made / "run", "--out", made / "evaluation", "-q")
    assert "PSNR" in said


def test_networks_are_trained_on_pairs_and_tested_on_real_volumes(made):
    """All volumes of the tested store count, since no network saw them. Other pairs are not taken for those of a run."""
    tiny = ("blocks_down=[1, 1]", "blocks_up=[1]", "crop=[8, 8, 8]", "batch=2", "steps=4", "evaluate_volumes=1", "device=cpu")
    for name, seed in (("a", 1), ("b", 2)):
        cases = write_cases(made / f"pairs-{name}", 4, 0, seed)
        tcam("prepare", cases, "--out", made / name, "-q", "--preset", "cohort")
    segment = ("segment", made / "store", *tiny, "--repeats", 1, "--out", made / "segmentation", "-q")
    said = tcam(*segment, "--train-on", made / "a")
    for split in ("train", "test"):
        assert f"split {split}, held out from the networks' training" in said
    protocol = json.loads((made / "segmentation" / "segmentation.json").read_text())["protocol"]
    assert protocol["trained_on"]["store"] == str(made / "a")
    assert "are not those with which the run began" in tcam(*segment, "--train-on", made / "b", fails=True)
    config = SegmentConfig.load("small", [*tiny])
    other = Store(made / "a")
    del other.label_names[3]
    with pytest.raises(UserError, match=r"expected the labels of .*, ED, NCR/NET, ET, got ED, NCR/NET"):
        segment_function(Store(made / "store"), [], config, made / "x", training=other)
    tcam("prepare", made / "cases", "--out", made / "two", "-q", "--preset", "cohort", "channels=[0,0]")
    with pytest.raises(UserError, match=r"expected the 1 channel\(s\) of .*, got 2"):
        segment_function(Store(made / "store"), [], config, made / "x", training=Store(made / "two"))


def test_the_list_of_samples_is_complete_and_their_own(made, tmp_path):
    """Samples without labels are listed, too, so that no command leaves them out; other data sets are not overwritten."""
    out = tmp_path / "samples"
    tcam("sample", made / "diffusion", "--n", 1, "--steps", 2, "--labels", "--out", out, "-q")
    tcam("sample", made / "diffusion", "--n", 3, "--steps", 2, "--out", out, "-q")
    assert len(read_set(out, lambda v: v).names) == 3
    listed = json.loads((out / "dataset.json").read_text())["training"]
    assert [("label" in entry) for entry in listed] == [True, False, False]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dataset.json").write_text('{"name": "BRATS"}')
    said = tcam("sample", made / "diffusion", "--labels", "--out", tmp_path / "mine", "-q", fails=True)
    assert "is of another data set" in said
    assert (tmp_path / "mine" / "dataset.json").read_text() == '{"name": "BRATS"}'


def test_other_commands_take_models_with_maps(made, tmp_path):
    """The report, known voxels, interpolation, and MONAI's bundle show or write images alone."""
    tcam("report", made / "run", made / "latents", "--out", tmp_path / "page.html", "-q")
    few = ("--n", 1, "--steps", 2, "-q")
    known = next((made / "samples").glob("sample-*.nii.gz"))
    tcam("sample", made / "diffusion", *few, "--known", known, "--labels", "--out", tmp_path / "known")
    between = ("case0", "case1", "--n", 2, "--steps", 2, "-q")
    tcam("interpolate", made / "diffusion", made / "latents", *between, "--out", tmp_path / "between")
    for folder in ("known", "between"):
        assert nib.load(next((tmp_path / folder).glob("*.nii.gz"))).shape == SIZE
    model = TriplaneDiffusion.load(made / "diffusion")
    (image,) = physical(model, torch.rand(1, 4, *SIZE), [0], 0)
    assert tuple(image.shape) == (1, *SIZE)
    store = Store(made / "store")
    volume = torch.from_numpy(store.volume(store.records[0]) / np.float32(255))[None]
    encoder = Autoencoder(model, encoding=EncodeConfig(init="start", steps=2, check_every=1))
    assert torch.isfinite(encoder.encode_stage_2_inputs(volume)).all()


def test_psnr_is_of_the_images(made):
    """Volumes whose maps alone differ have one PSNR."""
    store, run = Store(made / "store"), load_run(made / "run")
    record = store.in_split("train")[0]
    objective = TrainingObjective(run.config, SIZE, maps=3)
    planes = normalise(run.raw_planes()[record.name], run.config.norm)
    volume = np.array(store.volume(record))
    before = objective.psnr(planes, run.decoder, volume)
    volume[1:] = 255 - volume[1:]
    assert objective.psnr(planes, run.decoder, volume) == before
    volume[:1] = 255 - volume[:1]
    assert objective.psnr(planes, run.decoder, volume) != before


def test_what_has_no_maps_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="the volumes have no label maps"):
        TrainingObjective(TrainConfig.load("fast", ["data=x", "label_weight=0.1"]), SIZE)
    cases = write_cases(tmp_path / "cases", 3, 0)
    (cases / "labelsTr" / "case0.nii.gz").unlink()
    listed = json.loads((cases / "dataset.json").read_text())
    listed["training"][0] = {"image": "imagesTr/case0.nii.gz"}
    (cases / "dataset.json").write_text(json.dumps(listed))
    done = command("prepare", cases, "--out", tmp_path / "store", *PREPARE, check=False)
    assert done.returncode == 1
    assert "has no labels for label_maps" in done.stdout + done.stderr
    with pytest.raises(UserError, match="label_maps"):
        PrepareConfig.load("cohort", ["label_maps={ED: [300]}"])
    tcam("prepare", cases, "--out", tmp_path / "plain", "-q", "--preset", "cohort")
    tcam(
        "train-autodecoder",
        "fast",
        f"data={tmp_path / 'plain'}",
        *SMALL,
        "batch=2",
        "plane_size=8",
        "--out",
        tmp_path / "run",
        "-q",
    )
    tcam("export-latents", tmp_path / "run", "--out", tmp_path / "latents", "-q")
    said = tcam(
        "decode",
        tmp_path / "latents",
        "--volume",
        "case0",
        "--out",
        tmp_path / "a.nii",
        "--labels",
        tmp_path / "b.nii",
        fails=True,
    )
    assert "have no label maps" in said
    tcam(
        "train-diffusion", "tiny", f"latents={tmp_path / 'latents'}", *SMALL_DIFFUSION, "batch=2", "--out", tmp_path / "d", "-q"
    )
    said = tcam("sample", tmp_path / "d", "--labels", "--out", tmp_path / "s", fails=True)
    assert "--labels: the volumes have no label maps" in said
