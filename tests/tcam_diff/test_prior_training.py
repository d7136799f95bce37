"""The Gaussian prior of stage 2 in training and sampling."""

import math

import pytest
import runs
import torch
from priors import FILTERED, GAUSSIAN, drawn, some_prior
from tcam_diff.autodecoder.planes import plane_sizes
from tcam_diff.diffusion.config import NetworkConfig, SampleConfig
from tcam_diff.diffusion.data import LatentData
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.network import TriplaneUNet
from tcam_diff.diffusion.prior import transform
from tcam_diff.diffusion.prior_fit import cross_fit, principal
from tcam_diff.diffusion.process import Estimate, angle, flip, pack, unpack
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.diffusion.train import DiffusionTraining, _Loss
from tcam_diff.errors import UserError
from tcam_diff.training.distributed import Distributed


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "latents", count=12)


#: Parts of the network that the paper's has not.


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
