"""Solvers: errors against closed forms, and MONAI's scheduler (algorithm.md section 2)."""

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from tcam_diff.diffusion.config import Method
from tcam_diff.diffusion.interop import ArcScheduler
from tcam_diff.diffusion.process import Estimate
from tcam_diff.diffusion.solver import METHODS, STOCHASTIC, Solver, arc

W, M, S = np.array([0.3, 0.5, 0.2]), np.array([-1.2, 0.4, 1.3]), np.array([0.1, 0.15, 0.2])
_SCALE = math.sqrt((W * (M**2 + S**2)).sum())
M, S = M / _SCALE, S / _SCALE


def mixture(x: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means of noise and x0 for a mixture of three normals with unit second moment."""
    c, s = math.cos(eta), math.sin(eta)
    v = (c * S) ** 2 + s**2
    log = np.log(W) - 0.5 * np.log(v) - 0.5 * (x[:, None] - c * M) ** 2 / v
    r = np.exp(log - log.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    off = x[:, None] - c * M
    return (r * (s / v * off)).sum(1), (r * (M + c * S**2 / v * off)).sum(1)


def integrate(solver: str, steps: int, x: np.ndarray, estimate, **options) -> torch.Tensor:
    """Integrate from noise to data (N,), in float64."""
    scheduler = ArcScheduler(solver, final=options.pop("final", "x"), **options)
    scheduler.set_timesteps(steps)
    state = torch.from_numpy(x)[:, None]
    for t, eta in zip(scheduler.timesteps, scheduler.visited, strict=True):
        noise, x0 = estimate(state[:, 0].numpy(), eta)
        state, _ = scheduler.step(torch.from_numpy(np.stack([noise, x0], 1)), t, state)
    return state[:, 0]


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(4000)


@pytest.fixture(scope="module")
def exact(normals) -> torch.Tensor:
    return integrate("rk4", 1000, normals, mixture)


#: algorithm.md 2.3: RMS distance to the exact end, by evaluations of the network.
TABLE = {
    "euler": (0.074, 0.055, 0.025, 0.014, 0.0025),
    "frozen": (0.212, 0.138, 0.081, 0.059, 0.026),
    "ddim": (0.212, 0.138, 0.081, 0.059, 0.026),
    "ab2": (0.070, 0.021, 0.0046, 0.0012, 0.0003),
    "heun": (0.110, 0.029, 0.0073, 0.0022, 0.0006),
    "midpoint": (0.108, 0.019, 0.0022, 0.0007, 0.0002),
    "rk4": (0.088, 0.013, 0.0021, 0.0004, 0.0001),
}


#: Evaluations of the network in an interval, where they are more than one.
STAGES = {"heun": 2, "churn": 2, "midpoint": 2, "rk4": 4}


@pytest.mark.parametrize("solver", list(METHODS))
def test_errors_on_the_closed_form_mixture(solver, normals, exact):
    for evaluations, want in zip((8, 16, 32, 64, 128), TABLE[solver], strict=True):
        error = float(
            (integrate(solver, evaluations // STAGES.get(solver, 1), normals, mixture) - exact).square().mean().sqrt()
        )
        assert error == pytest.approx(want, rel=0.06, abs=6e-5 if want > 1e-4 else 1e-4), evaluations


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order, normals):
    """Orders hold where the posterior is smooth, as for one normal distribution with a mean that is not zero."""

    def smooth(x: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
        c, s = math.cos(eta), math.sin(eta)
        v = 0.49 * c**2 + s**2
        return s / v * (x - 0.7 * c), 0.7 + c * 0.49 / v * (x - 0.7 * c)

    end = integrate("rk4", 512, normals, smooth)
    coarse, fine = ((integrate(solver, n, normals, smooth) - end).square().mean().sqrt() for n in (16, 32))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk4", "ab2"])
def test_unit_normal_data_stay_where_they_are(solver, normals):
    def unit(x: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
        return math.sin(eta) * x, math.cos(eta) * x

    assert float((integrate(solver, 10, normals, unit) - torch.from_numpy(normals)).abs().max()) < 1e-6


def test_ddim_is_exact_for_a_point_mass(normals):
    def point(x: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
        return (x - 0.7 * math.cos(eta)) / max(math.sin(eta), 1e-300), np.full_like(x, 0.7)

    for solver in ("ddim", "frozen"):
        assert float((integrate(solver, 10, normals, point) - 0.7).abs().max()) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 4])
def test_hot_keeps_the_variance_of_unit_normal_data(k, normals):
    def unit(x: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
        return math.sin(eta) * x, math.cos(eta) * x

    g = torch.Generator().manual_seed(0)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=g, dtype=like.dtype)

    end = integrate("hot", 50, normals, unit, hot_k=k, draw=draw)
    assert float(end.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / len(normals)))
    assert (float((end - torch.from_numpy(normals)).abs().max()) > 0.1) == (k > 1)


@pytest.mark.parametrize("back", [0.0, 0.5, 2.0])
def test_churn_keeps_the_mixture(back, normals, exact):
    """Without noise it is Heun's method; with it a sample is another one of the same distribution."""
    g = torch.Generator().manual_seed(0)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=g, dtype=like.dtype)

    options = {"variances": (0.01, 1.0), "final": "x0"}
    end = integrate("churn", 100, normals, mixture, churn=back, draw=draw, **options)
    heun = integrate("heun", 100, normals, mixture, **options)
    if back == 0:
        assert float((end - heun).abs().max()) < 1e-9
    else:
        assert float((end - heun).square().mean().sqrt()) > 0.3
    assert float((end.sort().values - exact.sort().values).abs().mean()) < 0.05  # Wasserstein's distance


def test_churn_has_less_bias_than_hot():
    """Share of a mode's variance of 500 that an exact network leaves after 100 evaluations (docs/stage2.md)."""
    variance, g = 500.0, torch.Generator().manual_seed(0)

    def estimate(x: torch.Tensor, eta: float) -> Estimate:
        c, s = math.cos(eta), math.sin(eta)
        inner = c**2 * variance + s**2
        return Estimate(x, s / inner * x, c * variance / inner * x, eta)

    def share(method: str, steps: int, **options) -> float:
        solver = Solver(method, draw=lambda like: torch.randn(like.shape, dtype=like.dtype, generator=g), **options)
        start = torch.randn(100_000, dtype=torch.float64, generator=g)
        return float(solver.solve(start, arc(steps, variances=(0.05, 5000.0)), estimate).square().mean()) / variance

    assert share("churn", 50) == pytest.approx(0.98, abs=0.015)
    assert share("churn", 50, churn=4.0) == pytest.approx(0.89, abs=0.015)
    assert share("hot", 100) == pytest.approx(1.08, abs=0.015)


def test_churn_evaluates_where_the_noise_takes_the_state():
    """Before each interval tan(eta) is larger by the interval's ratio to the power of the lengths gone back."""
    etas = arc(6, variances=(0.1, 100.0))
    visited = Solver("churn", churn=2.0).evaluations(etas)
    assert visited[0] == etas[0]  # pure noise has nothing to go back to
    for i in range(1, 5):
        ratio = math.tan(etas[i]) / math.tan(etas[i + 1])
        assert math.tan(visited[2 * i]) == pytest.approx(math.tan(etas[i]) * ratio**2)
        assert visited[2 * i + 1] == etas[i + 1]


def test_there_and_back(normals, exact):
    scheduler = ArcScheduler("rk4", final="x")
    scheduler.set_timesteps(200, start=0.0, stop=1.0)
    state = exact[:, None]
    for t, eta in zip(scheduler.timesteps, scheduler.visited, strict=True):
        noise, x0 = mixture(state[:, 0].numpy(), eta)
        state, _ = scheduler.step(torch.from_numpy(np.stack([noise, x0], 1)), t, state)
    assert float((state[:, 0] - torch.from_numpy(normals)).square().mean().sqrt()) < 1e-3


@pytest.mark.parametrize("solver", [*METHODS, "hot", "churn"])
def test_solvers_evaluate_from_pure_noise_and_return_the_last_estimate(solver):
    scheduler = ArcScheduler(solver)
    assert float(scheduler.timesteps[0]) == 1000
    assert len(scheduler.timesteps) == 50 * STAGES.get(solver, 1)
    for _ in range(2):  # the scheduler starts again after the last step
        x = torch.zeros(2, 3)
        for number, t in enumerate(scheduler.timesteps):
            value = torch.full((2, 3), float(number))
            x, x0 = scheduler.step(torch.cat([torch.zeros(2, 3), value], 1), t, x)
            assert torch.equal(x0, value)
        last = max(n for n, t in enumerate(scheduler.timesteps) if t > 0)
        assert torch.equal(x, torch.full((2, 3), float(last)))


@pytest.mark.parametrize("method", [*METHODS, "hot", "churn"])
@pytest.mark.parametrize("final", ["x0", "x"])
def test_monais_scheduler_and_the_solver_are_one_integration(method, final):
    """The scheduler and the solver give equal bits."""

    def network(x: torch.Tensor, eta: float) -> torch.Tensor:
        return torch.cat([x.sin(), (x + eta).cos()], 1)

    def draws() -> Callable[[torch.Tensor], torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        return lambda like: torch.randn(like.shape, generator=g)

    start = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    scheduler = ArcScheduler(method, final, draw=draws())
    scheduler.set_timesteps(7)
    x = start
    for t, eta in zip(scheduler.timesteps, scheduler.visited, strict=True):
        x, _ = scheduler.step(network(x, eta), t, x)
    solver = Solver(method, final, draw=draws())
    end = solver.solve(start, arc(7), lambda x, eta: Estimate(x, *network(x, eta).chunk(2, 1), eta))
    assert torch.equal(x, end)


def test_every_method_has_its_name_in_the_configuration():
    assert set(get_args(Method)) == {*METHODS, *STOCHASTIC, "multirate"}


def test_the_scheduler_has_its_name_in_bundles_of_version_0_1():
    from tcam_diff.diffusion import schedulers

    assert schedulers.ArcScheduler is ArcScheduler


def test_steps_out_of_order_and_outputs_of_one_head_are_refused():
    scheduler = ArcScheduler("heun")
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="the next one"):
        scheduler.step(torch.zeros(1, 4), scheduler.timesteps[3], x)
    with pytest.raises(ValueError, match="expected 4 channels"):
        scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="solver: expected"):
        ArcScheduler("rk5")


def test_the_schedule_serves_monais_own_schedulers():
    from monai.networks.schedulers import DDIMScheduler

    monai = DDIMScheduler(schedule="quarter_circle")
    ours = ArcScheduler()
    x0, noise, t = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([1, 500, 999])
    torch.testing.assert_close(monai.add_noise(x0, noise, t), ours.add_noise(x0, noise, t), rtol=0, atol=2e-4)
    torch.testing.assert_close(monai.get_velocity(x0, noise, t), ours.get_velocity(x0, noise, t), rtol=0, atol=2e-4)


def test_monais_ancestral_sampler_keeps_the_variance_of_unit_data():
    """With the exact noise of unit normal data, sin(eta) x, as the network's output."""
    from monai.networks.schedulers import DDPMScheduler

    scheduler = DDPMScheduler(schedule="quarter_circle", clip_sample=False)
    scheduler.set_timesteps(1000)
    torch.testing.assert_close(scheduler.alphas.cumprod(0), scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(1, 20000)
        for t in scheduler.timesteps:
            x, _ = scheduler.step(math.sin(float(t) / 1000 * math.pi / 2) * x, int(t), x)
    assert float(x.std()) == pytest.approx(1, abs=0.03)
