"""Rivals: training that stops and goes on, files, reconstructions and samples."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from tcam_diff.baselines.compression import Compression, CompressionTraining
from tcam_diff.baselines.config import CompressionConfig, GaussianConfig, LatentDiffusionConfig
from tcam_diff.baselines.draw import draw, reconstruct
from tcam_diff.baselines.gaussian import Gaussian
from tcam_diff.baselines.latent_diffusion import LatentDiffusion
from tcam_diff.data.store import Store, unit
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.diffusion.data import LatentData
from tcam_diff.diffusion.process import pack
from tcam_diff.errors import UserError
from tcam_diff.evaluation.reconstruction import evaluate, find_reconstructions
from tcam_diff.evaluation.sets import read_planes, read_set
from tcam_diff.training.distributed import Distributed

SIZE = (16, 8, 24)
VAE = ("channels=[8,16]", "norm_groups=4", "latent_channels=2", "res_blocks=1", "discriminator_channels=4", "lr=1e-3",
       "discriminator_layers=1", "batch=2", "steps=12", "adversarial_start=4", "compute_dtype=float32")  # fmt: skip
VQ = (*VAE, "codes=32", "norm_groups=32", "slice_discriminator=true")
LDM = ("channels=[8,16]", "attention_levels=[1]", "head_channels=8", "res_blocks=1", "norm_groups=4", "batch=2", "steps=6",
       "timesteps=20", "sampler_steps=4", "compute_dtype=float32")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a store, and runs of all rivals that need no latent set."""
    folder = tmp_path_factory.mktemp("baselines")
    store = str(runs.make_store(folder / "store", count=5, held_out=2, size=SIZE).folder)
    for name, keys in (("vae-gan", VAE), ("vq-gan", VQ)):
        run = str(folder / name)
        runs.command("baseline", "train", name, f"data={store}", *keys, "--out", run, "-q")
        more = (f"autoencoder={run}", *LDM, "--out", str(folder / f"ldm-{name}"), "-q")
        runs.command("baseline", "train", f"ldm-{name}", *more)
    return folder


@pytest.mark.parametrize(("preset", "latents"), [("vae-gan", 2 * 8 * 32**3), ("vq-gan", 16 * 32**3)])
def test_the_papers_latents(preset, latents):
    config = CompressionConfig.load(preset)
    info = VolumeInfo(channels=1, shape=(128, 128, 128), affine=np.eye(4))
    assert Compression(None, config, info).latents == latents == 524288


@pytest.mark.parametrize("name", ["vae-gan", "vq-gan"])
def test_a_run_reconstructs_as_its_files_do(made, tmp_path, name):
    store = Store(made / "store")
    rows = {r.name: r for r in evaluate(find_reconstructions(store, made / name), store)}
    assert {r.group for r in rows.values()} == {"trained on", "held out, split test"}
    runs.command("baseline", "reconstruct", str(made / name), str(made / "store"), "--out", str(tmp_path))
    for row in evaluate(find_reconstructions(store, tmp_path), store):
        assert row.mse == pytest.approx(rows[row.name].mse, rel=1e-4)
    assert runs.has_space(nib.load(tmp_path / "blob0.nii.gz"))


@pytest.mark.parametrize(("name", "keys"), [("vae-gan", VAE), ("vq-gan", VQ)])
def test_a_stopped_run_continues_with_the_same_bits(made, tmp_path, name, keys):
    config = CompressionConfig.load(name, [f"data={made / 'store'}", *keys])
    whole = CompressionTraining(config, Distributed(), tmp_path)
    for i in range(6):
        values = whole.step(i)
    half = CompressionTraining(config, Distributed(), tmp_path)
    for i in range(5):
        half.step(i)
    again = CompressionTraining(config, Distributed(), tmp_path)
    again.load_state(half.shared_state(), [])
    other = again.step(5)
    assert values.keys() == other.keys()
    assert {"fool_volumes", "judge_volumes"} <= values.keys()
    assert ("judge_slices" in values) == (name == "vq-gan")
    for key, value in values.items():
        assert torch.equal(value, other[key]), key


def test_training_lowers_the_error(made):
    """More in 60 steps than in none; noise of the latents off at evaluation."""
    keys = [f"data={made / 'store'}", *VAE, "steps=60", "adversarial_weight=0"]
    task = CompressionTraining(CompressionConfig.load("vae-gan", keys), Distributed(), made)
    before = task.evaluate()
    for i in range(60):
        task.step(i)
    after = task.evaluate()
    assert after["psnr"] > before["psnr"] + 3
    assert after["held_out_psnr"] > before["held_out_psnr"]


def test_the_time_of_a_run_ends_it(made, tmp_path):
    """minutes ends a training as its last step does: with a model, and nothing left to do for --resume."""
    keys = ("baseline", "train", "vae-gan", f"data={made / 'store'}", *VAE, "steps=100000", "minutes=0.03", "--out")
    runs.command(*keys, str(tmp_path / "run"), "-q")
    provenance = Compression.provenance(tmp_path / "run")
    assert 0 < provenance["step"] < 100000
    assert 1.8 <= provenance["seconds"] < 60
    assert provenance["finished"]
    again = runs.command(*keys, str(tmp_path / "run"), "--resume", "auto")
    assert f"{provenance['step']} steps" in again.stdout


@pytest.mark.parametrize("name", ["ldm-vae-gan", "ldm-vq-gan"])
def test_samples_depend_on_seed_and_number(made, tmp_path, name):
    """Four at once, or the last two alone; files like those of `tcam sample`, so that sets of them are read alike."""
    for out, more in (("four", ("--n", "4")), ("two", ("--n", "2", "--first", "2"))):
        runs.command("baseline", "sample", str(made / name), "--out", str(tmp_path / out), *more, "--batch-size", "2", "-q")
    four, two = (read_set(tmp_path / out, lambda v: v).volumes for out in ("four", "two"))
    assert four.shape == (4, 1, *SIZE)
    assert torch.equal(four[2:], two)
    assert not torch.equal(four[0], four[1])
    assert 0 <= float(four.min()) <= float(four.max()) <= 1
    side = json.loads((tmp_path / "four" / "sample-0000_seed0.json").read_text())
    assert side["intensity"] == [[10.0, 20.0]]
    assert runs.has_space(nib.load(tmp_path / "four" / "sample-0000_seed0.nii.gz"))
    assert (tmp_path / "four" / "contact-sheet.png").is_file()


def test_latents_of_the_diffusion_have_unit_deviation(made):
    model = LatentDiffusion.load(made / "ldm-vae-gan")
    store = Store(made / "store")
    z = torch.cat([model.compression.encode(unit(torch.tensor(store.volume(r)))[None])[0] for r in store.in_split("train")])
    assert float(((z - model.shift) * model.scale).std()) == pytest.approx(1, rel=1e-4)


def test_a_gaussian_has_the_mean_and_covariance_of_the_planes(latents, tmp_path):
    runs.command("baseline", "train", "gaussian", f"latents={latents}", "--out", str(tmp_path / "g"))
    fitted = Gaussian.load(tmp_path / "g")
    states = pack([p.float() for p in LatentData(latents).planes])
    torch.testing.assert_close(fitted.mean, states.mean(0))
    centred = states - states.mean(0)
    covariance = centred.T @ centred / (len(states) - 1)
    torch.testing.assert_close(fitted.directions.T @ fitted.directions, covariance, rtol=1e-3, atol=1e-4)
    drawn = torch.stack([fitted.draw(i, 0) for i in range(2000)]) - fitted.mean
    coefficients = drawn @ torch.linalg.pinv(fitted.directions)  # standard normals, if the covariance is right
    torch.testing.assert_close(coefficients.T.cov(), torch.eye(len(fitted.directions)), rtol=0, atol=0.15)
    for n in ("2", "3"):  # the second command keeps what the first drew
        runs.command("baseline", "sample", str(tmp_path / "g"), "--out", str(tmp_path / "s"), "--n", n, "--planes", "-q")
        assert len(read_set(tmp_path / "s", lambda v: v).names) == int(n)
        assert read_planes(tmp_path / "s").shape == (int(n), len(fitted.mean))
    few = Gaussian.fit(GaussianConfig(latents=str(latents), directions=2))
    assert few.directions.shape[0] == 2


def test_what_does_not_fit_is_refused(made, tmp_path):
    store = str(made / "store")
    for config, message in (
        (CompressionConfig.load("vae-gan", [f"data={store}", *VAE, "channels=[8,8,8,8,8]"]), "needs multiples of 16"),
        (CompressionConfig.load("vae-gan", [f"data={store}", *VAE, "batch=9"]), "at most the 5 volumes"),
    ):
        with pytest.raises(UserError, match=message):
            CompressionTraining(config, Distributed(), tmp_path)
    with pytest.raises(UserError, match="norm_groups: expected a divisor"):
        CompressionConfig.load("vae-gan", ["channels=[10]"])
    for key, message in (
        ("norm_groups=3", "norm_groups: expected a divisor"), ("head_channels=5", "head_channels: expected a divisor"),
        ("attention_levels=[7]", "attention_levels: expected 0 to 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            LatentDiffusionConfig.load("vae-gan", [*LDM, key])
    with pytest.raises(UserError, match="one process"):
        CompressionTraining(CompressionConfig.load("vae-gan", [f"data={store}", *VAE]), Distributed(0, 2), tmp_path)
    other = runs.make_store(tmp_path / "other", count=2, held_out=0, size=(8, 8, 8))
    with pytest.raises(UserError, match="voxels"):
        reconstruct(made / "vae-gan", other, tmp_path / "out")
    with pytest.raises(UserError, match=r"no generative model.*2 x 8 x 4 x 12 latents"):
        draw(made / "vae-gan", tmp_path / "out", [0])
    (made / "ldm-vq-gan" / "network.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"network\.safetensors: changed or damaged"):
        LatentDiffusion.load(made / "ldm-vq-gan")
    assert LatentDiffusionConfig.load("vq-gan").timesteps == 300


def test_a_page_shows_rivals(made, tmp_path):
    """Their reconstructions and samples beside real volumes, their curves and their commands."""
    runs.command("baseline", "sample", str(made / "ldm-vae-gan"), "--out", str(tmp_path / "s"), "--n", "2", "-q")
    folders = [str(made / "vae-gan"), str(made / "ldm-vae-gan"), str(tmp_path / "s")]
    runs.command("report", *folders, "--out", str(tmp_path / "page.html"), "--volumes", "2")
    text = (tmp_path / "page.html").read_text()
    for part in ("rival vae-gan", "latent diffusion", "baseline train", "baseline sample RUN --n 2 --seed 0"):
        assert part in text, part
