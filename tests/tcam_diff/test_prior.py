"""The Gaussian prior of stage 2: its denoiser, its fit, and the angles where modes are decided (algorithm.md section 11)."""

import math

import numpy as np
import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from tcam_diff.autodecoder.planes import plane_sizes
from tcam_diff.diffusion.config import NetworkConfig, SampleConfig
from tcam_diff.diffusion.data import LatentData
from tcam_diff.diffusion.dct import dct
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.network import TriplaneUNet
from tcam_diff.diffusion.prior import LEAST, GaussianPrior, cross_fit, fit_prior, octaves, principal, transform
from tcam_diff.diffusion.process import Estimate, angle, decisive, flip, pack, unpack
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.diffusion.solver import Solver, arc
from tcam_diff.diffusion.train import DiffusionTraining, _Loss
from tcam_diff.errors import UserError
from tcam_diff.training.distributed import Distributed

OBLONG = plane_sizes((4, 6, 2))


def numbers(channels, sizes):
    return channels * sum(h * w for h, w in sizes)


def some_prior(channels=2, sizes=OBLONG, directions=3, white=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    m, (_, owner) = numbers(channels, sizes), octaves(channels, sizes)
    floor = torch.full((1,), 0.4) if white else 0.05 + torch.rand(len(owner), generator=g)
    return GaussianPrior(
        channels, sizes, torch.randn(m, generator=g), floor, 2 * torch.randn(directions, m, generator=g)
    ).double()


def covariance(prior):
    """S in the basis of texels (M, M), from its definition."""
    basis = transform(
        torch.eye(len(prior.mean), dtype=torch.float64), prior.channels, prior.sizes
    )  # rows: T e_i, so basis = T'
    w = prior.directions @ basis.T
    return basis @ torch.diag(prior.floor[prior.band]) @ basis.T + w.T @ w


# ---- the transform -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_the_transform_is_scipys_and_orthonormal(n):
    x = torch.randn(3, n, n + 1, dtype=torch.float64)
    ours = dct(n) @ x @ dct(n + 1).T
    np.testing.assert_allclose(ours, dctn(x.numpy(), axes=(1, 2), norm="ortho"), atol=1e-12)
    torch.testing.assert_close(dct(n) @ dct(n).T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [OBLONG, plane_sizes((8, 8, 8)), plane_sizes((1, 1, 1)), plane_sizes((5, 1, 3))])
def test_bands_are_the_octaves_of_each_plane_and_channel(sizes):
    band, owner = octaves(2, sizes)
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
    exact = GaussianPrior(2, OBLONG, torch.zeros(m), torch.full((len(octaves(2, OBLONG)[1]),), 0.05), 8 * w).double()
    single = GaussianPrior(2, OBLONG, torch.zeros(m), torch.full((len(octaves(2, OBLONG)[1]),), 0.05), 8 * w)
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


# ---- the fit -------------------------------------------------------------------------------


def drawn(prior, count, seed=0):
    """States (N, M) of a prior."""
    g = torch.Generator().manual_seed(seed)
    m = len(prior.mean)
    normals = torch.randn(count, m, dtype=torch.float64, generator=g) * prior.floor[prior.band].sqrt()
    along = torch.randn(count, len(prior.directions), dtype=torch.float64, generator=g) @ prior.directions
    return (prior.mean + transform(normals + along, prior.channels, prior.sizes, inverse=True)).float()


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
    band, owner = octaves(2, sizes)
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


def test_priors_without_a_part_have_the_energy_of_new_states():
    """Forty states of sixty directions: their own variances along their own directions are larger than those of others."""
    sizes = plane_sizes((8, 8, 8))
    p = some_prior(2, sizes, 60, seed=4).float()
    truth = GaussianPrior(2, sizes, p.mean, p.floor, 0.35 * p.directions).double()
    states, new = drawn(truth, 40), drawn(truth, 200, seed=1)
    both, plain = cross_fit(states, 2, sizes, without=True), fit_prior(states, 2, sizes)
    energy = float((new - both.prior.mean).square().sum(1).mean())

    def total(prior):
        return float(prior.directions.square().sum() + (prior.floor * prior.counts).sum())

    assert total(both.prior) == pytest.approx(energy, rel=0.05)
    assert total(plain) > 1.2 * energy
    assert both.prior.log_likelihood(new).mean() > plain.log_likelihood(new).mean() + 5
    variances = both.prior.directions.square().sum(1)
    assert (variances[1:] <= variances[:-1] + float(p.floor.max())).all()  # but for the share of the floor


def test_few_or_equal_states():
    with pytest.raises(UserError, match=r"2 volume.*prior=unit"):
        fit_prior(torch.randn(2, numbers(2, OBLONG)), 2, OBLONG)
    equal = fit_prior(torch.ones(5, numbers(2, OBLONG)), 2, OBLONG)
    assert len(equal.directions) == 0
    assert float(equal.floor.max()) == pytest.approx(LEAST)


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


# ---- in training and sampling --------------------------------------------------------------


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


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "latents", count=12)


GAUSSIAN = ("prior=gaussian", "timesteps=spectrum", "center=true")
#: Parts of the network that the paper's has not.
FILTERED = ("network.octave_gains=true", "network.prior_input=true")


def test_an_untrained_network_draws_from_the_prior(latents, tmp_path):
    """States before RMSNorm have the variances of the training states along their principal directions."""
    task = DiffusionTraining(runs.diffusion_config(latents, *GAUSSIAN), Distributed(), tmp_path)
    model, count = task.model(0), 400
    sampler = Sampler(model, SampleConfig(steps=30, final="x"))
    ends = sampler.integrate(sampler.noise(range(count)), range(count))
    data = LatentData(latents)
    p = principal(pack(task.centre.apply(data.rows(range(len(data))))))
    kept = min(3, len(task.prior.directions))
    assert kept >= 2
    drawn_variance = ((ends - p.mean) @ p.directions[:kept].T).var(0)
    ratio = (drawn_variance / p.variances[:kept]).numpy()
    assert abs(ratio - 1).max() < 4 * math.sqrt(2 / count)
    outside = transform(ends - p.mean, model.channels, model.geometry.sizes)
    along = torch.linalg.qr(task.prior.directions.T).Q
    outside = outside - (outside @ along) @ along.T
    expected = float((task.prior.floor * task.prior.counts).sum() / task.prior.counts.sum())
    assert float(outside.square().mean()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("prior", "loss"),
    [("none", "estimates"), ("unit", "estimates"), ("unit", "heads"), ("gaussian", "estimates"), ("gaussian", "heads")],
)
def test_every_prior_trains(latents, tmp_path, prior, loss):
    changes = (f"prior={prior}", f"loss={loss}", "timesteps=spectrum", "network.dropout=0", "steps=60", "lr=5e-3")
    task = DiffusionTraining(runs.diffusion_config(latents, *changes), Distributed(), tmp_path)
    first = task.evaluate()["training_loss"]
    for i in range(60):
        task.step(i)
    # These latents are nearly normal: there is little to learn beside the gaussian prior.
    assert task.evaluate()["training_loss"] < first * (1.01 if prior == "gaussian" else 0.9)


@pytest.mark.parametrize("weights", ["independent", "shared", "concatenated"])
@pytest.mark.parametrize("prior", ["unit", "gaussian"])
def test_estimates_of_one_head_agree_with_the_state(latents, tmp_path, prior, weights):
    """c x0 + s eps = x whatever the network says, and around the unit prior the head is the drift."""
    changes = (f"prior={prior}", "network.heads=one", f"network.weights={weights}", "network.dropout=0", "lr=5e-3")
    task = DiffusionTraining(runs.diffusion_config(latents, *changes), Distributed(), tmp_path)
    for i in range(3):
        assert float(task.step(i)["residual"]) < 1e-10
    model = task.model(3)
    x, t = torch.randn(4, model.length, generator=torch.Generator().manual_seed(0)), torch.full((4,), 300.0)
    noise, x0 = model.estimate(x, t).chunk(2, 1)
    eta = 0.3 * math.pi / 2
    torch.testing.assert_close(math.cos(eta) * x0 + math.sin(eta) * noise, x, atol=1e-5, rtol=0)
    if prior == "unit":
        head = pack(model.network(unpack(x, model.channels, model.geometry.sizes), t)[0])
        assert head.abs().max() > 1e-3
        torch.testing.assert_close(Estimate(x, noise, x0, eta).drift, -head, atol=1e-5, rtol=1e-4)
    model.save(tmp_path / "model")
    assert TriplaneDiffusion.load(tmp_path / "model").identity == model.identity


@torch.no_grad()
def test_prior_guidance_scales_what_the_network_adds(latents, tmp_path):
    """0 is the prior alone, 1 the model, and estimates are linear between and beyond; with classes too."""
    data = LatentData(latents)
    table = tmp_path / "labels.csv"
    table.write_text("name,label\n" + "".join(f"{n},{'ab'[i % 2]}\n" for i, n in enumerate(data.names)))
    changes = (*GAUSSIAN, "muon_lr=0.1", f"labels={table}", "network.octave_gains=true", "network.prior_input=true")
    task = DiffusionTraining(runs.diffusion_config(latents, *changes), Distributed(), tmp_path)
    with torch.enable_grad():
        for i in range(8):
            task.step(i)
    model, t = task.model(8), 700.0
    x = runs.sampler(model).noise([0, 1])
    for label, scale in ((None, 1.0), (0, 1.0), (1, 2.0)):
        found = [runs.sampler(model, prior_guidance=w, guidance_scale=scale)._estimate(x, t, label) for w in (0.0, 1.0, 1.5)]
        own = model.prior(x, angle(torch.full((2,), t)))
        torch.testing.assert_close(found[0], torch.cat(own, 1), atol=1e-5, rtol=1e-5)
        assert float((found[1] - found[0]).abs().max()) > 1e-2
        torch.testing.assert_close(found[2], found[0] + 1.5 * (found[1] - found[0]), atol=1e-5, rtol=1e-5)
        assert torch.equal(found[1], runs.sampler(model, guidance_scale=scale)._estimate(x, t, label))
    plain = DiffusionTraining(runs.diffusion_config(latents), Distributed(), tmp_path).model(0)
    with pytest.raises(UserError, match=r"prior_guidance=1.2: the model is distilled or has no prior"):
        runs.sampler(plain, prior_guidance=1.2).sample([0])


@torch.no_grad()
@pytest.mark.parametrize("prior_input", [False, True])
def test_cross_fitting_trains_volumes_as_new_ones(prior_input):
    """Around the prior of all volumes their loss is less than that of new ones, and around the others' priors as large."""
    sizes, count = plane_sizes((8, 8, 8)), 40
    truth = some_prior(2, sizes, 3, seed=4)
    seen, new = (drawn(truth, count, seed=s) for s in (0, 1))
    fitted = cross_fit(seen, 2, sizes, without=True)
    config = NetworkConfig(base=8, multipliers=[1], norm_groups=2, attention_levels=[], prior_input=prior_input)
    network = TriplaneUNet(2, config)
    if prior_input:  # so that the loss depends on the input
        torch.nn.init.normal_(network.leave.weight, std=0.003, generator=torch.Generator().manual_seed(3))
    errors = _Loss(network, torch.float32, fitted.prior, without=fitted.without)
    noise = unpack(torch.randn(seen.shape, generator=torch.Generator().manual_seed(2)), 2, sizes)
    t = torch.full((count,), 500.0)

    def loss(states, parts):
        return errors(unpack(states, 2, sizes), noise, t, None, None, parts)[1]

    as_new, crossed = float(loss(new, None).mean()), loss(seen, fitted.part)
    assert float(loss(seen, None).mean()) < 0.9 * as_new
    assert float(crossed.mean()) == pytest.approx(as_new, rel=0.05)
    for part, prior in enumerate(fitted.without):  # every volume has its own prior, in the order of the batch
        errors.prior = prior
        rows = fitted.part == part
        torch.testing.assert_close(crossed[rows], loss(seen, None)[rows], rtol=1e-4, atol=1e-5)


def test_a_cross_fitted_run_samples_with_the_prior_of_all_volumes(latents, tmp_path):
    config = runs.diffusion_config(latents, *GAUSSIAN, "cross_fit=true", "network.norm_groups=4")
    task = DiffusionTraining(config, Distributed(), tmp_path)
    assert task.part.bincount().tolist() == [3, 3, 2, 2, 2]
    assert len({len(p.directions) for p in (task.prior, *task.without)}) > 1
    assert math.isfinite(float(task.step(0)["loss"]))
    assert task.model(1).prior is task.prior


def test_other_priors_are_not_cross_fitted(latents, tmp_path):
    task = DiffusionTraining(runs.diffusion_config(latents, "prior=unit", "cross_fit=true"), Distributed(), tmp_path)
    assert task.part is None
    assert not task.without


def test_one_head_needs_a_prior(latents):
    with pytest.raises(UserError, match="one head is a velocity around a prior"):
        runs.diffusion_config(latents, "network.heads=one", "prior=none")


def test_heads_are_those_of_a_prior(latents):
    with pytest.raises(UserError, match="loss: heads is the loss of heads around a prior"):
        runs.diffusion_config(latents, "loss=heads", "prior=none")


def test_a_network_that_takes_estimates_of_the_prior_needs_one(latents, tmp_path):
    with pytest.raises(UserError, match=r"network.prior_input: there is no prior"):
        runs.diffusion_config(latents, "network.prior_input=true", "prior=none")
    model = DiffusionTraining(runs.diffusion_config(latents, *GAUSSIAN, *FILTERED), Distributed(), tmp_path).model(0)
    state = unpack(torch.randn(2, model.length), model.channels, model.geometry.sizes)
    with pytest.raises(ValueError, match="denoised: expected the prior's estimates"):
        model.network(state, torch.tensor([10.0, 900.0]))


def test_a_network_that_takes_estimates_of_the_prior_depends_on_them(latents, tmp_path):
    task = DiffusionTraining(runs.diffusion_config(latents, *GAUSSIAN, *FILTERED), Distributed(), tmp_path)
    task.step(0)
    network, state = task.network.eval(), task.validation.rows([0, 1])
    t = torch.tensor([300.0, 900.0])
    with torch.no_grad():
        other = [network(state, t, None, None, [p * scale for p in state])[1][0] for scale in (1, 2)]
    assert float((other[0] - other[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("more", [(), ("flip=[x, y]", *FILTERED), ("latent_dtype=bfloat16",), ("compute_dtype=bfloat16",)])
def test_planes_of_unequal_sizes_have_a_prior(tmp_path, more):
    oblong = runs.make_latents(tmp_path / "oblong", count=8, texels=(8, 12, 4))
    task = DiffusionTraining(runs.diffusion_config(oblong, *GAUSSIAN, *more), Distributed(), tmp_path)
    for i in range(2):
        assert math.isfinite(float(task.step(i)["loss"]))
    assert len(Sampler(task.model(2), SampleConfig(steps=2)).sample([0, 1])[2]) == 2


def test_classes_share_a_prior(latents, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("name,label\n" + "".join(f"{n},{'ab'[i % 2]}\n" for i, n in enumerate(LatentData(latents).names)))
    task = DiffusionTraining(runs.diffusion_config(latents, *GAUSSIAN, f"labels={table}"), Distributed(), tmp_path)
    task.step(0)
    model = task.model(1)
    labelled, other = (Sampler(model, SampleConfig(steps=2)).sample([0], k)[0] for k in (0, None))
    assert labelled.shape == other.shape


def test_a_resumed_run_keeps_its_prior(latents, tmp_path):
    """The prior is read from the checkpoint, not fitted again, so that another machine goes on around the same one."""
    runs.diffuse(latents, tmp_path, ("steps=6", *GAUSSIAN))
    task = DiffusionTraining(runs.diffusion_config(latents, "steps=6", *GAUSSIAN), Distributed(), tmp_path)
    state = task.shared_state()
    state["prior"] = {k: 1.5 * v for k, v in state["prior"].items()}
    state["variances"] = (0.2, 7.0)
    task.load_state(state, [])
    assert torch.equal(task.prior.mean, state["prior"]["mean"])
    assert task.inner.prior is task.prior
    assert task.model(0).variances == (0.2, 7.0)


def test_the_prior_alone_beats_an_untrained_network(latents, tmp_path):
    losses = [
        DiffusionTraining(runs.diffusion_config(latents, f"prior={p}"), Distributed(), tmp_path).evaluate()["training_loss"]
        for p in ("none", "unit", "gaussian")
    ]
    assert losses[0] == pytest.approx(2, abs=0.1)
    assert losses[2] < losses[1] < losses[0]


def test_a_model_with_a_prior_is_read_back_as_it_was(latents, tmp_path):
    for prior in ("unit", "gaussian"):
        config = runs.diffusion_config(latents, *GAUSSIAN, *FILTERED, f"prior={prior}")
        task = DiffusionTraining(config, Distributed(), tmp_path)
        task.step(0)
        model = task.model(1)
        model.save(tmp_path / prior)
        again = TriplaneDiffusion.load(tmp_path / prior)
        assert again.identity == model.identity
        assert again.variances == pytest.approx(model.variances)
        x, t = torch.randn(2, model.length), torch.tensor([10.0, 900.0])
        assert torch.equal(again.estimate(x, t), model.estimate(x, t))
    plain = DiffusionTraining(runs.diffusion_config(latents, "center=true"), Distributed(), tmp_path).model(0)
    assert plain.variances is None
    with pytest.raises(UserError, match="grid=spectrum: the model does not know"):
        Sampler(plain, SampleConfig(grid="spectrum", steps=2)).sample([0])


def test_a_prior_of_mirrored_volumes_is_symmetric(latents, tmp_path):
    task = DiffusionTraining(runs.diffusion_config(latents, *GAUSSIAN, "flip=[x, z]"), Distributed(), tmp_path)
    sizes = task.model(0).geometry.sizes
    x = unpack(torch.randn(2, task.model(0).length), 4, sizes)
    eta = torch.tensor([0.5, 1.4])
    for axis in (0, 2):
        straight = task.prior(pack(x), eta)
        mirrored = task.prior(pack(flip(x, axis)), eta)
        for a, b in zip(straight, mirrored, strict=True):
            torch.testing.assert_close(pack(flip(unpack(a, 4, sizes), axis)), b, rtol=1e-3, atol=2e-3)


def test_two_processes_with_a_prior_are_one(latents, tmp_path):
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        arguments = (latents, tmp_path / str(world), 3, ("network.dropout=0", "compute_dtype=float64", *GAUSSIAN, *FILTERED))
        runs.finish(runs.start(runs.diffusion_steps, *arguments, world=world))
    one, two = (torch.load(tmp_path / str(w) / "rank-0.pt") for w in (1, 2))
    for a, b in zip(one["network"], two["network"], strict=True):
        assert float((a - b).norm()) <= 1e-9 * float(a.norm() + 1)


def test_there_and_back_with_a_prior(latents, tmp_path):
    task = DiffusionTraining(runs.diffusion_config(latents, *GAUSSIAN), Distributed(), tmp_path)
    model, data = task.model(0), LatentData(latents)
    sampler = Sampler(model, SampleConfig(steps=60, final="x"))
    planes = data.rows([0])
    back = model.planes(sampler.integrate(sampler.invert(planes), [0]))
    assert float(torch.cat([(a - b).flatten() for a, b in zip(planes, back, strict=True)]).square().mean().sqrt()) < 0.05
