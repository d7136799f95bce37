"""Muon: its step against torch's, weights of several matrices, runs that go on."""

from __future__ import annotations

import shutil

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcam_diff.diffusion.train import DiffusionTraining
from tcam_diff.errors import UserError
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.muon import Muon, orthogonalised


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_singular_values_become_about_one(rows, columns, scale):
    """And the singular vectors stay. Tiny singular values would need more iterations."""
    u, _, v = torch.linalg.svd(normal(rows, columns, seed=rows), full_matrices=False)
    s = torch.linspace(1, 3, min(rows, columns))
    found = u.T @ orthogonalised((scale * u * s @ v)[None], torch.float32)[0] @ v.T
    values = found.diag()
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    assert float((found - values.diag()).abs().max()) < 1e-3


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_steps_are_those_of_torch(shape):
    mine, other = (torch.nn.Parameter(normal(*shape)) for _ in range(2))
    optimisers = (
        Muon([mine], lr=0.01, momentum=0.9),
        torch.optim.Muon([other], lr=0.01, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for i in range(5):
        for p, optimiser in zip((mine, other), optimisers, strict=True):
            p.grad = normal(*shape, seed=i + 1)
            optimiser.step()
    moved = (other.detach() - normal(*shape)).norm()
    assert float((mine.detach() - other.detach()).norm()) < 0.03 * float(moved)  # products in bfloat16 round


@pytest.mark.parametrize("copies", [1, 3])
def test_a_weight_of_several_matrices_is_several_weights(copies):
    whole = torch.nn.Parameter(normal(6 * copies, 4, 3, 3))
    parts = [torch.nn.Parameter(p.flatten(1).clone()) for p in whole.detach().split(6)]
    together = Muon([whole], lr=0.1, copies=copies, products=torch.float64)
    apart = Muon(parts, lr=0.1, products=torch.float64)
    for i in range(3):
        whole.grad = normal(*whole.shape, seed=i + 1)
        for p, gradient in zip(parts, whole.grad.split(6), strict=True):
            p.grad = gradient.flatten(1)
        together.step()
        apart.step()
    torch.testing.assert_close(whole.flatten(1), torch.cat(list(parts)), rtol=1e-5, atol=1e-6)


def test_weights_without_a_gradient_stay_and_others_are_refused():
    weight, empty = torch.nn.Parameter(normal(4, 5)), torch.nn.Parameter(torch.zeros(4, 5))
    optimiser = Muon([weight, empty], lr=0.1)
    optimiser.step()
    assert torch.equal(weight, normal(4, 5))
    empty.grad = torch.zeros(4, 5)
    optimiser.step()
    assert torch.equal(empty, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"3 matrices, got one of shape \(4, 5\)"):
        Muon([weight], lr=0.1, copies=3)
    with pytest.raises(ValueError, match=r"1 matrices, got one of shape \(4,\)"):
        Muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1)


# ---- in stage 2 ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "latents")


def test_every_parameter_has_one_optimiser(latents, tmp_path):
    for changes in ((), ("muon_lr=1e-2",), ("muon_lr=1e-2", "network.weights=shared")):
        task = DiffusionTraining(runs.diffusion_config(latents, *changes), Distributed(), tmp_path)
        before = {n: p.detach().clone() for n, p in task.network.named_parameters()}
        kept = [id(p) for o, _ in task.optimisers.values() for g in o.param_groups for p in g["params"]]
        assert sorted(kept) == sorted(id(p) for p in task.network.parameters())
        for i in range(3):
            task.step(i)
        moved = {n for n, p in task.network.named_parameters() if not torch.equal(p, before[n])}
        used = {n for n, p in task.network.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved >= used
    assert any("conv" in n for n in used)


def test_a_run_goes_on_with_the_same_bits(latents, tmp_path):
    changes = ("muon_lr=1e-2", "keep=9")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs.finish(runs.start(runs.diffuse, latents, whole, changes))
    shutil.copytree(whole, cut)
    for step in checkpoint.steps(cut / "checkpoints"):
        if step > 9:
            shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    runs.finish(runs.start(runs.diffuse, latents, cut, changes, "auto"))
    one, two = (checkpoint.load(checkpoint.latest(p / "checkpoints"))[1]["task"] for p in (whole, cut))
    for name in ("network", "average"):
        assert all(torch.equal(one[name][k], two[name][k]) for k in one[name])
    momenta = [{k: s["momentum_buffer"] for k, s in task["muon"]["state"].items()} for task in (one, two)]
    assert momenta[0]
    assert all(torch.equal(momenta[0][k], momenta[1][k]) for k in momenta[0])


@pytest.mark.parametrize(
    "change", [lambda s: s.pop("muon"), lambda s: s["muon"]["state"][0].update(momentum_buffer=torch.zeros(1))]
)
def test_a_damaged_state_is_refused(latents, tmp_path, change):
    runs.diffuse(latents, tmp_path / "run", ("muon_lr=1e-2", "steps=3"))
    runs.damage(tmp_path / "run" / "checkpoints", "shared.pt", lambda s: change(s["task"]))
    with pytest.raises(UserError, match=r"step-00000003: damaged"):
        runs.diffuse(latents, tmp_path / "run", ("muon_lr=1e-2", "steps=3"), "auto")
