"""Spread of sets of volumes: the statistics' definitions, their intervals, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tcam_diff.errors import UserError
from tcam_diff.evaluation.content import BANDS, BRIGHT, FOREGROUND, bright_level, content, contents, detail, told_apart
from tcam_diff.evaluation.metrics import ms_ssim3d
from tcam_diff.evaluation.sets import resampled
from tcam_diff.evaluation.spread import MODES, TRAINING, latent_modes, nearest, similarity, spreads


def test_the_statistics_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    volumes, training = torch.rand(7, 1, 6, 5, 4, generator=generator), torch.rand(9, 1, 6, 5, 4, generator=generator)
    rows, trained = resampled(volumes, 64).flatten(1), resampled(training, 64).flatten(1)
    figures = spreads({"samples": rows}, trained, resamples=50)["samples"]
    x = rows.double().numpy()
    assert figures["variance"].mean == pytest.approx(x.var(axis=0, ddof=1).mean())
    pairs = [np.sqrt(((x[i] - x[j]) ** 2).mean()) for i in range(7) for j in range(i)]
    assert figures["pairwise"].mean == pytest.approx(np.mean(pairs))
    distances = [min(np.sqrt(((a - b) ** 2).mean()) for b in trained.double().numpy()) for a in x]
    assert figures["nearest"].mean == pytest.approx(np.median(distances))
    assert nearest(volumes, training)[0] == pytest.approx(distances)
    for figure in figures.values():
        assert figure.volumes == 7
        assert figure.low < figure.high


def test_modes_measure_the_variance_along_the_training_volumes():
    """Samples with a fraction of the training volumes' deviation have its square of their variance, in the modes alone."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(60, MODES, generator=generator))[0].T
    training = torch.randn(40, MODES, generator=generator) @ basis
    training = training - training.mean(0)
    result = spreads({"half": 0.5 * training, "same": training.clone()}, training, resamples=50)
    assert result["half"]["modes"].mean == pytest.approx(0.25, rel=1e-5)
    assert result["same"]["modes"].mean == pytest.approx(1, rel=1e-5)
    assert result["training volumes"]["modes"].mean == pytest.approx(1, rel=1e-5)
    assert result["same"]["nearest"].mean == pytest.approx(0, abs=1e-6)
    assert "nearest" not in result["training volumes"]
    outside = training + torch.linalg.qr(torch.cat([basis.T, torch.randn(60, 1, generator=generator)], 1))[0][:, -1:].T * (
        torch.randn(40, 1, generator=generator)
    )
    more = spreads({"outside": outside}, training, resamples=50)["outside"]
    assert more["modes"].mean == pytest.approx(1, rel=1e-4)
    assert more["variance"].mean > result["same"]["variance"].mean


def test_intervals_of_the_variance_cover_it():
    """Of 60 sets of 30 volumes of 200 voxels, most intervals have the true variance, 1; a bootstrap's are a little short."""
    covered, training = 0, torch.randn(5, 200, generator=torch.Generator().manual_seed(2))
    for seed in range(60):
        rows = torch.randn(30, 200, generator=torch.Generator().manual_seed(seed))
        figure = spreads({"a": rows}, training, resamples=100, seed=seed)["a"]["variance"]
        assert figure.mean == pytest.approx(1, abs=0.1)
        covered += figure.low <= 1 <= figure.high
    assert covered >= 48


def test_small_and_unequal_sets_are_refused():
    rows = torch.rand(4, 10)
    with pytest.raises(UserError, match="samples: 1 volume"):
        spreads({"samples": rows[:1]}, rows)
    with pytest.raises(UserError, match="samples: its volumes have another size"):
        spreads({"samples": torch.rand(4, 9)}, rows)
    assert resampled(torch.rand(2, 3, 8, 6, 4), 4).shape == (2, 3, 4, 4, 4)


def test_similarity_is_the_mean_over_pairs():
    generator = torch.Generator().manual_seed(4)
    volumes = torch.rand(4, 1, 24, 22, 23, generator=generator)
    pairs = [ms_ssim3d(volumes[i], volumes[j]) for i in range(4) for j in range(i)]
    got = similarity(volumes, resamples=50)
    assert got.mean == pytest.approx(np.mean(pairs))
    assert min(pairs) <= got.low < got.mean < got.high <= max(pairs)
    assert similarity(volumes[:1].expand(3, -1, -1, -1, -1)).mean == pytest.approx(1)


# ---- content -------------------------------------------------------------------------------


def test_foreground_and_bright_voxels_are_volumes_in_millilitres():
    volumes = torch.zeros(2, 2, 10, 10, 10)
    volumes[0, 0, :5] = 0.5  # 500 voxels
    volumes[0, 0, 0] = 0.9  # 100 of them bright
    volumes[1, 0, 0, 0] = 1.0  # 10
    volumes[:, 1] = 1.0  # another channel
    got = content(volumes, 0.8, 0.002)
    assert got.foreground.tolist() == pytest.approx([1.0, 0.02])
    assert got.bright.tolist() == pytest.approx([0.2, 0.02])
    ramp = torch.linspace(0, 1, 1001)[None, None, :, None, None]
    assert bright_level(ramp) == pytest.approx(0.1 + 0.9 * BRIGHT, abs=2e-3)
    assert bright_level(torch.zeros(1, 1, 2, 2, 2)) == 1.0


@pytest.mark.parametrize("shape", [(12, 10, 14), (9, 12, 11)])
def test_power_is_that_of_the_whole_spectrum(shape):
    """Half spectra with their weights have the power of numpy's full ones, and waves are in the band of their frequency."""
    volume = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    full = np.abs(np.fft.fftn(volume[0, 0].numpy())) ** 2
    frequency = np.sqrt(sum(np.square(f) for f in np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij")))
    got = content(volume, 0.5, 1.0).power
    for name, (low, high) in BANDS.items():
        assert got[f"power_{name}"][0] == pytest.approx(full[(frequency >= low) & (frequency < high)].sum(), rel=1e-4)
    wave = torch.cos(2 * torch.pi * 3 / 10 * torch.arange(20.0))[None, None, None, None].expand(1, 1, 6, 6, 20)
    power = content(wave, 0.5, 1.0).power
    assert power["power_middle"][0] > 1e6 * (power["power_low"][0] + power["power_high"][0])


def test_noise_has_power_and_no_coherence():
    truth = torch.rand(12, 14, 10, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(12, 14, 10, generator=torch.Generator().manual_seed(1))
    same, half = detail(truth, truth), detail(0.5 * truth, truth)
    for band in BANDS:
        assert same[f"power_{band}"] == pytest.approx(1)
        assert same[f"coherence_{band}"] == pytest.approx(1)
        assert half[f"power_{band}"] == pytest.approx(0.25)
        assert half[f"coherence_{band}"] == pytest.approx(1)
        assert abs(detail(noise, truth)[f"coherence_{band}"]) < 0.2
        assert detail(noise, truth)[f"power_{band}"] > 0.7
    spectra = np.fft.fftn(noise.numpy()), np.fft.fftn(truth.numpy())
    frequency = np.sqrt(sum(np.square(f) for f in np.meshgrid(*map(np.fft.fftfreq, truth.shape), indexing="ij")))
    a, b = (s[(frequency >= 0.35) & (frequency < 0.5)] for s in spectra)
    expected = (a * b.conj()).real.sum() / np.sqrt((np.abs(a) ** 2).sum() * (np.abs(b) ** 2).sum())
    assert detail(noise, truth)["coherence_high"] == pytest.approx(expected, abs=1e-5)
    assert all(math.isnan(v) for v in detail(noise, torch.ones(12, 14, 10)).values())


def test_blur_lowers_and_noise_raises_the_power_of_fine_detail():
    generator = torch.Generator().manual_seed(0)
    training = torch.rand(6, 1, 16, 16, 16, generator=generator)
    blurred = torch.nn.functional.avg_pool3d(training, 3, 1, 1)
    noisy = training + 0.3 * torch.randn(training.shape, generator=generator)
    sets = {"same": training, "blurred": blurred, "noisy": noisy}
    figures = spreads(sets, training, contents({**sets, TRAINING: training}, TRAINING, 0.5), resamples=50)
    assert figures["same"]["power_high"].mean == pytest.approx(1)
    assert figures["blurred"]["power_high"].mean < 0.5 < 1 < figures["noisy"]["power_high"].mean
    assert figures["same"]["foreground"].mean == pytest.approx(0.5 * float((training > FOREGROUND).sum()) / 6)
    values = (training > FOREGROUND).flatten(1).sum(1).double().numpy() * 0.5
    assert figures["same"]["foreground_sd"].mean == pytest.approx(values.std(ddof=1))


def test_latent_modes_are_those_of_the_reference():
    training = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)) * torch.linspace(5, 0.1, 50)
    got = latent_modes({"half": 0.5 * training, "a": training}, "a")
    assert got["a"].mean == pytest.approx(1, rel=1e-5)
    assert got["half"].mean == pytest.approx(0.25, rel=1e-5)
    assert got["half"].low < 0.25 < got["half"].high
    with pytest.raises(UserError, match=r"other: 30 volume.*40 numbers"):
        latent_modes({"other": training[:, :40], "a": training}, "a")


def test_sets_that_differ_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    training = torch.rand(40, 1, 8, 8, 8, generator=generator)
    alike, brighter = (torch.rand(40, 1, 8, 8, 8, generator=generator) for _ in range(2))
    brighter = brighter + 0.03
    of = contents({"alike": alike, "brighter": brighter, TRAINING: training}, TRAINING, 1.0)
    got = told_apart(of, [TRAINING, "alike"])
    assert set(got["alike"]) == {TRAINING}
    assert got["alike"][TRAINING] > 0.05
    assert got["brighter"][TRAINING] < 1e-3
    assert got["brighter"]["alike"] < 1e-3
