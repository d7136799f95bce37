"""Both stages on a small cohort, from Python: volumes to planes, planes to a diffusion model, and new volumes from it.

python examples/train_and_sample.py [--out FOLDER] [--cases 8] [--size 24] [--steps 200]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tcam_diff.autodecoder.config import EncodeConfig, TrainConfig
from tcam_diff.autodecoder.encode import encode_store, export_latents, load_run
from tcam_diff.autodecoder.train import train_autodecoder
from tcam_diff.data.cohort import Cohort, make_cohort
from tcam_diff.data.config import PrepareConfig
from tcam_diff.data.prepare import prepare_cases
from tcam_diff.data.sources import find_cases
from tcam_diff.data.store import Store
from tcam_diff.diffusion.config import DiffusionConfig, SampleConfig
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.diffusion.train import train_diffusion
from tcam_diff.progress import Progress


def show(p: Progress) -> None:
    """A progress callback: a line every 100 steps."""
    if p.done % 100 == 0:
        print(f"step {p.done} of {p.total}, loss {p.metrics['loss']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep everything here [default: thrown away]")
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--size", type=int, default=24, help="voxels an axis")
    parser.add_argument("--steps", type=int, default=200, help="of each stage")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(a.out or Path(scratch), a.cases, a.size, a.steps)


def run(out: Path, cases: int, size: int, steps: int) -> None:
    for _ in make_cohort(out / "cohort", Cohort(cases, size, seed=0, held_out=2)):
        pass  # a case at a time
    data = find_cases(out / "cohort")
    for _ in prepare_cases(data.cases, out / "store", PrepareConfig.load("cohort"), names=data.label_names):
        pass
    small = ["channels=4", "plane_size=8", "widths=[24]", "batch=2", f"steps={steps}"]
    outcome = train_autodecoder(TrainConfig.load("fast", [f"data={out / 'store'}", *small]), out / "stage1", progress=show)
    print(f"stage 1: PSNR {outcome.metrics['fitted_psnr']:.1f} dB on the training volumes")
    stage1 = load_run(out / "stage1")
    latents = export_latents(stage1, out / "latents")
    held_out = encode_store(stage1, Store(out / "store"), out / "held-out", EncodeConfig(steps=50))
    print(f"planes of {len(latents.entries)} training and {len(held_out.entries)} held-out volumes")
    changes = [f"latents={latents.folder}", f"validation={held_out.folder}", "network.base=16", "network.head_channels=16"]
    train_diffusion(DiffusionConfig.load("tiny", [*changes, f"steps={steps}"]), out / "stage2", progress=show)
    model = TriplaneDiffusion.load(out / "stage2")
    planes = Sampler(model, SampleConfig(steps=10)).sample(range(2))
    with torch.no_grad():
        same, finer = model.decode(planes), model.decode(planes, (2 * size,) * 3)
    print(f"new volumes: {tuple(same.shape)}, and at twice the resolution {tuple(finer.shape)}")


if __name__ == "__main__":
    main()
