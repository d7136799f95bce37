"""Distillation of a diffusion model to a consistency model, and its sampling."""

import json
import math
from itertools import pairwise

import pytest
import runs
import torch
from priors import FILTERED, GAUSSIAN
from runs import tcam
from tcam_diff.diffusion.config import DistillConfig, SampleConfig
from tcam_diff.diffusion.distill import Distillation, distill, moved
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.diffusion.solver import Solver, arc
from tcam_diff.diffusion.train import DiffusionTraining
from tcam_diff.errors import UserError
from tcam_diff.training.distributed import Distributed

SHORT = ("steps=8", "batch=4", "teacher_steps=4", "updates=2", "evaluate_volumes=4", "log_every=2", "compute_dtype=float32")


def teacher(folder, latents, *changes):
    """Model whose heads are not zero, as after a training."""
    model = DiffusionTraining(
        runs.diffusion_config(latents, *GAUSSIAN, *FILTERED, "network.norm_groups=2", *changes), Distributed(), folder
    ).model(0)
    for parameter in model.network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "latents", count=12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, latents):
    return teacher(tmp_path_factory.mktemp("teacher"), latents)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, trained):
    out = tmp_path_factory.mktemp("distilled") / "run"
    tcam("distill", trained, "--out", out, "-q", *SHORT)
    return out


def config(trained, *changes):
    return DistillConfig.load("default", [f"model={trained}", *SHORT, *changes])


def test_angles_move_by_shares_of_their_distance():
    etas = arc(6, variances=(0.1, 100.0))
    logs = [math.log(math.tan(e)) for e in moved(etas, 0.5)[1:-1]]
    before = [math.log(math.tan(e)) for e in etas[1:-1]]
    assert logs[:-1] == pytest.approx([(a + b) / 2 for a, b in pairwise(before)])
    assert moved(etas, 0.5)[-2:] == etas[-2:]
    assert moved(etas, 0.3)[0] == math.pi / 2
    assert moved(etas, 0.3)[-1] == 0
    assert moved(etas, 0.0) == pytest.approx(etas)


def test_at_small_angles_the_planes_are_the_state(trained):
    model = TriplaneDiffusion.load(trained)
    model.consistency = True
    x = torch.randn(2, model.length)
    noise, x0 = model.estimate(x, torch.full((2,), 0.01)).chunk(2, 1)
    torch.testing.assert_close(x0, x, atol=1e-3, rtol=0)
    t = torch.tensor([300.0, 900.0])
    noise, x0 = model.estimate(x, t).chunk(2, 1)
    eta = (t * (math.pi / 2000))[:, None]
    torch.testing.assert_close(eta.cos() * x0 + eta.sin() * noise, x, atol=1e-4, rtol=0)


def test_one_evaluation_leads_to_the_teachers_planes(latents, tmp_path):
    """Constant heads around a unit prior move the ends of all trajectories alike.

    After some steps one evaluation leads to them, five times as near as the prior's flow does, also from other noise.
    """
    training = DiffusionTraining(runs.diffusion_config(latents, "prior=unit", "network.norm_groups=2"), Distributed(), tmp_path)
    model = training.model(0)
    bias = model.network.leave.bias
    bias.add_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)))
    trained = tmp_path / "teacher"
    model.save(trained)
    task = Distillation(config(trained, "steps=120", "lr=2e-2", "batch=8", "updates=4"), Distributed(), tmp_path)
    assert task.evaluate()["prior_distance"] > 0.05
    for i in range(120):
        task.step(i)
    found = task.evaluate()
    assert found["distance"] < found["prior_distance"] / 5
    one = Sampler(task.average, SampleConfig(solver="consistency", steps=1)).integrate(
        Sampler(task.average).noise(range(50, 54)), range(50, 54)
    )
    ends = Sampler(model, SampleConfig(steps=50)).integrate(Sampler(model).noise(range(50, 54)), range(50, 54))
    spread = (ends - ends.mean(0)).square().mean().sqrt()
    assert float((one - ends).square().mean().sqrt() / spread) < found["prior_distance"] / 5


def test_a_stopped_distillation_continues_to_the_bit(trained, tmp_path):
    distill(config(trained), tmp_path / "whole")
    count = 0

    def stop():
        nonlocal count
        count += 1
        return count > 3  # in the middle of the steps with the same trajectories

    assert distill(config(trained), tmp_path / "parts", stop=stop).stopped
    distill(config(trained), tmp_path / "parts", "auto")
    whole, parts = (TriplaneDiffusion.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_distilled_model_draws_volumes(distilled, tmp_path):
    for steps in (1, 2, 4):
        tcam("sample", distilled, "--n", 2, "--solver", "consistency", "--steps", steps, "--out", tmp_path / f"{steps}", "-q")
        assert len(list((tmp_path / f"{steps}").glob("sample-*.nii.gz"))) == 2
    model = TriplaneDiffusion.load(distilled)
    assert model.consistency
    assert model.provenance["distilled_steps"] == 8
    sampler = runs.sampler(model, solver="consistency", steps=2)
    torch.testing.assert_close(sampler.sample([3])[0], sampler.sample([2, 3])[0][1:], atol=1e-4, rtol=0)
    assert TriplaneDiffusion.load(distilled).identity == model.identity


def test_a_run_continues_with_its_own_teacher_under_another_name(latents, trained, tmp_path):
    distill(config(trained, "minutes=1e-9"), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints").is_dir()
    (tmp_path / "moved").symlink_to(trained)
    distill(config(tmp_path / "moved"), tmp_path / "run", "auto")
    other = teacher(tmp_path / "other", latents, "seed=1")
    with pytest.raises(UserError, match="is not the model with which the run began"):
        distill(config(other), tmp_path / "run", "auto")


def test_the_decoders_type_is_that_of_stage_1(trained, tmp_path):
    distill(config(trained, "compute_dtype=float32"), tmp_path / "run")
    model, before = TriplaneDiffusion.load(tmp_path / "run"), TriplaneDiffusion.load(trained)
    assert model.stage1 == before.stage1
    assert model.config.compute_dtype == "float32"


def test_the_page_shows_a_distillation(distilled, tmp_path):
    tcam("sample", distilled, "--n", 1, "--solver", "consistency", "--steps", 1, "--out", tmp_path / "samples", "-q")
    tcam("report", distilled, tmp_path / "samples", "--out", tmp_path / "page.html", "-q")
    text = (tmp_path / "page.html").read_text()
    for words in (
        "Training, distillation",
        "tcam distill",
        "teacher_steps=4",
        f"tcam sample {distilled} --n 1 --solver consistency",
    ):
        assert words in text, words


def test_classes_are_kept(latents, tmp_path):
    names = [f"v0-{i}" for i in range(12)]
    (tmp_path / "labels.csv").write_text("name,label\n" + "\n".join(f"{n},{'ab'[i % 2]}" for i, n in enumerate(names)) + "\n")
    trained = teacher(tmp_path / "teacher", latents, f"labels={tmp_path / 'labels.csv'}")
    distill(config(trained), tmp_path / "run")
    model = TriplaneDiffusion.load(tmp_path / "run")
    sampler = runs.sampler(model, solver="consistency", steps=1)
    a, b, none = (sampler.sample([0], model.label(label))[0] for label in ("a", "b", None))
    assert not torch.equal(a, b)
    assert not torch.equal(a, none)


def test_bad_requests_are_refused(latents, trained, distilled, tmp_path):
    sample = ("sample", distilled, "--out", tmp_path / "samples", "-q")
    assert "take the solver consistency" in tcam(*sample, fails=True)
    assert "is not distilled" in tcam("sample", trained, "--solver", "consistency", "--out", tmp_path / "s", "-q", fails=True)
    assert "is distilled already" in tcam("distill", distilled, "--out", tmp_path / "again", "-q", fails=True)
    for solver in ("heun", "consistency"):
        between = ("interpolate", distilled, latents, "v0-0", "v0-1", "--solver", solver, "--out", tmp_path / "i", "-q")
        assert ("has no inverse" if solver == "heun" else "stochastic") in tcam(*between, fails=True)
        assert not (tmp_path / "i").exists()
    assert "leave model=... out" in tcam("distill", trained, "model=other", "--out", tmp_path / "o", "-q", fails=True)
    assert "has a model" in tcam("distill", trained, "--out", trained, "-q", fails=True)
    assert "evaluate_volumes" in tcam("distill", trained, "evaluate_volumes=1", "--out", tmp_path / "o", "-q", fails=True)
    with pytest.raises(ValueError, match="only multirate visits"):
        Solver("heun", visit=print)
    DiffusionTraining(runs.diffusion_config(latents), Distributed(), tmp_path).model(0).save(tmp_path / "plain")
    assert "has no prior" in tcam("distill", tmp_path / "plain", "--out", tmp_path / "run", "-q", fails=True)
    with pytest.raises(UserError, match="guidance_scale=2"):
        runs.sampler(TriplaneDiffusion.load(distilled), solver="consistency", guidance_scale=2.0).sample([0])
    with pytest.raises(UserError, match="prior_guidance=2"):
        runs.sampler(TriplaneDiffusion.load(distilled), solver="consistency", prior_guidance=2.0).sample([0])
    index = json.loads((distilled / "model" / "model.json").read_text())
    for value in (1, "yes"):
        (distilled / "model" / "model.json").write_text(json.dumps(index | {"consistency": value}))
        with pytest.raises(UserError, match="consistency: expected true"):
            TriplaneDiffusion.load(distilled)
    (distilled / "model" / "model.json").write_text(json.dumps(index))
