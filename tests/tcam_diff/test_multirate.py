"""The solver multirate, which integrates a model's prior in fine steps between evaluations of the network."""

import math

import pytest
import runs
import torch
from priors import GAUSSIAN, some_prior
from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.prior import GaussianPrior
from tcam_diff.diffusion.process import Estimate
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.diffusion.solver import Solver, arc
from tcam_diff.diffusion.train import DiffusionTraining
from tcam_diff.errors import UserError
from tcam_diff.training.distributed import Distributed
from test_solvers import mixture


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "latents", count=12)


def rms(x):
    return float(x.square().mean().sqrt())


def test_multirate_is_exact_for_the_prior_itself():
    """With an exact network for modes of variances up to 2,000, two evaluations are better than fifty of Heun's method."""
    p = some_prior()
    p = GaussianPrior(p.channels, p.sizes, p.mean.float(), p.floor.float(), 5 * p.directions.float()).double()
    x = torch.randn(8, len(p.mean), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def estimate(x, eta):
        return Estimate(x, *p(x, torch.full((1,), eta)), eta)

    def end(method, steps):
        return Solver(method, "x", prior=p).solve(x, arc(steps, variances=p.range), estimate)

    exact = end("rk4", 400)
    heun = rms(end("heun", 25) - exact)
    assert rms(end("multirate", 2) - exact) < min(heun, 0.01 * rms(exact - p.mean))


def test_multirate_needs_few_evaluations_for_other_distributions():
    """A mixture of three normals around a prior that knows only their second moment."""
    p = GaussianPrior.unit(2, [(4, 4)] * 3).double()
    x = torch.randn(20, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def estimate(x, eta):
        noise, x0 = mixture(x.flatten().numpy(), eta)
        return Estimate(x, torch.from_numpy(noise).view_as(x), torch.from_numpy(x0).view_as(x), eta)

    def end(method, steps):
        solver, etas = Solver(method, "x", prior=p), arc(steps, variances=(0.02, 1.0))
        return solver.solve(x, etas, estimate), len(solver.evaluations(etas))

    exact = Solver("rk4", "x").solve(x, arc(1000), estimate)
    found, evaluations = end("multirate", 16)
    assert evaluations == 16
    assert rms(found - exact) < 0.01
    for method, steps in (("heun", 8), ("ab2", 16)):
        other, evaluations = end(method, steps)
        assert evaluations == 16
        assert rms(other - exact) > 3 * rms(found - exact)


def test_multirate_takes_angles_of_any_density():
    """Angles so near to an end that log tan(eta) is cut off there."""
    p = GaussianPrior.unit(1, [(1, 1)] * 3).double()
    x = torch.ones(1, 3, dtype=torch.float64)
    etas = [math.pi / 2, math.pi / 2 - 1e-5, math.pi / 2 - 2e-5, 1.0, 1e-5, 5e-6, 0.0]
    for final in ("x0", "x"):
        end = Solver("multirate", final, prior=p).solve(x, etas, lambda x, eta: Estimate(x, *p(x, torch.full((1,), eta)), eta))
        torch.testing.assert_close(end, x, atol=1e-3, rtol=0)


def test_multirate_and_heun_agree_on_a_model(latents, tmp_path):
    model = DiffusionTraining(runs.diffusion_config(latents, *GAUSSIAN), Distributed(), tmp_path).model(0)
    for parameter in model.network.leave.parameters():  # a network whose heads are not zero
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    noise = Sampler(model).noise(range(3))
    heun = Sampler(model, SampleConfig(steps=200)).integrate(noise, range(3))
    configs = SampleConfig(solver="multirate", steps=8), SampleConfig(steps=4)  # both of eight evaluations
    errors = [rms(Sampler(model, c).integrate(noise, range(3)) - heun) / rms(heun) for c in configs]
    assert errors[0] < min(0.01, errors[1] / 5)


def test_multirate_is_refused_without_a_prior(latents, tmp_path):
    model = DiffusionTraining(runs.diffusion_config(latents), Distributed(), tmp_path).model(0)
    with pytest.raises(UserError, match="solver=multirate: the model has no prior"):
        Sampler(model, SampleConfig(solver="multirate")).sample([0])
    with pytest.raises(ValueError, match="needs the prior"):
        Solver("multirate")
