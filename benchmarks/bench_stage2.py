"""Stage 2 on `tcam make-cohort`: distance of samples from real volumes, beside rivals that should be farther.

python benchmarks/bench_stage2.py [--steps N] [--seeds 3] [--work DIR] [--json FILE] [--picture FILE]

128 training volumes of 64^3 (the FLAIR-like channel) and 128 held-out ones; C = 8, planes of 32^2, latents fitted beforehand.
Each seed trains the network with and without cross-attention, draws 64 volumes from each, and scores them with critics at 32^3
in pairs: samples and decoded noise, samples and samples with swapped planes, and samples of the two networks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import torch
from bench_stage1 import tcam
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.autodecoder.planes import normalise
from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.evaluation.config import CriticConfig
from tcam_diff.evaluation.critic import Score, blurred, halves, prepare, score
from tcam_diff.evaluation.picture import sheet, strip
from tcam_diff.evaluation.sets import read_set
from tcam_diff.training.logger import read_metrics
from tcam_diff.training.report import png

NETWORKS = {"samples": (), "without cross-attention": ("network.cross=none",)}
PAIRS = ("decoded noise", "planes swapped", "without cross-attention")


def timed(times: dict[str, float], name: str, work: Callable[[], object]) -> object:
    start = time.perf_counter()
    result = work()
    times[name] = times.get(name, 0.0) + time.perf_counter() - start
    return result


def decoded(model: TriplaneDiffusion, planes: list[torch.Tensor]) -> torch.Tensor:
    """Volumes (N, 1, 64, 64, 64) of planes, decoded one by one."""
    return torch.cat([model.decode([p[i : i + 1] for p in planes]) for i in range(len(planes[0]))])


@torch.no_grad()
def draw(model: TriplaneDiffusion, count: int, config: SampleConfig) -> list[torch.Tensor]:
    parts = [Sampler(model, config).sample(range(i, min(i + 16, count))) for i in range(0, count, 16)]
    return [torch.cat(p) for p in zip(*parts, strict=True)]


def nearest(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The root mean square distance of each volume of ``a`` to the nearest one of ``b``, (N,)."""
    x, y = a.flatten(1).float(), b.flatten(1).float()
    return torch.cdist(x, y).amin(1) / x.shape[1] ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each network")
    parser.add_argument("--stage1-steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=100, help="largest number of epochs of each critic")
    parser.add_argument("--changes", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the preset cohort")
    parser.add_argument("--work", type=Path, help="keep all files here and reuse its latents [default: a temporary folder]")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--picture", type=Path, help="write a picture of real volumes, samples and rivals")
    a = parser.parse_args()
    for key, value in harness.environment().items():
        print(f"# {key}: {value}")
    with tempfile.TemporaryDirectory() as scratch:
        run(a, a.work or Path(scratch))


def run(a: argparse.Namespace, work: Path) -> None:
    cohort, store, stage1, latents = (work / n for n in ("cohort", "store", "stage1", "latents"))
    before: dict[str, float] = {}
    if not (latents / "latents.json").is_file():
        make = ("make-cohort", "--n", 256, "--size", 64, "--seed", 0, "--held-out", 128, "--out", cohort, "-q")
        timed(before, "cohort_s", lambda: tcam(*make))
        timed(before, "prepare_s", lambda: tcam("prepare", cohort, "--out", store, "-q"))
        settings = ("fast", f"data={store}", "channels=8", "plane_size=32", f"steps={a.stage1_steps}")
        tcam("train-autodecoder", *settings, "--out", stage1, "-q")
        tcam("export-latents", stage1, "--out", latents, "-q")
    seconds = [m["seconds"] for m in read_metrics(stage1) if "seconds" in m]
    before["latents_s"] = seconds[-1]  # of training stage 1, restarts included
    psnr = statistics.fmean(e.psnr for e in LatentSet(latents).entries)
    print(f"latents: {len(LatentSet(latents).entries)} volumes, PSNR {psnr:.2f} dB; {before}", flush=True)
    config = CriticConfig(size=32, epochs=a.epochs)
    cpu = torch.device("cpu")
    fast = ("compute_dtype=bfloat16",) if harness.environment()["bf16_instructions"] else ()
    truth = read_set(store, lambda v: v.half(), split="test").volumes
    trained = read_set(store, lambda v: v.half(), split="train").volumes
    rows: list[dict[str, object]] = []
    about = {"cores": len(os.sched_getaffinity(0)), "steps": a.steps, "psnr": psnr, "before": before}
    about["controls"] = controls(truth, reconstructed(latents, a.samples), config)
    print(about["controls"], flush=True)
    for seed in range(a.seeds):
        times: dict[str, float] = {}
        volumes: dict[str, torch.Tensor] = {}
        losses = {}
        for name, changes in NETWORKS.items():
            folder = work / f"seed{seed}-{name.replace(' ', '-')}"
            settings = ("cohort", f"latents={latents}", f"seed={seed}", f"steps={a.steps}", *fast, *a.changes, *changes)
            if not (folder / "report.html").is_file():
                timed(
                    times,
                    "train_s",
                    lambda s=settings, f=folder: tcam("train-diffusion", *s, "--out", f, "--resume", "auto", "-q"),
                )
            model = TriplaneDiffusion.load(folder)
            planes = timed(times, "sample_s", lambda m=model, s=seed: draw(m, a.samples, SampleConfig(seed=s, steps=25)))
            volumes[name] = decoded(model, planes)
            losses[name] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["training_loss"]
            if name == "samples":
                swapped = [p.roll(i, 0) for i, p in enumerate(planes)]
                volumes["planes swapped"] = decoded(model, swapped)
                noise = [
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + 10 * i)) for i, p in enumerate(planes)
                ]
                volumes["decoded noise"] = decoded(model, normalise(noise))
        prepared = {k: prepare(v, config) for k, v in volumes.items()}
        real = prepare(truth, config)
        pairs: dict[str, dict[str, float]] = {}
        valid = True
        for rival in PAIRS:
            fakes = {"samples": prepared["samples"], rival: prepared[rival]}
            result: Score = timed(times, "critic_s", lambda r=real, f=fakes, s=seed: score(r, f, config, s, cpu))
            valid &= result.valid
            pairs[rival] = result.distance | {
                "epochs": result.epochs,
                "kept": result.epoch,
                "gradient_norm": result.gradient_norm,
            }
            print(f"seed {seed}: {rival}: {result}", flush=True)
        near = nearest(prepared["samples"], prepare(trained, config))
        held_out = nearest(real, prepare(trained, config))
        between = nearest(prepared["samples"], real)
        rows.append({
            "seed": seed, "pairs": pairs, "valid": valid, "losses": losses, **times, "total_s": sum(times.values()),
            "nearest_training_samples": float(near.median()), "nearest_training_held_out": float(held_out.median()),
            "nearest_training_samples_low": float(near.min()), "nearest_training_held_out_low": float(held_out.min()),
            "nearest_held_out_samples": float(between.median()),
        })  # fmt: skip
        print(json.dumps(rows[-1], indent=1), flush=True)
        if a.json:
            harness.write_json(a.json, rows, **about)
        if a.picture and seed == 0:
            picture(a.picture, {"held out": truth, "training": trained, **volumes}, model.geometry.info.affine)


@torch.no_grad()
def reconstructed(latents: Path, count: int) -> torch.Tensor:
    """Training volumes decoded from their planes, (N, 1, 64, 64, 64): the closest that samples of such planes can come."""
    latent_set = LatentSet(latents)
    fitted = [latent_set.fitted(e.name) for e in latent_set.entries[:count]]
    return torch.cat([f.decoder(f.planes, f.info.shape).float().clamp(0, 1) for f in fitted])


def controls(truth: torch.Tensor, decoded: torch.Tensor, config: CriticConfig) -> dict[str, float]:
    """Scores of one half of the held-out volumes against the other, plain and blurred, and against decoded training volumes."""
    a, b = halves(prepare(truth, config), 0)
    scores = {}
    others = {
        "other half": b,
        "other half, blurred by 1 voxel": blurred(b, 1.0).half(),
        "training volumes, decoded from their planes": prepare(decoded, config),
    }
    for name, other in others.items():
        scores[name] = score(a, {name: other}, config, 0, torch.device("cpu")).distance[name]
    return scores


def picture(path: Path, volumes: dict[str, torch.Tensor], affine: np.ndarray) -> None:
    strips = [(f"{name} {i}", strip(v[i, 0].float().numpy(), affine)) for name, v in volumes.items() for i in range(4)]
    path.write_bytes(png(sheet(strips, 4)))


if __name__ == "__main__":
    main()
