"""The preset cohort of stage 2 with its choices taken back one at a time, and statistics of samples of longer runs.

    python benchmarks/bench_stage2.py LATENTS HELD_OUT --out RUNS [--steps 150] [--seeds 1 2 3] [--json FILE]
        [--runs NAME RUN... --runs NAME RUN... --summaries SUMMARY... --sets SAMPLES|LATENTS...]

LATENTS and HELD_OUT are planes that `tcam encode` made of training and of other volumes. Every seed trains networks as the
preset has them, and with each of VARIANTS, for as many steps; a run that is there is continued or read. The figures are the
losses of held-out volumes at the end, and the means over seeds of their differences from the preset's, with 95 % intervals by
Student's t.
Without --variants nothing is trained. --runs adds longer runs under a name, one for each seed; with several names they are
compared in the same way. --summaries adds the summary.json of `tcam evaluate STORE SAMPLES...` of their samples, one for each
seed, and --sets the energy of planes by octave of frequency: mean squares about the mean of LATENTS, divided by those of
LATENTS.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import harness
import torch
from scipy.stats import t as student
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.diffusion.data import LatentData
from tcam_diff.diffusion.dct import octaves_of
from tcam_diff.diffusion.prior import transform
from tcam_diff.diffusion.train import train_diffusion
from tcam_diff.evaluation.sets import read_planes

#: Changes of the preset, by name. Batches of 4 are of twice as many steps.
VARIANTS = {
    "the preset": (),
    "Adam for all weights": ("muon_lr=null",),
    "32 channels": ("network.base=32",),
    "32 channels, a network for each plane": ("network.base=32", "network.weights=independent"),
    "two heads": ("network.heads=two",),
    "no gains by octaves": ("network.octave_gains=false",),
    "without the prior's planes as input": ("network.prior_input=false",),
    "without cross-attention": ("network.cross=none",),
    "40 directions": ("prior_directions=40",),
    "one prior of all volumes": ("cross_fit=false",),
    "batches of 4": ("batch=4",),
}
FIRST = next(iter(VARIANTS))


def figures(run: Path) -> dict[str, Any]:
    """Steps, minutes and loss of held-out volumes at the end of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [m for m in lines if "validation_loss" in m][-1]
    seconds = max(m.get("seconds", 0.0) for m in lines)
    return {"steps": last["step"], "minutes": round(seconds / 60, 1), "loss": round(last["validation_loss"], 4)}


def interval(values: list[float]) -> dict[str, float]:
    """Mean and 95 % interval."""
    mean, count = statistics.fmean(values), len(values)
    half = student.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def differences(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Differences of each network's losses from those of the first one, by seed, if there are several."""
    if len(rows) < 2:
        return {}
    first, *others = rows[0]["runs"]
    return {n: interval([r["runs"][n]["loss"] - r["runs"][first]["loss"] for r in rows]) for n in others}


def named(value: Any) -> Any:
    """The value with folders of samples by their names alone."""
    return {Path(k).name: named(v) for k, v in value.items()} if isinstance(value, dict) else value


def statistics_of(summary: Path) -> dict[str, Any]:
    """What the tables of samples show of a summary.json."""
    read = json.loads(summary.read_text())
    kept = {k: read[k] for k in ("counts", "volumes_for_fid_and_mmd", "real", "sets", "told_apart")}
    return named(kept) | {"protocol": {k: read["protocol"][k] for k in ("voxels", "features")}}


def octave_energies(latents: Path, sets: list[Path]) -> dict[str, list[float]]:
    """Mean squares of sets of planes by octave about the mean of ``latents``, divided by those of ``latents``."""
    data = LatentData(latents)
    channels, sizes = data.channels, [(p.shape[2], p.shape[3]) for p in data.planes]
    octave = torch.cat([octaves_of(h, w).flatten().repeat(channels) for h, w in sizes])
    counts, mean = octave.bincount().double(), None
    found: dict[str, list[float]] = {}
    for path in (latents, *sets):
        planes = read_planes(path)
        if planes is None:
            raise SystemExit(f"{path}: expected planes, of `tcam encode` or `tcam sample --planes`")
        mean = planes.mean(0) if mean is None else mean
        squares = transform(planes - mean, channels, sizes).double().square().mean(0)
        energy = torch.zeros_like(counts).index_add_(0, octave, squares) / counts
        found[f"{path.parent.name}/{path.name}"] = energy.tolist()
    first = next(iter(found.values()))
    return {name: [round(e / f, 3) for e, f in zip(energy, first, strict=True)] for name, energy in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", type=Path, help="planes of training volumes")
    parser.add_argument("held_out", type=Path, help="planes of other volumes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=150, help="steps of 8 volumes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="at least two")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--runs", nargs="+", action="append", default=[], help="a name and its longer runs, one for each seed")
    parser.add_argument("--summaries", type=Path, nargs="+", default=[], help="statistics of their samples, one for each seed")
    parser.add_argument("--sets", type=Path, nargs="+", default=[], help="sets of planes for their energy by octave")
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    if a.variants and (len(a.seeds) < 2 or FIRST not in a.variants):
        parser.error(f"--seeds: expected at least two, and {FIRST!r} among the --variants")
    if any(len(runs) != len(a.runs[0]) for runs in a.runs):
        parser.error("--runs: expected as many runs under each name")
    environment = harness.environment()
    rows: list[dict[str, Any]] = []
    for seed in a.seeds if a.variants else []:
        losses = {}
        for name in a.variants:
            run, changes = a.out / f"{seed}-{name.replace(' ', '-')}", VARIANTS[name]
            steps = 2 * a.steps if "batch=4" in changes else a.steps
            data = [f"latents={a.latents}", f"validation={a.held_out}", f"seed={seed}", f"steps={steps}"]
            config = DiffusionConfig.load("cohort", [*data, "evaluate_volumes=128", "preview_steps=0", *changes])
            train_diffusion(config, run, "auto")
            losses[name] = figures(run)
            print(f"seed {seed}, {name}: {losses[name]}", flush=True)
        rows.append({"seed": seed, "runs": losses})
    found: dict[str, Any] = {"rows": rows, "differences": differences(rows)}
    longer = [{name: figures(Path(run)) for name, run in zip((n for n, *_ in a.runs), each, strict=True)}
              for each in zip(*(runs for _, *runs in a.runs), strict=True)]  # fmt: skip
    found["longer"] = [{"seed": seed, "runs": runs} for seed, runs in enumerate(longer)]
    found["longer_differences"] = differences(found["longer"])
    print(json.dumps({k: found[k] for k in ("differences", "longer", "longer_differences")}, indent=1))
    found["summaries"] = [statistics_of(s) for s in a.summaries]
    found["octaves"] = octave_energies(a.latents, a.sets) if a.sets else {}
    if a.json:
        a.json.write_text(json.dumps({"environment": environment, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
