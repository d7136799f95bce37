"""Sampling from a trained model: files, interpolation, requests."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from runs import SIZE, sampler, tcam
from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.draw import Output, draw_samples
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.process import unpack
from tcam_diff.evaluation.sets import read_planes, read_set

# ---- samples -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "hot", "churn"])
def test_a_sample_depends_on_its_number_alone(model, solver):
    s = sampler(model, solver=solver)
    assert torch.equal(s.noise([5]), s.noise(range(7))[5:6])
    alone = model.decode(s.sample([5]))
    among = model.decode(s.sample([2, 3, 5, 9]))[2:3]
    assert float((alone - among).abs().max()) < 1e-3
    assert torch.equal(alone, model.decode(s.sample([5])))
    other = model.decode(sampler(model, solver=solver, seed=1).sample([5]))
    assert float((alone - other).abs().max()) > 1e-3


def test_products_in_bfloat16_are_near_those_in_float32(model, trained):
    other = TriplaneDiffusion.load(trained, compute="bfloat16")
    assert (model.computing, other.computing) == (torch.float32, torch.bfloat16)
    exact, rough = (m.decode(sampler(m).sample([0])) for m in (model, other))
    assert 0 < float((exact - rough).abs().max()) < 0.1


def test_float32_products_use_no_tf32_on_gpus():
    """TF32 is off during the products, and the previous setting is restored."""
    from tcam_diff.diffusion.model import _no_tf32

    flags, gpu = torch.backends.cudnn.conv, torch.device("cuda")
    before = flags.fp32_precision
    with _no_tf32(gpu, torch.float32):
        assert flags.fp32_precision == "ieee"
    with _no_tf32(gpu, torch.bfloat16):
        assert flags.fp32_precision == before
    assert flags.fp32_precision == before


def test_planes_of_samples_have_unit_energy(model):
    for p in sampler(model).sample([0, 1]):
        torch.testing.assert_close(p.square().mean((1, 2, 3)), torch.ones(2), rtol=0, atol=1e-4)


def test_classifier_free_guidance_is_linear_in_the_scale(model):
    """Scale 1 gives the conditional estimate and 0 the unconditional one."""
    x = sampler(model).noise([0, 1])
    estimates = {s: sampler(model, guidance_scale=s)._estimate(x, 500.0, 1) for s in (0.0, 1.0, 2.0)}
    times = torch.full((2,), 500.0)
    torch.testing.assert_close(estimates[0.0], model.estimate(x, times))
    torch.testing.assert_close(estimates[1.0], model.estimate(x, times, torch.tensor([1, 1])))
    torch.testing.assert_close(estimates[2.0], 2 * estimates[1.0] - estimates[0.0])
    assert not torch.equal(estimates[0.0], estimates[1.0])


def test_there_and_back(model, latents):
    """Sampling undoes the inversion."""
    from tcam_diff.autodecoder.latents import LatentSet

    latent_set = LatentSet(latents)
    planes = [p[None] for p in latent_set.planes(latent_set.entries[0])]
    s = sampler(model, solver="rk4", steps=40, final="x")
    again = model.planes(s.integrate(s.invert(planes), [0]))
    error = torch.cat([(a - b).flatten() for a, b in zip(again, planes, strict=True)]).square().mean().sqrt()
    assert float(error) < 0.02


def test_interpolation_begins_and_ends_at_its_volumes(model, latents):
    from tcam_diff.autodecoder.latents import LatentSet

    latent_set = LatentSet(latents)
    a, b = ([p[None] for p in latent_set.planes(e)] for e in latent_set.entries[:2])
    points = list(sampler(model, solver="rk4", steps=30, final="x").interpolate(a, b, 3))
    for planes, want in ((points[0], a), (points[2], b)):
        for p, q in zip(planes, want, strict=True):
            assert float((p - q).square().mean().sqrt()) < 0.05
    assert float((points[1][0] - points[0][0]).square().mean()) > 1e-3


# ---- the command ---------------------------------------------------------------------------


def test_files_of_a_sample(trained, model, tmp_path):
    out = tmp_path / "samples"
    tcam("sample", trained, "--out", out, "--n", 2, "--seed", 3, "--steps", 4, "--size", 20, 16, 12, "-q")
    stem = "sample-0001_seed3_heun4"
    image = nib.load(out / f"{stem}.nii.gz")
    assert image.shape == (20, 16, 12)
    assert runs.has_space(image)  # those of the training volumes
    # the field of view is that of the training volumes
    spacing = np.asarray(image.header.get_zooms()) * image.shape
    np.testing.assert_allclose(spacing, np.array([1.0, 1.5, 2.0]) * SIZE, rtol=1e-5)
    lo, hi = model.geometry.info.intensity[0]
    data = image.get_fdata()
    assert lo - 1e-3 <= data.min() < data.max() <= hi + 1e-3
    sidecar = json.loads((out / f"{stem}.json").read_text())
    assert sidecar["index"] == 1
    assert sidecar["sampling"]["seed"] == 3
    assert sidecar["intensity"] == [[lo, hi]]
    assert (sidecar["shape"], sidecar["codes"]) == ([20, 16, 12], [1, 3])
    assert (out / f"{stem}.png").is_file()
    assert (out / "contact-sheet.png").is_file()


def test_a_command_draws_the_missing_samples(trained, tmp_path):
    out = tmp_path / "samples"
    command = ("sample", trained, "--out", out, "--steps", 3, "--batch-size", 1)
    tcam(*command, "--n", 3)
    files = {p.name: p.read_bytes() for p in out.glob("*.nii.gz")}
    kept = out / "sample-0000_seed0_heun3.nii.gz"
    before = kept.stat().st_mtime_ns
    (out / "sample-0001_seed0_heun3.json").unlink()  # as after an interruption
    (out / "sample-0002_seed0_heun3.nii.gz").unlink()
    assert "1 already exist" in tcam(*command, "--n", 3)
    assert kept.stat().st_mtime_ns == before
    assert {p.name: p.read_bytes() for p in out.glob("*.nii.gz")} == files
    assert "3 already exist" in tcam(*command, "--n", 3)
    for other in (("--final", "x"), ("--size", 8, 8, 8), ("--dtype", "uint8"), ("--compute-dtype", "bfloat16")):
        assert "exists with other settings" in tcam(*command, "--n", 3, *other, fails=True)  # nothing is overwritten
    assert {p.name: p.read_bytes() for p in out.glob("*.nii.gz")} == files


def test_planes_are_written_beside_the_samples(trained, model, tmp_path):
    out = tmp_path / "samples"
    command = ("sample", trained, "--out", out, "--n", 2, "--steps", 2, "-q")
    tcam(*command)
    assert read_planes(out) is None
    volume = (out / "sample-0001_seed0_heun2.nii.gz").read_bytes()
    assert "exists with other settings" in tcam(*command[:-1], "--planes", "--final", "x", fails=True)
    tcam(*command, "--planes")  # samples without planes are drawn again
    assert (out / "sample-0001_seed0_heun2.nii.gz").read_bytes() == volume
    states = read_planes(out)
    planes = unpack(states, model.channels, model.geometry.sizes)
    shown = model.decode([p[1:] for p in planes])[0]
    np.testing.assert_allclose(read_set(out, lambda v: v).volumes[1], shown, atol=1e-4)
    (out / "sample-0000_seed0_heun2.json").unlink()  # not finished
    assert torch.equal(read_planes(out), states[1:])


def test_a_grid_that_the_model_does_not_know_is_refused_before_drawing(trained, tmp_path):
    assert "grid=spectrum: the model does not know" in tcam(
        "sample", trained, "--out", tmp_path / "samples", "--grid", "spectrum", fails=True
    )
    assert not list((tmp_path / "samples").glob("*.nii.gz"))


def test_drawing_stops_and_continues(trained, tmp_path):
    reports, kept = [], []
    request = (trained, Output(tmp_path), range(3), SampleConfig(steps=2))
    assert not draw_samples(*request, batch_size=1, progress=reports.append, stop=lambda: len(reports) == 2)
    assert [(p.done, p.total) for p in reports] == [(1, 3), (2, 3)]
    assert not (tmp_path / "contact-sheet.png").exists()
    assert draw_samples(*request, batch_size=1, started=lambda model, there: kept.append(there))
    assert kept == [2]
    assert len(list(tmp_path.glob("*.nii.gz"))) == 3


def test_the_mean_residual_is_that_of_the_sample(trained, tmp_path):
    """It does not depend on the batch size."""
    residuals = []
    for size in (1, 3):
        out = tmp_path / f"{size}"
        tcam("sample", trained, "--out", out, "--n", 3, "--steps", 3, "--batch-size", size, "-q")
        residuals.append([json.loads(p.read_text())["residual_mean_square"] for p in sorted(out.glob("*.json"))])
    assert residuals[0] == pytest.approx(residuals[1], rel=1e-4)
    assert len(set(residuals[0])) == 3


def test_two_processes_draw_the_same_volumes(trained, tmp_path):
    for world in (1, 2):
        runs.finish(runs.start(runs.sample, trained, tmp_path / str(world), world=world))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / str(w)).glob("*.nii.gz")} for w in (1, 2))
    assert len(one) == 5
    assert one == two
    assert (tmp_path / "2" / "contact-sheet.png").is_file()
    for number in (1, 3):  # samples of the second process
        next((tmp_path / "2").glob(f"sample-000{number}*.json")).unlink()
    runs.finish(runs.start(runs.sample, trained, tmp_path / "2", world=2))
    assert len(list((tmp_path / "2").glob("*.json"))) == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--label", "c"], "expected one of a, b, got c"),
        (["--final", "y"], "final"),
        (["--size", 0, 4, 4], "three positive numbers"),
        (["--size", 40000, 4, 4], "at most 32767"),
        (["--dtype", "int3"], "int3"),
        (["--device", "tpu9"], "expected auto, cpu, cuda"),
        (["--guidance-scale", 3], "add --label"),
        (["--mask", "m.nii.gz"], "add --known"),
    ],
)
def test_bad_requests_are_refused(trained, tmp_path, arguments, said):
    assert said in tcam("sample", trained, "--out", tmp_path / "s", "--n", 1, "--steps", 1, "-q", *arguments, fails=True)


def test_interpolate(trained, latents, tmp_path):
    out = tmp_path / "between"
    tcam("interpolate", trained, latents, "v0-0", "v0-3", "--out", out, "--n", 3, "--steps", 4, "-q")
    assert sorted(p.name for p in out.iterdir()) == [
        "00-of-3.nii.gz", "01-of-3.nii.gz", "02-of-3.nii.gz", "contact-sheet.png", "interpolation.json",
    ]  # fmt: skip
    assert json.loads((out / "interpolation.json").read_text())["b"] == "v0-3"
    for names, said in (
        (("v9", "v0-3"), "no volume 'v9'"),
        (("v0-1", "v0-3"), "of another interpolation"),
        (("v0-0", "v0-3", "--solver", "hot"), "no inverse"),
        (("v0-0", "v0-3", "--dtype", "int3"), "int3"),
    ):
        command = ("interpolate", trained, latents, *names, "--out", out)
        assert said in tcam(*command, "--n", 3, "--steps", 4, fails=True)
    other = runs.make_latents(tmp_path / "other", decoder_seed=1)
    assert "planes of another decoder" in tcam("interpolate", trained, other, "v0-0", "v0-3", "--out", out, fails=True)
    other = runs.make_latents(tmp_path / "oblong", texels=(16, 8, 8))
    assert "its planes are" in tcam("interpolate", trained, other, "v0-0", "v0-3", "--out", out, fails=True)
