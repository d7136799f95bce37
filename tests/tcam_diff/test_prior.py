"""The Gaussian prior of stage 2: its denoiser, its flow, and the angles where modes are decided (algorithm.md section 11)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from priors import OBLONG, covariance, numbers, some_prior
from scipy.fft import dctn
from tcam_diff.autodecoder.planes import plane_sizes
from tcam_diff.diffusion.dct import dct
from tcam_diff.diffusion.prior import GaussianPrior, octaves, transform
from tcam_diff.diffusion.process import Estimate, decisive, pack, unpack
from tcam_diff.diffusion.solver import Solver, arc

# ---- the transform -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_the_transform_is_scipys_and_orthonormal(n):
    x = torch.randn(3, n, n + 1, dtype=torch.float64)
    ours = dct(n) @ x @ dct(n + 1).T
    np.testing.assert_allclose(ours, dctn(x.numpy(), axes=(1, 2), norm="ortho"), atol=1e-12)
    torch.testing.assert_close(dct(n) @ dct(n).T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [OBLONG, plane_sizes((8, 8, 8)), plane_sizes((1, 1, 1)), plane_sizes((5, 1, 3))])
def test_bands_are_the_octaves_of_each_plane_and_channel(sizes):
    band, owner, _ = octaves(2, sizes)
    assert len(band) == numbers(2, sizes)
    assert band.unique().tolist() == list(range(len(owner)))
    of_channel = owner[band].split([h * w for h, w in sizes for _ in range(2)])
    assert [c.unique().tolist() for c in of_channel] == [[i] for i in range(6)]
    x = torch.zeros(1, len(band), dtype=torch.float64)
    planes = unpack(x, 2, sizes)
    planes[1][0, 1] = 3.0  # the mean of one channel is in one band
    power = torch.zeros(len(owner), dtype=torch.float64).index_add(0, band, transform(pack(planes), 2, sizes)[0].square())
    assert (power > 1e-20).sum() == 1
    assert int(owner[power.argmax()]) == 3


# ---- the denoiser --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, math.pi / 2),
    st.integers(0, 5),
    st.booleans(),
    st.integers(1, 3),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.integers(0, 99),
)
def test_estimates_are_the_posterior_means(eta, directions, white, channels, texels, seed):
    sizes = plane_sizes(texels)
    prior = some_prior(channels, sizes, directions, white, seed)
    m, c, s = len(prior.mean), math.cos(eta), math.sin(eta)
    x = torch.randn(2, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    noise, x0 = prior(x, torch.full((2,), eta, dtype=torch.float64))
    torch.testing.assert_close(c * x0 + s * noise, x, rtol=0, atol=1e-9)
    inverse = torch.linalg.inv(c**2 * covariance(prior) + s**2 * torch.eye(m, dtype=torch.float64))
    r = (x - c * prior.mean) @ inverse
    torch.testing.assert_close(x0, prior.mean + c * r @ covariance(prior), rtol=0, atol=2e-6)  # W W' is kept in float32
    torch.testing.assert_close(noise, s * r, rtol=0, atol=2e-6)


def test_each_row_has_its_own_angle():
    prior, eta = some_prior(), torch.tensor([0.0, 0.4, 1.5, math.pi / 2], dtype=torch.float64)
    x = torch.randn(4, len(prior.mean), dtype=torch.float64)
    together = prior(x, eta)
    for i in range(4):
        for whole, alone in zip(together, prior(x[i : i + 1], eta[i : i + 1]), strict=True):
            torch.testing.assert_close(whole[i : i + 1], alone)


def test_float32_is_near_float64_at_every_angle():
    """Where one direction has 40,000 times the variance of the floor, too."""
    m = numbers(2, OBLONG)
    w = torch.randn(3, m, generator=torch.Generator().manual_seed(1))
    exact = GaussianPrior(2, OBLONG, torch.zeros(m), torch.full((len(octaves(2, OBLONG).owner),), 0.05), 8 * w).double()
    single = GaussianPrior(2, OBLONG, torch.zeros(m), torch.full((len(octaves(2, OBLONG).owner),), 0.05), 8 * w)
    x0 = torch.randn(5, 3, dtype=torch.float64) @ exact.directions
    for eta in torch.linspace(0, math.pi / 2, 9, dtype=torch.float64):
        x = eta.cos() * x0 + eta.sin() * torch.randn(5, m, dtype=torch.float64)
        for a, b in zip(exact(x, eta.expand(5)), single(x.float(), eta.float().expand(5)), strict=True):
            assert float((a - b).abs().max()) < 2e-4 * float(1 + x.abs().max())


def test_the_unit_prior_is_the_plain_skips():
    prior = GaussianPrior.unit(2, OBLONG)
    x, eta = torch.randn(3, len(prior.mean)), torch.tensor([0.0, 0.7, math.pi / 2])
    noise, x0 = prior(x, eta)
    torch.testing.assert_close(noise, eta.sin()[:, None] * x)
    torch.testing.assert_close(x0, eta.cos()[:, None] * x)
    torch.testing.assert_close(prior.spread(eta), torch.ones_like(x))


def test_heads_scale_to_the_posterior_deviation_outside_the_directions():
    """A head of unit variance in a white floor gives the errors of x0 and noise their true variances."""
    prior = some_prior(directions=0, white=True)
    eta = torch.tensor([0.0, 0.3, 1.2, math.pi / 2], dtype=torch.float64)
    c, s, d = eta.cos(), eta.sin(), 0.4
    noise_scale, x0_scale = prior.scales(eta)
    variance = d * s**2 / (c**2 * d + s**2)
    torch.testing.assert_close(x0_scale[:, 0] ** 2, variance, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(noise_scale[:, 0] ** 2, d * c**2 / (c**2 * d + s**2), rtol=1e-6, atol=1e-12)


def test_equal_heads_leave_no_residual():
    prior = some_prior()
    x = torch.randn(3, len(prior.mean), dtype=torch.float64)
    t = torch.tensor([10.0, 500.0, 990.0], dtype=torch.float64)
    head = unpack(torch.randn_like(x), 2, OBLONG)
    noise, x0 = (pack(p) for p in prior.combine(prior.denoised(unpack(x, 2, OBLONG), t), t, head, head))
    eta = (t * (math.pi / 2000))[:, None]
    torch.testing.assert_close(eta.cos() * x0 + eta.sin() * noise, x)
    assert float((x0 - prior(x, eta[:, 0])[1]).abs().max()) > 0.01


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("directions", [0, 3])
def test_the_likelihood_is_that_of_the_distribution(white, directions):
    prior = some_prior(directions=directions, white=white)
    states = torch.randn(4, len(prior.mean), dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(prior.mean, covariance(prior)).log_prob(states)
    torch.testing.assert_close(prior.log_likelihood(states), exact, rtol=1e-6, atol=1e-5)


def test_tensors_that_do_not_fit_are_refused():
    m = numbers(2, OBLONG)
    with pytest.raises(ValueError, match=r"expected mean \(88,\)"):
        GaussianPrior(2, OBLONG, torch.zeros(m - 1), torch.ones(1), torch.zeros(0, m))
    with pytest.raises(ValueError, match="floor"):
        GaussianPrior(2, OBLONG, torch.zeros(m), torch.ones(2), torch.zeros(0, m))
    with pytest.raises(ValueError, match="positive variances"):
        GaussianPrior(2, OBLONG, torch.zeros(m), torch.zeros(1), torch.zeros(0, m))


# ---- the flow ------------------------------------------------------------------------------


@pytest.mark.parametrize(("directions", "white"), [(0, True), (0, False), (3, False), (7, True)])
def test_the_flow_is_the_root_of_the_covariance(directions, white):
    """Checked against the eigenvectors of S at angles of a batch, and at one for all rows."""
    p = some_prior(directions=directions, white=white)
    p = GaussianPrior(p.channels, p.sizes, p.mean.float(), p.floor.float(), 4 * p.directions.float()).double()
    values, vectors = torch.linalg.eigh(covariance(p))
    etas = torch.tensor([0.0, 1e-3, 0.3, 1.2, 1.57, math.pi / 2], dtype=torch.float64)
    x = torch.randn(len(etas), len(p.mean), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    c, s = etas.cos()[:, None], etas.sin()[:, None]
    root = (values / (c.square() * values + s.square())).sqrt()
    expected = p.mean + (((x - c * p.mean) @ vectors) * root) @ vectors.T
    near = {"rtol": 0, "atol": 1e-3 * float(expected.abs().max())}
    torch.testing.assert_close(p.flow(x, etas), expected, **near)
    alone = torch.cat([p.flow(x[i : i + 1], etas[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(alone, expected, **near)
    together = p.flow(x, etas[3:4])
    torch.testing.assert_close(together[3], expected[3], **near)


def test_the_flow_is_the_end_of_the_ode():
    p = some_prior()
    x = torch.randn(4, len(p.mean), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def estimate(x, eta):
        return Estimate(x, *p(x, torch.full((1,), eta)), eta)

    for share in (1.0, 0.6, 0.1):
        end = Solver("rk4", "x").solve(x, arc(800, share), estimate)
        error = (p.flow(x, torch.tensor([share * math.pi / 2])) - end).abs().max()
        assert float(error) < 1e-3 * float(end.abs().max())


# ---- angles --------------------------------------------------------------------------------


def test_the_grid_is_even_where_modes_are_decided():
    etas = arc(30, variances=(0.5, 1000.0))
    assert len(etas) == 31
    assert (etas[0], etas[-1]) == (math.pi / 2, 0.0)
    inner = np.log(np.tan(etas[1:-1]))
    np.testing.assert_allclose(np.diff(inner), np.diff(inner)[0])
    np.testing.assert_allclose((inner[-1], inner[0]), decisive((0.5, 1000.0)), atol=1e-9)
    np.testing.assert_allclose(arc(30, 0.0, 1.0, (0.5, 1000.0)), etas[::-1], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1), st.floats(1, 4e4))
def test_a_grid_goes_from_its_start_to_its_end(steps, start, stop, smallest, largest):
    if abs(start - stop) < 1e-6:
        return
    etas = np.array(arc(steps, start, stop, (smallest, largest)))
    assert len(etas) == steps + 1
    np.testing.assert_allclose(etas[[0, -1]], np.array([start, stop]) * math.pi / 2, atol=1e-6)
    assert (np.diff(etas) * np.sign(stop - start) >= -1e-9).all()


@pytest.mark.parametrize("variance", [0.5, 1.0, 16.0, 400.0, 1000.0, 2500.0, 40000.0])
def test_modes_keep_their_deviation(variance):
    """An exact network, Heun with 30 intervals, and modes of 1 to 40,000 times the unit variance (algorithm.md section 11)."""

    def end(etas):
        def estimate(x, eta):
            c, s = math.cos(eta), math.sin(eta)
            inner = c**2 * variance + s**2
            return Estimate(x, s / inner * x, c * variance / inner * x, eta)

        return float(Solver("heun").solve(torch.ones(1, dtype=torch.float64), etas, estimate)) / math.sqrt(variance)

    assert end(arc(30, variances=(0.5, 40000.0))) == pytest.approx(1, abs=0.03)
    if variance == 400:
        assert end(arc(25)) == pytest.approx(0.80, abs=0.01)  # what a uniform grid leaves


def test_ab2_has_second_order_on_uneven_grids():
    def end(steps):
        def estimate(x, eta):
            c, s = math.cos(eta), math.sin(eta)
            inner = 9 * c**2 + s**2
            return Estimate(x, s / inner * (x - c), 1 + 9 * c / inner * (x - c), eta)

        return float(
            Solver("ab2", final="x").solve(torch.full((1,), 0.7, dtype=torch.float64), arc(steps, variances=(1, 9)), estimate)
        )

    exact = end(20000)
    assert math.log2(abs(end(40) - exact) / abs(end(80) - exact)) == pytest.approx(2, abs=0.35)
