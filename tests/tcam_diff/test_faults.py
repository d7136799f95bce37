"""Faults of the machine: every command names the file and the reason in one line, with exit status 2."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import runs

SMALL = ["channels=4", "plane_size=8", "widths=[8]", "steps=3"]
TRAIN = ["fast", "data=store", "batch=2", *SMALL]
DIFFUSE = ["tiny", "latents=latents", *runs.SMALL_DIFFUSION, "steps=2", "batch=2"]
SAMPLE = ["--n", "1", "--steps", "2"]
CRITICS = ["--critics", "1", "size=16", "width=4", "epochs=1", "--size", "8", "-q"]
RIVAL = ["channels=[8]", "norm_groups=4", "res_blocks=1", "latent_channels=2", "adversarial_weight=0", "steps=2", "batch=2"]

#: Commands on the folder of `results`, with the option that names their result and its place.
COMMANDS = {
    "fit": (["volume.nii", *SMALL], "--out", "out"),
    "decode": (["fit"], "--out", "out.nii"),
    "compare": (["volume.nii", "volume.nii"], "--out", "out.png"),
    "check-data": (["volumes"], "--json", "out.json"),
    "prepare": (["volumes"], "--out", "out"),
    "train-autodecoder": (TRAIN, "--out", "out"),
    "ablate": (["fast", "channels=2,3", "data=store", "batch=2", *SMALL[1:]], "--out", "out"),
    "encode": (["run", "store", "steps=2"], "--out", "out"),
    "export-latents": (["run"], "--out", "out"),
    "evaluate": (["store", "run"], "--out", "out"),
    "train-diffusion": (DIFFUSE, "--out", "out"),
    "sample": (["model", *SAMPLE], "--out", "out"),
    "interpolate": (["model", "latents", "blob0", "blob1", "--n", "2", "--steps", "2"], "--out", "out"),
    "export-bundle": (["model"], "--out", "out"),
    "evaluate samples": (["store", "samples", *CRITICS], "--out", "out"),
    "features train": (["store", "size=16", "channels=[2]", "steps=2", "batch=2"], "--out", "out"),
    "baseline train": (["vae-gan", "data=store", *RIVAL], "--out", "out"),
    "baseline reconstruct": (["rival", "store"], "--out", "out"),
    "make-cohort": (["--n", "2", "--held-out", "1", "--size", "16"], "--out", "out"),
}


def words(name):
    """The command of a name of COMMANDS."""
    return ["evaluate"] if name == "evaluate samples" else name.split()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with small results of all commands."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "volumes").mkdir()
        for name in ("volume.nii", "volumes/a.nii", "volumes/b.nii"):
            nib.save(nib.Nifti1Image(np.random.default_rng(0).random((16, 16, 16), np.float32), np.eye(4)), name)
        runs.make_store(folder / "store", count=3, held_out=2, size=(16, 16, 16))
        runs.command("fit", "volume.nii", "--out", "fit", *SMALL)
        runs.command("train-autodecoder", *TRAIN, "--out", "run")
        runs.command("export-latents", "run", "--out", "latents")
        runs.command("baseline", "train", *COMMANDS["baseline train"][0], "--out", "rival")
        runs.command("train-diffusion", *DIFFUSE, "--out", "model")
        runs.command("sample", "model", "--out", "samples", "--n", "4", "--steps", "2")
    return folder


@pytest.fixture
def here(results, tmp_path, monkeypatch):
    """A copy of the results, as the working directory."""
    shutil.copytree(results, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def says(done, code, *parts):
    """Check that a command ended with one line that has all parts."""
    lines = [line for line in done.stderr.splitlines() if "warning:" not in line]
    assert done.returncode == code, (done.stdout, done.stderr)
    assert len(lines) == 1, done.stderr
    assert all(part in lines[0] for part in parts), (lines[0], parts)


@pytest.mark.parametrize("place", ["file/sub", "/proc/nowhere"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_written(name, place, here):
    arguments, option, result = COMMANDS[name]
    Path("file").write_text("")
    done = runs.command(*words(name), *arguments, option, f"{place}/{result}", check=False)
    reason = "Not a directory" if place.startswith("file") else "No such file"
    says(done, 2, place, "no such folder" if name == "decode" else reason)


@pytest.mark.parametrize("name", [n for n, (_, _, result) in COMMANDS.items() if "." in result])
def test_a_folder_in_the_place_of_a_file(name, here):
    arguments, option, result = COMMANDS[name]
    Path(result).mkdir()
    says(runs.command(*words(name), *arguments, option, result, check=False), 2, result, "Is a directory")


@pytest.mark.parametrize("name", [n for n, (_, _, result) in COMMANDS.items() if "." not in result])
def test_a_file_in_the_place_of_a_folder(name, here):
    arguments, option, result = COMMANDS[name]
    Path(result).write_text("")
    done = runs.command(*words(name), *arguments, option, result, check=False)
    says(done, 2, result)
    assert Path(result).is_file()


@pytest.fixture(scope="module")
def opened():
    """List of functions of a path that are called before a file is opened. The hook itself stays in the process."""
    listeners = []

    def hook(event, arguments):
        if event == "open":
            for listener in listeners:
                listener(str(arguments[0]))

    sys.addaudithook(hook)
    return listeners


@pytest.fixture
def vanishes(opened):
    """Let a file or folder vanish when a file is opened for the n-th time."""

    def arrange(trigger, number, victim):
        def listener(path):
            nonlocal number
            if path.endswith(trigger) and number:
                number -= 1
                if not number:
                    shutil.rmtree(victim) if Path(victim).is_dir() else Path(victim).unlink()

        opened.append(listener)
        return lambda: not number

    yield arrange
    opened.clear()


CASE, INDEX, CHECKPOINT = "store/cases/blob0.npy", "store/store.json", "run/checkpoints/step-00000003"
#: Command, file whose opening makes another vanish, number of the opening, and the file that vanishes.
VANISHING = [
    ("fit", "volume.nii", 1, "volume.nii"),
    ("fit", "volume.nii", 2, "volume.nii"),
    ("decode", "fit/manifest.json", 1, "fit/manifest.json"),
    ("decode", "fit/manifest.json", 1, "fit/planes.safetensors"),
    ("decode", "fit/config.yaml", 2, "fit/config.yaml"),
    ("decode", "fit/config.yaml", 2, "fit/planes.safetensors"),
    ("compare", "volume.nii", 3, "volume.nii"),
    ("train-autodecoder", INDEX, 1, INDEX),
    ("train-autodecoder", INDEX, 1, CASE),
    ("train-autodecoder", INDEX, 1, "store"),
    ("ablate", INDEX, 1, CASE),
    ("encode", "store/store.json", 1, "store/cases/blob3.npy"),
    ("encode", f"{CHECKPOINT}/manifest.json", 1, f"{CHECKPOINT}/shared.pt"),
    ("encode", f"{CHECKPOINT}/shared.pt", 2, f"{CHECKPOINT}/shared.pt"),
    ("encode", "run/config.yaml", 1, "run/config.yaml"),
    ("export-latents", f"{CHECKPOINT}/manifest.json", 1, CHECKPOINT),
    ("export-latents", INDEX, 1, INDEX),
    ("evaluate", INDEX, 1, CASE),
    ("evaluate", f"{CHECKPOINT}/manifest.json", 1, f"{CHECKPOINT}/shared.pt"),
    ("train-diffusion", "latents/latents.json", 1, "latents/latents.json"),
    ("train-diffusion", "latents/latents.json", 1, "latents/planes/blob1.safetensors"),
    ("train-diffusion", "latents/planes/blob0.safetensors", 1, "latents"),
    ("sample", "model/model/model.json", 1, "model/model/model.json"),
    ("sample", "model/model/model.json", 1, "model/model/network.safetensors"),
    ("interpolate", "latents/latents.json", 1, "latents/planes"),
    ("interpolate", "model/model/model.json", 1, "model"),
    ("export-bundle", "model/model/model.json", 1, "model/model/decoder.safetensors"),
    ("evaluate samples", INDEX, 1, CASE),
    ("evaluate samples", "samples/sample-0001_seed0_heun2.nii.gz", 1, "samples"),
    ("features train", INDEX, 1, CASE),
    ("baseline train", INDEX, 1, CASE),
    ("baseline reconstruct", "rival/baseline.json", 1, "rival/network.safetensors"),
]


@pytest.mark.parametrize(("name", "trigger", "number", "victim"), VANISHING)
def test_an_input_that_vanishes(name, trigger, number, victim, here, vanishes):
    arguments, option, result = COMMANDS[name]
    gone = vanishes(trigger, number, victim)
    done = runs.command(*words(name), *arguments, option, result, check=False)
    assert gone()
    says(done, 2, victim)
    assert any(reason in done.stderr for reason in ("No such file", "missing", "no such file"))
    assert "damaged" not in done.stderr


@pytest.mark.parametrize("name", ["check-data", "prepare"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_case_that_vanishes_is_reported_and_the_others_are_used(name, number, here, vanishes):
    gone = vanishes("volumes/a.nii", number, "volumes/a.nii")
    done = runs.command(name, "volumes", "--jobs", "1", *([] if name == "check-data" else ["--out", "out"]), check=False)
    assert gone()
    assert done.returncode == 1, done.stderr
    assert "FAILS a [train]: " in done.stdout
    assert "1 of 2 cases" in done.stdout


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["fit", "check-data"])
def test_a_slice_of_a_series_that_vanishes_is_named(name, number, tmp_path, monkeypatch, vanishes):
    pytest.importorskip("pydicom")
    from test_dicom import write_series

    monkeypatch.chdir(tmp_path)
    write_series(Path("series"))
    gone = vanishes("000.dcm", number, "series/001.dcm")
    done = runs.command(name, "series", *(["--out", "out", *SMALL] if name == "fit" else ["--jobs", "1"]), check=False)
    assert gone()
    assert done.returncode == (2 if name == "fit" else 1), done.stderr
    text = done.stderr if name == "fit" else done.stdout
    assert "series/001.dcm: " in text
    assert "No such file" in text
    assert "Traceback" not in text


def test_the_demo_on_a_full_disk(tmp_path, monkeypatch):
    from tcam_diff import files
    from tcam_diff.demo import __main__ as demo

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "demo"), "--fit-only"])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == f"demo: {tmp_path / 'demo' / 'mni152_128.nii.gz'}: No space left on device"
    assert not list((tmp_path / "demo").iterdir())


def test_a_configuration_that_vanishes(here, vanishes):
    Path("mine.yaml").write_text("data: store\n")
    vanishes("mine.yaml", 1, "mine.yaml")
    says(runs.command("train-autodecoder", "mine.yaml", "--out", "out", check=False), 2, "mine.yaml", "No such file")
