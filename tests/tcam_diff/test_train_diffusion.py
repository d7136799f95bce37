"""Training of stage 2: data, steps, interrupted runs, ranks and models."""

from __future__ import annotations

import json
import random
import re
import time
import warnings

import pytest
import runs
import torch
import yaml
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.autodecoder.planes import plane_sizes
from tcam_diff.config import presets
from tcam_diff.diffusion.config import DiffusionConfig, NetworkConfig, presets_text
from tcam_diff.diffusion.data import Centre, LatentData
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.network import TriplaneUNet
from tcam_diff.diffusion.process import flip, pack
from tcam_diff.diffusion.report import samples_picture
from tcam_diff.diffusion.train import DiffusionTraining
from tcam_diff.errors import UserError
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.logger import read_metrics
from tcam_diff.training.rng import in_epochs


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "latents")


@pytest.fixture(scope="module")
def oblong(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "oblong", texels=(8, 12, 4))


def states(out):
    step, shared, _ = checkpoint.load(checkpoint.latest(out / "checkpoints"))
    return step, shared["task"]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ---- data ----------------------------------------------------------------------------------


def test_data_are_the_planes_of_the_set(latents):
    data, latent_set = LatentData(latents), LatentSet(latents)
    assert data.names == [e.name for e in latent_set.entries]
    for i, entry in enumerate(latent_set.entries):
        for a, b in zip(data.rows([i]), latent_set.planes(entry), strict=True):
            assert torch.equal(a[0], b)


def test_centring_leaves_no_mean_and_unit_energy_and_is_undone(latents):
    data = LatentData(latents)
    centre = Centre.from_planes(data.planes)
    moved = centre.apply(data.rows(range(len(data))))
    for p, q, original in zip(moved, centre.invert(moved), data.planes, strict=True):
        assert float(p.mean(0).abs().max()) < 1e-5
        assert float(p.square().mean()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(q, original)


def test_planes_that_do_not_fit_the_network_are_refused_at_the_start(latents, oblong, tmp_path):
    with pytest.raises(UserError, match=r"latents: .*rows and columns multiples of 16 \(5 network.multipliers\)"):
        DiffusionTraining(runs.diffusion_config(latents, "network.multipliers=[1,1,1,1,1]"), Distributed(), tmp_path)
    with pytest.raises(UserError, match="concatenated needs planes of one size"):
        DiffusionTraining(runs.diffusion_config(oblong, "network.weights=concatenated"), Distributed(), tmp_path)
    other = runs.make_latents(tmp_path / "other", seed=1, decoder_seed=1)
    with pytest.raises(UserError, match="planes of another decoder"):
        DiffusionTraining(runs.diffusion_config(latents, f"validation={other}"), Distributed(), tmp_path)


@pytest.mark.parametrize("texels", [(64, 64, 64), (36, 36, 36), (10, 12, 9), (1, 1, 1), (120, 120, 78)])
def test_presets_that_will_refuse_planes_are_named_with_a_size_that_fits(texels):
    """What the text of stage 1 says is what the networks do."""

    def takes(name, size):
        settings = DiffusionConfig.load(name).network.model_dump() | {"base": 8, "head_channels": 8}
        with torch.device("meta"):
            unet = TriplaneUNet(3, NetworkConfig.model_validate(settings))
        try:
            unet.check([(3, *s) for s in plane_sizes(size)])
        except ValueError:
            return False
        return True

    text = presets_text(texels)
    refusing = {n for n in presets("diffusion") if not takes(n, texels)}
    named = re.findall(r"([\w-]+(?:, [\w-]+)*) \(multiples of \d+, plane_size=([\d,\[\]]+)\)", text)
    assert {n for names, _ in named for n in names.split(", ")} == refusing
    for names, size in named:
        fitting = yaml.safe_load(size)
        assert all(takes(n, fitting if isinstance(fitting, list) else [fitting] * 3) for n in names.split(", "))
    assert (text == "") == (not refusing)


def test_a_damaged_plane_file_is_named(latents, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    path = sorted((copy / "planes").iterdir())[2]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=path.name):
        LatentData(copy)


def test_labels_come_from_a_table(latents, tmp_path):
    table = tmp_path / "labels.csv"
    names = LatentData(latents).names
    table.write_text("name,label\n" + "".join(f"{n},{'well' if i % 2 else 'ill'}\n" for i, n in enumerate(names)))
    data = LatentData(latents, labels=str(table))
    assert data.classes == ["ill", "well"]
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1]
    table.write_text("name,label\nv0-0,ill\n")
    with pytest.raises(UserError, match="no label for v0-1"):
        LatentData(latents, labels=str(table))
    table.write_text("volume,class\nv0-0,ill\n")
    with pytest.raises(UserError, match="columns name and label"):
        LatentData(latents, labels=str(table))
    table.write_text("name,label\n" + "".join(f"{n},new\n" for n in names))
    with pytest.raises(UserError, match="v0-0 is new, the training volumes ill, well"):
        LatentData(latents, labels=str(table), classes=["ill", "well"])
    with pytest.raises(UserError, match=r"none\.csv"):
        LatentData(latents, labels=str(tmp_path / "none.csv"))


def test_every_epoch_visits_every_volume(latents):
    seen = [in_epochs(p, 6, 0) for p in range(18)]
    for epoch in range(3):
        assert sorted(seen[6 * epoch : 6 * epoch + 6]) == list(range(6))
    assert len({tuple(seen[i : i + 6]) for i in (0, 6, 12)}) == 3


@pytest.mark.parametrize("centre", ["center=false", "center=true"])
def test_flips_are_those_of_the_volume_and_only_along_the_axes_asked(latents, centre):
    """States decode to the volume mirrored along x, or to the volume itself."""
    still = DiffusionTraining(runs.diffusion_config(latents, centre), Distributed(), latents)
    turning = DiffusionTraining(runs.diffusion_config(latents, centre, "flip=[x]"), Distributed(), latents)
    turned = 0
    for step in range(4):
        a, noise, *_ = still._batch(step, range(4))
        b, same, *_ = turning._batch(step, range(4))
        assert all(torch.equal(p, q) for p, q in zip(noise, same, strict=True))
        before, after = (t.model(0).decode(t.model(0).planes(pack(x))) for t, x in ((still, a), (turning, b)))
        for one, other in zip(before, after, strict=True):
            mirrored = float((one - other).abs().max()) > 1e-3
            torch.testing.assert_close(other, one.flip(1) if mirrored else one, rtol=0, atol=1e-5)
            turned += mirrored
    assert 2 <= turned <= 14


def test_states_that_are_flipped_have_unit_energy_too(latents):
    task = DiffusionTraining(runs.diffusion_config(latents, "center=true", "flip=[x, z]"), Distributed(), latents)
    states = task.centre.apply(task.data.rows(range(len(task.data))))
    for axis in (0, 2):
        turned = task.centre.apply(flip(task.data.rows(range(len(task.data))), axis))
        for p, q in zip(flip(states, axis), turned, strict=True):
            assert float(q.square().mean()) == pytest.approx(1, abs=1e-5)
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


# ---- steps ---------------------------------------------------------------------------------


def test_training_lowers_the_loss_of_held_out_volumes(latents, tmp_path):
    held_out = runs.make_latents(tmp_path / "held-out", seed=1, split="test")
    overrides = ("steps=150", "network.dropout=0", f"validation={held_out}", "lr=5e-3", "evaluate_volumes=6")
    task = DiffusionTraining(runs.diffusion_config(latents, *overrides), Distributed(), tmp_path)
    assert task.evaluate()["validation_loss"] == pytest.approx(2, abs=0.1)
    for i in range(150):
        task.step(i)
    assert task.evaluate()["validation_loss"] < 1.2


@pytest.mark.parametrize("overrides", [("accumulate=2",), ("accumulate=4", "network.checkpointing=true")])
def test_accumulated_gradients_are_those_of_the_batch(latents, tmp_path, overrides):
    plain = ("network.dropout=0", "compute_dtype=float64")
    gradients = []
    for more in ((), overrides):
        task = DiffusionTraining(runs.diffusion_config(latents, *plain, *more), Distributed(), tmp_path)
        task.step(0)
        gradients.append([p.grad for p in task.network.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm()) <= 1e-9 * float(a.norm() + 1e-12)


@pytest.mark.parametrize("overrides", [("network.weights=shared",), ("network.weights=concatenated",), ("center=true",),
    ("timesteps=antithetic",), ("latent_dtype=bfloat16",), ("compute_dtype=bfloat16",), ("network.cross=axis",),
    ("muon_lr=2e-2",)])  # fmt: skip
def test_every_switch_trains(latents, tmp_path, overrides):
    task = DiffusionTraining(runs.diffusion_config(latents, *overrides, "lr=5e-3", "steps=40"), Distributed(), tmp_path)
    first = float(task.step(0)["loss"])
    for i in range(1, 40):
        last = float(task.step(i)["loss"])
    assert last < first


def test_planes_of_unequal_sizes_train(oblong, tmp_path):
    task = DiffusionTraining(runs.diffusion_config(oblong), Distributed(), tmp_path)
    assert float(task.step(0)["loss"]) == pytest.approx(2, abs=0.2)
    assert task.model(1).geometry.texels == (8, 12, 4)


# ---- runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(latents, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    runs.finish(runs.start(runs.diffuse, latents, out))
    return out


def test_files_of_a_run(uninterrupted):
    assert sorted(p.name for p in uninterrupted.iterdir()) == [
        "checkpoints", "config.yaml", "machine.json", "metrics.jsonl", "model", "report.html", "samples", "tensorboard",
    ]  # fmt: skip
    metrics = read_metrics(uninterrupted)
    assert [m["step"] for m in metrics if "loss" in m] == [4, 8, 12, 16]
    assert [m["step"] for m in metrics if "training_loss" in m] == [8, 16]  # without a set for validation
    page = (uninterrupted / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert len(list((uninterrupted / "samples").glob("*.png"))) == 2


def test_a_finished_run_does_not_change(latents, uninterrupted):
    page = (uninterrupted / "report.html").read_text()
    weights = states(uninterrupted)
    runs.finish(runs.start(runs.diffuse, latents, uninterrupted, (), "auto"))
    assert (uninterrupted / "report.html").read_text() == page
    assert equal(states(uninterrupted), weights)


def test_the_best_checkpoint_is_one_that_was_evaluated(latents, tmp_path):
    """The score of a checkpoint is that of its step, not of an earlier evaluation."""
    runs.finish(runs.start(runs.diffuse, latents, tmp_path, ("keep=9", "checkpoint_every=3", "evaluate_every=4")))
    scores = {s: json.loads((tmp_path / "checkpoints" / f"step-{s:08d}" / "manifest.json").read_text())["score"]
              for s in checkpoint.steps(tmp_path / "checkpoints")}  # fmt: skip
    losses = {m["step"]: -m["training_loss"] for m in read_metrics(tmp_path) if "training_loss" in m}
    assert {s: v for s, v in scores.items() if v is not None} == losses
    assert {3, 9, 15} <= {s for s, v in scores.items() if v is None}


def test_killed_at_random_points_a_run_ends_with_the_same_bits(latents, uninterrupted, tmp_path):
    out, chance = tmp_path / "run", random.Random(1)

    def reached():
        return (checkpoint.steps(out / "checkpoints") or [0])[-1]

    kills = 0
    while reached() < 12:
        (process,) = runs.start(runs.diffuse, latents, out, (), "auto")
        goal = reached() + chance.choice((3, 3, 6))
        while process.is_alive() and reached() < goal:
            time.sleep(0.002)
        process.join(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        kills += 1
    runs.finish(runs.start(runs.diffuse, latents, out, (), "auto"))
    assert kills >= 2
    assert equal(states(out), states(uninterrupted))
    steps = [m["step"] for m in read_metrics(out) if "loss" in m]
    assert steps == sorted(set(steps))


def test_the_command_protects_a_run(latents, uninterrupted):
    with pytest.raises(UserError, match=r"contains a run.*--resume auto"):
        runs.diffuse(latents, uninterrupted)
    with pytest.raises(UserError, match=r"lr: the run in .* began with 0.002, --resume was given 0.1"):
        runs.diffuse(latents, uninterrupted, ("lr=0.1",), "auto")


def test_other_labels_are_refused(latents, tmp_path):
    table, names = tmp_path / "labels.csv", LatentData(latents).names
    table.write_text("name,label\n" + "".join(f"{n},{'ab'[i % 2]}\n" for i, n in enumerate(names)))
    runs.diffuse(latents, tmp_path / "run", (f"labels={table}", "steps=2"))
    table.write_text("name,label\n" + "".join(f"{n},{'ab'[i // 3]}\n" for i, n in enumerate(names)))
    with pytest.raises(UserError, match=r"labels: .*labels\.csv: not the labels with which the run began"):
        runs.diffuse(latents, tmp_path / "run", (f"labels={table}", "steps=2"), "auto")


def test_a_run_from_before_a_key_existed_is_continued(latents, tmp_path):
    """A key that is missing in the run's config.yaml had its default."""
    runs.diffuse(latents, tmp_path / "run", ("steps=2",))
    path = tmp_path / "run" / "config.yaml"
    absent = ("prior", "loss:", "  heads:")
    assert all(f"\n{key}" in path.read_text() for key in absent)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(absent)))
    runs.diffuse(latents, tmp_path / "run", ("steps=2",), "auto")
    with pytest.raises(UserError, match=r"prior: the run in .* began with none, --resume was given unit"):
        runs.diffuse(latents, tmp_path / "run", ("steps=2", "prior=unit"), "auto")
    with pytest.raises(UserError, match="network: the run in"):
        runs.diffuse(latents, tmp_path / "run", ("steps=2", "network.base=12"), "auto")


def test_other_latents_are_refused(uninterrupted, tmp_path):
    other = runs.make_latents(tmp_path / "other", seed=3)
    with pytest.raises(UserError, match="not the planes with which the run began"):
        runs.diffuse(other, uninterrupted, (), "auto")


@pytest.mark.parametrize(
    ("overrides", "count", "tolerance"),
    [
        ((), 1, 1e-6),
        (("compute_dtype=float64",), 20, 1e-9),
        (("compute_dtype=float64", "accumulate=2"), 2, 1e-9),
        (("compute_dtype=float64", "muon_lr=1e-2"), 5, 1e-9),
    ],
)
def test_two_processes_are_one(latents, tmp_path, overrides, count, tolerance):
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        arguments = (latents, tmp_path / str(world), count, ("network.dropout=0", *overrides))
        runs.finish(runs.start(runs.diffusion_steps, *arguments, world=world))
    one, two = (torch.load(tmp_path / str(w) / "rank-0.pt") for w in (1, 2))
    whole = torch.cat([g.flatten() for g in one["gradients"]]).norm()
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        assert float((a - b).norm()) <= tolerance * float(whole)
    if count > 1:
        for a, b in zip(one["network"], two["network"], strict=True):
            assert float((a - b).norm()) <= tolerance * float(a.norm() + 1)
    assert one["checked"]["training_loss"] == pytest.approx(two["checked"]["training_loss"], rel=1e-6)


def test_a_batch_that_cannot_be_shared(latents, tmp_path):
    with pytest.raises(UserError, match=r"batch: expected a multiple of 6 \(3 process"):
        DiffusionTraining(runs.diffusion_config(latents, "accumulate=2"), Distributed(0, 3), tmp_path)


def test_an_estimate_of_disk_space(latents, tmp_path):
    """That of the run; time and memory are for people."""
    over = ["tiny", f"latents={latents}", *runs.SMALL_DIFFUSION, "prior=gaussian"]
    words = runs.tcam("estimate", *over, "--seconds", 1).split()
    assert {"time", "host", "disk"} <= set(words)
    disk, unit = float(words[words.index("disk") + 1]), words[words.index("disk") + 2]
    runs.tcam("train-diffusion", *over, "--out", tmp_path / "run", "-q")
    files = [p for name in ("checkpoints", "model") for p in (tmp_path / "run" / name).rglob("*") if p.is_file()]
    kept = len(list((tmp_path / "run" / "checkpoints").iterdir()))
    model = sum(p.stat().st_size for p in files if "model" in p.parts)
    held = sum(p.stat().st_size for p in files) - model
    assert disk * {"KB": 1e3, "MB": 1e6}[unit] == pytest.approx(2 * held / kept + model, rel=0.25)


# ---- models --------------------------------------------------------------------------------


def test_a_model_trained_in_float64_draws(latents, tmp_path):
    task = DiffusionTraining(runs.diffusion_config(latents, "compute_dtype=float64"), Distributed(), tmp_path)
    assert samples_picture(task.model(0), 2, 1)[:4] == b"\x89PNG"


@pytest.mark.parametrize("overrides", [(), ("center=true",)])
def test_a_model_is_read_back_as_it_was(latents, tmp_path, overrides):
    task = DiffusionTraining(runs.diffusion_config(latents, *overrides), Distributed(), tmp_path)
    for i in range(3):
        task.step(i)
    model = task.model(3)
    model.save(tmp_path / "model")
    again = TriplaneDiffusion.load(tmp_path)  # from the folder of the run
    assert again.geometry == model.geometry
    x, t = torch.randn(2, model.length), torch.tensor([100.0, 800.0])
    assert torch.equal(model.estimate(x, t), again.estimate(x, t))
    for a, b in zip(model.planes(x), again.planes(x), strict=True):
        assert torch.equal(a, b)
        assert float(a.square().mean((1, 2, 3)).sub(1).abs().max()) < 1e-5
    torch.testing.assert_close(again.state(again.planes(again.state(task.data.rows([1])))), again.state(task.data.rows([1])))


def test_the_geometry_of_a_model_is_that_of_the_middle_volume(latents):
    model = DiffusionTraining(runs.diffusion_config(latents), Distributed(), latents).model(0)
    assert model.geometry.info.affine[0][3] in (2.0, 3.0)  # the affine of volume i starts at i
    assert model.geometry.info.intensity == [(-12.5, 92.5)]
    assert model.geometry.info.shape == (16, 16, 16)


def test_a_damaged_model_is_refused(uninterrupted, tmp_path):
    import shutil

    for name in ("network.safetensors", "model.json"):
        copy = tmp_path / name
        shutil.copytree(uninterrupted / "model", copy)
        path = copy / name
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=name):
            TriplaneDiffusion.load(copy)
    with pytest.raises(UserError, match="no model: expected a run"):
        TriplaneDiffusion.load(tmp_path)
    index = json.loads((uninterrupted / "model" / "model.json").read_text())
    assert index["provenance"]["volumes"] == 6


def test_normalising_every_channel_alone_is_warned_of(latents, tmp_path):
    """Then classes and times, which are added to channels, have no effect."""
    with pytest.warns(UserWarning, match=r"norm_groups=32 with network.base=8 .* take at most 4"):
        DiffusionTraining(runs.diffusion_config(latents, "network.norm_groups=32"), Distributed(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiffusionTraining(runs.diffusion_config(latents, "network.norm_groups=4"), Distributed(), tmp_path)
