"""Sampling from a trained model: files, guidance, interpolation, MONAI."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from tcam_diff.cli.app import app
from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.draw import Output, draw_samples
from tcam_diff.diffusion.guidance import ImageGuidance, read_known
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.errors import UserError
from typer.testing import CliRunner

SIZE = (16, 16, 16)


def tcam(*arguments, fails=False):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if fails:
        assert isinstance(done.exception, UserError), (done.output, done.exception)
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "latents")


@pytest.fixture(scope="module")
def trained(latents, tmp_path_factory):
    """Run with two classes."""
    out = tmp_path_factory.mktemp("trained") / "run"
    table = out.parent / "labels.csv"
    table.write_text("name,label\n" + "".join(f"v0-{i},{'ab'[i % 2]}\n" for i in range(6)))
    more = ("steps=60", "network.dropout=0", "lr=5e-3", "checkpoint_every=60", "evaluate_every=60", f"labels={table}")
    runs.finish(runs.start(runs.diffuse, latents, out, more))
    return out


@pytest.fixture(scope="module")
def model(trained):
    return TriplaneDiffusion.load(trained)


def sampler(model, **changes):
    return Sampler(model, SampleConfig(**{"steps": 6} | changes))


# ---- samples -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "hot"])
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


# ---- guidance ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth(model):
    """Volume that the model can generate: a sample with another seed."""
    return model.decode(sampler(model, seed=77, final="x").sample([0]))[0]


@pytest.mark.parametrize("what", ["half", "coarse"])
def test_guided_samples_follow_known_voxels(model, truth, what):
    s = sampler(model, steps=20, solver="euler")
    if what == "half":
        mask = torch.zeros_like(truth)
        mask[:, :8] = 1
        guidance = ImageGuidance(truth, mask, noise=0.005, iterations=10)
    else:
        guidance = ImageGuidance(torch.nn.functional.avg_pool3d(truth, 4), factor=(4, 4, 4), noise=0.005, iterations=10)
    guided = guidance.bind(model)
    free, samples = s.sample([0, 1]), s.sample([0, 1], correct=guided)
    before, after = guided.misfit(free), guided.misfit(samples)
    assert float((after / before).max()) < 0.2
    assert float((samples[0][0] - samples[0][1]).square().mean()) > 1e-4  # unknown voxels still vary


def test_guidance_keeps_the_state(model, truth):
    """The noise changes with the planes, so that cos(eta) x0 + sin(eta) eps stays the same."""
    from tcam_diff.diffusion.process import Estimate

    x = sampler(model).noise([0])
    estimate = Estimate(x, torch.randn_like(x), torch.randn_like(x), 0.9)
    corrected = ImageGuidance(truth).bind(model)(estimate)
    torch.testing.assert_close(corrected.residual, estimate.residual, rtol=0, atol=1e-4)
    assert not torch.equal(corrected.x0, estimate.x0)


def test_guidance_approaches_the_minimum_near_known_voxels(model, truth):
    """Texels far from all known voxels change only by the common scale of the normalisation."""
    from tcam_diff.diffusion.process import Estimate, unpack

    mask = torch.zeros_like(truth)
    mask[:, :3, :3, :3] = 1
    eta = 1.4
    before = model.state([p[None] for p in (t[0] for t in sampler(model, seed=3, final="x").sample([0]))])
    estimate = Estimate(before, torch.randn_like(before), before, eta)

    def objective(z):
        guided = ImageGuidance(truth, mask).bind(model)
        return float(guided.misfit(model.planes(z)) / 0.02**2 + ((z - before) / math.sin(eta)).square().sum()) / 2

    few, many = (ImageGuidance(truth, mask, iterations=n).bind(model)(estimate).x0 for n in (5, 100))
    start, reached, least = objective(before), objective(few), objective(many)
    assert least <= reached < start
    assert reached - least < 0.1 * (start - least)
    for plane in unpack(few - before, model.channels, model.geometry.sizes):
        near, far = plane[..., :3, :3], plane[..., 5:, 5:]
        assert float(far.square().mean()) < 0.01 * float(near.square().mean())


def test_guided_samples_depend_on_their_numbers_alone(trained, model, truth, tmp_path):
    """The command draws them one at a time."""
    path = tmp_path / "known.nii.gz"
    lo, hi = model.geometry.info.intensity[0]
    nib.save(nib.Nifti1Image(lo + (hi - lo) * torch.nn.functional.avg_pool3d(truth, 4)[0].numpy(), np.eye(4)), path)
    command = ("sample", trained, "--steps", 3, "--known", path, "-q")
    tcam(*command, "--out", tmp_path / "all", "--n", 3, "--batch-size", 3)
    tcam(*command, "--out", tmp_path / "one", "--n", 1, "--first", 2)
    one = next((tmp_path / "one").glob("*.nii.gz"))
    assert one.read_bytes() == (tmp_path / "all" / one.name).read_bytes()


def test_unknown_voxels_do_not_matter(model, truth):
    mask = torch.zeros_like(truth)
    mask[:, 3:9, 5:11, 2:4] = 1
    other = torch.where(mask > 0, truth, torch.rand_like(truth))
    other[:, 0, 0, 0] = float("nan")
    planes = sampler(model).sample([0])
    a, b = (ImageGuidance(v, mask).bind(model) for v in (truth, other))
    assert a.box == [(3, 9), (5, 11), (2, 4)]
    assert torch.equal(a.misfit(planes), b.misfit(planes))
    whole = (model.decode(planes)[0] - truth) * mask
    torch.testing.assert_close(a.misfit(planes)[0], whole.square().sum(), rtol=1e-3, atol=1e-6)


def test_known_files(model, trained, truth, tmp_path):
    lo, hi = model.geometry.info.intensity[0]
    path, mask = tmp_path / "known.nii.gz", tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(lo + (hi - lo) * truth[0].numpy(), np.eye(4)), path)
    marked = np.zeros(SIZE, np.uint8)
    marked[:8] = 1
    nib.save(nib.Nifti1Image(marked, np.eye(4)), mask)
    guidance = read_known(model, path, mask)
    torch.testing.assert_close(guidance.known, truth, rtol=0, atol=1e-5)
    assert guidance.mask.sum() == 8 * 16 * 16
    out = tmp_path / "samples"
    tcam("sample", trained, "--out", out, "--n", 1, "--steps", 3, "--known", path, "--mask", mask, "-q")
    assert json.loads(next(out.glob("*.json")).read_text())["known"]["mask"] is not None
    nib.save(nib.Nifti1Image(np.zeros((5, 16, 16), np.float32), np.eye(4)), path)
    with pytest.raises(UserError, match=r"known\.nii\.gz: expected 1 channel"):
        read_known(model, path)
    nib.save(nib.Nifti1Image(np.ones((8, 4, 16), np.float32), np.eye(4)), path)
    assert read_known(model, path).factor == (2, 4, 1)
    with pytest.raises(UserError, match="numbers from 0 to 0"):
        read_known(model, path, channels="1")


def test_known_files_are_reoriented_to_the_model(model, truth, tmp_path):
    """A file with other axes and the same anatomy gives the same known voxels."""
    lo, hi = model.geometry.info.intensity[0]
    path, mask = tmp_path / "known.nii.gz", tmp_path / "mask.nii.gz"
    marked = np.zeros(SIZE, np.uint8)
    marked[:5, :, 2:] = 1
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    turned = affine.copy()  # x is flipped, y and z are swapped
    turned[0, 0], turned[0, 3] = -1.0, SIZE[0] - 1
    turned[1:3, 1:3] = [[0, 1], [1, 0]]
    for target, values in ((path, lo + (hi - lo) * truth[0].numpy()), (mask, marked)):
        nib.save(nib.Nifti1Image(values[::-1].transpose(0, 2, 1), turned), target)
    guidance = read_known(model, path, mask)
    torch.testing.assert_close(guidance.known, truth, rtol=0, atol=1e-5)
    assert torch.equal(guidance.mask[0] != 0, torch.from_numpy(marked != 0))
    scaled = read_known(model, path, intensity=(lo, lo + 2 * (hi - lo)))
    torch.testing.assert_close(scaled.known, truth / 2, rtol=0, atol=1e-5)
    nib.save(nib.Nifti1Image(marked, affine @ np.diag([1, 1, 1.5, 1])), mask)
    with pytest.raises(UserError, match=r"mask\.nii\.gz: its affine is not that of"):
        read_known(model, path, mask)


# ---- MONAI ---------------------------------------------------------------------------------


def test_monais_inferer_draws_our_samples(model):
    from monai.inferers import LatentDiffusionInferer
    from tcam_diff.diffusion.interop import ArcScheduler, Autoencoder, Network, latent_shape

    s = sampler(model, steps=5)
    scheduler = ArcScheduler("heun")
    scheduler.set_timesteps(5)
    inferer = LatentDiffusionInferer(scheduler)
    noise = s.noise([4, 2]).view(2, *latent_shape(model))
    assert noise.shape == (2, 12, 8, 8)
    volumes = inferer.sample(noise, Autoencoder(model), Network(model), verbose=False)
    torch.testing.assert_close(volumes, model.decode(s.sample([4, 2])), rtol=0, atol=1e-4)
    context = torch.full((2, 1, 1), 1.0)
    guided = inferer.sample(noise, Autoencoder(model), Network(model), verbose=False, conditioning=context, cfg=2.0)
    ours = sampler(model, steps=5, guidance_scale=2.0).sample([4, 2], label=1)
    torch.testing.assert_close(guided, model.decode(ours), rtol=0, atol=1e-4)


def test_monais_inferer_trains_on_our_latents(model, truth):
    from monai.inferers import LatentDiffusionInferer
    from tcam_diff.autodecoder.config import EncodeConfig
    from tcam_diff.diffusion.interop import ArcScheduler, Autoencoder, Network, latent_shape

    encoding = EncodeConfig(steps=300, init="start", check_every=100, region="volume")
    autoencoder = Autoencoder(model, encoding=encoding)
    latent = autoencoder.encode_stage_2_inputs(truth[None])
    assert float((autoencoder.decode_stage_2_outputs(latent)[0] - truth).square().mean().sqrt()) < 0.05
    noise = torch.randn(1, *latent_shape(model))
    inferer = LatentDiffusionInferer(ArcScheduler())
    prediction = inferer(truth[None], autoencoder, Network(model), noise, torch.tensor([500]))
    assert prediction.shape == (1, 24, 8, 8)


#: JSON schema of the mandatory keys of MONAI's bundle specification. The published schema needs network access.
SPECIFICATION = {
    "type": "object",
    "required": [
        "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task", "description",
        "authors", "copyright", "network_data_format",
    ],
    "properties": {
        "version": {"type": "string"},
        "changelog": {"type": "object"},
        "required_packages_version": {"type": "object"},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "additionalProperties": {"type": "object", "additionalProperties": {"$ref": "#/definitions/tensor"}},
        },
    },
    "definitions": {
        "tensor": {
            "type": "object",
            "required": [
                "type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def",
            ],
            "properties": {
                "num_channels": {"type": "integer"},
                "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
                "dtype": {"type": "string"},
                "value_range": {"type": "array", "items": {"type": "number"}},
                "is_patch_data": {"type": "boolean"},
                "channel_def": {"type": "object"},
            },
        }
    },
}  # fmt: skip


def test_a_bundle_is_verified_and_runs_alone(trained, model, tmp_path):
    bundle, schema = tmp_path / "bundle", tmp_path / "schema.json"
    tcam("export-bundle", trained, "--out", bundle)
    schema.write_text(json.dumps(SPECIFICATION))
    common = {"cwd": bundle, "check": True, "capture_output": True, "text": True}
    meta = bundle / "configs" / "metadata.json"
    command = [sys.executable, "-m", "monai.bundle"]
    subprocess.run([*command, "verify_metadata", "--meta_file", meta, "--filepath", schema], **common)
    run = [*command, "run", "--config_file", "configs/inference.json", "--count", "2", "--seed", "3", "--steps", "4"]
    subprocess.run(run, **common)
    names = sorted(p.name for p in (bundle / "eval").iterdir())
    assert names == ["sample-0000_seed3.nii.gz", "sample-0001_seed3.nii.gz"]
    image = nib.load(bundle / "eval" / names[1])
    lo, hi = model.geometry.info.intensity[0]
    want = lo + (hi - lo) * model.decode(sampler(model, steps=4, seed=3).sample([0, 1]))[1, 0]
    np.testing.assert_allclose(image.get_fdata(), want.numpy(), atol=0.1)
    np.testing.assert_allclose(image.affine, model.geometry.info.affine, atol=1e-5)
    tcam("export-bundle", trained, "--out", bundle)  # replaces a complete or incomplete bundle
    (tmp_path / "file").write_text("")
    (tmp_path / "project" / "docs").mkdir(parents=True)
    for place in (tmp_path / "file", tmp_path / "project"):
        assert "exists and is not a bundle" in tcam("export-bundle", trained, "--out", place, fails=True)


def test_a_model_loads_in_three_lines(trained):
    code = (
        "from tcam_diff.diffusion.model import TriplaneDiffusion\n"
        "from tcam_diff.diffusion.sampling import Sampler\n"
        f"model = TriplaneDiffusion.load({str(trained)!r})\n"
        "print(model.decode(Sampler(model).sample([0])).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[1, 1, 16, 16, 16]" in done.stdout
