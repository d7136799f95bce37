"""Rows of the tables from the results of their steps."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.baselines.compression import Compression, is_compression
from tcam_diff.baselines.gaussian import INDEX as GAUSSIAN
from tcam_diff.baselines.gaussian import is_gaussian
from tcam_diff.evaluation.reconstruction import FITTED, TRAINED
from tcam_diff.tables.plan import OURS, RIVALS, Plan, last
from tcam_diff.tables.steps import record
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


def peak(run: Path) -> float | None:
    """Largest memory in the log of a run, in GB, over its restarts."""
    return max((float(r["memory_gb"]) for r in read_metrics(run) if r.get("memory_gb") is not None), default=None)


def table1(plan: Plan) -> list[Row]:
    """A row for each seed, model and kind of volumes (fitted or trained on; held out)."""
    rows = []
    groups = {FITTED: "training", TRAINED: "training"}
    groups |= {f"{how}, split {plan.config.held_out}": "held out" for how in ("encoded", "held out")}
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
                "memory_gb": peak(run),
                "late_gain_db": late_gain(points),
                "curve": points,
            }
            for folder in folders:
                evaluation = f"{folder}-evaluation"
                for group, figures in read(plan.folder / evaluation / "summary.json")["groups"].items():
                    if group in groups:
                        count = figures["mse"]["volumes"]
                        row = {**common, "volumes_are": groups[group], "volumes": count, "figures": figures}
                        row |= {"evaluation": evaluation, "group": group, "encoding_seconds": None}
                        if group.startswith("encoded"):
                            row["encoding_seconds"] = read(plan.folder / "steps" / f"{record(folder)}.json")["seconds"] / count
                        rows.append(row)
    return rows


def of_volumes(folder: Path, row: Row) -> dict[str, dict[str, float]]:
    """MSE and SSIM of every volume of a row, by name and metric."""
    with (folder / row["evaluation"] / "volumes.csv").open(newline="") as file:
        of_group = [r for r in csv.DictReader(file) if r["group"] == row["group"]]
    return {r["name"]: {m: float(r[m]) for m in ("mse", "ssim")} for r in of_group}


def paired(
    ours: dict[str, dict[str, float]], other: dict[str, dict[str, float]], resamples: int = 9999
) -> dict[str, tuple[float, float]]:
    """95 % intervals (percentile bootstrap over volumes, seed 0) of the ratio of mean MSEs and the difference of mean SSIMs."""
    names = sorted(ours.keys() & other.keys())
    a, b = (np.array([[of[n]["mse"], of[n]["ssim"]] for n in names]) for of in (ours, other))
    chosen = np.random.default_rng(0).integers(0, len(names), (resamples, len(names)))
    x, y = a[chosen].mean(1), b[chosen].mean(1)
    values = {"mse_ratio": x[:, 0] / y[:, 0], "ssim_difference": x[:, 1] - y[:, 1]}
    return {name: (float(np.percentile(v, 2.5)), float(np.percentile(v, 97.5))) for name, v in values.items()}


def comparisons(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Ours beside the better rival, by seed: ratio of MSE, difference of SSIM; for training volumes also time and memory."""
    result: dict[str, Any] = {}
    for kind in ("training", "held out"):
        chosen = [r for r in rows if r["volumes_are"] == kind]
        by_seed = []
        for seed in sorted({r["seed"] for r in chosen}):
            of = {r["model"]: r for r in chosen if r["seed"] == seed}
            rivals = [of[n] for n in RIVALS]
            best = min(rivals, key=lambda r: float(r["figures"]["mse"]["mean"]))
            similar = max(rivals, key=lambda r: float(r["figures"]["ssim"]["mean"]))
            ours = of[OURS]
            compared = {
                "seed": seed,
                "better_rival": best["model"],
                "mse_ratio": ours["figures"]["mse"]["mean"] / best["figures"]["mse"]["mean"],
                "better_rival_by_ssim": similar["model"],
                "ssim_difference": ours["figures"]["ssim"]["mean"] - similar["figures"]["ssim"]["mean"],
                "intervals": {
                    name: paired(of_volumes(folder, ours), of_volumes(folder, rival))[name]
                    for name, rival in (("mse_ratio", best), ("ssim_difference", similar))
                },
            }
            if kind == "training":
                share = time_to(ours["curve"], best["curve"][-1][1]) / best["seconds"]
                compared["time_to_its_psnr"] = share if math.isfinite(share) else None
                compared["memory_ratio"] = ours["memory_gb"] / min(r["memory_gb"] for r in rivals)
            by_seed.append(compared)
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
        for name, title in plan.generators.items():
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
                    "critics": [[s["train_distance"], s["gradient_norm"], s["end"]] for s in scores],
                    "scored": [scores[0]["real_count"], scores[0]["counts"][ours], scores[0]["counts"][other]],
                    "critic_size": summary["protocol"]["critic"]["size"],
                    "ours_seconds": last(at / "diffusion", "seconds"),
                    "ours_memory_gb": peak(at / "diffusion"),
                    **_training(at / name),
                }
            )
    return rows


def _training(run: Path) -> Row:
    """Seconds and memory of the training of a generator."""
    if is_gaussian(run):
        provenance = read(run / GAUSSIAN)["provenance"]
        return {"seconds": provenance["seconds"], "memory_gb": provenance["memory_gb"]}
    return {"seconds": last(run, "seconds"), "memory_gb": peak(run)}


def sets(plan: Plan) -> list[dict[str, Any]]:
    """Statistics of every generator's samples, for each seed, with the seed left out of the names."""
    summaries = []
    for seed in range(plan.seeds):
        text = (plan.folder / f"seed-{seed}" / "sets" / "summary.json").read_text()
        summaries.append(json.loads(text.replace(f"seed-{seed}/", "")))
    return summaries


def table4(plan: Plan) -> list[Row]:
    """Channels, latents, MSE, SSIM, time and memory of every training of the ablation."""
    rows = read(plan.folder / "ablation" / "ablation.json")
    return [{**r, "memory_gb": peak(plan.folder / "ablation" / f"channels-{r['channels']}")} for r in rows]


def mean_and_deviation(values: Sequence[float], form: str) -> str:
    """Mean of numbers, with the standard deviation if there are several."""
    mean = statistics.fmean(values)
    return f"{mean:{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")
