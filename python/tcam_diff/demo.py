"""``make demo``: a real MRI becomes three feature planes and comes back as a volume.

The volume is the MNI152 T1 template (ICBM 2009a, 1 mm) that nilearn ships, its central 128^3 voxels. Run with
``python -m tcam_diff.demo [--out FOLDER]``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import tcam_ext
from tcam_diff.autodecoder import artefact
from tcam_diff.autodecoder.config import load_config
from tcam_diff.cli.compare import compare_volumes
from tcam_diff.cli.decode import decode_to_file
from tcam_diff.cli.fit import console, fit_volume
from tcam_diff.data.intensity import to_unit
from tcam_diff.data.nifti import read_volume
from tcam_diff.evaluation import metrics

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
    arguments = parser.parse_args()
    start = time.monotonic()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    original, fitted_folder = out / "mni152_128.nii.gz", out / "fitted"
    template(original)
    source = read_volume(original)
    result, meta = fit_volume(source, load_config("fast", arguments.overrides))
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
