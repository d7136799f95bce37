"""Writes the tables of docs/performance.md from benchmarks/results/*.json.

    python benchmarks/make_tables.py [--check]

Each table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; NAME is the JSON file's stem.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def circumstances(found: dict[str, Any]) -> str:
    e = found["environment"]
    peaks = ", ".join(f"{k} {v:.0f}" + ("" if "/" in k else " GFLOP/s") for k, v in found.get("peak_gflops", {}).items() if v)
    machine = e.get("card") or f"{e['cpu']}, {e['threads']} threads, {e['isa']} kernels"
    return (
        f"`{e['command']}`, commit {e['commit']}, {e['date']}: {machine}, "
        f"torch {e['torch']}, Python {e['python']}{'; peak ' + peaks if peaks else ''}; load before {e['load_before']}."
    )


def fits_table(found: dict[str, Any]) -> str:
    lines = [
        circumstances(found),
        "",
        "| fit | changes to the preset | steps | s | PSNR dB | SSIM | PSNR dB with noise C = 0.32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        changes = f"`{r['changes']}`" if r["changes"] else ""
        lines.append(
            f"| {r['fit']} | {changes} | {r['steps']} | {r['seconds']:.0f} | {r['psnr']:.2f} | {r['ssim']:.4f} | "
            f"{r['psnr_noisy']:.2f} |"
        )
    return "\n".join(lines)


def points_table(found: dict[str, Any]) -> str:
    lines = [
        circumstances(found),
        "",
        "| case | points | what | rival | median s | spread | Mpoint/s | ratio | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        lines.append(
            f"| {r['case']} | {r['points']} | {r['what']} | {r['rival']} | {r['seconds']:.3f} | {r['low']:.3f} to "
            f"{r['high']:.3f} | {r['mpoints']:.2f} | {number(r['ratio'], 2)} | {number(r['memory_mb'], 0)} |"
        )
    return "\n".join(lines)


def train_table(found: dict[str, Any]) -> str:
    lines = [
        circumstances(found),
        "",
        "| case | objects | voxels a step | step s | spread | bare s | of the step | Mvoxel/s | 200,000 steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        rate = r["voxels"] / r["step_s"] / 1e6
        lines.append(
            f"| {r['case']} | {r['batch']} | {r['voxels']} | {r['step_s']:.4f} | {r['step_low']:.4f} to {r['step_high']:.4f} | "
            f"{r['bare_s']:.4f} | {100 * r['share']:.0f} % | {rate:.2f} | {r['hours_200000']:.1f} h |"
        )
    return "\n".join(lines)


def stage1_table(found: dict[str, Any]) -> str:
    lines = [circumstances(found), "", "| what | measured | estimated before |", "|---|---|---|"]
    for r in found["rows"]:
        lines += [
            f"| training, {r['steps']} steps | {r['train_s'] / 60:.1f} min | {r['estimated_s'] / 60:.0f} min |",
            f"| peak memory | {r['memory_gb']:.2f} GB | {r['estimated_memory_gb']:.2f} GB |",
            f"| checkpoints | {r['disk_gb']:.2f} GB | {r['estimated_disk_gb']:.2f} GB |",
            f"| fitted PSNR, 64 volumes | **{r['fitted_psnr']:.2f} dB** | |",
            f"| encoding, {r['encode_steps']} steps | {r['encode_s'] / 60:.1f} min | |",
            f"| held-out PSNR, 16 volumes | **{r['held_out_psnr']:.2f} dB** "
            f"({r['held_out_low']:.2f} to {r['held_out_high']:.2f}) | |",
        ]
    return "\n".join(lines)


def stage2_table(found: dict[str, Any]) -> str:
    lines = [
        circumstances(found),
        "",
        f"{found['steps']} steps a network. Latents fitted beforehand in {found['before']['latents_s'] / 60:.0f} min, "
        f"PSNR {found['psnr']:.1f} dB. Of critics: W on volumes held back, lower is nearer to real.",
        "",
        "| critic of samples and | "
        + " | ".join(f"seed {r['seed']}" for r in found["rows"])
        + " | mean ± std: samples | rival |",
        "|---|" + "---|" * (len(found["rows"]) + 2),
    ]
    for rival in found["rows"][0]["pairs"]:
        ours = [r["pairs"][rival]["samples"] for r in found["rows"]]
        theirs = [r["pairs"][rival][rival] for r in found["rows"]]
        each = " | ".join(f"{a:.2f} : {b:.2f}" for a, b in zip(ours, theirs, strict=True))
        spread = [f"{statistics.fmean(x):.2f} ± {statistics.stdev(x):.2f}" for x in (ours, theirs)]
        lines.append(f"| {rival} | {each} | {spread[0]} | {spread[1]} |")
    lines += ["", "| a seed | " + " | ".join(f"seed {r['seed']}" for r in found["rows"]) + " |"]
    lines.append("|---|" + "---|" * len(found["rows"]))
    for name, cell in {
        "training both networks, min": lambda r: f"{r['train_s'] / 60:.1f}",
        "drawing 64 volumes of each, min": lambda r: f"{r['sample_s'] / 60:.1f}",
        "critics, min": lambda r: f"{r['critic_s'] / 60:.1f}",
        "all, min": lambda r: f"{r['total_s'] / 60:.1f}",
        "loss of the average: with, without cross-attention": lambda r: " : ".join(f"{v:.3f}" for v in r["losses"].values()),
        "distance to the nearest training volume (RMS): samples": lambda r: f"{r['nearest_training_samples']:.4f}",
        "the same of held-out volumes": lambda r: f"{r['nearest_training_held_out']:.4f}",
        "the nearest of all: samples, held-out volumes": lambda r: (
            f"{r['nearest_training_samples_low']:.4f}, {r['nearest_training_held_out_low']:.4f}"
        ),
    }.items():
        lines.append(f"| {name} | " + " | ".join(cell(r) for r in found["rows"]) + " |")
    controls = ", ".join(f"{k} {v:.2f}" for k, v in found["controls"].items())
    lines.append(f"\nControls, critics of one half of the real volumes against the other: {controls}.")
    return "\n".join(lines)


def decode_table(found: dict[str, Any]) -> str:
    lines = [
        circumstances(found),
        "",
        "| case | size | what | rival | median s | spread | Mvoxel/s | ratio to naive | peak MB | of peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        name = r["rival"] + (" (extrapolated)" if r["extrapolated"] else "")
        share = "" if r["of_peak"] is None else f"{100 * r['of_peak']:.0f} %"
        spread = "" if r["repeats"] < 2 else f"{r['low']:.3f} to {r['high']:.3f}"
        lines.append(
            f"| {r['case']} | {r['size']}³ | {r['what']} | {name} | {r['seconds']:.3f} | {spread} | {r['mvoxels']:.2f} | "
            f"{number(r['ratio'])} | {number(r['memory_mb'], 0)} | {share} |"
        )
    for name, value in found["fits"].items():
        lines.append(f"\n{name}: **{value:.3f}** (log-log least squares)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    check = parser.parse_args().check
    page = PAGE.read_text()

    def fill(match: re.Match[str]) -> str:
        path = ROOT / "benchmarks" / "results" / f"{match[1]}.json"
        kind = match[1].split("_")[0]
        tables = {
            "fit": fits_table,
            "points": points_table,
            "sample": points_table,
            "train": train_table,
            "stage1": stage1_table,
            "stage2": stage2_table,
        }
        table = tables.get(kind, decode_table)
        return f"<!-- table {match[1]} -->\n{table(json.loads(path.read_text()))}\n<!-- end -->"

    filled = re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", fill, page, flags=re.S)
    if check:
        sys.exit(0 if filled == page else f"{PAGE} differs from benchmarks/results: run python benchmarks/make_tables.py")
    PAGE.write_text(filled)


if __name__ == "__main__":
    main()
