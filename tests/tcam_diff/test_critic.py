"""Distance of the critic: network, sets, and order of the distances (algorithm.md 5.1 and 9.9)."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from tcam_diff.cli.app import app
from tcam_diff.errors import UserError
from tcam_diff.evaluation.critic import Critic, CriticConfig, _epoch, blurred, halves, prepare, score
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
    torch.testing.assert_close(read_set(samples, lambda v: v), volumes, rtol=0, atol=1e-5)
    unchanged = read_set(samples, lambda v: v, intensity=(0, 200))  # the JSON files have priority
    torch.testing.assert_close(unchanged, volumes, rtol=0, atol=1e-5)
    plain = write(tmp_path / "plain", volumes, -1000.0, 400.0, sidecars=False)
    with pytest.raises(UserError, match=r"s0\.nii\.gz: values from .*--intensity"):
        read_set(plain, lambda v: v)
    torch.testing.assert_close(read_set(plain, lambda v: v, intensity=(-1000, 400)), volumes, rtol=0, atol=1e-5)
    (plain / "s0.json").write_text(json.dumps({"EchoTime": 0.03}))  # as in BIDS
    torch.testing.assert_close(read_set(plain, lambda v: v, intensity=(-1000, 400)), volumes, rtol=0, atol=1e-5)
    (plain / "s0.json").write_text("{")
    with pytest.raises(UserError, match=r"s0\.json: damaged"):
        read_set(plain, lambda v: v, intensity=(-1000, 400))
    store = runs.make_store(tmp_path / "store", count=3, held_out=2)
    assert read_set(store.folder, lambda v: v).shape == (5, 1, 12, 10, 14)
    held_out = read_set(store.folder, lambda v: v, split="test")
    assert float(held_out.max()) <= 1
    assert len(held_out) == 2


def test_the_command_prints_a_line_for_every_set(tmp_path):
    real, near, far = (
        write(tmp_path / name, blob_set(12, seed, shift), 0.0, 1.0)
        for name, seed, shift in (("truth", 0, 0.0), ("real", 1, 0.05), ("far", 2, 0.4))
    )
    path = tmp_path / "scores.json"
    command = ["critic", real, near, far, "size=16", "width=8", "epochs=10", "lr=1e-3", "--seeds", 2, "--json", path, "-q"]
    done = CliRunner().invoke(app, [str(c) for c in command])
    assert done.exit_code == 0, (done.output, done.exception)
    assert [line.split(":")[0] for line in done.output.splitlines()] == [
        "real", str(near), str(far), "control", "control", "control",
    ]  # fmt: skip
    scores = json.loads(path.read_text())["scores"]
    assert all(len(v) == 2 for v in scores.values())
    assert scores[str(far)][0]["distance"][str(far)] > scores[str(far)][0]["distance"][str(near)]
    done = CliRunner().invoke(app, ["critic", str(real), str(near), str(near)])
    assert "expected another folder" in str(done.exception)
