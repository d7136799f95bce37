"""The two parts of the demo: one MRI as planes, and new volumes from a cohort."""

from __future__ import annotations

import gzip
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from tcam_diff.autodecoder import artefact
from tcam_diff.autodecoder.config import FitConfig, TrainConfig
from tcam_diff.autodecoder.decode import decode_to_file
from tcam_diff.autodecoder.encode import export_latents, load_run
from tcam_diff.autodecoder.fit import fit_volume
from tcam_diff.autodecoder.planes import texel_noise
from tcam_diff.autodecoder.train import train_autodecoder
from tcam_diff.data.cohort import Cohort, make_cohort
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.prepare import prepare_cases
from tcam_diff.data.readers import read_volume
from tcam_diff.data.sources import find_cases
from tcam_diff.data.store import Store
from tcam_diff.diffusion.config import DiffusionConfig, SampleConfig
from tcam_diff.diffusion.draw import Output, draw_samples
from tcam_diff.diffusion.train import train_diffusion
from tcam_diff.errors import UserError
from tcam_diff.evaluation import metrics, reconstruction
from tcam_diff.evaluation.compare import compare_volumes, figures_text
from tcam_diff.files import write_bytes, write_text
from tcam_diff.progress import Progress, ProgressCallback
from tcam_diff.report import viewer
from tcam_diff.report.inputs import find_inputs
from tcam_diff.report.page import Choice, Written, find_columns, origin, tables, trainings, write_page
from tcam_diff.report.viewer import Column
from tcam_diff.report.volumes import shown

SIZE = 128
JOBS = len(os.sched_getaffinity(0))


def write_template(path: Path) -> None:
    """Write the central SIZE^3 voxels of the MNI152 template."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn.datasets import load_mni152_template

        image = load_mni152_template(resolution=1)
    data = np.asarray(image.dataobj, dtype=np.float32)
    corner = [(n - SIZE) // 2 for n in data.shape]
    crop = data[tuple(slice(c, c + SIZE) for c in corner)]
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ corner
    image = nib.Nifti1Image(crop, affine)
    image.header.set_xyzt_units("mm", "sec")
    write_bytes(path, gzip.compress(image.to_bytes(), mtime=0))


def progress(what: str, every: float = 20.0) -> ProgressCallback:
    """Callback that prints a line every ``every`` seconds and at the end."""
    last = time.monotonic()

    def show(p: Progress) -> None:
        nonlocal last
        if time.monotonic() - last > every or p.done == p.total:
            last = time.monotonic()
            figures = "".join(f", {k} {p.metrics[k]:.4g}" for k in ("loss", "psnr", "training_loss") if k in p.metrics)
            print(f"{what}: {p.done} of {p.total}{figures}", flush=True)

    return show


def work_through(items: Iterable[object], total: int, what: str) -> None:
    """Consume ``items`` and print the progress."""
    show = progress(what)
    for done, _ in enumerate(items, 1):
        show(Progress(done, total))


def fit_one(out: Path, overrides: list[str], start: float) -> None:
    """Fit planes to the template, and decode them at two sizes."""
    original, fitted_folder = out / "mni152_128.nii.gz", out / "fitted"
    write_template(original)
    source = read_volume(original)
    result, info = fit_volume(source, FitConfig.load("fast", overrides), progress=progress("fitting"))
    artefact.save(fitted_folder, result, info)

    fitted = artefact.load(fitted_folder)
    same, double = out / "recon_128.nii.gz", out / "recon_256.nii.gz"
    decode_to_file(fitted, same, (SIZE,) * 3)
    decode_to_file(fitted, double, (2 * SIZE,) * 3)
    picture = out / "compare.png"
    print(figures_text(compare_volumes(source, read_volume(same), picture)))
    noisy = noisy_psnr(fitted, source.data)
    print(f"(without noise; decoded with the training noise C = {result.config.noise_std}: {noisy:.2f} dB)")
    print(f"\n{time.monotonic() - start:.0f} s in total\n")
    for what, path in (
        ("original, 128^3", original),
        ("planes and decoder", fitted_folder),
        ("decoded, 128^3", same),
        ("decoded, 256^3", double),
        ("picture", picture),
    ):
        print(f"  {what + ':':<20}{path.resolve()}")


def generate(out: Path, start: float) -> None:
    """Do the same as the commands in commands.txt: make a cohort, train both stages, draw four volumes; then write a page."""
    folders = cohort, store, stage1, latents, stage2, samples, evaluation = [
        out / n for n in ("cohort", "store", "stage1", "latents", "stage2", "samples", "evaluation")
    ]
    settings = out / "commands.txt"
    changes1 = [f"data={store}", "channels=8", "plane_size=24", "steps=900"]
    changes2 = [
        f"latents={latents}",
        "center=true",
        "prior=gaussian",
        "flip=[x]",
        "network.attention_levels=[1]",
        "steps=1200",
    ]  # attention on 12^2 texels

    def make() -> None:
        work_through(make_cohort(cohort, Cohort(48, 48, 0, 0), JOBS), 48, "cases")

    def prepare() -> None:
        data = find_cases(cohort)
        steps = prepare_cases(data.cases, store, PrepareConfig.load("cohort"), JOBS, names=data.label_names)
        work_through(steps, len(data.cases), "preparing")

    def train1() -> None:
        config = TrainConfig.load("fast", changes1)
        train_autodecoder(config, stage1, "auto", progress=progress("training"))

    def evaluate() -> None:
        real = Store(store)
        found = reconstruction.find_reconstructions(real, stage1)
        rows = reconstruction.evaluate(found, real, progress=progress("evaluating"))
        reconstruction.write(evaluation, rows, reconstruction.protocol(real, stage1, found))

    def train2() -> None:
        config = DiffusionConfig.load("tiny", changes2)
        train_diffusion(config, stage2, "auto", progress=progress("training"))

    commands: list[tuple[str, Callable[[], object]]] = [
        (f"make-cohort --n 48 --size 48 --seed 0 --held-out 0 --out {cohort}", make),
        (f"prepare {cohort} --out {store}", prepare),
        (f"train-autodecoder fast {' '.join(changes1)} --out {stage1}", train1),
        (f"evaluate {store} {stage1} --out {evaluation}", evaluate),
        (f"export-latents {stage1} --out {latents}", lambda: export_latents(load_run(stage1), latents)),
        (f"train-diffusion tiny {' '.join(changes2)} --out {stage2}", train2),
        (
            f"sample {stage2} --n 4 --steps 25 --out {samples}",
            lambda: draw_samples(stage2, Output(samples), range(4), SampleConfig(steps=25), progress=progress("sampling")),
        ),
    ]
    text = "\n".join(f"tcam {command}" for command, _ in commands)
    earlier = settings.read_text() if settings.is_file() else ""
    if not earlier.startswith("tcam make-cohort"):
        others = [str(f) for f in folders if f.exists()]
        if others:
            raise UserError(f"--out {out}: contains {', '.join(others)}, not made by this demo; choose another folder")
    elif earlier != text:  # results of another version of this demo
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    write_text(settings, text)
    for command, work in commands:
        print(f"\ntcam {command}", flush=True)
        work()
    took = f"{text}\n\n{time.monotonic() - start:.0f} s on {torch.get_num_threads()} threads"
    written = _page(out, [stage1, stage2, samples, evaluation], Store(store), took)
    for remark in written.remarks:
        print(f"note: {remark}")
    print(f"\n{time.monotonic() - start:.0f} s in total; report: {(out / 'index.html').resolve()}")


def _page(out: Path, folders: list[Path], store: Store, commands: str) -> Written:
    """Write index.html: the MRI beside its reconstruction, the page of ``tcam report`` about the folders, and the commands."""
    inputs = find_inputs(folders)
    info = artefact.load(out / "fitted").info
    mri: list[Column] = []
    for title, name in (("original", "mni152_128.nii.gz"), ("decoded from its planes", "recon_128.nii.gz")):
        values = torch.from_numpy(info.to_unit(read_volume(out / name).data))
        mri.append(Column(title, [shown("MNI152", values, info, 0, SIZE)], follows=bool(mri)))
    cohort = find_columns(inputs, store, Choice(volumes=4))
    return write_page(
        out / "index.html",
        "tcam: from a volume to planes, and from noise to volumes",
        "",
        [("One MRI", mri), ("A cohort: training volumes, their reconstructions, and new volumes", cohort)],
        [
            ("One MRI: original, decoded from its planes, difference", (out / "compare.png").read_bytes()),
            *tables(inputs),
            *trainings(inputs),
            *origin(inputs, store, commands),
        ],
        viewer.script(),
    )


def noisy_psnr(fitted: artefact.FittedVolume, data: np.ndarray) -> float:
    """PSNR (dB) of the decoded planes with the noise of training."""
    size = fitted.info.shape
    planes = texel_noise(fitted.planes, fitted.config.noise_std, size, 0)
    with torch.no_grad():
        noisy: torch.Tensor = fitted.decoder(planes, size)[0].clamp(0, 1)
    return metrics.psnr(torch.from_numpy(fitted.info.to_unit(data)), noisy)
