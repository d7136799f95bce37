"""The fit of the Gaussian prior to states, with states held out (algorithm.md section 11)."""

import math

import numpy as np
import pytest
import torch
from priors import OBLONG, covariance, drawn, numbers, some_prior
from tcam_diff.autodecoder.planes import plane_sizes
from tcam_diff.diffusion.prior import GaussianPrior, octaves, transform
from tcam_diff.diffusion.prior_fit import LEAST, HeldOut, Variances, cross_fit, fit_prior, principal
from tcam_diff.errors import UserError


def test_principal_components_are_numpys():
    states = torch.randn(7, 40)
    p = principal(states)
    values, vectors = np.linalg.eigh(np.cov(states.double().numpy(), rowvar=False))
    np.testing.assert_allclose(p.variances, values[::-1][:6], rtol=1e-4)
    np.testing.assert_allclose(abs((p.directions.double().numpy() * vectors[:, ::-1][:, :6].T).sum(1)), 1, atol=1e-4)
    torch.testing.assert_close(p.directions @ p.directions.T, torch.eye(6), rtol=0, atol=1e-5)
    assert len(principal(torch.zeros(4, 5)).variances) == 0


def test_a_planted_distribution_is_found():
    """Three directions, and a floor that differs by bands."""
    sizes = plane_sizes((8, 8, 8))
    band, owner, _ = octaves(2, sizes)
    floor = 0.1 + 0.9 * torch.rand(len(owner), generator=torch.Generator().manual_seed(3))
    w = torch.zeros(3, numbers(2, sizes))
    for k in range(3):
        w[k, 40 * k + 1] = 20.0 - 5 * k
    truth = GaussianPrior(2, sizes, torch.randn(w.shape[1]), floor, w).double()
    fitted = fit_prior(drawn(truth, 200), 2, sizes)
    assert 3 <= len(fitted.directions) <= 8
    variances = principal(drawn(truth, 200)).variances
    basis = torch.linalg.qr(fitted.directions[:3].T.double()).Q
    assert float((basis.T @ (w[:3] / w[:3].norm(dim=1, keepdim=True)).T.double()).norm(dim=0).min()) > 0.99
    own = fitted.directions.square().sum(1)[:3]
    torch.testing.assert_close(own, variances[:3], rtol=0.02, atol=0)
    many = torch.bincount(band) >= 8
    torch.testing.assert_close(fitted.floor[many], floor[many], rtol=0.25, atol=0)
    held_out = drawn(truth, 50, seed=1).double()
    gap = truth.log_likelihood(held_out).mean() - fitted.double().log_likelihood(held_out).mean()
    assert 0 < float(gap) < 0.1 * len(truth.mean)


def test_leading_variances_are_those_of_the_states():
    states = drawn(some_prior(2, plane_sizes((4, 4, 4)), 2, seed=4), 40)
    fitted = fit_prior(states, 2, plane_sizes((4, 4, 4))).double()
    p = principal(states.double())
    s = covariance(fitted)
    for k in range(2):
        assert float(p.directions[k] @ s @ p.directions[k]) == pytest.approx(float(p.variances[k]), rel=0.01)


def test_copies_of_a_volume_do_not_choose_the_floor():
    """With its mirrored copies among the others a state would leave no residual."""
    states = torch.randn(12, numbers(2, OBLONG), generator=torch.Generator().manual_seed(0))
    twice = torch.cat([states, states])
    groups = [*range(12), *range(12)]
    assert float(fit_prior(twice, 2, OBLONG, groups=groups).floor.mean()) > 0.5
    assert float(fit_prior(twice, 2, OBLONG).floor.mean()) < 0.5


def test_priors_without_a_part_meet_its_states_as_new_ones():
    """Outside the span of its prior's directions a state has nothing, and outside that of the others' the floor."""
    sizes = plane_sizes((8, 8, 8))
    states = drawn(some_prior(2, sizes, 3, seed=4), 40)
    both = cross_fit(states, 2, sizes, without=True)
    assert len(both.without) == 5
    assert both.part.bincount().tolist() == [8] * 5

    def outside(prior, state):
        along = torch.linalg.qr(prior.directions.T).Q if len(prior.directions) else prior.directions.T
        rest = transform((state - prior.mean)[None], 2, sizes)[0]
        return float((rest - along @ (along.T @ rest)).square().mean())

    floor = float((both.prior.floor * both.prior.counts).sum() / both.prior.counts.sum())
    away = [outside(both.without[int(part)], state) for state, part in zip(states, both.part, strict=True)]
    assert sum(away) / len(away) == pytest.approx(floor, rel=0.15)
    new = drawn(some_prior(2, sizes, 3, seed=4), 40, seed=1)
    assert sum(outside(both.prior, s) for s in new) / 40 == pytest.approx(floor, rel=0.15)
    for prior in both.without:
        torch.testing.assert_close(prior.floor, both.prior.floor, rtol=0, atol=0)


def smooth_truth(sizes, channels=2, directions=8):
    """A distribution whose directions are in the lowest octaves and whose floor is in all of them."""
    g = torch.Generator().manual_seed(4)
    bands = octaves(channels, sizes)
    m = numbers(channels, sizes)
    w = torch.randn(directions, m, generator=g) * torch.where(bands.octave[bands.band] < 3, 2.0, 0.0)
    return GaussianPrior(
        channels, sizes, torch.randn(m, generator=g), 0.2 + torch.rand(len(bands.owner), generator=g), w
    ).double()


def test_the_surprise_of_held_out_states_is_minus_their_likelihood():
    """It differs by the constant alone, and the variances that it is given are those of the prior they are applied to."""
    plain, bands = some_prior(), octaves(2, OBLONG)
    unit = GaussianPrior(2, OBLONG, plain.mean, plain.floor, torch.nn.functional.normalize(plain.directions)).double()
    found = Variances(
        torch.rand(len(bands.owner)).double() + 0.1, 0.5 + bands.octave.double(), torch.tensor([9.0, 4.0]).double()
    )
    states = torch.randn(7, len(plain.mean), dtype=torch.float64)
    surprise = HeldOut.of(unit, states).surprise(found.floor, found.gain, found.along_each(3))
    constant = 0.5 * math.log(2 * math.pi) * states.numel()
    assert float(surprise) + constant == pytest.approx(
        -float(found.apply(unit).double().log_likelihood(states).sum()), rel=1e-5
    )


def test_priors_without_a_part_have_the_energy_of_new_states_in_every_octave():
    """The states' own directions have noise in high octaves."""
    sizes = plane_sizes((16, 16, 16))
    truth = smooth_truth(sizes)
    states, new = drawn(truth, 100), drawn(truth, 200, seed=1)
    both, plain = cross_fit(states, 2, sizes, without=True), fit_prior(states, 2, sizes)
    bands = octaves(2, sizes)
    octave = bands.octave[bands.band]

    def energy(variances):
        return torch.zeros(int(octave.max()) + 1).index_add(0, octave, variances.float())

    wanted = energy(transform(new - both.prior.mean, 2, sizes).square().mean(0))
    for prior in both.without:
        ours = energy(prior.directions.square().sum(0) + prior.floor[prior.band])
        torch.testing.assert_close(ours, wanted, rtol=0.15, atol=0)
    assert (energy(plain.directions.square().sum(0) + plain.floor[plain.band]) > 1.2 * wanted).any()
    assert both.prior.log_likelihood(new).mean() > plain.log_likelihood(new).mean() + 0.01 * len(truth.mean)


def test_directions_are_shorter_where_they_are_noise():
    """In octaves that no direction of the true distribution reaches, those of the states are noise alone."""
    sizes = plane_sizes((16, 16, 16))
    states = drawn(smooth_truth(sizes), 100)
    both, plain = cross_fit(states, 2, sizes, without=True), fit_prior(states, 2, sizes)
    bands = octaves(2, sizes)
    high = bands.octave[bands.band] > 3
    share = [float(p.directions[:, high].square().sum() / p.directions.square().sum()) for p in (both.prior, plain)]
    assert share[0] < 0.1 * share[1]


def test_few_or_equal_states():
    with pytest.raises(UserError, match=r"2 volume.*prior=unit"):
        fit_prior(torch.randn(2, numbers(2, OBLONG)), 2, OBLONG)
    equal = fit_prior(torch.ones(5, numbers(2, OBLONG)), 2, OBLONG)
    assert len(equal.directions) == 0
    assert float(equal.floor.max()) == pytest.approx(LEAST)
