"""Tables and figures of the paper: commands, resumption, rows and pages, at the smallest sizes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import runs
from tcam_diff.config import presets
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.errors import UserError
from tcam_diff.tables.config import TableConfig
from tcam_diff.tables.make import _claim, make_figure, make_table
from tcam_diff.tables.paper import PUBLISHED, TABLES
from tcam_diff.tables.plan import GENERATORS, VARIANTS, Plan
from tcam_diff.tables.render import grid, sets_text
from tcam_diff.tables.rows import late_gain, paired, time_to
from tcam_diff.tables.steps import run, step

TINY = TableConfig(
    cohort=["--n", "9", "--size", "24", "--held-out", "4"],
    train_changes=["channels=3", "plane_size=8", "widths=[8]", "steps=8", "batch=2", "evaluate_every=4"],
    encode_changes=["steps=3"],
    vae_gan="vae-gan-small",
    vae_gan_changes=["channels=[8,8]", "adversarial_weight=0", "evaluate_every=1"],
    vq_gan="vq-gan-small",
    vq_gan_changes=["channels=[8]", "codes=8", "adversarial_weight=0", "evaluate_every=1"],
    diffusion="tiny",
    diffusion_changes=["steps=4", "network.base=8", "network.head_channels=8", "batch=2", "preview_steps=0"],
    ldm_vae_gan="ldm-vae-gan-small",
    ldm_vae_gan_changes=["channels=[32,32]", "attention_levels=[]", "timesteps=10", "sampler_steps=2"],
    ldm_vq_gan="ldm-vq-gan-small",
    ldm_vq_gan_changes=["channels=[32,32]", "attention_levels=[]", "timesteps=3"],
    samples=4,
    sample_steps=2,
    size=24,
    critics=1,
    critic_changes=["size=16", "width=4", "epochs=1"],
    channels=[2, 3],
)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_every_preset_are_configurations(name):
    for preset in presets("diffusion"):
        config = DiffusionConfig.load(preset, list(VARIANTS[name]))
        if name == "no-prior":
            assert (config.prior, config.muon_lr, config.network.heads) == ("none", None, "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with table 1."""
    path = tmp_path_factory.mktemp("tables") / "small"
    assert make_table(1, path, TINY)
    return path


@pytest.mark.exhaustive
def test_table_1_has_both_kinds_of_volumes_of_every_model(folder):
    content = json.loads((folder / "table-1.json").read_text())
    kinds = {(r["model"], r["volumes_are"], r["volumes"]) for r in content["rows"]}
    models = "tcam-diff", "vae-gan", "vq-gan"
    assert kinds == {(m, k, n) for m in models for k, n in (("training", 5), ("held out", 4))}
    of = {r["model"]: r for r in content["rows"] if r["volumes_are"] == "training"}
    assert of["tcam-diff"]["latents"] == 3 * 3 * 64
    assert of["vae-gan"]["latents"] == 2 * 8 * 12**3
    summary = json.loads((folder / "seed-0/store-vq-gan-evaluation/summary.json").read_text())
    assert of["vq-gan"]["figures"]["mse"] == summary["groups"]["trained on"]["mse"]
    for rival in ("vae-gan", "vq-gan"):  # as much time as ours, to the end of the step that exceeds it
        assert of[rival]["seconds"] >= of["tcam-diff"]["seconds"] * 0.9
    text = (folder / "table-1.md").read_text()
    for part in ("5 training and 4 other volumes", *map(str, TABLES[1][2][0]), "tcam make-cohort"):
        assert part in text, part


@pytest.mark.exhaustive
def test_a_table_is_not_made_twice_and_not_of_two_protocols(folder):
    before = {p: p.stat().st_mtime_ns for p in (folder / "steps").iterdir()}
    assert make_table(1, folder, TINY)
    assert {p: p.stat().st_mtime_ns for p in (folder / "steps").iterdir()} == before
    with pytest.raises(UserError, match="tables of another protocol"):
        make_table(1, folder, TINY.model_copy(update={"samples": 5}))


@pytest.mark.exhaustive
def test_tables_3_and_4_and_the_figures(folder):
    for number in (3, 4):
        text = make_table(number, folder, TINY)
        assert text
        assert f"## Table {number}." in text
    rows = json.loads((folder / "table-3.json").read_text())["rows"]
    assert [r["pair"] for r in rows] == list(GENERATORS.values())
    assert all(r["seconds"] >= 0 and r["memory_gb"] > 0 for r in rows)
    (summary,) = json.loads((folder / "table-3.json").read_text())["sets"]
    sets = summary["sets"]
    assert all("latent_modes" in sets[f"{n}-samples"] for n in ("diffusion", "no-cross", "gaussian"))
    assert all(len(r["ours"]) == len(r["other"]) == 1 for r in rows)
    assert rows[0]["controls"]
    assert [r["latents"] for r in json.loads((folder / "table-4.json").read_text())["rows"]] == [2 * 192, 3 * 192]
    for number in (3, 5, 6, 7):
        path = make_figure(number, folder, TINY)
        assert path
        assert path.stat().st_size > 10_000


def test_a_protocol_of_an_earlier_version_is_the_same(tmp_path):
    """A key that is missing in the folder's config.yaml had its default."""
    _claim(tmp_path, TINY)
    path = tmp_path / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("latents_changes")))
    _claim(tmp_path, TINY)
    with pytest.raises(UserError, match="tables of another protocol"):
        _claim(tmp_path, TINY.model_copy(update={"samples": 5}))


def test_stage_2_learns_fitted_or_encoded_planes(tmp_path):
    """With latents_changes training and held-out volumes are encoded alike, apart from the encoding of table 1."""
    latents = "seed-0/store-tcam-diff-latents"
    fitted = {s.name: s.arguments() for s in Plan(tmp_path, TINY).steps(3)}
    assert fitted[latents][0] == "export-latents"
    assert "validation=seed-0/store-tcam-diff-encoded" in fitted["seed-0/diffusion"]
    changed = TINY.model_copy(update={"latents_changes": ["mean_weight=0.01"]})
    encoded = {s.name: s.arguments() for s in Plan(tmp_path, changed).steps(3)}
    held_out = "seed-0/store-tcam-diff-held-out-latents"
    for name, split in ((latents, "train"), (held_out, "test")):
        command = encoded[name]
        assert command[0] == "encode"
        assert command[command.index("--split") + 1] == split
        assert "mean_weight=0.01" in command
    assert f"validation={held_out}" in encoded["seed-0/diffusion"]
    assert held_out in encoded["seed-0/sets"]
    assert encoded["seed-0/store-tcam-diff-encoded"] == fitted["seed-0/store-tcam-diff-encoded"]
    alike = Plan(tmp_path, TINY.model_copy(update={"latents_changes": TINY.encode_changes})).steps(3)
    assert [s.name for s in alike if s.arguments()[0] == "encode"] == ["seed-0/store-tcam-diff-encoded", latents]
    assert "validation=seed-0/store-tcam-diff-encoded" in next(s for s in alike if s.name == "seed-0/diffusion").arguments()


def test_the_generators_of_table_3_are_chosen(tmp_path):
    chosen = Plan(tmp_path, TINY.model_copy(update={"generators": ["gaussian", "no-cross"]}))
    assert list(chosen.generators) == ["no-cross", "gaussian"]
    names = [s.name for s in chosen.steps(3)]
    assert {n for n in names if "pair" in n} == {"seed-0/pair-no-cross", "seed-0/pair-gaussian"}
    assert not [n for n in names if "ldm" in n or "concatenated" in n]
    with pytest.raises(UserError, match="generators"):
        TableConfig.load("small", ["generators=[unknown]"])


def test_statistics_of_several_seeds_have_their_deviation():
    def summary(mean):
        figures = {"pairwise": {"mean": mean, "low": mean - 1, "high": mean + 1}}
        return {
            "sets": {"samples": figures}, "protocol": {"voxels": [4, 4, 4], "features": "none"}, "counts": {"samples": 9},
            "volumes_for_fid_and_mmd": 0, "real": "held-out volumes", "told_apart": {"samples": {}},
        }  # fmt: skip

    assert "| samples | 2 (1 to 3) |" in "\n".join(sets_text([summary(2.0)]))
    assert "| samples | 3 ± 1.41 |" in "\n".join(sets_text([summary(2.0), summary(4.0)]))


def test_a_step_that_fails_is_named_with_its_message(tmp_path):
    with pytest.raises(UserError, match=r"tcam make-cohort --out c --n 0: failed with status 2.*--n: expected at least 1"):
        run(tmp_path, [step("broken", "make-cohort --out c --n 0")])
    assert not (tmp_path / "steps" / "broken.json").exists()


def test_a_stopped_step_continues(tmp_path):
    """A stop during a training ends it with a checkpoint; the next call continues it and goes on to the end."""
    store = runs.make_store(tmp_path / "store").folder
    keys = "steps=400 channels=2 plane_size=8 widths=[8] batch=2 checkpoint_every=400 evaluate_every=400"
    steps = [step("train", f"train-autodecoder fast data={store} {keys} --out run -q", resume=True)]
    assert run(tmp_path, steps, stop=lambda: (tmp_path / "run" / "metrics.jsonl").exists()) is False
    assert (tmp_path / "run" / "checkpoints").is_dir()
    assert not (tmp_path / "steps" / "train.json").exists()
    assert run(tmp_path, steps)
    record = json.loads((tmp_path / "steps" / "train.json").read_text())
    assert record["command"] == steps[0].arguments()
    with pytest.raises(UserError, match="made by another command"):
        run(tmp_path, [step("train", "make-cohort --out c")])


def test_rivals_get_the_time_of_ours(tmp_path):
    run_folder = tmp_path / "seed-0" / "store-tcam-diff"
    run_folder.mkdir(parents=True)
    (run_folder / "metrics.jsonl").write_text('{"step": 5, "seconds": 90.0}\n{"step": 7, "seconds": 120.0}\n')
    steps = {s.name: s.arguments() for s in Plan(tmp_path, TINY, equal_steps=True).steps(1)}
    assert "minutes=2.0000" in steps["seed-0/store-vae-gan"]
    assert "steps=7" in steps["seed-0/store-vq-gan-equal-steps"]
    with_data = Plan(tmp_path, TINY.model_copy(update={"data": "/a folder/x"})).steps(1)
    assert with_data[0].arguments()[:2] == ["prepare", "/a folder/x"]


def test_without_a_prior_there_is_no_row_without_it(tmp_path):
    plain = TINY.model_copy(update={"diffusion_changes": ["prior=none"]})
    assert set(Plan(tmp_path, TINY).generators) - set(Plan(tmp_path, plain).generators) == {"no-prior"}
    assert not any("no-prior" in s.name for s in Plan(tmp_path, plain).steps(3))


def test_times_are_read_off_curves():
    points = [(10.0, 20.0), (20.0, 24.0), (30.0, 25.0)]
    assert time_to(points, 22.0) == pytest.approx(15)
    assert time_to(points, 20.0) == 10
    assert time_to(points, 24.5) == pytest.approx(25)
    assert time_to(points, 26.0) == math.inf
    assert late_gain(points) == pytest.approx(25 - 24.4)
    assert math.isnan(late_gain(points[:1]))


def test_before_ours_is_trained_the_commands_say_so(tmp_path):
    steps = {s.name: s.arguments() for s in Plan(tmp_path, TINY, equal_steps=True).steps(1)}
    assert "minutes=THOSE-OF-OURS" in steps["seed-0/store-vae-gan"]
    assert "steps=THOSE-OF-OURS" in steps["seed-0/store-vae-gan-equal-steps"]


def test_intervals_of_ratios_are_paired_by_volume():
    """A rival with exactly twice the error of every volume leaves no doubt about the ratio, however much volumes differ."""
    ours = {f"v{i}": {"mse": 10.0**-i, "ssim": 0.9} for i in range(5)}
    double = {n: {"mse": 2 * v["mse"], "ssim": 0.8} for n, v in ours.items()}
    assert paired(ours, double)["mse_ratio"] == pytest.approx((0.5, 0.5))
    assert paired(ours, double)["ssim_difference"] == pytest.approx((0.1, 0.1))
    noisy = {n: {"mse": v["mse"] * (1 + i), "ssim": 0.9 - 0.01 * i} for i, (n, v) in enumerate(ours.items())}
    low, high = paired(ours, noisy)["mse_ratio"]
    assert low < 1.11111 / (1 + 0.2 + 0.03 + 0.004 + 0.0005) < high
    differences = np.random.default_rng(1).normal(0.05, 0.1, 400)
    many = {f"v{i}": {"mse": 1.0, "ssim": float(d)} for i, d in enumerate(differences)}
    low, high = paired(many, {n: {"mse": 1.0, "ssim": 0.0} for n in many})["ssim_difference"]
    assert high - low == pytest.approx(2 * 1.96 * differences.std() / 20, rel=0.05)


def test_published_figures_are_the_papers():
    assert [round(p["psnr"], 1) for p in PUBLISHED] == [39.0, 28.5, 31.0, 28.5, 23.5]
    assert grid(["a"], [["1"]]) == "| a |\n| --- |\n| 1 |"
