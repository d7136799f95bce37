"""``make demo``: a real MRI becomes three feature planes and comes back as a volume; then new volumes are drawn.

The MRI is the MNI152 T1 template (ICBM 2009a, 1 mm) that nilearn ships, its central 128^3 voxels. The new volumes come from a
small diffusion model of a cohort made from it. Run with ``python -m tcam_diff.demo [--out FOLDER] [--fit-only]``.
"""

from __future__ import annotations

import argparse
import shutil
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import tcam_ext
from tcam_diff.autodecoder import artefact
from tcam_diff.autodecoder.config import load_config
from tcam_diff.autodecoder.decode import decode_to_file
from tcam_diff.autodecoder.objective import unit
from tcam_diff.cli.app import app
from tcam_diff.cli.common import INTERRUPTED, say
from tcam_diff.cli.compare import compare_volumes
from tcam_diff.cli.fit import console, fit_volume
from tcam_diff.data.intensity import to_unit
from tcam_diff.data.nifti import read_volume
from tcam_diff.data.store import Store
from tcam_diff.errors import UserError
from tcam_diff.evaluation import metrics
from tcam_diff.evaluation.picture import sheet, strip
from tcam_diff.files import write_text
from tcam_diff.training.logger import read_metrics
from tcam_diff.training.report import curves, page, png

SIZE = 128


def template(path: Path) -> None:
    """The central SIZE^3 voxels of the MNI152 template, with the affine that keeps them in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn.datasets import load_mni152_template

        image = load_mni152_template(resolution=1)
    data = np.asarray(image.dataobj, dtype=np.float32)
    corner = [(n - SIZE) // 2 for n in data.shape]
    crop = data[tuple(slice(c, c + SIZE) for c in corner)]
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ corner
    nib.save(nib.Nifti1Image(crop, affine), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything the demo makes (default: demo)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the preset fast")
    parser.add_argument("--fit-only", action="store_true", help="the MRI alone: no cohort, no new volumes")
    arguments = parser.parse_args()
    start = time.monotonic()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    try:
        fit_one(out, arguments.overrides, start)
        if not arguments.fit_only:
            generate(out, start)
    except UserError as error:
        raise SystemExit(f"demo: {error}") from error
    except KeyboardInterrupt:
        say("\ndemo: interrupted; the same command goes on")
        raise SystemExit(INTERRUPTED) from None


def fit_one(out: Path, overrides: list[str], start: float) -> None:
    """The template: planes, and back at two sizes."""
    original, fitted_folder = out / "mni152_128.nii.gz", out / "fitted"
    template(original)
    source = read_volume(original)
    result, meta = fit_volume(source, load_config("fast", overrides))
    artefact.save(fitted_folder, result, meta)

    fitted = artefact.load(fitted_folder)
    same, double = out / "recon_128.nii.gz", out / "recon_256.nii.gz"
    decode_to_file(fitted, same, (SIZE,) * 3)
    decode_to_file(fitted, double, (2 * SIZE,) * 3)
    picture = out / "compare.png"
    compare_volumes(source, read_volume(same), picture)
    noisy = noisy_psnr(fitted, source.data)
    console.print(f"(those are without noise; decoded with the training noise C = {result.config.noise_std}: {noisy:.2f} dB)")
    console.print(f"\n{time.monotonic() - start:.0f} s in all\n", highlight=False)
    for what, path in (
        ("original, 128^3", original),
        ("planes and decoder", fitted_folder),
        ("decoded, 128^3", same),
        ("decoded, 256^3", double),
        ("picture", picture),
    ):
        console.print(f"  {what + ':':<20}{path.resolve()}", highlight=False, soft_wrap=True)


def generate(out: Path, start: float) -> None:
    """A cohort, both stages on it, four new volumes, and a page with everything; by the commands, as one would type them."""
    cohort, store, stage1, latents, stage2, samples = (
        out / n for n in ("cohort", "store", "stage1", "latents", "stage2", "samples")
    )
    settings = out / "commands.txt"
    small = "network.attention_levels=[1]"  # of 12^2 texels
    commands: list[list[str | Path]] = [
        ["make-cohort", "--n", "48", "--size", "48", "--seed", "0", "--held-out", "0", "--out", cohort],
        ["prepare", cohort, "--out", store],
        ["train-autodecoder", "fast", f"data={store}", "channels=8", "plane_size=24", "steps=900", "--out", stage1],
        ["export-latents", stage1, "--out", latents],
        ["train-diffusion", "tiny", f"latents={latents}", "center=true", "flip=[x]", small, "steps=1200", "--out", stage2],
        ["sample", stage2, "--n", "4", "--steps", "25", "--out", samples],
    ]
    shown = "\n".join("tcam " + " ".join(map(str, c)) for c in commands)
    folders = (cohort, store, stage1, latents, stage2, samples)
    ours = settings.is_file() and settings.read_text().startswith("tcam make-cohort")
    if ours and settings.read_text() != shown:  # of another version of this demo
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    elif not ours:
        theirs = [str(f) for f in folders if f.exists()]
        if theirs:
            raise UserError(f"--out {out}: holds {', '.join(theirs)}, which this demo did not make; choose another folder")
    write_text(settings, shown)
    for command in commands:
        say("\ntcam " + " ".join(map(str, command)), style="bold", markup=False)
        resumed = ["--resume", "auto"] if str(command[0]).startswith("train") else []
        if app([str(c) for c in command] + resumed, standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    page = out / "index.html"
    write_text(page, _page(out, store, stage1, stage2, samples, shown, time.monotonic() - start))
    say(f"\n{time.monotonic() - start:.0f} s in all; everything on one page: {page.resolve()}")


def _page(out: Path, store: Path, stage1: Path, stage2: Path, samples: Path, commands: str, seconds: float) -> str:
    held = Store(store)
    chosen = held.records[:4]
    real = [(r.name, strip(unit(torch.tensor(held.volume(r)))[0].numpy(), np.asarray(r.affine))) for r in chosen]
    shown = [
        curves(read_metrics(stage1), [["loss", "data"], ["psnr"]]),
        curves(read_metrics(stage2), [["loss", "validation_loss"], ["residual"]]),
    ]
    return page(
        "tcam: from a volume to planes, and from noise to volumes",
        [
            ("One MRI: original, decoded from its planes, difference", (out / "compare.png").read_bytes()),
            ("Four volumes of the cohort that the model is trained on", png(sheet(real))),
            ("Four new volumes", (samples / "contact-sheet.png").read_bytes()),
            ("Stage 1: one decoder, planes for every volume", shown[0]),
            ("Stage 2: the diffusion model of the planes", shown[1]),
            ("What was run", f"{commands}\n\n{seconds:.0f} s on {torch.get_num_threads()} threads"),
        ],
    )


def noisy_psnr(fitted: artefact.FittedVolume, data: np.ndarray) -> float:
    """PSNR with the noise of training on the planes."""
    from tcam_diff.autodecoder.planes import texel_noise

    size = fitted.meta.shape
    planes = texel_noise(fitted.planes, fitted.config.noise_std, size, 0)
    with torch.no_grad():
        noisy: torch.Tensor = fitted.decoder(planes, size)[0].clamp(0, 1)
    return metrics.psnr(torch.from_numpy(to_unit(data, fitted.meta.intensity)), noisy)


if __name__ == "__main__":
    print(f"tcam_ext {tcam_ext.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    main()
