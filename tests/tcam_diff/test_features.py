"""Features of volumes: distances against MONAI's, the encoder's files, MedicalNet's weights."""

from __future__ import annotations

import pytest
import runs
import torch
from monai.metrics import FIDMetric, MMDMetric
from monai.networks.nets import resnet
from tcam_diff.errors import UserError
from tcam_diff.evaluation.features import frechet, jackknifed, load_features, mmd


def features(count, length, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(length, length, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.randn(count, length, generator=generator, dtype=torch.float64) @ mix + shift


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_fid_is_monais():
    a, b = features(60, 8, 0), features(50, 8, 1, 0.3)
    assert frechet(a, b) == pytest.approx(float(FIDMetric()(a, b)), rel=1e-8)


def test_fid_of_fewer_volumes_than_features():
    """It is 0 for equal sets, and between sets on two lines through one point it has a closed form."""
    a = features(6, 20, 2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    line = torch.zeros(5, 20, dtype=torch.float64)
    line[:, 0] = torch.arange(5.0)
    other = line.roll(1, 1)  # an orthogonal line
    assert frechet(line, 3 * line) == pytest.approx(4**2 + 2.5 * (3 - 1) ** 2)
    assert frechet(line - 2 * line[1], other - 2 * other[1]) == pytest.approx(2 * 2.5)


def test_linear_mmd_is_monais():
    a, b = features(40, 8, 0), features(40, 8, 1, 0.3)
    assert mmd(a, b, degree=1) == pytest.approx(float(MMDMetric()(b, a)) / 8)


def test_mmd_of_equal_distributions_is_zero_on_average():
    values = [mmd(features(12, 4, 2 * s), features(15, 4, 2 * s + 1)) for s in range(200)]
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / len(values) ** 0.5
    assert abs(mean) < 3 * error
    assert mmd(features(12, 4, 0), features(15, 4, 1, 3.0)) > 10 * torch.tensor(values).std()


def test_jackknife_intervals_cover_the_expectation():
    """The difference of two means has a known expectation; the jackknife's error of a mean is the usual one."""

    def difference(x, y):
        return float(x.mean() - y.mean())

    covered = 0
    for seed in range(100):
        a, b = (torch.randn(40, 1, generator=torch.Generator().manual_seed(2 * seed + i)) for i in (0, 1))
        value = jackknifed(difference, a + 1, b)
        covered += value.low <= 1 <= value.high
    assert covered >= 85


def test_an_encoder_is_stopped_continued_and_loaded(tmp_path):
    store = runs.make_store(tmp_path / "store", count=5, held_out=1, size=(20, 17, 18))
    small = ("size=16", "channels=[3,5]", "batch=4", "steps=20", "--resume", "auto", "-q")
    for out in ("a", "b"):
        runs.command("features", "train", str(store.folder), "--out", str(tmp_path / out), *small)
    volumes = torch.rand(3, 1, 40, 17, 30)
    a, b = (load_features(tmp_path / out) for out in ("a", "b"))
    got = a(volumes)
    assert got.shape == (3, 8)
    assert torch.equal(got, b(volumes))
    torch.testing.assert_close(a(volumes[1:2]), got[1:2], rtol=1e-4, atol=1e-4)  # another batch, other rounding
    with pytest.raises(UserError, match="made for volumes of 1 channels, got 2"):
        a(volumes.expand(-1, 2, -1, -1, -1))
    (tmp_path / "b" / "features.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="features\\.safetensors"):
        load_features(tmp_path / "b")


@pytest.mark.parametrize("depth", [10, 18])
def test_weights_of_medicalnet_are_told_by_their_layers(tmp_path, depth):
    shortcut = "B" if depth == 10 else "A"
    make = getattr(resnet, f"resnet{depth}")
    network = make(spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type=shortcut, bias_downsample=False)
    state = {f"module.{k}": v for k, v in network.state_dict().items()} | {"module.conv_seg.0.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    loaded = load_features(tmp_path / "weights.pth")
    volumes = torch.rand(2, 2, 32, 32, 32)
    got = loaded(volumes)
    assert got.shape == (2, 512)
    with torch.no_grad():
        want = network.eval()(volumes[0].unsqueeze(1)).flatten(1).mean(0)
    torch.testing.assert_close(got[0].float(), want, rtol=1e-4, atol=1e-5)
    assert f"resnet{depth}" in loaded.description
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: no weights of a MedicalNet ResNet"):
        load_features(tmp_path / "other.pth")
