"""Modules in place of other projects' decoders equal the projects' code, written again from its published shapes."""

from __future__ import annotations

import pickle

import numpy as np
import problems
import pytest
import torch
from peers import DOUBLE, Eg3d, Nfd, OpenLrm, SemCity, TripoSr
from torch import nn

from tcam_ext import projects
from tcam_ext.nn import from_eg3d, from_nfd, from_openlrm, from_semcity, from_triposr


def of_nfd(source):
    return from_nfd(source.net if isinstance(source, nn.Module) else source)


PROJECTS = {
    "eg3d": (Eg3d, 32, lambda d: from_eg3d(d, box_warp=1.4, lr_multiplier=0.5)),
    "openlrm": (OpenLrm, 80, from_openlrm),
    "triposr": (TripoSr, 40, from_triposr),
    "nfd": (Nfd, 32, of_nfd),
    "nfd-plain": (lambda: Nfd(False), 32, of_nfd),
    "semcity": (SemCity, 64, from_semcity),
    "semcity-plain": (lambda: SemCity(0), 64, lambda d: from_semcity(d, frequencies=0)),
}


def results(out):
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.fixture(params=sorted(PROJECTS))
def project(request):
    torch.manual_seed(0)
    make, channels, of = PROJECTS[request.param]
    decoder = make()
    planes = torch.randn(2, 3, channels, 6, 6, dtype=DOUBLE, requires_grad=True)
    return decoder, planes, of


def test_points_and_gradients(project):
    decoder, planes, of = project
    mine = of(decoder)
    xyz = (torch.rand(2, 40, 3, dtype=DOUBLE) - 0.5) * 1.2 * decoder.width
    xyz.requires_grad_()
    want, got = decoder(planes, xyz), mine(planes, xyz)
    assert type(want) is type(got)
    assert not isinstance(want, dict) or want.keys() == got.keys()
    inputs = [planes, xyz, *(p for p in decoder.parameters() if p.requires_grad)]
    grads = [torch.randn_like(w) for w in results(want)]
    for a, b in zip(results(got), results(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(results(want), inputs, grads)
    for a, b in zip(torch.autograd.grad(results(got), inputs, grads), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_one_object_and_coordinates_of_any_shape(project):
    decoder, planes, of = project
    xyz = (torch.rand(4, 5, 3, dtype=DOUBLE) - 0.5) * decoder.width
    want = decoder(planes[:1], xyz.reshape(1, -1, 3))
    for a, b in zip(results(of(decoder)(planes[0], xyz)), results(want), strict=True):
        torch.testing.assert_close(a, b.reshape(4, 5, -1), rtol=1e-9, atol=1e-9)


def test_grids(project):
    decoder, planes, of = project
    size, mine = (4, 3, 5), of(decoder)
    axes = [torch.linspace(-0.5, 0.5, n, dtype=DOUBLE) * decoder.width for n in size]
    xyz = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3).expand(2, -1, -1)
    for a, b in zip(results(mine.grid(planes, size)), results(decoder(planes, xyz)), strict=True):
        torch.testing.assert_close(a.flatten(2).mT, b, rtol=1e-9, atol=1e-9)


def test_a_state_dict_gives_the_same(project):
    decoder, planes, of = project
    xyz = torch.rand(2, 7, 3, dtype=DOUBLE) - 0.5
    mine = of({k: v.clone() for k, v in decoder.state_dict().items()})
    for a, b in zip(results(mine(planes, xyz)), results(decoder(planes, xyz)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(p.requires_grad for p in mine.parameters())


def test_numbers_order_the_layers_of_a_state_dict():
    """Files of safetensors have them in alphabetical order, 10 before 2."""
    decoder = TripoSr()
    state = dict(sorted(decoder.state_dict().items()))
    assert list(state) != list(decoder.state_dict())
    planes, xyz = torch.randn(1, 3, 40, 6, 6, dtype=DOUBLE), torch.rand(1, 7, 3, dtype=DOUBLE) - 0.5
    for a, b in zip(results(from_triposr(state)(planes, xyz)), results(decoder(planes, xyz)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_layers_of_blocks_stay_together():
    names = [f"blocks.{i}.{part}.weight" for i in (10, 0, 2) for part in ("into", "from")]
    want = [f"blocks.{i}.{part}.weight" for i in (0, 2, 10) for part in ("into", "from")]
    assert list(projects._in_order(names)) == want
    names = ["second.2.weight", "first.2.weight", "second.0.weight", "first.0.weight"]
    assert projects._in_order(names) == ["second.0.weight", "second.2.weight", "first.0.weight", "first.2.weight"]


def test_encoded_grids_check_their_arguments():
    mine, planes = from_semcity(SemCity()), torch.randn(1, 3, 64, 4, 4, dtype=DOUBLE)
    whole = mine.grid(planes, (4, 5, 6), bounds=[(-0.5, 0.7)] * 3)
    part = mine.grid(planes, (4, 5, 6), bounds=[(-0.5, 0.7)] * 3, box=np.array([[1, 3], [0, 5], [2, 6]]))
    torch.testing.assert_close(part, whole[:, :, 1:3, :, 2:], rtol=1e-12, atol=1e-12)
    for change, message in (
        ({"size": (4, 4)}, "size"),
        ({"bounds": [(0, 1)]}, "bounds"),
        ({"box": ((0, 9), (0, 1), (0, 1))}, r"box\[0\]"),
        ({"extra": torch.zeros(1, 36, 4, 5, 6)}, "extra"),
    ):
        with pytest.raises(ValueError, match=message):
            mine.grid(planes, **{"size": (4, 5, 6), **change})
    assert mine.grid(planes[:0], (4, 5, 6)).shape == (0, 20, 4, 5, 6)


def test_frequencies_that_change_later_are_used():
    torch.manual_seed(0)
    planes, xyz = torch.randn(1, 3, 32, 6, 6, dtype=DOUBLE), torch.rand(1, 7, 3, dtype=DOUBLE) - 0.5
    first, second = Nfd(), Nfd()
    mine = from_nfd(first.net).to(DOUBLE)
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(mine(planes, xyz), second(planes, xyz), rtol=1e-9, atol=1e-9)
    copy, other = from_nfd(second.net.state_dict()), from_nfd(Nfd().net.state_dict())
    other.load_state_dict(copy.state_dict())
    torch.testing.assert_close(other(planes, xyz), second(planes, xyz), rtol=1e-9, atol=1e-9)


def test_modules_are_pickled(project):
    decoder, planes, of = project
    xyz, mine = torch.rand(2, 7, 3, dtype=DOUBLE) - 0.5, of(decoder)
    again = pickle.loads(pickle.dumps(mine))
    for a, b in zip(results(again(planes, xyz)), results(mine(planes, xyz)), strict=True):
        assert torch.equal(a, b)


def test_no_coordinates(project):
    decoder, planes, of = project
    for a in results(of(decoder)(planes[0], torch.empty(0, 3, dtype=DOUBLE))):
        assert a.shape[0] == 0
        assert a.dim() == 2


def test_a_module_shares_the_projects_parameters():
    decoder = OpenLrm()
    mine = from_openlrm(decoder)
    assert {id(p) for p in mine.parameters()} == {id(p) for p in decoder.parameters()}


@pytest.mark.parametrize("device", problems.DEVICES)
def test_float32(device):
    torch.manual_seed(0)
    for make, channels, of in PROJECTS.values():
        decoder = make()
        planes, xyz = torch.randn(2, 3, channels, 6, 6, dtype=DOUBLE), torch.rand(2, 40, 3, dtype=DOUBLE) - 0.5
        want = results(decoder(planes, xyz))
        mine = of(decoder).to(device, torch.float32)
        for a, b in zip(results(mine(planes.to(device).float(), xyz.to(device).float())), want, strict=True):
            assert float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()) < 1e-4


def test_bad_decoders_are_refused():
    with pytest.raises(ValueError, match="decoder: expected a module with linear layers"):
        from_openlrm(nn.ReLU())
    with pytest.raises(ValueError, match=r"expected a state_dict with matrices named \.\.\.weight, got a"):
        from_openlrm({"a": torch.zeros(3)})
    two = nn.ModuleDict({"sdf": nn.Linear(240, 1), "rgb": nn.Linear(240, 3)})
    with pytest.raises(ValueError, match=r"one chain of linear layers, got weights \(1, 240\) and \(3, 240\)"):
        from_openlrm(two)
    with pytest.raises(ValueError, match="half_width"):
        from_triposr(TripoSr(), radius=0.0)
