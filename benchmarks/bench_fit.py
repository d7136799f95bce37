"""Fit the MNI152 template with the demo's settings and variants: time, PSNR and SSIM, with and without training noise.

python benchmarks/bench_fit.py [--variants fast noise-free ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import harness
import torch
from tcam_diff.autodecoder.config import FitConfig
from tcam_diff.autodecoder.fit import Fitter
from tcam_diff.autodecoder.planes import texel_noise
from tcam_diff.data.nifti import read_volume
from tcam_diff.data.volume import intensity_range
from tcam_diff.demo import run as demo
from tcam_diff.evaluation import metrics

VARIANTS = {
    "fast": [],
    "noise-free": ["noise_std=0"],
    "last tenth noise-free": ["noise_free_fraction=0.1"],
    "four hidden layers, half the steps": ["widths=[128,128,128,128]", "steps=1600"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    environment = harness.environment()
    for key, value in environment.items():
        print(f"# {key}: {value}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "template.nii.gz"
        demo.write_template(path)
        volume = read_volume(path)
    target = volume.info.replaced(intensity=intensity_range(volume.data)).to_unit(volume.data)
    want = torch.from_numpy(target)
    size = tuple(want.shape[1:])
    rows = []
    for name in a.variants:
        config = FitConfig.load("fast", VARIANTS[name])
        result = Fitter(target, config).run()
        noisy = texel_noise(result.planes, 0.32, size, 0)
        with torch.no_grad():
            clean, rough = (result.decoder(p, size)[0].clamp(0, 1) for p in (result.planes, noisy))
        rows.append(
            {
                "fit": name,
                "changes": " ".join(VARIANTS[name]),
                "steps": result.steps_done,
                "seconds": result.seconds,
                "psnr": metrics.psnr(want, clean),
                "ssim": metrics.ssim3d(want, clean),
                "psnr_noisy": metrics.psnr(want, rough),
            }
        )
        print(rows[-1], flush=True)
    if a.json:
        harness.write_json(a.json, rows)
        print(f"wrote {a.json}")


if __name__ == "__main__":
    main()
