"""Commands with the arguments that a user types."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import runs
import tcam_diff
from rich.console import Console
from runs import command as tcam
from tcam_diff import environment
from tcam_diff.cli import common
from tcam_diff.cli.app import app
from tcam_diff.progress import Progress

FAST = ["steps=12", "channels=6", "widths=[24]"]
OBLIQUE = np.array([[0.9, 0.1, 0.3, -20.0], [-0.1, 1.8, 0.2, 7.0], [-0.2, 0.3, 2.9, 3.0], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """Anisotropic, oblique volume, stored as scaled int16."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (20, 16, 12)], indexing="ij")
    data = 800 * np.exp(-3 * (x**2 + y**2 + z**2)) - 100
    image = nib.Nifti1Image(data.astype(np.float32), OBLIQUE)
    image.header.set_data_dtype(np.int16)
    path = tmp_path_factory.mktemp("data") / "volume.nii.gz"
    nib.save(image, path)
    return path


@pytest.fixture(scope="module")
def fitted(volume, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "run"
    done = tcam("fit", volume, "--out", folder, *FAST)
    assert "PSNR" in done.stdout
    return folder


def test_fit_decode_compare(volume, fitted, tmp_path):
    recon = tmp_path / "recon.nii.gz"
    tcam("decode", fitted, "--out", recon)
    got, want = nib.load(recon), nib.load(volume)
    assert got.shape == want.shape
    np.testing.assert_allclose(got.affine, want.affine, atol=1e-4)
    assert got.header.get_xyzt_units() == ("mm", "sec")
    out = tcam("compare", volume, recon).stdout
    assert all(word in out for word in ("MSE", "PSNR", "SSIM"))
    assert (tmp_path / "compare.png").is_file()


def test_decode_at_another_size_and_type(fitted, tmp_path):
    recon = tmp_path / "big.nii"
    tcam("decode", fitted, "--out", recon, "--size", 40, 32, 36, "--dtype", "int16")
    image = nib.load(recon)
    assert image.shape == (40, 32, 36)
    assert image.get_data_dtype() == np.int16
    zooms = np.sqrt((OBLIQUE[:3, :3] ** 2).sum(0)) * np.array([0.5, 0.5, 1 / 3])
    np.testing.assert_allclose(image.header.get_zooms(), zooms, rtol=1e-4)


def test_channels(tmp_path):
    data = np.random.default_rng(0).random((12, 13, 14, 3), np.float32) * [1, 10, 100]
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.eye(4)), tmp_path / "c.nii.gz")
    tcam("fit", tmp_path / "c.nii.gz", "--out", tmp_path / "run", *FAST, "-q")
    tcam("decode", tmp_path / "run", "--out", tmp_path / "r.nii.gz", "--dtype", "uint16")
    back = nib.load(tmp_path / "r.nii.gz").get_fdata()
    assert back.shape == data.shape
    assert back[..., 2].max() > 5 * back[..., 1].max() > 5 * back[..., 0].max()
    assert "MSE" in tcam("compare", tmp_path / "c.nii.gz", tmp_path / "r.nii.gz", "--channel", 2).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "absent.nii.gz", "--out", "{out}"), "absent.nii.gz: no such file"),
        (("fit", "{volume}", "--out", "{out}", "step=3"), "did you mean steps"),
        (("fit", "{volume}", "--out", "{out}", "--preset", "slow"), "preset"),
        (("fit", "{volume}", "--out", "{fitted}"), "--overwrite"),
        (("fit", "{volume}", "--out", "{out}", "--max-voxels", "10"), "--max-voxels"),
        (("decode", "{out}", "--out", "x.nii.gz"), "not a folder that"),
        (("decode", "{fitted}", "--out", "{out}.img"), ".nii or .nii.gz"),
        (("decode", "{fitted}", "--out", "{out}.nii", "--dtype", "float16"), "float16"),
        (("decode", "{fitted}", "--out", "{out}.nii", "--size", "0", "3", "3"), "--size"),
        (("compare", "{volume}", "absent.nii"), "absent.nii: no such file"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, volume, fitted, tmp_path):
    done = tcam(*(a.format(volume=volume, fitted=fitted, out=tmp_path / "new") for a in arguments), check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_ctrl_c_keeps_the_best_result(volume, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tcam_diff.cli",
        "fit",
        str(volume),
        "--out",
        str(tmp_path / "run"),
        "steps=1000000",
        "channels=6",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert any("planes" in line for line in process.stdout)  # printed when the fit is set up
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "stopped after" in out
    tcam("decode", tmp_path / "run", "--out", tmp_path / "r.nii.gz")


def test_ctrl_c_ends_a_training_run_with_a_checkpoint_and_a_status(tmp_path):
    store = runs.make_store(tmp_path / "store").folder
    command = [sys.executable, "-m", "tcam_diff.cli", "train-autodecoder", "fast", f"data={store}", *runs.SMALL]
    process = subprocess.Popen(
        [*command, "steps=1000000", "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert "volumes" in first, first + process.stdout.read()
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 130, out
    assert "--resume auto continues" in out
    assert any((tmp_path / "run" / "checkpoints").iterdir())


def test_ctrl_c_ends_the_demo(monkeypatch, tmp_path, capsys):
    """No command runs after one that was interrupted."""
    from tcam_diff.demo import __main__ as command
    from tcam_diff.demo import run as demo

    calls = []

    def work(name, stops=False):
        def run(*arguments, **options):
            calls.append(name)
            if stops:
                raise KeyboardInterrupt
            return []

        monkeypatch.setattr(demo, name, run)

    monkeypatch.setattr(demo, "fit_one", lambda *a: None)
    monkeypatch.setattr(demo, "find_cases", lambda path: mock.Mock(cases=[]))
    for name in ("make_cohort", "prepare_cases", "export_latents", "train_diffusion", "draw_samples"):
        work(name)
    work("train_autodecoder", stops=True)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 130
    assert calls == ["make_cohort", "prepare_cases", "train_autodecoder"]
    assert "the same command continues" in capsys.readouterr().out


def test_the_library_does_not_import_the_command_line():
    package = Path(tcam_diff.__file__).parent
    for path in package.rglob("*.py"):
        if "cli" not in path.relative_to(package).parts:
            for line in path.read_text().splitlines():
                assert not re.match(r"\s*(from|import) (rich|typer|tcam_diff\.cli)\b", line), (path, line)


def test_help_and_version():
    alone = subprocess.run([sys.executable, "-m", "tcam_diff.cli", "--help"], capture_output=True, text=True, check=True)
    assert "decode" in alone.stdout
    assert tcam("--version").stdout.startswith("tcam ")
    for command in ("fit", "decode", "compare"):
        assert "--out" in tcam(command, "-h").stdout


QUICK = """
import sys
sys.argv = ["tcam", *sys.argv[1:]]
from rich.console import Console
from tcam_diff.cli import common, main
try:
    main()
finally:
    print("imported:", *({"torch", "monai", "scipy.ndimage", "matplotlib", "nibabel", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version", "--nothing"], ["fit"], *([c.name, "-h"] for c in app.registered_commands)], ids=str
)
def test_help_and_usage_errors_import_no_large_package(arguments):
    done = subprocess.run([sys.executable, "-c", QUICK, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize(
    ("given", "want"),
    [({}, environment.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=str,
)
def test_idle_threads_do_not_spin_for_long_unless_the_user_says_so(given, want):
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    script = QUICK.replace('print("imported:"', 'import os; print(os.environ.get("GOMP_SPINCOUNT"), "imported:"')
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, env=env)
    assert done.stdout.splitlines()[-1].split()[0] == want


def test_check_data_needs_no_torch(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"no volume")
    done = subprocess.run([sys.executable, "-c", QUICK, "check-data", str(tmp_path)], capture_output=True, text=True)
    assert "not a readable NIfTI file" in done.stdout
    assert not {"torch", "monai", "matplotlib"} & set(done.stdout.splitlines()[-1].split())


def test_missing_extra_packages_are_reported_in_one_line(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "tcam_diff.cli"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'tcam-ext[train]'" in done.stderr


@pytest.mark.parametrize("terminal", [False, True])
def test_brackets_in_names_are_printed_as_they_are(terminal, tmp_path, monkeypatch):
    """Nothing in a file's name is markup, a pattern or an emoji."""
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # as rich takes it

    def printed(*arguments, code=0):
        done = tcam(*arguments, check=False)
        assert done.returncode == code, done.stderr
        assert terminal or "\x1b" not in done.stdout
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stdout + done.stderr)

    path = tmp_path / "[bold]" / "[red]x[/red] :smile: [0] *?.nii.gz"  # the slash ends a folder's name
    bad, store, run = path.parent / "[red]bad.nii.gz", tmp_path / "[red]store[", tmp_path / "[link=x]run :tada:"
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((12, 12, 12), np.float32), np.eye(4)), path)
    bad.write_bytes(b"no image")
    lines = printed("check-data", path.parent, code=1)
    assert f"{path.parent}: " in lines
    assert "ok    red] :smile: [0] *? [train]" in lines
    assert "FAILS [red]bad [train]" in lines
    prepared = printed("prepare", path.parent, "--out", store, "resize=[8,8,8]", code=1)
    assert "FAILS [red]bad [train]" in prepared
    assert f"{store}: 1 of 2 cases" in prepared
    assert f"{store}: a prepared store" in printed("check-data", store)
    fitted = printed("fit", path, "--out", run, *FAST)
    assert f"{path}: 12 x 12 x 12" in fitted
    assert f"{run}: 12 steps" in fitted
    assert f"{path.parent}.nii" in printed("decode", run, "--out", f"{path.parent}.nii")
    assert f"{bad}: " in printed("fit", bad, "--out", tmp_path / "no", code=2)
    assert "[bold]x[/red]" in printed("[bold]x[/red]", code=2)
    assert "k[/red]: no such key" in printed("fit", path, "--out", run, "k[/red]=3", code=2)


def test_a_progress_bar_shows_names_as_they_are(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(common, "console", Console(file=out, force_terminal=True, width=200, markup=False, emoji=False))
    with common.progress_bar("[red]x[/red] :smile:") as show:
        show(Progress(1, 2))
    assert "[red]x[/red] :smile:" in out.getvalue()


#: Run commands one after another in this process, as one that starts does.
COMMANDS = """
import json, sys
from tcam_diff.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["tcam", *arguments]
    try:
        main()
    except SystemExit as done:
        assert not done.code, arguments
"""


@pytest.mark.slow
def test_commands_leave_nothing_in_the_temporary_directory(volume, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    runs.make_store(tmp_path / "store", count=3, held_out=1)
    small = ["channels=4", "plane_size=8", "widths=[8]", "steps=3"]
    commands = [
        ["fit", volume, "--out", "fit", *small],
        ["prepare", volume.parent, "--out", "prepared", "resize=[8,8,8]"],
        ["train-autodecoder", "fast", "data=store", "--out", "run", "batch=2", *small],
        ["estimate", "fast", "data=store", "batch=2", *small, "--seconds", "1"],
        ["encode", "run", "store", "--out", "encoded", "steps=3"],
        ["export-latents", "run", "--out", "latents"],
        ["train-diffusion", "tiny", "latents=latents", "--out", "model", *runs.SMALL_DIFFUSION, "steps=2", "batch=2"],
        ["sample", "model", "--out", "samples", "--n", "1", "--steps", "2"],
        ["export-bundle", "model", "--out", "bundle"],
    ]
    script = [sys.executable, "-c", COMMANDS, json.dumps(commands, default=str)]
    env = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} | {"TMPDIR": str(temporary)}
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(temporary.iterdir())


def test_a_compiled_network_has_the_cache_folder_of_torch_or_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv(environment.COMPILER_FOLDER, raising=False)
    environment.prepare_environment()
    assert Path(os.environ[environment.COMPILER_FOLDER]).is_dir()
    environment.restore_compiler_folder()
    assert environment.COMPILER_FOLDER not in os.environ
    monkeypatch.setenv(environment.COMPILER_FOLDER, str(tmp_path))
    environment.prepare_environment()
    environment.restore_compiler_folder()
    assert os.environ[environment.COMPILER_FOLDER] == str(tmp_path)
