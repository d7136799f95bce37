"""Spread of sets of volumes: the statistics' definitions, their intervals, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import ms_ssim3d
from tcam_diff.evaluation.sets import resampled
from tcam_diff.evaluation.spread import MODES, nearest, similarity, spreads


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
