"""Modules in place of other projects' decoders equal the projects' code, written again from its published shapes."""

from __future__ import annotations

import pickle

import numpy as np
import problems
import pytest
import torch
from peers import DOUBLE, Blaze3dm, Eg3d, KPlanes, Nfd, OpenLrm, SemCity, SsdNerf, TripoSr
from torch import nn

from tcam_ext import explain
from tcam_ext.nn import (
    from_blaze3dm,
    from_eg3d,
    from_kplanes,
    from_nfd,
    from_openlrm,
    from_semcity,
    from_ssdnerf,
    from_triposr,
)
from tcam_ext.projects.decoder import _in_order


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
    "ssdnerf": (SsdNerf, 6, from_ssdnerf),
    "ssdnerf-plain": (lambda: SsdNerf(views=False, hidden=1), 6, from_ssdnerf),
    "blaze3dm": (Blaze3dm, 32, from_blaze3dm),
    "blaze3dm-product": (lambda: Blaze3dm("prod", False), 32, lambda d: from_blaze3dm(d, "prod")),
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
    unused = {"allow_unused": True, "materialize_grads": True}  # Blaze3DM's planes of its objects, SSDNeRF's colours
    expected = torch.autograd.grad(results(want), inputs, grads, **unused)
    for a, b in zip(torch.autograd.grad(results(got), inputs, grads, **unused), expected, strict=True):
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
    ends = [0.5 - 0.5 / n if getattr(decoder, "cells", False) else 0.5 for n in size]
    axes = [torch.linspace(-e, e, n, dtype=DOUBLE) * decoder.width for n, e in zip(size, ends, strict=True)]
    xyz = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3).expand(2, -1, -1)
    xyz = xyz.flip(-1) if getattr(decoder, "order", "xyz") == "zyx" else xyz
    for a, b in zip(results(mine.grid(planes, size)), results(decoder(planes, xyz)), strict=True):
        torch.testing.assert_close(a.flatten(2).mT, b, rtol=1e-9, atol=1e-9)


def test_a_state_dict_gives_the_same(project):
    decoder, planes, of = project
    xyz = torch.rand(2, 7, 3, dtype=DOUBLE) - 0.5
    mine = of({k: v.clone() for k, v in decoder.state_dict().items()})
    prepare = getattr(decoder, "prepare", lambda planes: planes)  # Blaze3DM's convolution is a module of its own
    for a, b in zip(results(mine(prepare(planes), xyz)), results(decoder(planes, xyz)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(p.requires_grad for p in mine.parameters())
    names = [id(p) for p in mine.state_dict(keep_vars=True).values()]
    assert len(names) == len(set(names))
    single = mine.float()(prepare(planes).float(), xyz.float())
    for a, b in zip(results(single), results(decoder(planes, xyz)), strict=True):
        assert problems.relative(a.double(), b) < 1e-4


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
    assert list(_in_order(names)) == want
    names = ["second.2.weight", "first.2.weight", "second.0.weight", "first.0.weight"]
    assert _in_order(names) == ["second.0.weight", "second.2.weight", "first.0.weight", "first.2.weight"]


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


def test_colours_by_direction():
    """SSDNeRF's density and colour of points and directions, of one object too, with z flipped and deeper networks."""
    torch.manual_seed(0)
    for decoder in (SsdNerf(), SsdNerf(flip_z=True, hidden=1)):
        mine = from_ssdnerf(decoder)
        planes = torch.randn(2, 3, 6, 7, 7, dtype=DOUBLE, requires_grad=True)
        xyz = (torch.rand(2, 50, 3, dtype=DOUBLE) * 2.2 - 1.1).requires_grad_()
        directions = torch.nn.functional.normalize(torch.randn(2, 50, 3, dtype=DOUBLE), dim=-1).requires_grad_()
        want, got = decoder(planes, xyz, directions), mine(planes, xyz, directions)
        inputs = [planes, xyz, directions, *decoder.parameters()]
        for key in ("sigma", "rgb"):
            torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-9)
            grad = torch.randn_like(want[key])
            expected = torch.autograd.grad(
                want[key], inputs, grad, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            own = torch.autograd.grad(got[key], inputs, grad, retain_graph=True, materialize_grads=True, allow_unused=True)
            for i, (a, b) in enumerate(zip(own, expected, strict=True)):
                if i == 2:  # along the sphere: harmonics may be continued from it in any way
                    a, b = (g - (g * directions).sum(-1, keepdim=True) * directions for g in (a, b))
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        one = mine(planes[0], xyz[0], directions[0])
        torch.testing.assert_close(one["rgb"], want["rgb"][0], rtol=1e-9, atol=1e-9)
        volume = mine.grid(planes, (3, 4, 5), grid="cells")["sigma"]
        at = torch.tensor([[[1 / 3 * 2 - 2 / 3, -0.75, 0.8]]], dtype=DOUBLE).expand(2, -1, -1)
        torch.testing.assert_close(volume[:, :, 1, 0, 4], decoder(planes, at)["sigma"][:, 0], rtol=1e-9, atol=1e-9)
        part = mine.grid(planes, (3, 4, 5), grid="cells", bounds=[(-1, 1), (-1, 1), (-1.0, 1.0)])["sigma"]
        torch.testing.assert_close(part, volume, rtol=1e-12, atol=1e-12)
    bare = SsdNerf()
    bare.dir_net, bare.color_net[0] = None, nn.Linear(80, 3, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"directions: expected \(2, 50, 3\)"):
        mine(planes, xyz, directions[:, :7])
    with pytest.raises(TypeError, match="planes: expected a tensor"):
        mine(list(planes.unbind(1)), xyz)
    for source in (bare, bare.state_dict()):
        assert from_ssdnerf(source)(planes, xyz).keys() == {"sigma"}
    with pytest.raises(ValueError, match="directions: expected None"):
        from_ssdnerf(bare)(planes, xyz, directions)


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"linear": True}, {"concat": False}, {"channels": 5, "scales": (1, 2)}, {"tiny": False}, {"scales": (1,)}],
    ids=str,
)
def test_kplanes(time, options):
    """Points, gradients, a state_dict, and a grid at one time, of hybrid and linear fields."""
    torch.manual_seed(0)
    field = KPlanes(time=time, **options)
    decode = from_kplanes(field)
    points = (torch.rand(4, 9, 3, dtype=DOUBLE) * 3.6 - 2).requires_grad_()
    stamps = [torch.rand(4, dtype=DOUBLE) * 2 - 1] if time else []
    want, got = field(points, *stamps), decode(field.grids, points, *stamps)
    assert want.keys() == got.keys()
    inputs = [points, *(p for p in field.parameters() if p.requires_grad)]
    grads = [torch.randn_like(w) for w in want.values()]
    for a, b in zip(got.values(), want.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(list(want.values()), inputs, grads)
    for a, b in zip(torch.autograd.grad(list(got.values()), inputs, grads), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    state = {k: v.clone() for k, v in field.state_dict().items()}
    again = from_kplanes(state, concat_features=options.get("concat", True))
    copied = pickle.loads(pickle.dumps(again))
    for got in (again(field.grids, points, *stamps), copied(field.grids, points, *stamps)):
        assert got.keys() == want.keys()
        for a, b in zip(got.values(), want.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    size = (3, 4, 2)
    axes = [torch.linspace(lo, hi, n, dtype=DOUBLE) for (lo, hi), n in zip(field.aabb.T.tolist(), size, strict=True)]
    xyz = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3)
    volume = decode.grid(field.grids, size, **({"time": 0.3} if time else {}))
    dense = field(xyz, *([torch.full((1,), 0.3, dtype=DOUBLE)] if time else []))
    for a, b in zip(volume.values(), dense.values(), strict=True):
        torch.testing.assert_close(a.flatten(2).mT, b, rtol=1e-9, atol=1e-9)


def test_a_field_that_changes_later_is_used():
    torch.manual_seed(0)
    field, other, points = KPlanes(scales=(1, 2)), KPlanes(scales=(1, 2)), torch.randn(3, 5, 3, dtype=DOUBLE)
    other.aabb.data *= 0.7
    decode = from_kplanes(field)
    field.load_state_dict(other.state_dict())
    torch.testing.assert_close(decode(field.grids, points)["density"], other(points)["density"], rtol=1e-9, atol=1e-9)


def test_a_grid_at_one_time_goes_through_maps():
    field = KPlanes(time=True, scales=(1, 2))
    text = explain(from_kplanes(field).grid, field.grids, (8, 8, 8), time=0.3)["values"]
    assert "maps over pairs of axes, multiplied" in text


def test_kplanes_in_a_contracted_space():
    torch.manual_seed(0)
    field = KPlanes(scales=(1, 2))
    field.spatial_distortion = lambda x: 2 * x / (1 + x.abs())
    points = torch.randn(3, 5, 3, dtype=DOUBLE) * 4
    torch.testing.assert_close(
        from_kplanes(field)(field.grids, points)["density"], field(points)["density"], rtol=1e-9, atol=1e-9
    )


def test_bad_fields_are_refused():
    field = KPlanes(scales=(1, 2))
    with pytest.raises(ValueError, match="timestamps: expected None"):
        from_kplanes(field)(field.grids, torch.zeros(1, 2, 3), torch.zeros(1))
    timed = KPlanes(time=True, scales=(1, 2))
    with pytest.raises(ValueError, match="time: expected a number"):
        from_kplanes(timed).grid(timed.grids, (2, 2, 2))
    for more in ({"hidden": 48}, {"concat_features": False}):
        with pytest.raises(ValueError, match=r"expected the parameters of a network of .* features"):
            from_kplanes(field.state_dict(), **more)
    with pytest.raises(ValueError, match="without sigma_net"):
        from_kplanes({k: v for k, v in field.state_dict().items() if k.startswith("grids")})
    with pytest.raises(ValueError, match="reduce: expected"):
        from_blaze3dm(Blaze3dm(), "mean")
    with pytest.raises(ValueError, match="expected grids of 3 or 6 planes"):
        from_kplanes(OpenLrm())
    with pytest.raises(ValueError, match="density_activation"):
        from_kplanes(field, density_activation="softplus")
    with pytest.raises(ValueError, match="without base_net and density_net"):
        from_ssdnerf(OpenLrm())
