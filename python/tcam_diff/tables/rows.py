"""Rows of the tables from the results of their steps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.baselines.compression import Compression, is_compression
from tcam_diff.evaluation.reconstruction import FITTED, TRAINED
from tcam_diff.tables.plan import GENERATORS, OURS, RIVALS, Plan, last
from tcam_diff.training.logger import read_metrics

TITLES = {OURS: "TCAM-Diff", "vae-gan": "VAE-GAN (MONAI)", "vq-gan": "VQ-GAN (MONAI)"}
TITLES |= {f"{n}-equal-steps": f"{TITLES[n]}, as many steps as ours" for n in RIVALS}

Row = dict[str, Any]


def read(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text())


def latents(folder: Path) -> int:
    """Numbers that a model keeps of a volume."""
    if is_compression(folder):
        return Compression.load(folder).latents
    encoded = LatentSet(folder.with_name(f"{folder.name}-encoded"))
    return sum(p.numel() for p in encoded.planes(encoded.entries[0]))


def curve(run: Path) -> list[tuple[float, float]]:
    """Seconds and PSNR of the evaluations of a training on some of its volumes."""
    points, seconds = [], 0.0
    for r in read_metrics(run):
        seconds = r.get("seconds") or seconds
        if r.get("psnr") is not None:
            points.append((seconds, float(r["psnr"])))
    return points


def late_gain(points: Sequence[tuple[float, float]]) -> float:
    """Gain of PSNR in the last fifth of the time, in dB: near 0 where the curve was flat at the end."""
    if len(points) < 2:
        return math.nan
    seconds, values = np.array(points).T
    return float(values[-1] - np.interp(0.8 * seconds[-1], seconds, values))


def time_to(points: Sequence[tuple[float, float]], psnr: float) -> float:
    """Seconds after which a curve first reaches a PSNR, interpolated; infinite if it does not."""
    before = (0.0, -math.inf)
    for seconds, value in points:
        if value >= psnr:
            share = (psnr - before[1]) / (value - before[1]) if math.isfinite(before[1]) and value > before[1] else 1.0
            return before[0] + share * (seconds - before[0])
        before = (seconds, value)
    return math.inf


def table1(plan: Plan) -> list[Row]:
    """A row for each seed, model and kind of volumes (fitted or trained on; held out)."""
    rows = []
    for seed in range(plan.seeds):
        for model, folders in plan.reconstructions(seed).items():
            run = plan.folder / folders[0]
            points = curve(run)
            common = {
                "seed": seed,
                "model": model,
                "latents": latents(run),
                "steps": max(int(r["step"]) for r in read_metrics(run)),
                "seconds": last(run, "seconds"),
                "memory_gb": last(run, "memory_gb"),
                "late_gain_db": late_gain(points),
                "curve": points,
            }
            for folder in folders:
                for group, figures in read(plan.folder / f"{folder}-evaluation" / "summary.json")["groups"].items():
                    kind = "training" if group in (FITTED, TRAINED) else "held out"
                    rows.append({**common, "volumes_are": kind, "volumes": figures["mse"]["volumes"], "figures": figures})
    return rows


def comparisons(rows: Sequence[Row]) -> dict[str, Any]:
    """Ours beside the better rival at equal time, by seed: ratios of MSE, differences of SSIM, times and memory."""
    result: dict[str, Any] = {}
    for kind in ("training", "held out"):
        chosen = [r for r in rows if r["volumes_are"] == kind]
        by_seed = []
        for seed in sorted({r["seed"] for r in chosen}):
            of = {r["model"]: r for r in chosen if r["seed"] == seed}
            rivals = [of[n] for n in RIVALS]
            best = min(rivals, key=lambda r: float(r["figures"]["mse"]["mean"]))
            ours = of[OURS]
            by_seed.append(
                {
                    "seed": seed,
                    "better_rival": best["model"],
                    "mse_ratio": ours["figures"]["mse"]["mean"] / best["figures"]["mse"]["mean"],
                    "ssim_difference": ours["figures"]["ssim"]["mean"] - max(r["figures"]["ssim"]["mean"] for r in rivals),
                    "time_to_its_psnr": time_to(ours["curve"], best["curve"][-1][1]) / best["seconds"],
                    "memory_ratio": ours["memory_gb"] / min(r["memory_gb"] for r in rivals),
                }
            )
        result[kind] = by_seed
    return result


def table2(plan: Plan) -> list[Row]:
    """The rows of `tcam segment`, with the models' names."""
    names = {f: m for m, folders in plan.reconstructions(0, "store-channels").items() for f in folders}
    rows = read(plan.folder / "segmentation" / "segmentation.json")["rows"]
    return [{**r, "model": names.get(r["images"], r["images"])} for r in rows]


def table3(plan: Plan) -> list[Row]:
    """For each seed and pair the distances of ours and of the other generator from held-out volumes, by the same critics."""
    rows = []
    for seed in range(plan.seeds):
        at = plan.folder / f"seed-{seed}"
        for name, title in GENERATORS.items():
            summary = read(at / f"pair-{name}" / "summary.json")
            ours, other = f"seed-{seed}/diffusion-samples", f"seed-{seed}/{name}-samples"
            scores = summary["critics"][ours]
            rows.append(
                {
                    "seed": seed,
                    "pair": title,
                    "ours": [s["distance"][ours] for s in scores],
                    "other": [s["distance"][other] for s in scores],
                    "valid": all(s["valid"] for s in scores),
                    "real": summary["real"],
                    "volumes": summary["counts"],
                    "controls": {
                        k: [s["distance"][k] for s in v] for k, v in summary["critics"].items() if k.startswith("control")
                    },
                    "seconds": last(at / ("diffusion" if name == "gaussian" else name), "seconds"),
                    "memory_gb": last(at / name, "memory_gb"),
                }
            )
    return rows


def sets(plan: Plan) -> dict[str, Any]:
    """Statistics of every generator's samples, of the first seed."""
    content: dict[str, Any] = read(plan.folder / "seed-0" / "sets" / "summary.json")
    return content


def table4(plan: Plan) -> list[Row]:
    """Channels, latents, MSE, SSIM, time and memory of every training of the ablation."""
    rows = read(plan.folder / "ablation" / "ablation.json")
    return [{**r, "memory_gb": last(plan.folder / "ablation" / f"channels-{r['channels']}", "memory_gb")} for r in rows]


def mean_and_deviation(values: Sequence[float], form: str) -> str:
    """Mean of numbers, with the standard deviation if there are several."""
    mean = statistics.fmean(values)
    return f"{mean:{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")
