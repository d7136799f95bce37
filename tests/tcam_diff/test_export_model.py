"""Copies of models with a model card, and the models that come with the package."""

import json

import pytest
import runs
import torch
from priors import GAUSSIAN
from runs import tcam
from tcam_diff.diffusion.export import export_model
from tcam_diff.diffusion.model import NETWORK, TriplaneDiffusion
from tcam_diff.diffusion.train import DiffusionTraining
from tcam_diff.errors import UserError
from tcam_diff.evaluation.sets import read_planes
from tcam_diff.pretrained import names, pretrained
from tcam_diff.training.distributed import Distributed


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "latents", count=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory, latents):
    folder = tmp_path_factory.mktemp("model")
    DiffusionTraining(runs.diffusion_config(latents, *GAUSSIAN), Distributed(), folder).model(16).save(folder / "model")
    return folder


def size(folder):
    return (folder / NETWORK).stat().st_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_draws_the_same_volumes(model, tmp_path, dtype):
    """To the bit in float32, and nearly in bfloat16, with half of the bytes."""
    tcam("export-model", model, "--out", tmp_path / "copy", "--dtype", dtype)
    original, copy = TriplaneDiffusion.load(model), TriplaneDiffusion.load(tmp_path / "copy")
    drawn = [torch.cat([p.flatten(1) for p in runs.sampler(m).sample([0, 1])], 1) for m in (original, copy)]
    difference = float((drawn[0] - drawn[1]).square().mean().sqrt())
    assert difference == 0 if dtype == "float32" else 0 < difference < 0.02
    share = size(tmp_path / "copy") / size(model / "model")
    assert share == pytest.approx(1.0 if dtype == "float32" else 0.5, abs=0.1)
    assert copy.provenance["copy_of"] == original.identity


def test_the_model_card_describes_the_model(model, tmp_path):
    (tmp_path / "note.md").write_text("Made for a *test*.\n")
    for _ in range(2):  # a copy is replaced by one of the same model
        tcam("export-model", model, "--out", tmp_path / "copy", "--note", tmp_path / "note.md")
    text = (tmp_path / "copy" / "README.md").read_text()
    for words in (
        "# copy",
        "16 x 16 x 16 voxels, of 1 x 1.5 x 2 mm",
        "12 volumes",
        "for 16 steps",
        "Made for a *test*.",
        "tcam sample copy",
    ):
        assert words in text
    tcam("sample", tmp_path / "copy", "--n", 1, "--steps", 2, "--out", tmp_path / "samples", "-q")


def test_bad_requests_are_refused(model, latents, tmp_path):
    with pytest.raises(UserError, match="expected float32 or bfloat16, got int8"):
        export_model(model, tmp_path / "copy", "int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    for taken in (model, model / "model", tmp_path / "full", tmp_path / "full" / "README.md"):
        with pytest.raises(UserError, match="exists, and is no copy of this model"):
            export_model(model, taken)
    assert (tmp_path / "full" / "README.md").read_text() == "mine"
    (tmp_path / "note.md").write_bytes(b"\xff\xfe")
    assert "in UTF-8" in tcam("export-model", model, "--out", tmp_path / "c", "--note", tmp_path / "note.md", fails=True)
    export_model(model, tmp_path / "copy")
    other = DiffusionTraining(runs.diffusion_config(latents, *GAUSSIAN, "seed=1"), Distributed(), tmp_path).model(0)
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="no copy of this model"):
        export_model(tmp_path / "other", tmp_path / "copy")
    (tmp_path / "copy" / "model.json").write_text("{}")
    with pytest.raises(UserError, match="format"):
        export_model(model, tmp_path / "copy")
    assert "--pretrained: " in tcam("sample", "--pretrained", "none", "--out", tmp_path / "s", fails=True)
    for arguments in (("sample",), ("sample", model, "--pretrained", "cohort")):
        assert "give a run or a model's folder, or --pretrained NAME" in tcam(*arguments, "--out", tmp_path / "s", fails=True)


@pytest.mark.parametrize("name", names())
def test_models_of_the_package_draw_volumes(name, tmp_path):
    tcam("sample", "--pretrained", name, "--n", 1, "--steps", 1, "--solver", "euler", "--out", tmp_path / "samples", "-q")
    folder = pretrained(name)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 16e6
    assert len(list((tmp_path / "samples").glob("*.nii.gz"))) == 1


@pytest.mark.parametrize("solver", ["heun", "multirate"])
def test_the_command_draws_with_prior_guidance(solver, tmp_path):
    """Its files say so, its planes are farther from those of the prior alone, and other settings do not overwrite them."""
    command = ["sample", "--pretrained", "cohort", "--n", 1, "--steps", 2, "--solver", solver, "--final", "x", "--planes", "-q"]
    found = {}
    for scale in (0, 1, 1.2):
        tcam(*command, "--prior-guidance", scale, "--out", tmp_path / str(scale))
        (sidecar,) = (p for p in (tmp_path / str(scale)).glob("*.json"))
        assert json.loads(sidecar.read_text())["sampling"]["prior_guidance"] == scale
        found[scale] = read_planes(tmp_path / str(scale))
    assert float((found[1.2] - found[1]).norm()) > 0.01 * float(found[1].norm())
    assert float((found[1.2] - found[0]).norm()) > float((found[1] - found[0]).norm())
    assert "exists with other settings" in tcam(*command, "--out", tmp_path / "1.2", fails=True)
