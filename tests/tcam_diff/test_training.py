"""Training of stage 1: tables, schedule, checkpoints, ranks and interrupted runs."""

from __future__ import annotations

import errno
import functools
import json
import math
import random
import shutil
import time

import pytest
import runs
import torch
import yaml
from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.planes import init_planes
from tcam_diff.autodecoder.tables import PlaneTable
from tcam_diff.autodecoder.train import AutodecoderTraining, Schedule
from tcam_diff.errors import UserError
from tcam_diff.evaluation.metrics import psnr_of_mse
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import Distributed
from tcam_diff.training.ema import update_average
from tcam_diff.training.logger import read_metrics
from tcam_diff.training.loop import Cadence
from tcam_diff.training.loop import run as loop
from tcam_diff.training.rng import rng, seed_of


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return runs.make_store(tmp_path_factory.mktemp("store")).folder


# ---- streams and the schedule ----------------------------------------------------------


def test_streams_are_functions_of_their_names():
    assert seed_of(0, "noise", 3, 4) == 6754865986189519899  # resumed runs depend on these numbers
    names = [(s, n, o, v) for s in (0, 1) for n in ("noise", "region") for o in (1, 12) for v in (1, 2, 21)]
    assert len({seed_of(s, n, o, v) for s, n, o, v in names}) == len(names)
    assert seed_of(0, "a", 12, 1) != seed_of(0, "a", 1, 21)
    assert torch.equal(torch.randn(3, generator=rng(5, "x")), torch.randn(3, generator=rng(5, "x")))


@pytest.mark.parametrize(("objects", "batch", "inner"), [(7, 3, 1), (8, 4, 2), (5, 5, 1), (64, 8, 1), (3, 1, 3)])
def test_a_schedule_visits_every_object_of_a_slot_once_per_round(objects, batch, inner):
    schedule, turns = Schedule(objects, batch, inner, seed=1), -(-objects // batch)
    for round_ in range(3):  # whatever the batch, a round visits all objects equally often
        steps = range(round_ * inner * turns, (round_ + 1) * inner * turns)
        visits = [schedule.at(s, slot) for s in steps for slot in range(batch)]
        assert sorted(o for o, _, active in visits if active) == sorted([*range(objects)] * inner)
    for slot in range(batch):
        mine = list(schedule.of_slot(slot))
        seen = [v for s in range(3 * inner * turns) if (v := schedule.at(s, slot))[2]]
        assert {o for o, _, _ in seen} == set(mine)
        assert len(set(seen)) == len(seen)  # no visit occurs twice
        assert max(v for _, v, _ in seen) == 3 * inner - 1
    assert sorted(o for s in range(batch) for o in schedule.of_slot(s)) == list(range(objects))


def test_an_idle_slot_changes_nothing(store, tmp_path):
    """With 7 objects and a batch of 4 the fourth slot is idle in every second step: its object stays as it was."""
    task = AutodecoderTraining(runs.config(store, "prefetch=0"), Distributed(), tmp_path)
    assert len(task.records) % task.config.batch
    for index in range(4):
        visits = [task.schedule.at(index, slot) for slot in range(task.config.batch)]
        before = {o: [p.clone() for p in task.table.planes(o)] for o, _, _ in visits}
        task.step(index)
        for o, _, active in visits:
            same = all(torch.equal(p, q) for p, q in zip(before[o], task.table.planes(o), strict=True))
            assert same != active
    assert not all(active for s in range(2) for *_, active in (task.schedule.at(s, slot) for slot in range(4)))


def test_every_round_has_an_order_of_its_own():
    schedule = Schedule(12, 1, 1, seed=1)
    rounds = [tuple(schedule.at(12 * r + s, 0)[0] for s in range(12)) for r in range(4)]
    assert len(set(rounds)) == 4


def test_the_last_steps_have_no_noise(store, tmp_path):
    """With equal parameters the noise changes the loss of an early step and not that of one of the last steps."""
    losses = {}
    for std in (0.0, 0.3):
        for index in (0, 23):  # of 24, a quarter without noise
            task = AutodecoderTraining(runs.config(store, f"noise_std={std}", "prefetch=0"), Distributed(), tmp_path)
            losses[std, index] = float(task.step(index)["loss"])
            task.close()
    assert losses[0.0, 0] != losses[0.3, 0]
    assert losses[0.0, 23] == losses[0.3, 23]


# ---- tables ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_a_table_is_adam_object_by_object(where, tmp_path):
    """Each object is updated as by its own torch.optim.Adam, only in the steps that visit it (algorithm.md 9.4)."""
    objects = [3, 5, 9]
    table = PlaneTable(objects, 4, (5, 6, 7), where=where, folder=tmp_path / "t", dtype=torch.float64)
    start = {o: [p.double() for p in init_planes(4, (5, 6, 7), 1.0, torch.Generator().manual_seed(o))] for o in objects}
    table.fill(lambda o: start[o])
    mine = {o: [p.clone().requires_grad_() for p in start[o]] for o in objects}
    adam = {o: torch.optim.Adam(mine[o], lr=0.1, betas=(0.9, 0.95)) for o in objects}
    generator = torch.Generator().manual_seed(0)
    for visited in ([3, 5], [5], [9, 3], [5, 9], [3]):
        rows = table.fetch(visited)
        before = {o: [p.clone() for p in table.planes(o)] for o in objects if o not in visited}
        for leaf in rows.leaves:
            leaf.grad = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        for i, o in enumerate(visited):
            for p, leaf in zip(mine[o], rows.leaves, strict=True):
                p.grad = leaf.grad[i : i + 1].clone()
            norm = torch.nn.utils.clip_grad_norm_(mine[o], 3.0)
            adam[o].step()
        norms = table.update(rows, lr=0.1, beta2=0.95, eps=1e-8, clip=3.0)
        torch.testing.assert_close(norms[-1], norm)
        for o, planes in before.items():
            assert all(torch.equal(a, b) for a, b in zip(table.planes(o), planes, strict=True))
    for o in objects:
        for a, b in zip(table.planes(o), mine[o], strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9)
    assert table.steps.tolist() == [[3, 3, 2]] * 3


def test_a_table_takes_its_rows_from_any_sharding():
    whole = PlaneTable(range(5), 2, (3, 3, 3))
    whole.fill(lambda o: [torch.full((1, 2, 3, 3), float(o))] * 3)
    whole.steps += torch.arange(5)
    parts = [PlaneTable([0, 2, 4], 2, (3, 3, 3)), PlaneTable([1, 3], 2, (3, 3, 3))]
    for part in parts:
        part.load([whole.state()])
    again = PlaneTable(range(5), 2, (3, 3, 3))
    again.load([p.state() for p in parts])
    assert torch.equal(again.tables["value"][1], whole.tables["value"][1])
    assert torch.equal(again.steps, whole.steps)
    with pytest.raises(ValueError, match="no planes of 1 of the 6 objects"):
        PlaneTable(range(6), 2, (3, 3, 3)).load([whole.state()])


# ---- configuration ---------------------------------------------------------------------


@pytest.mark.parametrize("preset", configs.presets("train"))
def test_presets(preset):
    config = TrainConfig.load(preset)
    assert TrainConfig.model_validate(yaml.safe_load(config.yaml())) == config
    assert 1e-3 <= config.lr_planes / config.plane_init_std <= 1  # algorithm.md 6.3


def test_a_file_with_an_unknown_key_is_refused_with_the_nearest(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: x\nlr_plane: 1e-2\n")
    with pytest.raises(UserError, match="lr_plane: no such key; did you mean lr_planes"):
        TrainConfig.load(path)
    path.write_text("data: x\nlr_planes: 1e-2\n")
    assert TrainConfig.load(path).lr_planes == 0.01
    path.write_text("channels: 3\n")
    with pytest.raises(UserError, match="data: field required"):
        TrainConfig.load(path)


# ---- checkpoints -----------------------------------------------------------------------


def save(folder, step, score=None, keep=2, value=1.0):
    state = {"task": {"x": torch.full((3,), value)}, "seconds": 1.0}
    return checkpoint.save(folder, step, state, {"y": torch.ones(2)}, Distributed(), score=score, keep=keep)


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, score in ((1, 10.0), (2, 30.0), (3, 20.0), (4, None), (5, 25.0)):
        save(tmp_path, step, score)
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    step, shared, shards = checkpoint.load(checkpoint.latest(tmp_path))
    assert step == 5
    assert torch.equal(shared["task"]["x"], torch.ones(3))
    assert torch.equal(shards[0]["y"], torch.ones(2))


@pytest.mark.parametrize("name", ["shared.pt", "shard-0-of-1.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path, name):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data[: len(data) if name != "manifest.json" else 20])
    with pytest.raises(UserError, match=rf"{name}.*damaged.*delete .*step-00000002"):
        checkpoint.load(checkpoint.latest(tmp_path))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shared.pt", lambda s: s.pop("seconds")),
        ("shared.pt", lambda s: s.update(seconds=[1])),
        ("shared.pt", lambda s: s["task"].pop("decoder")),
        ("shared.pt", lambda s: s["task"]["decoder"].update({"0.weight": s["task"]["decoder"]["0.weight"][:1]})),
        ("shared.pt", lambda s: s["task"]["average"].update({"0.weight": s["task"]["average"]["0.weight"].half()})),
        ("shared.pt", lambda s: s["task"]["decoder"]["0.bias"].fill_(float("nan"))),
        ("shared.pt", lambda s: s["task"]["optimiser"]["state"][0].update(exp_avg=torch.zeros(1))),
        ("shared.pt", lambda s: s["task"]["optimiser"]["state"][0].pop("step")),
        ("shared.pt", lambda s: s["task"]["optimiser"]["param_groups"][0].update(betas=(2.0, "x"))),
        ("shard-0-of-1.pt", lambda s: s.update({"value.xy": s["value.xy"][:, :1]})),
        ("shard-0-of-1.pt", lambda s: s.update({"value.xy": torch.zeros(1).expand(10**4, 10**4, 10**4)})),
        ("shard-0-of-1.pt", lambda s: s["exp_avg.yz"].fill_(float("inf"))),
        ("shard-0-of-1.pt", lambda s: s.pop("steps")),
        ("shard-0-of-1.pt", lambda s: s.update(objects=s["objects"][1:])),
    ],
)
def test_a_state_that_does_not_fit_the_run_is_refused(store, uninterrupted, tmp_path, name, change):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    runs.damage(out / "checkpoints", name, change)
    with pytest.raises(UserError, match=r"step-00000024: damaged: .*; delete .* --resume auto then continues") as error:
        runs.run(store, out, resume="auto")
    assert "\n" not in str(error.value)


def test_a_damaged_log_and_settings_of_a_run(store, uninterrupted, tmp_path):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    lines = (
        b"\xff",
        b"[3]",
        b"[" * 10**5,
        b'{"step": "x"}',
        b'{"step": 4, "loss": [1]}',
        b'{"step": 8, "loss": 1}',
        b'{"step": 9, ',
    )
    (out / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_metrics(out) == [{"step": 8, "loss": 1}]
    for text, message in ((b"\xff", "not YAML"), (b"- 3", "expected keys and values, got list")):
        (out / "config.yaml").write_bytes(text)
        with pytest.raises(UserError, match=f"config.yaml: {message}"):
            runs.run(store, out, resume="auto")


def test_a_checkpoint_under_the_name_of_another_step(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000009")
    with pytest.raises(
        UserError, match=r"step-00000009/manifest\.json: damaged: step: expected that of the folder's name, got 2"
    ):
        checkpoint.load(tmp_path / "step-00000009")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    write = checkpoint._write

    def full(path, what):
        if path.name.startswith("shard"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, what)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(UserError, match=r"step-00000002.*No space left.*step 1 is intact.*--resume auto"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load(checkpoint.latest(tmp_path))[0] == 1


# ---- runs ------------------------------------------------------------------------------


def states(out):
    step, shared, shards = checkpoint.load(checkpoint.latest(out / "checkpoints"))
    return step, shared["task"], shards


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture(scope="module")
def uninterrupted(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    runs.finish(runs.start(runs.run, store, out))
    return out


def test_files_of_a_run(uninterrupted):
    assert sorted(p.name for p in uninterrupted.iterdir()) == [
        "checkpoints", "config.yaml", "machine.json", "metrics.jsonl", "report.html", "samples", "tensorboard",
    ]  # fmt: skip
    metrics = read_metrics(uninterrupted)
    assert [m["step"] for m in metrics if "loss" in m] == [4, 8, 12, 16, 20, 24]
    assert all(math.isfinite(m["grad_decoder"]) for m in metrics if "loss" in m)
    assert [m["step"] for m in metrics if "psnr" in m] == [8, 16, 24]
    page = (uninterrupted / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "fitted PSNR" in page
    assert len(list((uninterrupted / "samples").glob("*.png"))) == 3


def test_killed_at_random_points_a_run_ends_with_the_same_bits(store, uninterrupted, tmp_path):
    """Parameters, moments, counters and averages are equal after repeated SIGKILL and --resume auto."""
    out, chance = tmp_path / "run", random.Random(0)

    def reached():
        return (checkpoint.steps(out / "checkpoints") or [0])[-1]

    kills = 0
    while reached() < 20:
        (process,) = runs.start(runs.run, store, out, (), "auto")
        goal = reached() + chance.choice((0, 3, 3))  # at the start, after a checkpoint, or while one is written
        while process.is_alive() and reached() < goal:
            time.sleep(0.002)
        process.join(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        kills += 1
    runs.finish(runs.start(runs.run, store, out, (), "auto"))
    assert kills >= 4
    assert equal(states(out), states(uninterrupted))
    steps = [m["step"] for m in read_metrics(out) if "loss" in m]
    assert steps == sorted(set(steps))  # no step twice
    assert not list((out / "checkpoints").glob(".writing-*"))


def _exhausted(left):
    return next(left, None) is None


def test_a_stopped_and_resumed_run_is_the_same(store, uninterrupted, tmp_path):
    """The stop comes from the callback, at a step without a checkpoint."""
    torch.set_num_threads(1)
    config = runs.config(store)
    for stop_at in (5, 13, 99):
        task = AutodecoderTraining(config, Distributed(), tmp_path)
        last = checkpoint.latest(tmp_path / "checkpoints")
        left = iter(range(stop_at - (checkpoint.steps(tmp_path / "checkpoints") or [0])[-1]))
        stop = functools.partial(_exhausted, left)
        outcome = loop(task, tmp_path, Cadence(4, 8, 3), Distributed(), resume=last, stop=stop)
        assert outcome.step == min(stop_at, 24)
        task.close()
    assert equal(states(tmp_path), states(uninterrupted))


def test_the_command_protects_a_run(store, uninterrupted):
    with pytest.raises(UserError, match=r"contains a run.*--resume auto"):
        runs.run(store, uninterrupted)
    with pytest.raises(UserError, match=r"channels: the run in .* began with 6, --resume was given 8"):
        runs.run(store, uninterrupted, ("channels=8",), "auto")
    with pytest.raises(UserError, match="expected auto or a folder"):
        runs.run(store, uninterrupted, (), "nowhere")


@pytest.mark.parametrize("cadence", [Cadence(4, 8, 3), Cadence(100, 100, 3)])  # NaN is noticed at a record or at a checkpoint
def test_a_loss_of_nan_ends_the_run(store, tmp_path, cadence):
    torch.set_num_threads(1)
    task = AutodecoderTraining(runs.config(store), Distributed(), tmp_path)
    step = task.step

    def poisoned(index):
        values = step(index)
        if index == 9:
            with torch.no_grad():
                task.decoder.layers()[0].weight[0, 0] = math.nan
        return values

    task.step = poisoned
    with pytest.raises(UserError, match=r"NaN.*step-00000009 is good: --resume auto.*learning rates"):
        loop(task, tmp_path, cadence, Distributed())
    _, shared, _ = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))
    assert all(torch.isfinite(v).all() for v in shared["task"]["decoder"].values())
    task.close()


def test_another_store_is_refused(store, uninterrupted, tmp_path):
    other = runs.make_store(tmp_path / "other", count=6).folder
    with pytest.raises(UserError, match="not those with which the run began"):
        runs.run(other, uninterrupted, (), "auto")


def test_training_fits_every_object(store, tmp_path):
    """All seven objects reach 30 dB, with noise and lattices."""
    task = AutodecoderTraining(runs.config(store, "steps=600", "channels=8", "widths=[32, 32]"), Distributed(), tmp_path)
    for i in range(task.steps):
        task.step(i)
    scores = [task.evaluate([o], whole=True)["psnr"] for o in range(7)]
    assert min(scores) > psnr_of_mse(1e-3)
    task.close()


# ---- ranks -----------------------------------------------------------------------------


def load_ranks(out, world):
    ranks = [torch.load(out / f"rank-{r}.pt") for r in range(world)]
    planes = {}
    for f in ranks:
        planes |= f["planes"]
    return ranks[0], planes


@pytest.mark.parametrize(
    ("overrides", "count", "tolerance"),
    [((), 1, 1e-6), (("noise_mode=point",), 1, 1e-6), (("compute_dtype=float64",), 20, 1e-9)],
)
def test_two_processes_are_one(store, tmp_path, overrides, count, tolerance):
    """Compared are the gradients of a step in float32, and the decoder and planes after twenty steps in float64."""
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        runs.finish(runs.start(runs.steps, store, tmp_path / str(world), count, overrides, world=world))
    (one, one_planes), (two, two_planes) = load_ranks(tmp_path / "1", 1), load_ranks(tmp_path / "2", 2)
    assert sorted(one_planes) == sorted(two_planes) == list(range(7))
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        assert float((a - b).norm()) <= tolerance * float(a.norm())
    for a, b in zip(one["decoder"], two["decoder"], strict=True):
        assert float((a - b).norm()) <= max(tolerance, 1e-6 if count == 1 else 0) * float(a.norm())
    if count > 1:
        for o, planes in one_planes.items():
            for a, b in zip(planes, two_planes[o], strict=True):
                assert float((a - b).norm()) <= tolerance * float(a.norm())


def test_a_rank_that_dies_and_a_resume_with_another_number(store, tmp_path):
    out = tmp_path / "run"
    slow = ("steps=4000", "checkpoint_every=3")
    processes = runs.start(runs.run, store, out, slow, world=2)
    while not checkpoint.steps(out / "checkpoints"):
        time.sleep(0.05)
        assert all(p.is_alive() for p in processes)
    processes[1].kill()
    processes[0].join(60)
    assert processes[0].exitcode not in (0, None)  # ended by the death of the other rank
    before = checkpoint.steps(out / "checkpoints")[-1]
    (alone,) = runs.start(runs.run, store, out, slow, "auto")
    while checkpoint.steps(out / "checkpoints")[-1] <= before:
        time.sleep(0.05)
        assert alone.is_alive()
    alone.kill()
    alone.join()
    assert json.loads((checkpoint.latest(out / "checkpoints") / "manifest.json").read_text())["world"] == 1


def test_a_batch_that_the_ranks_cannot_share(store, tmp_path):
    with pytest.raises(UserError, match="batch: expected a multiple of the 3 ranks, got 4"):
        AutodecoderTraining(runs.config(store), Distributed(0, 3), tmp_path)
    with pytest.raises(UserError, match="batch: expected at most the 7 objects"):
        AutodecoderTraining(runs.config(store, "batch=8"), Distributed(), tmp_path)


def test_the_average_moves_by_its_warmed_up_decay():
    average, module = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    for index, decay in ((0, 0.1), (8, 0.5), (10_000, 0.99)):  # (1 + n)/(10 + n), at most the configured decay
        want = [decay * a + (1 - decay) * p for a, p in zip(average.parameters(), module.parameters(), strict=True)]
        update_average(average, module, 0.99, index)
        for got, expected in zip(average.parameters(), want, strict=True):
            torch.testing.assert_close(got, expected)
