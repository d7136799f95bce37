"""Distance of the critic: network, sets, and order of the distances (algorithm.md 5.1 and 9.9)."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from tcam_diff.cli.app import app
from tcam_diff.data.store import StoreWriter, quantise
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.errors import UserError
from tcam_diff.evaluation.config import CriticConfig
from tcam_diff.evaluation.critic import Critic, _epoch, blurred, halves, prepare, score
from tcam_diff.evaluation.distances import convergence
from tcam_diff.evaluation.sets import read_set
from typer.testing import CliRunner

SMALL = CriticConfig(size=16, width=8, epochs=12, lr=1e-3)
CPU = torch.device("cpu")


def blob_set(count: int, seed: int, shift: float = 0.0, size: int = 16) -> torch.Tensor:
    """Volumes (N, 1, size, size, size) in [0, 1] of Gaussian blobs at random places, with heights raised by ``shift``."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij")
    volumes = []
    for _ in range(count):
        centre, height = rng.normal(0, 0.2, 3), 0.5 + rng.normal(0, 0.05) + shift
        volumes.append(height * np.exp(-4 * sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True))))
    return torch.from_numpy(np.stack(volumes)[:, None].astype(np.float32))


@pytest.mark.parametrize(("size", "count"), [(128, 6.95e6), (64, 0.72e6)])
def test_the_critic_has_the_protocols_size(size, count):
    plain = sum(p.numel() for p in Critic(1, CriticConfig(size=size)).parameters())
    assert plain == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_critic_gives_one_number_per_volume(ndim):
    config = CriticConfig(size=32, width=4, ndim=ndim)
    volumes = prepare(torch.rand(3, 2, 20, 40, 33), config)
    assert volumes.shape == (3, 2, *(32,) * ndim)
    assert Critic(2, config)(volumes.float()).shape == (3,)


@pytest.mark.parametrize("size", [24, 8, 100])
def test_sizes_that_cannot_be_halved_are_refused(size):
    with pytest.raises((UserError, ValueError), match="size"):
        Critic(1, CriticConfig(size=size))


def test_preparing_keeps_means_and_maps_the_unit_interval():
    volumes = torch.rand(2, 1, 32, 32, 32)
    prepared = prepare(volumes, SMALL).float()
    assert prepared.shape == (2, 1, 16, 16, 16)
    torch.testing.assert_close(prepared.mean((1, 2, 3, 4)), volumes.mean((1, 2, 3, 4)) * 2 - 1, rtol=0, atol=1e-3)
    assert prepare(torch.full((1, 1, 8, 8, 8), 7.0), SMALL).unique().tolist() == [1.0]  # clamped and enlarged


def test_blurring_keeps_constants_and_lowers_variation():
    volumes = torch.rand(1, 2, 12, 10, 8)
    assert torch.allclose(blurred(torch.full((1, 1, 9, 9, 9), 0.3), 1.5), torch.tensor(0.3))
    spread = [float(blurred(volumes, s).std()) for s in (0.5, 1.0, 2.0)]
    assert spread == sorted(spread, reverse=True)


def test_the_distance_grows_with_the_shift():
    """Distances grow with the shift of the sets, with one critic per set and with one for all sets."""
    real = prepare(blob_set(40, 0), SMALL)
    fakes = {f"{s}": prepare(blob_set(40, 1, s), SMALL) for s in (0.0, 0.15, 0.4)}
    alone = [score(real, {k: v}, SMALL, 0, CPU).distance[k] for k, v in fakes.items()]
    assert alone == sorted(alone)
    assert alone[-1] > 3 * abs(alone[0])
    together = list(score(real, fakes, SMALL, 0, CPU).distance.values())
    assert together == sorted(together)


def test_a_score_is_a_function_of_its_seed():
    real, fake = prepare(blob_set(12, 0), SMALL), prepare(blob_set(12, 1, 0.3), SMALL)
    config = SMALL.model_copy(update={"epochs": 3})
    a, b, c = (score(real, {"x": fake}, config, s, CPU) for s in (0, 0, 1))
    assert a == b
    assert a != c
    renamed = score(real, {"y": fake}, config, 0, CPU)
    assert list(renamed.distance.values()) == list(a.distance.values())
    assert (a.real_count, a.counts) == (5, {"x": 5})
    assert a.epochs == 3


def test_fakes_beyond_the_number_of_reals_are_left_out():
    real = prepare(blob_set(10, 0), SMALL)
    result = score(real, {"x": prepare(blob_set(30, 1), SMALL)}, SMALL.model_copy(update={"epochs": 1}), 0, CPU)
    assert (result.real_count, result.counts) == (4, {"x": 4})
    with pytest.raises(ValueError, match="one or more sets"):
        score(real, {}, SMALL, 0, CPU)
    with pytest.raises(UserError, match="x: 1 volumes are too few"):
        score(real, {"x": real[:1]}, SMALL, 0, CPU)


def test_clipped_weights_stay_clipped():
    config = SMALL.model_copy(update={"constraint": "clip", "lr": 1e-3})
    real, fake = (prepare(blob_set(10, i, 0.4 * i), config) for i in (0, 1))
    critic = Critic(1, config)
    weights = [m.weight for m in critic.modules() if isinstance(m, torch.nn.Conv3d)]
    assert max(float(w.detach().abs().max()) for w in weights) > 2 * config.clip
    _epoch(critic, torch.optim.RMSprop(critic.parameters(), lr=config.lr), real, [fake], config, 0, 1, CPU)
    assert max(float(w.detach().abs().max()) for w in weights) <= config.clip
    assert score(real, {"x": fake}, config.model_copy(update={"epochs": 2}), 0, CPU).valid


def test_halves_share_nothing():
    real = torch.arange(9.0)[:, None]
    a, b = halves(real, 3)
    assert sorted([*a.flatten().tolist(), *b.flatten().tolist()]) == list(range(9))


# ---- sets and the command ------------------------------------------------------------------


def write(folder, volumes, lo, hi, sidecars=True):
    folder.mkdir()
    for i, v in enumerate(volumes.numpy()):
        nib.save(nib.Nifti1Image(lo + (hi - lo) * v[0], np.eye(4)), folder / f"s{i}.nii.gz")
        if sidecars:
            (folder / f"s{i}.json").write_text(json.dumps({"intensity": [[lo, hi]]}))
    return folder


def test_sets_come_from_stores_samples_and_files(tmp_path):
    volumes = blob_set(3, 0, size=12)
    samples = write(tmp_path / "samples", volumes, -1000.0, 400.0)
    torch.testing.assert_close(read_set(samples, lambda v: v).volumes, volumes, rtol=0, atol=1e-5)
    unchanged = read_set(samples, lambda v: v, intensity=(0, 200)).volumes  # the JSON files have priority
    torch.testing.assert_close(unchanged, volumes, rtol=0, atol=1e-5)
    plain = write(tmp_path / "plain", volumes, -1000.0, 400.0, sidecars=False)
    with pytest.raises(UserError, match=r"s0\.nii\.gz: values from .*--intensity"):
        read_set(plain, lambda v: v)
    torch.testing.assert_close(read_set(plain, lambda v: v, intensity=(-1000, 400)).volumes, volumes, rtol=0, atol=1e-5)
    (plain / "s0.json").write_text(json.dumps({"EchoTime": 0.03}))  # as in BIDS
    torch.testing.assert_close(read_set(plain, lambda v: v, intensity=(-1000, 400)).volumes, volumes, rtol=0, atol=1e-5)
    (plain / "s0.json").write_text("{")
    with pytest.raises(UserError, match=r"s0\.json: damaged"):
        read_set(plain, lambda v: v, intensity=(-1000, 400))
    store = runs.make_store(tmp_path / "store", count=3, held_out=2)
    assert read_set(store.folder, lambda v: v).volumes.shape == (5, 1, 12, 10, 14)
    held_out = read_set(store.folder, lambda v: v, split="test").volumes
    assert float(held_out.max()) <= 1
    assert len(held_out) == 2


def test_critics_report_how_their_training_went():
    real, fake = prepare(blob_set(12, 0), SMALL), prepare(blob_set(12, 1, 0.3), SMALL)
    result = score(real, {"x": fake}, SMALL.model_copy(update={"epochs": 4}), 0, CPU)
    assert len(result.history) == result.epochs == 4
    assert result.end == "all epochs"
    assert result.history[result.epoch - 1][0] == result.train_distance
    assert result.history[result.epoch - 1][1] == result.gradient_norm
    text = convergence("x", [result])
    assert f"all epochs ({result.epoch} of 4)" in text
    assert ("NOT CONVERGED" in text) == (not result.valid)
    same = score(real, {"x": real}, SMALL.model_copy(update={"constraint": "clip", "lr": 1e-9, "window": 2}), 0, CPU)
    assert same.end in ("steady", "all epochs")  # W is 0: steady only if it is positive


@pytest.mark.slow
def test_the_command_orders_sets_by_their_distance(tmp_path):
    """Real, blurred and noisy volumes and a shifted set, by critics, FID and MMD."""
    store = StoreWriter(tmp_path / "store", {"percentiles": [0.0, 100.0]})
    info = VolumeInfo(channels=1, shape=(16, 16, 16), affine=np.eye(4))
    records = [
        store.write(f"{split}{i}", split, quantise(v, "float16"), info, [])
        for split, seed, count in (("train", 0, 16), ("test", 1, 16))
        for i, v in enumerate(blob_set(count, seed).numpy())
    ]
    store.finish(records)
    near, far = (write(tmp_path / n, blob_set(16, s, d), 0.0, 1.0) for n, s, d in (("near", 2, 0.0), ("far", 3, 0.4)))
    runs.command("features", "train", str(tmp_path / "store"), "--out", str(tmp_path / "net"), "size=16", "channels=[4,8]",
                 "steps=60", "-q")  # fmt: skip
    done = runs.command(
        "evaluate", str(tmp_path / "store"), str(near), str(far), "size=16", "width=8", "epochs=10", "lr=1e-3",
        "--critics", "2",
        "--size", "16", "--features", str(tmp_path / "net"), "--out", str(tmp_path / "out"), "-q",
    )  # fmt: skip
    assert "encoder of an autoencoder of 16 volumes of store, 12 features" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["real"] == "held out"
    w = {name: np.mean([s["distance"][name] for s in scores]) for name, scores in summary["critics"].items()}
    assert w[str(far)] > w[str(near)]
    assert {len(s["history"]) for s in summary["critics"]["control: real"]} == {10}
    for statistic in ("fid", "mmd"):
        of = {name: figures[statistic] for name, figures in summary["sets"].items() if statistic in figures}
        assert "held out" not in of
        real = of["training volumes"]
        for worse in (str(far), "training volumes, blurred by 2 voxels", "training volumes, with noise of 0.1"):
            assert of[worse]["mean"] > real["high"], (statistic, worse)
        assert of["training volumes, blurred by 1 voxel"]["mean"] < of["training volumes, blurred by 2 voxels"]["mean"]
        assert of[str(near)]["mean"] < of[str(far)]["mean"]
    for name in ("statistics.png", "critics.png", "volumes.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_without_held_out_volumes_training_volumes_are_real(tmp_path):
    store = runs.make_store(tmp_path / "store", count=6, held_out=0)
    samples = write(tmp_path / "new", blob_set(6, 0, size=10), 0.0, 1.0)
    keys = ("--critics", "1", "--no-controls", "size=16", "width=4", "epochs=1", "--size", "8", "-q")
    done = runs.command("evaluate", str(store.folder), str(samples), *keys, "--out", str(tmp_path / "out"))
    assert "no held-out volumes, so copies of training volumes have the best FID, MMD and W" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["real"] == "training volumes"
    assert list(summary["critics"]) == [str(samples)]


def test_options_that_do_not_apply_are_refused(tmp_path):
    store = runs.make_store(tmp_path / "store", count=4, held_out=2)
    samples = write(tmp_path / "new", blob_set(3, 0, size=10), 0.0, 1.0)
    command = ["evaluate", str(store.folder)]
    for arguments, message in (
        ([str(samples), "epochs=3"], "epochs=3: a change to the critic, but --critics is 0"),
        (["epochs=3"], "FAKE: expected a folder"),
        ([str(samples), str(samples)], "FAKE: expected different folders"),
        ([str(samples), "--features", str(tmp_path / "no")], "no: cannot be read"),
    ):
        done = CliRunner().invoke(app, [*command, *arguments])
        assert message in str(done.exception), (arguments, done.output, done.exception)
