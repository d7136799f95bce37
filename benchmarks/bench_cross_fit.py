"""Stage 2 around the prior of all volumes, and around priors that are fitted without each volume (cross_fit).

    python benchmarks/bench_cross_fit.py LATENTS HELD_OUT --out RUNS [--steps 150] [--seeds 1 2 3] [--json FILE]
        [--runs PLAIN CROSSED --summary SUMMARY]

LATENTS and HELD_OUT are planes that `tcam encode` made of training and of other volumes. Every seed trains two networks with
the preset cohort; a run that is there is continued or read. The figures are the losses of held-out volumes at the end, and the
mean of their differences with its 95 % interval by Student's t. --runs adds two longer runs, and --summary the summary.json of
`tcam evaluate STORE SAMPLES...` of their samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import harness
from scipy.stats import t as student
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.diffusion.train import train_diffusion


def figures(run: Path) -> dict[str, Any]:
    """Steps, minutes and loss of held-out volumes at the end of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [m for m in lines if "validation_loss" in m][-1]
    seconds = max(m.get("seconds", 0.0) for m in lines)
    return {"steps": last["step"], "minutes": round(seconds / 60, 1), "loss": round(last["validation_loss"], 4)}


def interval(differences: list[float]) -> dict[str, float]:
    """Mean and 95 % interval."""
    mean, count = statistics.fmean(differences), len(differences)
    half = student.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def named(value: Any) -> Any:
    """The value with folders of samples by their names alone."""
    return {Path(k).name: named(v) for k, v in value.items()} if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", type=Path, help="planes of training volumes")
    parser.add_argument("held_out", type=Path, help="planes of other volumes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="at least two")
    parser.add_argument("--runs", type=Path, nargs=2, metavar=("PLAIN", "CROSSED"), help="two longer runs")
    parser.add_argument("--summary", type=Path, help="statistics of their samples")
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    environment = harness.environment()
    rows = []
    for seed in a.seeds:
        row: dict[str, Any] = {"seed": seed}
        for cross in ("false", "true"):
            run = a.out / f"{seed}-{cross}"
            changes = [f"latents={a.latents}", f"validation={a.held_out}", f"seed={seed}", f"cross_fit={cross}"]
            config = DiffusionConfig.load("cohort", [*changes, f"steps={a.steps}", "preview_steps=0"])
            train_diffusion(config, run, "auto")
            row[cross] = figures(run)
        print(f"seed {seed}: {row['false']['loss']:.4f} around the prior of all, {row['true']['loss']:.4f} cross-fitted")
        rows.append(row)
    found = {"rows": rows, "difference": interval([r["true"]["loss"] - r["false"]["loss"] for r in rows])}
    print(f"difference: {found['difference']}")
    if a.runs:
        found["runs"] = {name: figures(run) for name, run in zip(("false", "true"), a.runs, strict=True)}
    if a.summary:
        summary = json.loads(a.summary.read_text())
        kept = {k: summary[k] for k in ("counts", "volumes_for_fid_and_mmd", "real", "sets", "told_apart")}
        found["summary"] = named(kept) | {"protocol": {k: summary["protocol"][k] for k in ("voxels", "features")}}
    if a.json:
        a.json.write_text(json.dumps({"environment": environment, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
