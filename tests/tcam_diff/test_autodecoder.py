"""Normalisation, noise, total variation, and the fit of a small volume (algorithm.md section 9)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tcam_diff.autodecoder import artefact, planes
from tcam_diff.autodecoder.config import FitConfig
from tcam_diff.autodecoder.fit import Fitter
from tcam_diff.autodecoder.objective import TrainingObjective, make_decoder
from tcam_diff.autodecoder.perceptual import Perceptual, ssim2d
from tcam_diff.autodecoder.planes import init_planes
from tcam_diff.data.volume import VolumeInfo, intensity_range
from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import psnr_of_mse

import tcam_ext

SMALL = ["channels=8", "widths=[32, 32]", "steps=150", "region=volume"]


def ellipsoids(n=24):
    """A smooth volume in [0, 1]."""
    x, y, z = np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1] * 3, indexing="ij")
    inner = np.exp(-8 * ((x - 0.2) ** 2 + 2 * y**2 + (z + 0.1) ** 2))
    return (0.2 + 0.6 * inner + 0.2 * np.exp(-6 * (x**2 + (y - 0.3) ** 2))).astype(np.float32).clip(0, 1)[None]


# ---- planes ----------------------------------------------------------------------------


def test_rms_norm_has_unit_energy_and_ignores_scale():
    f = 3 * torch.randn(2, 5, 6, 7, requires_grad=True)
    normal = planes.rms_norm(f)
    torch.testing.assert_close(normal.square().mean((1, 2, 3)).sqrt(), torch.ones(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(planes.rms_norm(10 * f), normal, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(f)
    (grad,) = torch.autograd.grad((normal * weight).sum(), f)
    f = f.detach()
    assert abs(float((grad * f).sum())) < 1e-4 * float(grad.norm() * f.norm())  # orthogonal: scale does not matter


@pytest.mark.parametrize("size", [(16, 16, 16), (32, 32, 32), (24, 40, 17), (8, 8, 8)])
def test_texel_noise_has_its_standard_deviation_at_the_voxels(size):
    """Measured with decode_grid: a decoder with one identity layer returns the sampled features."""
    channels, texels = 12, (16, 16, 16)
    zero = [torch.zeros(1, channels, 16, 16) for _ in range(3)]
    sampled = []
    for seed in range(6):
        noisy = planes.texel_noise(zero, 0.32, size, seed)
        for first in range(0, 3 * channels, 12):
            w = torch.eye(3 * channels)[first : first + 12]
            sampled.append(tcam_ext.decode_grid(noisy, [w], [None], size).square().mean())
    assert float(torch.stack(sampled).mean().sqrt()) == pytest.approx(0.32, rel=0.03)
    assert texels == (16, 16, 16)


def test_total_variation():
    assert planes.total_variation([torch.ones(1, 2, 4, 5)] * 3) == 0
    ramp = torch.arange(5.0).expand(1, 2, 4, 5)
    assert planes.total_variation([ramp, ramp, ramp]) == 3
    assert planes.total_variation([torch.randn(1, 2, 1, 1)] * 3) == 0


# ---- configuration ---------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_presets_are_valid_and_survive_a_round_trip(preset):
    config = FitConfig.load(preset)
    assert FitConfig.model_validate(json.loads(config.model_dump_json())) == config
    assert (config.channels, config.beta, config.noise_std, config.grad_clip) == (42, 0.3, 0.32, 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=3", "did you mean steps"),
        ("steps", "key=value"),
        ("steps=-1", "steps"),
        ("steps=many", "steps"),
        ("activation=gelu", "activation"),
        ("stride=0", "stride"),
        ("widths=[300]", "widths"),
        ("channels=[", "channels"),
    ],
)
def test_bad_configuration_names_the_key(override, message):
    with pytest.raises(UserError, match=message):
        FitConfig.load("fast", [override])


def test_numbers_in_any_notation():
    assert FitConfig.load("fast", ["lr_planes=2e-3"]).lr_planes == 2e-3


# ---- fitting ---------------------------------------------------------------------------


def test_a_small_volume_is_fitted():
    """MSE below 5e-4 on a smooth 24^3 volume with noise; algorithm.md 9.5 requires it of a 32^3 volume."""
    fitter = Fitter(ellipsoids(), FitConfig.load("fast", [*SMALL, "steps=300"]))  # half of the steps in 9.5
    result = fitter.run()
    assert result.steps_done == fitter.config.steps
    assert result.psnr > psnr_of_mse(5e-4)
    for p in result.planes:
        assert float(p.square().mean().sqrt()) == pytest.approx(1, rel=1e-4)


def test_equal_seeds_give_equal_bits_and_others_do_not():
    def run(seed, steps=5):
        return Fitter(ellipsoids(12), FitConfig.load("fast", [*SMALL, f"steps={steps}", f"seed={seed}"])).run().planes

    torch.manual_seed(1)
    a = run(0)
    torch.manual_seed(2)  # the global generator is not used
    b = run(0)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], run(1)[0])


@pytest.mark.parametrize("mode", ["point", "texel"])
def test_noise_makes_the_decoder_less_sensitive(mode):
    """Equation 7 acts as a penalty on the decoder's Jacobian (algorithm.md 6.2): the more noise, the less sensitivity."""
    changes = []
    for noise in (0.0, 0.32, 1.0):
        torch.manual_seed(0)
        result = Fitter(
            ellipsoids(),
            FitConfig.load("fast", [*SMALL, "steps=300", "noise_free_fraction=0", f"noise_std={noise}", f"noise_mode={mode}"]),
        ).run()
        with torch.no_grad():
            clean = result.decoder(result.planes, (24, 24, 24))
            moved = result.decoder([p + 0.1 * torch.randn_like(p) for p in result.planes], (24, 24, 24))
        changes.append(float((moved - clean).square().mean().sqrt()))
    assert changes[0] > changes[1] > changes[2]


def objective(size, *overrides):
    return TrainingObjective(FitConfig.load("fast", ["channels=4", "widths=[8]", *overrides]), size)


@pytest.mark.parametrize(("overrides", "voxels"), [(["region=volume"], 4096), (["region=box", "voxels_per_step=700"], 729)])
def test_boxes_lie_in_the_volume(overrides, voxels):
    o = objective((16, 16, 16), *overrides)
    boxes = [o.visit(0, i).regions[0] for i in range(20)]
    for box in boxes:
        assert math.prod(hi - lo for lo, hi in box) == voxels
        assert all(0 <= lo < hi <= 16 for lo, hi in box)
    assert len(set(boxes)) == (1 if voxels == 4096 else len(boxes))


def test_slices_lie_across_the_volume():
    o = objective((8, 9, 10), "region=slices", "slices=2")
    boxes = o.visit(3, 4).regions
    assert sorted(sum(hi - lo == 1 for lo, hi in box) for box in boxes) == [1] * 6
    assert o.visit(3, 4).regions == boxes
    assert o.visit(3, 5).regions != boxes


def test_lattices_cover_the_volume():
    """Every voxel is visited once per round, with the value that decoding the whole volume gives it."""
    o = objective((13, 12, 14), "region=lattice", "stride=3", "plane_size=[7, 5, 6]")
    volume = np.random.default_rng(0).random((1, *o.size)).astype(np.float32)
    planes = init_planes(4, o.texels, 1.0, torch.Generator().manual_seed(0))
    decoder = make_decoder(o.config, 1)
    for first in (0, 27):  # two rounds
        seen = torch.zeros(1, 1, *o.size)
        with torch.no_grad():
            whole = decoder(planes, o.size)
            for i in range(first, first + 27):
                visit = o.read(o.visit(0, i), volume)
                (at,), (want,) = visit.regions, visit.targets
                a, b, c = at.start
                got = decoder(o._lattice(planes, at), want.shape[2:])
                seen[:, :, a::3, b::3, c::3] += 1
                torch.testing.assert_close(got, whole[:, :, a::3, b::3, c::3], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(want[0], torch.from_numpy(volume[:, a::3, b::3, c::3]))
        assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
@pytest.mark.parametrize("region", ["volume", "box", "slices", "lattice"])
def test_stored_volumes_are_converted_to_the_unit_range(region, dtype):
    """The loss of a stored volume is that of its float32 values."""
    o = objective((10, 9, 8), f"region={region}", "voxels_per_step=200", "stride=2", "noise_std=0.1")
    stored = (np.random.default_rng(1).random((2, 10, 9, 8)) * (255 if dtype == np.uint8 else 1)).astype(dtype)
    plain = stored.astype(np.float32) / (255 if dtype == np.uint8 else 1)
    planes = init_planes(4, o.texels, 1.0, torch.Generator().manual_seed(0))
    decoder = make_decoder(o.config, 2)
    losses = [o.losses(planes, decoder, [o.read(o.visit(0, 5), v)])[0] for v in (stored, plain)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_several_objects_have_the_losses_of_each():
    o = objective((8, 8, 8), "region=lattice", "stride=2", "ssim_weight=0.1", "tv_weight=0.01")
    volumes = np.random.default_rng(2).random((3, 1, 8, 8, 8)).astype(np.float32)
    planes = [torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    decoder = make_decoder(o.config, 1)
    visits = [o.read(o.visit(n, 7), v) for n, v in enumerate(volumes)]
    together, terms = o.losses(planes, decoder, visits)
    alone = [o.losses([p[n : n + 1] for p in planes], decoder, [visits[n]])[0] for n in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=0)
    torch.testing.assert_close(together, terms["data"] + 0.01 * terms["tv"] + 0.1 * terms["ssim"])


@pytest.mark.parametrize("norm", ["plane", "texel", "channel", "triplane", "none"])
def test_variants_of_equation_6(norm):
    f = [3 * torch.randn(2, 5, 6, 7), torch.randn(2, 5, 7, 4), torch.randn(2, 5, 6, 4)]
    got = planes.normalise(f, norm)
    if norm == "plane":
        energy = [g.square().mean((1, 2, 3)) for g in got]
    elif norm == "texel":
        energy = [g.square().mean(1) for g in got]
    elif norm == "channel":
        energy = [g.square().mean((2, 3)) for g in got]
    elif norm == "triplane":
        energy = [torch.cat([g.flatten(1) for g in got], 1).square().mean(1)]
        assert float(got[0].square().mean()) > float(got[1].square().mean())
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, f, strict=True))
        return
    for e in energy:
        torch.testing.assert_close(e, torch.ones_like(e), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dims", [(-3, -2, -1), (-3,), (-2, -1)])
def test_gradients_written_by_hand(dims):
    f = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: planes.rms_norm(x, dims), f)
    assert torch.autograd.gradcheck(lambda x: planes.total_variation([x, x[:, :, :1], x]), f)


@pytest.mark.parametrize(("kind", "want"), [("l1_mean", 6.0), ("l2_mean", 12.0), ("rms", 6 * 2**0.5), ("nfd_sum", None)])
def test_variants_of_total_variation(kind, want):
    """Differences 0 and 2 in equal numbers along both axes."""
    steps = torch.tensor([0.0, 0.0, 2.0, 2.0, 4.0])
    plane = (steps[:, None] + steps).expand(2, 3, 5, 5)
    count = 3 * 5 * 4
    want = 6 * (2 * count) ** 0.5 if want is None else want
    assert planes.total_variation([plane] * 3, kind).tolist() == pytest.approx([want] * 2, rel=1e-5)


def test_ssim_of_slices_is_that_of_the_metric():
    """In two dimensions the value is that of MONAI's SSIMMetric."""
    from monai.metrics import SSIMMetric

    a, b = torch.rand(2, 1, 24, 20), torch.rand(2, 1, 24, 20)
    want = SSIMMetric(2, data_range=1.0)(a, b).mean()
    torch.testing.assert_close(ssim2d(a, b), want, rtol=1e-4, atol=1e-5)
    assert float(ssim2d(a, a)) == pytest.approx(1)
    assert float(ssim2d(a[:, :, :6, :8], a[:, :, :6, :8])) == pytest.approx(1)  # smaller than the window


def test_the_perceptual_loss_takes_a_local_file_and_says_what_is_missing(tmp_path):
    lpips = pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.squeezenet1_1(weights=None)
    torch.save(net.state_dict(), tmp_path / "squeezenet.pt")
    ours = Perceptual(str(tmp_path / "squeezenet.pt"))
    x = torch.rand(2, 1, 48, 48)
    y = (x + 0.2 * torch.rand_like(x)).requires_grad_()
    assert float(ours(x, x)) == 0
    value = ours(y, x)
    value.backward()
    assert float(value.detach()) > 0
    assert float(y.grad.abs().sum()) > 0
    plain = Perceptual(str(tmp_path / "squeezenet.pt"), "eq4")
    layers = [plain.net.net(plain.net.scaling_layer(v.expand(-1, 3, -1, -1))) for v in (x, y)]
    want = sum(float((p - q).square().mean().detach()) for p, q in zip(*layers, strict=True))
    assert float(plain(y, x).detach()) == pytest.approx(want, rel=1e-5)
    assert abs(want - float(value.detach())) > 1e-3 * want
    reference = lpips.LPIPS(net="squeeze", verbose=False, pnet_rand=True)
    for key, tensor in reference.net.state_dict().items():
        assert torch.equal(ours.net.net.state_dict()[key], net.state_dict()["features." + key.split(".", 1)[1]])
        assert tensor.shape == ours.net.net.state_dict()[key].shape
    with pytest.raises(UserError, match=r"perceptual_weights.*gone\.pt: no such file"):
        Perceptual(str(tmp_path / "gone.pt"))


def test_the_perceptual_term_is_the_sum_of_the_axes_means():
    """algorithm.md 7.3, with the mean square difference in place of the network."""
    config = FitConfig.load("fast", [*SMALL, "feature_slices=2", "tv_weight=0", "ssim_weight=0"])
    objective = TrainingObjective(config.model_copy(update={"perceptual_weight": 0.0}), (12, 10, 8))
    objective.config = config.model_copy(update={"perceptual_weight": 1.0})
    objective.perceptual = lambda got, want: (got - want).square().mean()
    decoder = make_decoder(config, 1)
    raw = init_planes(config.channels, objective.texels, 0.1, torch.Generator().manual_seed(0))
    volume = np.random.default_rng(0).random((1, 12, 10, 8), dtype=np.float32)
    visit = objective.read(objective.visit(0, 0), volume)
    assert len(visit.features) == 6
    _, terms = objective.losses(raw, decoder, [visit], noise=False)
    normal = planes.normalise(raw, config.norm)
    by_axis = [[], [], []]
    for box, target in zip(visit.features, visit.targets[len(visit.regions) :], strict=True):
        got = decoder(normal, (12, 10, 8), box=box, compute_dtype=objective.compute)
        by_axis[next(a for a, (lo, hi) in enumerate(box) if hi - lo == 1)].append(
            float((got - target).square().mean().detach())
        )
    assert float(terms["perceptual"]) == pytest.approx(sum(np.mean(v) for v in by_axis), rel=1e-4)


@pytest.mark.parametrize("mode", ["point", "texel"])
def test_feature_slices_have_equation_7s_noise_if_asked(mode):
    terms = {}
    for noisy in (False, True):
        changes = [*SMALL, "tv_weight=0", "ssim_weight=1", f"noise_mode={mode}", f"feature_noise={noisy}"]
        config = FitConfig.load("fast", changes)
        objective = TrainingObjective(config, (12, 12, 12))
        decoder = make_decoder(config, 1)
        raw = init_planes(config.channels, objective.texels, 0.1, torch.Generator().manual_seed(0))
        visit = objective.read(objective.visit(0, 0), ellipsoids(12))
        terms[noisy] = [float(objective.losses(raw, decoder, [visit], noise=n)[1]["ssim"]) for n in (False, True)]
    assert terms[False][0] == terms[False][1] == terms[True][0]
    assert terms[True][1] != terms[True][0]


def test_stopping_early_keeps_the_best_state():
    calls = []
    fitter = Fitter(ellipsoids(16), FitConfig.load("fast", SMALL))
    result = fitter.run(calls.append, lambda: len(calls) >= 7)
    assert result.stopped
    assert result.steps_done == 7
    with torch.no_grad():
        out = result.decoder(result.planes, (16, 16, 16))
    assert torch.isfinite(out).all()


def test_a_fit_that_diverges_keeps_the_best_state():
    fitter = Fitter(ellipsoids(12), FitConfig.load("fast", [*SMALL, "steps=40"]))
    step = fitter.step

    def poisoned(index):
        if index == 20:
            with torch.no_grad():
                fitter.planes[0][0, 0, 0, 0] = math.nan
        return step(index)

    fitter.step = poisoned
    result = fitter.run()
    assert result.steps_done == 40
    assert math.isfinite(result.psnr)
    assert all(torch.isfinite(p).all() for p in result.planes)


def test_intensity_maps_both_ways():
    data = np.stack([np.linspace(-1000, 500, 27), np.full(27, 7.0)]).reshape(2, 3, 3, 3).astype(np.float32)
    ranges = intensity_range(data)
    unit = VolumeInfo(channels=2, shape=data.shape[1:], affine=np.eye(4), intensity=ranges).to_unit(data)
    assert unit.min() == 0
    assert unit.max() == 1
    for c, (lo, hi) in enumerate(ranges):
        np.testing.assert_allclose(lo + (hi - lo) * unit[c], data[c], rtol=1e-6, atol=1e-3)


# ---- artefacts -------------------------------------------------------------------------


@pytest.fixture
def fitted(tmp_path):
    result = Fitter(ellipsoids(12), FitConfig.load("fast", [*SMALL, "steps=3"])).run()
    info = VolumeInfo(channels=1, shape=(12, 12, 12), affine=np.eye(4), intensity=[(-5.0, 11.0)], source="x.nii")
    artefact.save(tmp_path / "run", result, info)
    return tmp_path / "run", result


def test_an_artefact_decodes_to_the_same_volume(fitted):
    folder, result = fitted
    loaded = artefact.load(folder)
    with torch.no_grad():
        want = -5 + 16 * result.decoder(result.planes, (10, 9, 8))[0].numpy()
    for slab in (1, 3, None):
        got = np.concatenate(list(loaded.decode((10, 9, 8), slab)), axis=3)
        np.testing.assert_array_equal(got, want)


def test_an_artefact_carries_its_metadata(fitted):
    folder, _ = fitted
    with safe_open(folder / "planes.safetensors", framework="pt") as f:
        meta = json.loads(f.metadata()["tcam"])
        assert f.get_tensor("xy").shape == (1, 8, 6, 6)
    assert meta["shape"] == [12, 12, 12]
    assert meta["intensity"] == [[-5.0, 11.0]]
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml",
        "decoder.safetensors",
        "manifest.json",
        "planes.safetensors",
    ]


@pytest.mark.parametrize("name", ["planes.safetensors", "decoder.safetensors", "config.yaml"])
def test_a_changed_byte_or_a_missing_file_is_noticed(fitted, name):
    folder, _ = fitted
    path = folder / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match=name):
        artefact.load(folder)
    path.unlink()
    with pytest.raises(UserError, match=name):
        artefact.load(folder)


def test_a_folder_without_an_artefact_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a folder that"):
        artefact.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        artefact.load(tmp_path)


def test_an_artefact_is_not_overwritten_by_accident(fitted):
    folder, _ = fitted
    with pytest.raises(UserError, match="--overwrite"), artefact.reserved(folder, overwrite=False):
        pass
    with artefact.reserved(folder, overwrite=True):
        pass
