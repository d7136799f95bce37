"""``tcam evaluate``: metrics of reconstructions, their groups, intervals and files."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from tcam_diff.autodecoder.encode import load_run
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.data.store import Store, unit
from tcam_diff.errors import UserError
from tcam_diff.evaluation import metrics, reconstruction
from tcam_diff.evaluation.reconstruction import FITTED, Row
from tcam_diff.evaluation.sets import read_set

SIZE = (24, 12, 26)
SMALL = ["channels=4", "plane_size=8", "widths=[8]", "steps=6", "batch=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a store, a run, the latents of its training volumes and those of held-out ones."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs.make_store(folder / "store", count=3, held_out=2, size=SIZE)
        runs.command("train-autodecoder", "fast", "data=store", *SMALL, "--out", "run")
        runs.command("export-latents", "run", "--out", "fitted")
        runs.command("encode", "run", "store", "steps=3", "--out", "encoded")
    return folder


def test_every_form_of_a_reconstruction_has_the_same_figures(made, tmp_path):
    """A run, its latents, and its decoded files; the figures are those of the metrics on the whole volumes."""
    store = Store(made / "store")
    for name in ("blob0", "blob1", "blob2"):
        runs.command("decode", str(made / "fitted"), "--volume", name, "--out", str(tmp_path / f"{name}.nii"))
    tables = {}
    for path in (made / "run", made / "fitted", tmp_path):
        found = reconstruction.find_reconstructions(store, path)
        tables[path.name] = {r.name: r for r in reconstruction.evaluate(found, store)}
        truth = unit(torch.tensor(store.volume(store.records[0])))
        row, got = tables[path.name]["blob0"], found[0].read()
        assert row.mse == pytest.approx(float((got - truth).square().mean()), rel=1e-5)
        assert row.psnr == pytest.approx(-10 * math.log10(row.mse))
        assert row.ssim == metrics.ssim3d(got, truth)
        assert row.group == (FITTED if path.name in ("run", "fitted") else "files, split train")
    for name, row in tables["run"].items():
        for other in tables.values():
            assert other[name].mse == pytest.approx(row.mse, rel=1e-3)
            assert other[name].ssim == pytest.approx(row.ssim, abs=1e-4)
    assert load_run(made / "run").objects == list(tables["run"])


def test_fitted_and_encoded_volumes_are_apart(made):
    out = made / "out"
    done = runs.command("evaluate", str(made / "store"), str(made / "encoded"), "--out", str(out))
    assert "encoded, split test: 2 volumes" in done.stdout
    assert re.search("MSE, +lower is better", done.stdout)
    assert re.search("coherence at 0.35 to 0.5 cycles per voxel, +higher is better", done.stdout)
    rows = list(csv.DictReader((out / "volumes.csv").open()))
    assert [r["name"] for r in rows] == ["blob3", "blob4"]
    assert {r["group"] for r in rows} == {"encoded, split test"}
    assert {r["ms_ssim"] for r in rows} == {"nan"}  # 12 voxels have one scale
    summary = json.loads((out / "summary.json").read_text())
    figures = summary["groups"]["encoded, split test"]
    assert figures["mse"]["mean"] == pytest.approx(np.mean([float(r["mse"]) for r in rows]))
    assert figures["mse"]["low"] <= figures["mse"]["mean"] <= figures["mse"]["high"]
    assert summary["protocol"]["preprocessing"] == Store(made / "store").config
    assert (out / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    done = runs.command("evaluate", str(made / "store"), str(made / "run"), "--split", "test", check=False)
    assert done.returncode == 2
    assert "no reconstruction" in done.stderr


def test_reconstructions_of_other_volumes_are_refused(made, tmp_path):
    other = runs.make_store(tmp_path / "other", count=5, held_out=0, size=SIZE)
    volume = np.lib.format.open_memmap(other.path(other.records[0]), mode="r+")
    volume[:] = 255 - volume
    shutil.copytree(made / "store", tmp_path / "changed")
    index = json.loads((tmp_path / "changed" / "store.json").read_text())
    index["cases"][0]["sha256"] = "0" * 64
    (tmp_path / "changed" / "store.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"blob0\.safetensors: made from another volume than 'blob0'"):
        reconstruction.find_reconstructions(Store(tmp_path / "changed"), made / "fitted")
    (tmp_path / "files").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.float32), np.eye(4)), tmp_path / "files" / "blob0.nii")
    store = Store(made / "store")
    with pytest.raises(UserError, match=r"blob0: the reconstruction has shape \(1, 8, 8, 8\)"):
        reconstruction.evaluate(reconstruction.find_reconstructions(store, tmp_path / "files"), store)
    shutil.copy(tmp_path / "files" / "blob0.nii", tmp_path / "files" / "nobody.nii")
    with pytest.raises(UserError, match="'nobody' is no case of"):
        reconstruction.find_reconstructions(store, tmp_path / "files")


def test_generated_volumes_beside_held_out_ones(made, tmp_path):
    """Volumes with other names are generated ones; copies of training volumes are found to be that."""
    store = Store(made / "store")
    for number, record in enumerate(store.in_split("train")):
        image = nib.Nifti1Image(unit(torch.tensor(store.volume(record)))[0].numpy(), record.info.affine)
        nib.save(image, tmp_path / f"new{number}.nii")
    done = runs.command("evaluate", str(made / "store"), str(tmp_path), "--out", str(tmp_path / "out"), "--size", "8")
    assert f"{tmp_path}, 3 volumes" in " ".join(done.stdout.split())
    assert "held out, 2 volumes" in " ".join(done.stdout.split())
    sets = json.loads((tmp_path / "out" / "summary.json").read_text())["sets"]
    assert sets[str(tmp_path)]["nearest"]["mean"] == pytest.approx(0, abs=1e-6)
    assert sets["held out"]["nearest"]["mean"] > 0.01
    assert sets[str(tmp_path)]["variance"]["mean"] == pytest.approx(sets["training volumes"]["variance"]["mean"], rel=1e-5)
    assert "nearest" not in sets["training volumes"]
    rows = list(csv.DictReader((tmp_path / "out" / "volumes.csv").open()))
    assert [r["nearest_training_volume"] for r in rows if r["set"] == str(tmp_path)] == ["blob0", "blob1", "blob2"]


def test_latent_sets_beside_generated_volumes_are_decoded(made, tmp_path):
    """The training planes are the reference of the modes of planes, wherever they stand; bright voxels are tested, too."""
    store = Store(made / "store")
    for number, record in enumerate(store.in_split("train")):
        image = nib.Nifti1Image(unit(torch.tensor(store.volume(record)))[0].numpy(), record.info.affine)
        nib.save(image, tmp_path / f"new{number}.nii")
    encoded, fitted = str(made / "encoded"), str(made / "fitted")
    out = ("--out", str(tmp_path / "out"), "--size", "26")
    runs.command("evaluate", str(made / "store"), encoded, str(tmp_path), fitted, *out)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["counts"][fitted] == 3
    assert summary["sets"][fitted]["latent_modes"]["mean"] == pytest.approx(1, rel=1e-4)
    assert "latent_modes" in summary["sets"][encoded]
    assert "latent_modes" not in summary["sets"][str(tmp_path)]
    assert set(summary["told_apart"][str(tmp_path)]) == {"training volumes", "held out", encoded, fitted}
    assert summary["told_apart"][str(tmp_path)]["training volumes"] == pytest.approx(1)
    planes = LatentSet(made / "fitted").fitted("blob1")
    decoded = torch.cat(list(planes.decode_unit(SIZE)), 3)
    assert torch.equal(read_set(made / "fitted", lambda v: v).volumes[1], decoded)
    done = runs.command("evaluate", str(made / "store"), str(tmp_path), "--split", "test", check=False)
    assert "--split: only for reconstructions" in done.stderr


def test_intervals_cover_the_mean_as_often_as_they_say():
    """Of 200 groups of 30 volumes with normal errors, 95 % of the intervals have the true mean; at least 90 % by chance."""
    generator, covered = np.random.default_rng(0), 0
    for trial in range(200):
        errors = generator.normal(1.0, 0.3, 30)
        rows = [Row(str(i), "test", "a", e, 0.0, math.nan, math.nan, math.nan) for i, e in enumerate(errors)]
        figures = reconstruction.means(rows, resamples=400, seed=trial)["a"]
        covered += figures["mse"].low <= 1.0 <= figures["mse"].high
        assert set(figures) == {"mse", "psnr"}
        assert figures["mse"].mean == pytest.approx(errors.mean())
    assert 180 <= covered < 200


def test_lpips_of_slices_is_the_mean_over_slices():
    def difference(x, y):  # a stand-in for the network: mean absolute difference of a batch of slices
        assert x.shape[1] == 1
        return (x - y).abs().mean()

    a, b = torch.rand(2, 5, 7, 4), torch.rand(2, 5, 7, 4)
    want = sum(float((a - b).abs().mean()) * 2 * n for n in (5, 7, 4)) / (2 * (5 + 7 + 4))
    assert metrics.lpips_of_slices(difference, a, b, batch=3) == pytest.approx(want, rel=1e-5)
