"""Encoding and export of latents, and decoding of latents to volumes."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from safetensors import safe_open
from tcam_diff.autodecoder.ablation import evaluate_run
from tcam_diff.autodecoder.config import EncodeConfig
from tcam_diff.autodecoder.encode import Encoder, load_run
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.autodecoder.planes import PLANE_NAMES, normalise
from tcam_diff.cli.app import app
from tcam_diff.data.store import Store
from tcam_diff.errors import UserError
from typer.testing import CliRunner

SIZE = (12, 10, 14)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return runs.make_store(tmp_path_factory.mktemp("store"), count=7, held_out=4).folder


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    more = ("steps=500", "channels=8", "widths=[32, 32]", "checkpoint_every=250", "evaluate_every=250", "ssim_weight=0",
            "compute_dtype=float32")  # fmt: skip
    runs.finish(runs.start(runs.run, store, out, more))
    return out


def tcam(*arguments, fails=False):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if fails:
        assert isinstance(done.exception, UserError), done.output
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def encoded(trained, store, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "latents"
    tcam("encode", trained, store, "--out", out, "steps=200", "-q")
    return out


def test_held_out_volumes_are_encoded(encoded, store):
    """The PSNR in the index is that of the volumes decoded from the files."""
    latents = LatentSet(encoded)
    assert "mean_weight" not in latents.index["provenance"]["encode"]  # sets of earlier versions are continued
    assert [e.name for e in latents.entries] == [r.name for r in Store(store).in_split("test")]
    for entry in latents.entries:
        assert entry.psnr > 25  # seven training blobs are few; the training volumes have more than 30
        fitted = latents.fitted(entry.name)
        for plane in fitted.planes:
            assert float(plane.square().mean()) == pytest.approx(1, rel=1e-4)
        with torch.no_grad():
            got = fitted.decoder(fitted.planes, SIZE)[0].clamp(0, 1).numpy()
        want = Store(store).volume(next(r for r in Store(store).records if r.name == entry.name)) / 255
        assert -10 * np.log10(np.mean((got - want) ** 2)) == pytest.approx(entry.psnr, abs=0.01)


def test_statistics_of_the_set(encoded):
    """Statistics equal their definitions."""
    latents = LatentSet(encoded)
    for p, name in enumerate(PLANE_NAMES):
        stacked = torch.stack([latents.planes(e)[p] for e in latents.entries]).double()
        statistics = latents.index["statistics"][name]
        assert statistics["rms"] == pytest.approx(1, rel=1e-3)
        np.testing.assert_allclose(statistics["channel_rms"], stacked.square().mean((0, 2, 3)).sqrt(), atol=1e-5)
        share = stacked.mean(0).square().mean() / stacked.square().mean()
        assert statistics["mean_plane_energy_share"] == pytest.approx(float(share), rel=1e-4)
        assert 0 < share < 1
    assert latents.index["provenance"]["preprocessing"]["percentiles"] == [0.0, 100.0]


def test_encoding_does_not_touch_the_decoder(trained, encoded):
    run = load_run(trained)
    with safe_open(encoded / "decoder.safetensors", framework="pt") as file:
        for name, tensor in run.decoder.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert all(not p.requires_grad for p in run.decoder.parameters())


def test_a_stopped_encoding_continues(trained, store, encoded, tmp_path, monkeypatch):
    """The planes do not depend on the interruption, because random numbers depend on a volume's name and not on its group."""
    out, encode, calls = tmp_path / "latents", Encoder.encode, []

    def stopping(self, volumes, *callbacks):
        calls.append(len(volumes))
        return None if len(calls) == 2 else encode(self, volumes, *callbacks)

    monkeypatch.setattr(Encoder, "encode", stopping)
    message = tcam("encode", trained, store, "--out", out, "steps=200", "batch=3", "-q", fails=True)
    assert "stopped with 3 of 4 volumes; the same command continues" in message
    with pytest.raises(UserError, match=r"latents\.json is missing"):
        LatentSet(out)
    assert "3 of 4 volumes already exist" in tcam("encode", trained, store, "--out", out, "steps=200", "batch=3", "-q")
    assert calls == [3, 1, 1]
    a, b = LatentSet(encoded), LatentSet(out)
    for x, y in zip(a.entries, b.entries, strict=True):
        for p, q in zip(a.planes(x), b.planes(y), strict=True):
            assert torch.equal(p, q)


def test_a_plateau_ends_a_volume(trained, store):
    data = Store(store)
    volumes = {r.name: data.volume(r) for r in data.in_split("test")[:2]}
    steps = {}
    for plateau in (0.0, 100.0):
        config = EncodeConfig(steps=100, check_every=10, plateau_db=plateau)
        last = []
        Encoder(load_run(trained), config, SIZE, torch.device("cpu")).encode(volumes, last.append)
        steps[plateau] = last[-1].done
    assert steps == {0.0: 100, 100.0: 40}  # the first check has nothing to compare with; three poor ones follow


def test_mean_weight_draws_planes_to_the_mean(trained, store):
    """Larger weights, planes nearer to the mean of the training planes, and a lower PSNR."""
    data, run = Store(store), load_run(trained)
    record, distances, psnrs = data.in_split("test")[0], [], []
    for weight in (0.0, 1e-2, 1e-1):
        config = EncodeConfig(steps=200, mean_weight=weight, plateau_db=0)
        encoded = Encoder(run, config, SIZE, torch.device("cpu")).encode({record.name: data.volume(record)})[record.name]
        squares = [(p - m).square().mean() for p, m in zip(encoded.planes, run.mean_planes(), strict=True)]
        distances.append(float(sum(squares)))
        psnrs.append(encoded.psnr)
    assert distances[0] > 1.2 * distances[1] > 2 * distances[2]
    assert psnrs[0] > psnrs[1] > psnrs[2]


def test_planes_that_become_nan_name_their_volume(trained, store):
    record = Store(store).in_split("test")[0]
    encoder = Encoder(load_run(trained), EncodeConfig(steps=4, check_every=2, lr=1e38), SIZE, torch.device("cpu"))
    with pytest.raises(UserError, match=f"{record.name}: its planes became NaN"):
        encoder.encode({record.name: Store(store).volume(record)})


def test_the_fitted_planes_are_exported(trained, store, tmp_path):
    out = tmp_path / "latents"
    tcam("export-latents", trained, "--out", out, "-q")
    latents, run = LatentSet(out), load_run(trained)
    raw = run.raw_planes()
    assert [e.name for e in latents.entries] == run.objects == [f"blob{i}" for i in range(7)]
    for entry in latents.entries:
        assert entry.psnr > 30
        for p, want in zip(latents.planes(entry), normalise(raw[entry.name]), strict=True):
            assert torch.equal(p, want[0])
    assert evaluate_run(trained)["psnr"] == pytest.approx(np.mean([e.psnr for e in latents.entries]), abs=0.01)


def test_a_latent_decodes_to_a_file_in_physical_units(encoded, store, tmp_path):
    name = LatentSet(encoded).entries[1].name
    tcam("decode", encoded, "--volume", name, "--out", tmp_path / "x.nii.gz", "--size", 24, 20, 28, "-q")
    image = nib.load(tmp_path / "x.nii.gz")
    assert image.shape == (24, 20, 28)
    assert runs.has_space(image)  # those of the store
    np.testing.assert_allclose(image.header.get_zooms(), (0.5, 0.75, 1.0))
    values = image.get_fdata()
    assert values.min() >= 10
    assert 15 < values.max() <= 20  # intensities 10 to 20 are 0 to 1
    assert "choose one with --volume" in tcam("decode", encoded, "--out", tmp_path / "y.nii.gz", fails=True)
    assert "no volume 'z'" in tcam("decode", encoded, "--volume", "z", "--out", tmp_path / "y.nii.gz", fails=True)


def test_damage_and_what_does_not_belong_together(trained, encoded, store, tmp_path):
    latents = LatentSet(encoded)
    path = encoded / "planes" / f"{latents.entries[0].name}.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match="changed or damaged"):
            latents.fitted(latents.entries[0].name)
    finally:
        path.write_bytes(whole)
    other = runs.make_store(tmp_path / "other", count=1, held_out=1)
    index = json.loads((tmp_path / "other" / "store.json").read_text())
    (tmp_path / "other" / "store.json").write_text(json.dumps(index | {"digest": "0"}))
    assert "prepared differently" in tcam("encode", trained, other.folder, "--out", tmp_path / "l", fails=True)
    assert "not a folder of `tcam train-autodecoder`" in tcam("encode", store, store, "--out", tmp_path / "l", fails=True)
    assert "no such key; did you mean steps" in tcam("encode", trained, store, "--out", tmp_path / "l", "step=3", fails=True)


def test_an_estimate_of_memory_and_disk(store, tmp_path):
    """Of the disk within 25 %; time and memory, which a test must not hold, are in docs/performance.md."""
    over = [f"data={store}", *runs.SMALL, "steps=12", "checkpoint_every=3", "keep=2"]
    lines = tcam("estimate", "fast", *over, "--seconds", 1)
    words = lines.split()
    assert "stage 2      planes of 6 x 5 x 7 texels fit no preset: tiny (multiples of 2" in lines
    disk, unit = float(words[words.index("disk") + 1]), words[words.index("disk") + 2]
    assert "stage 2: planes of 6 x 5 x 7 texels" in tcam("train-autodecoder", "fast", *over, "--out", tmp_path / "run")
    held = sum(p.stat().st_size for p in (tmp_path / "run" / "checkpoints").rglob("*.pt"))
    kept = len(list((tmp_path / "run" / "checkpoints").iterdir()))
    assert unit == "MB"
    assert disk * 1e6 / 2 == pytest.approx(held / kept, rel=0.25)  # keep=2; an older one that is the best stays too


def test_an_ablation(store, tmp_path):
    said = tcam("ablate", "fast", "channels=4,6", f"data={store}", *runs.SMALL[1:], "steps=8", "--out", tmp_path / "a", "-q")
    rows = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert [r["channels"] for r in rows] == [4, 6]
    per_channel = (6 * 5 + 5 * 7 + 6 * 7) / (12 * 10 * 14)
    assert [r["ratio"] for r in rows] == pytest.approx([4 * per_channel, 6 * per_channel])
    assert (tmp_path / "a" / "ablation.png").stat().st_size > 5000
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("result.json")}
    assert (
        tcam("ablate", "fast", "channels=4,6", f"data={store}", *runs.SMALL[1:], "steps=8", "--out", tmp_path / "a", "-q")
        == said
    )
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # a finished value is not trained again
