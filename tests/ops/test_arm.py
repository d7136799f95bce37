"""The CPU kernels on ARM, built with a cross compiler and run under qemu. `make test-arm` runs every test of the ops there."""

from __future__ import annotations

import arm
import problems
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tcam_ext
from tcam_ext import reference

pytestmark = [
    pytest.mark.skipif(arm.CXX is None or arm.QEMU is None, reason="no cross compiler for ARM, or no qemu-aarch64"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    process = arm.Arm(arm.build(tmp_path_factory.mktemp("arm")))
    yield process
    process.close()


@pytest.fixture
def on_arm(process, monkeypatch):
    arm.replace_kernels(monkeypatch, process)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(p=problems.problems(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_grids_and_their_gradients(on_arm, p, dtype):
    name = str(dtype).removeprefix("torch.")
    exact, mine = p.to(torch.float64, requires_grad=True), p.to(dtype, requires_grad=True)
    out, trusted = problems.masked_reference(exact)
    grad = torch.randn_like(out) * trusted
    got = mine.call(tcam_ext.decode_grid)
    assert problems.relative(got, p.call(reference.decode_grid), problems.terms_of(p)) < problems.FORWARD_LIMIT[name]
    want = torch.autograd.grad(out, exact.tensors, grad)
    assert (
        problems.gradient_error(list(torch.autograd.grad(got, mine.tensors, grad.to(dtype))), list(want))
        < (problems.GRADIENT_LIMIT[name])
    )


def test_the_operating_point(on_arm):
    p = problems.make(**problems.SMALL_OPERATING_POINT).to(torch.float32, requires_grad=True)
    exact = p.to(torch.float64, requires_grad=True)
    target = torch.rand(1, 1, *p.size)
    loss = tcam_ext.decode_grid_loss(p.planes, p.weights, p.biases, target, loss="mse", **p.options)
    want = torch.nn.functional.mse_loss(exact.call(reference.decode_grid), target.double())
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    own, other = torch.autograd.grad(loss, p.planes), torch.autograd.grad(want, exact.planes)
    assert problems.gradient_error(list(own), list(other)) < 1e-2  # relu masks may flip
    xyz = torch.rand(1, 40, 3) * 2 - 1
    got = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz, **p.options)
    at = reference.decode_points(exact.planes, exact.weights, exact.biases, xyz.double(), **p.options)
    assert problems.relative(got, at) < 1e-5


def test_noise_is_that_of_this_machine(on_arm, monkeypatch):
    p = problems.make(size=(6, 5, 4)).to(torch.float32)
    options = {"noise_std": 0.3, "noise_seed": 7}
    got = p.call(tcam_ext.decode_grid, **options)
    monkeypatch.undo()
    assert problems.relative(got, p.call(tcam_ext.decode_grid, **options).double()) < 1e-6
