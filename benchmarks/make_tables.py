"""Write the tables of docs/performance.md and docs/reproduction.md from benchmarks/results/*.json.

    python benchmarks/make_tables.py [--check]

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; NAME is the stem of its JSON file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / name for name in ("performance.md", "reproduction.md")]


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def provenance(results: dict[str, Any]) -> str:
    """Command, commit, date, machine and versions of a benchmark's run."""
    e = results["environment"]
    peaks = ", ".join(f"{k} {v:.0f}" + ("" if "/" in k else " GFLOP/s") for k, v in results.get("peak_gflops", {}).items() if v)
    machine = e.get("card") or f"{e['cpu']}, {e['threads']} threads, {e['isa']} kernels"
    return (
        f"`{e['command']}`, commit {e['commit']}, {e['date']}: {machine}, "
        f"torch {e['torch']}, Python {e['python']}{'; peak ' + peaks if peaks else ''}; load before the run {e['load_before']}."
    )


Columns = dict[str, Callable[[dict[str, Any]], object]]


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of Markdown."""
    header = list(header)
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header)] + [f"| {' | '.join(map(str, r))} |" for r in rows]


def by_columns(columns: Columns) -> Callable[[dict[str, Any]], str]:
    """A writer of tables with these columns, below their provenance."""

    def write(results: dict[str, Any]) -> str:
        rows = ([cell(r) for cell in columns.values()] for r in results["rows"])
        fits = [f"\n{name}: **{value:.3f}** (log-log least squares)" for name, value in results.get("fits", {}).items()]
        return "\n".join([provenance(results), "", *table(columns, rows), *fits])

    return write


FIT: Columns = {
    "fit": lambda r: r["fit"],
    "changes to the preset": lambda r: f"`{r['changes']}`" if r["changes"] else "",
    "steps": lambda r: r["steps"],
    "s": lambda r: f"{r['seconds']:.0f}",
    "PSNR dB": lambda r: f"{r['psnr']:.2f}",
    "SSIM": lambda r: f"{r['ssim']:.4f}",
    "PSNR dB with noise C = 0.32": lambda r: f"{r['psnr_noisy']:.2f}",
}
POINTS: Columns = {
    "case": lambda r: r["case"],
    "points": lambda r: r["points"],
    "pass": lambda r: r["what"],
    "rival": lambda r: r["rival"],
    "median s": lambda r: f"{r['seconds']:.3f}",
    "range s": lambda r: f"{r['low']:.3f} to {r['high']:.3f}",
    "Mpoint/s": lambda r: f"{r['mpoints']:.2f}",
    "speed-up": lambda r: number(r["ratio"], 2),
    "peak MB": lambda r: number(r["memory_mb"], 0),
}
METRICS: Columns = {
    "metric": lambda r: r["case"],
    "voxels": lambda r: f"{r['size']}³",
    "by": lambda r: r["rival"],
    "median s": lambda r: f"{r['seconds']:.3f}",
    "range s": lambda r: f"{r['low']:.3f} to {r['high']:.3f}",
    "speed-up": lambda r: number(r["ratio"], 1),
    "peak MB": lambda r: number(r["memory_mb"], 0),
    "difference": lambda r: f"{r['difference']:.0e}",
}
SUBNORMALS: Columns = {
    "kernels": lambda r: r["build"],
    "products": lambda r: r["products"],
    "mean logit": lambda r: f"{r['logit']:g}",
    "median ms": lambda r: f"{r['ms']:.1f}",
    "range ms": lambda r: f"{r['low']:.1f} to {r['high']:.1f}",
}
TRAIN: Columns = {
    "case": lambda r: r["case"],
    "objects": lambda r: r["batch"],
    "voxels per step": lambda r: r["voxels"],
    "step s": lambda r: f"{r['step_s']:.4f}",
    "range s": lambda r: f"{r['step_low']:.4f} to {r['step_high']:.4f}",
    "loss alone s": lambda r: f"{r['bare_s']:.4f}",
    "share of the step": lambda r: f"{100 * r['share']:.0f} %",
    "Mvoxel/s": lambda r: f"{r['voxels'] / r['step_s'] / 1e6:.2f}",
    "hours for 200,000 steps": lambda r: f"{r['hours_200000']:.1f}",
}
DIFFUSION: Columns = {
    "preset": lambda r: f"`{r['preset']}`",
    "batch": lambda r: r["batch"],
    "products": lambda r: r["products"],
    "GMAC of an evaluation": lambda r: f"{r['gmac']:.1f}",
    "evaluation s": lambda r: f"{r['forward_s']:.3f}",
    "of peak": lambda r: f"{100 * r['forward_of_peak']:.0f} %",
    "training step s": lambda r: f"{r['training_s']:.3f}",
    "of peak, step": lambda r: f"{100 * r['training_of_peak']:.0f} %",
}
SOLVERS: Columns = {
    "solver": lambda r: f"`{r['solver']}`",
    "evaluations": lambda r: r["evaluations"],
    "difference": lambda r: f"{r['difference']:.3f}",
    "spread": lambda r: f"{r['spread']:.3f}",
    "s": lambda r: f"{r['seconds']:.1f}",
}
SPIN: Columns = {
    "setting": lambda r: "libgomp's default" if r["setting"] == "default" else f"`{r['setting']}`",
    "alone ms": lambda r: f"{r['alone_ms']:.1f}",
    "range ms": lambda r: " to ".join(f"{v:.1f}" for v in r["alone_range_ms"]),
    "to the default": lambda r: f"{r['alone_to_default']:.2f}",
    "beside a busy process ms": lambda r: f"{r['busy_ms']:.1f}",
    "its range ms": lambda r: " to ".join(f"{v:.1f}" for v in r["busy_range_ms"]),
    "busy to alone": lambda r: f"{r['busy_to_alone']:.2f}",
}
DECODE: Columns = {
    "case": lambda r: r["case"],
    "size": lambda r: f"{r['size']}³",
    "pass": lambda r: r["what"],
    "rival": lambda r: r["rival"] + (" (extrapolated)" if r["extrapolated"] else ""),
    "median s": lambda r: f"{r['seconds']:.3f}",
    "range s": lambda r: "" if r["repeats"] < 2 else f"{r['low']:.3f} to {r['high']:.3f}",
    "Mvoxel/s": lambda r: f"{r['mvoxels']:.2f}",
    "speed-up": lambda r: number(r["ratio"]),
    "peak MB": lambda r: number(r["memory_mb"], 0),
    "of peak": lambda r: "" if r["of_peak"] is None else f"{100 * r['of_peak']:.0f} %",
}


def decode_table(results: dict[str, Any]) -> str:
    """Decodes, and in each comparison ours beside the fastest rival."""
    fastest: dict[tuple[object, ...], float] = {}
    for r in results["rows"]:
        if not r["rival"].startswith("ours"):
            key = r["case"], r["size"], r["what"]
            fastest[key] = min(fastest.get(key, r["seconds"]), r["seconds"])

    def beside(r: dict[str, Any]) -> str:
        best = fastest.get((r["case"], r["size"], r["what"])) if r["rival"].startswith("ours") else None
        return "" if best is None else number(best / r["seconds"])

    columns = dict(DECODE)
    if any(beside(r) for r in results["rows"]):
        at = list(columns).index("speed-up") + 1
        items = list(columns.items())
        columns = dict([*items[:at], ("to the fastest rival", beside), *items[at:]])
    return by_columns(columns)(results)


def stage1_table(results: dict[str, Any]) -> str:
    lines = []
    for r in results["rows"]:
        spread = f"{r['held_out_low']:.2f} to {r['held_out_high']:.2f}"
        lines += [
            (f"training, {r['steps']} steps", f"{r['train_s'] / 60:.1f} min", f"{r['estimated_s'] / 60:.0f} min"),
            ("peak memory", f"{r['memory_gb']:.2f} GB", f"{r['estimated_memory_gb']:.2f} GB"),
            ("checkpoints", f"{r['disk_gb']:.2f} GB", f"{r['estimated_disk_gb']:.2f} GB"),
            ("fitted PSNR, 64 volumes", f"**{r['fitted_psnr']:.2f} dB**", ""),
            (f"encoding, {r['encode_steps']} steps", f"{r['encode_s'] / 60:.1f} min", ""),
            ("held-out PSNR, 16 volumes", f"**{r['held_out_psnr']:.2f} dB** ({spread})", ""),
        ]
    return "\n".join([provenance(results), "", *table(["quantity", "measured", "estimated before"], lines)])


GPU: Columns = {
    "pass": lambda r: r["what"],
    "rival": lambda r: r["rival"],
    "median ms": lambda r: f"{1e3 * r['seconds']:.1f}",
    "Mvoxel/s": lambda r: f"{r['mvoxels']:.0f}",
    "peak MB": lambda r: number(r["memory_mb"], 0),
}


def gpu_table(results: dict[str, Any]) -> str:
    """The times of a run of benchmarks/run_gpu.sh, and what its checks found."""
    e, kernels, tests = results["environment"], results["kernels"], results["tests"]
    sanitizers = {"memcheck", "racecheck", "synccheck"}
    clean = [s["step"] for s in results["steps"] if s["step"] in sanitizers and s["status"] == 0]
    rows = sorted((r for r in results["rows"] if "rival" in r), key=lambda r: (r["what"], r["seconds"]))
    return "\n".join([
        f"`{e['command']}`, commit {e['commit']}, {e['date']}: {e['card']}, torch {e['torch']}, CUDA {e['cuda']}. "
        f"{kernels['right']} checks of kernels right, {len(kernels['wrong'])} wrong; GPU tests: {tests['passed']} passed, "
        f"{tests['failed']} failed; without an error under compute-sanitizer: {', '.join(clean)}.",
        "",
        *table(GPU, ([cell(r) for cell in GPU.values()] for r in rows)),
    ])  # fmt: skip


def changes_table(results: dict[str, Any]) -> str:
    """Milliseconds of several builds of the CUDA kernels on one card, from benchmarks/time_build.py."""
    e, passes = results["environment"], ["forward", "loss", "loss+gradients", "forward+backward"]

    def cells(r: dict[str, Any]) -> list[object]:
        build = f"{r['commit']}{', ' + r['setting'] if r['setting'] else ''}"
        return [r["change"], build, r["repeats"], *("{:.1f} ({:.1f} to {:.1f})".format(*r["ms"][name]) for name in passes)]

    return "\n".join([
        f"`{e['command']}` ({e['form']}), {e['date']}: {e['card']}, torch {e['torch']}, {e['size']}³, {e['compute']}; medians "
        "and ranges in milliseconds.",
        "",
        *table(["change", "build", "runs", *passes], map(cells, results["rows"])),
    ])  # fmt: skip


def paper_table(results: dict[str, Any]) -> str:
    """A table of the paper, as `tcam table` prints it."""
    sys.path.insert(0, str(ROOT / "python"))
    from tcam_diff.tables.render import markdown

    return markdown(results)


def cross_table(results: dict[str, Any]) -> str:
    """Losses with and without cross-fitted priors, then the statistics of samples of longer runs."""
    sys.path.insert(0, str(ROOT / "python"))
    from tcam_diff.tables.render import sets_text

    runs = [(f"seed {r['seed']}", r) for r in results["rows"]] + ([("longer", results["runs"])] if "runs" in results else [])
    cells = [
        [name, r["false"]["steps"], *(r[how][x] for x in ("minutes", "loss") for how in ("false", "true"))] for name, r in runs
    ]
    columns = [f"{what}, {how}" for what in ("min", "held-out loss") for how in ("one prior", "cross-fitted")]
    d = results["difference"]
    return "\n".join([
        provenance(results),
        "",
        *table(["run", "steps", *columns], cells),
        "",
        f"Difference of the losses of {len(results['rows'])} seeds: {d['mean']:.4f} ({d['low']:.4f} to {d['high']:.4f}, 95 %, "
        "Student's t).",
        *(["", "\n\n".join(sets_text([results["summary"]]))] if "summary" in results else []),
    ])  # fmt: skip


def stage2_table(results: dict[str, Any]) -> str:
    """Losses of stage 2's preset and of changes of it, then the statistics of samples of longer runs."""
    sys.path.insert(0, str(ROOT / "python"))
    from tcam_diff.tables.render import sets_text

    return "\n".join([
        provenance(results),
        *_losses(results["rows"], results["differences"]),
        *_losses(results["longer"], results["longer_differences"]),
        *(["", "\n\n".join(sets_text(results["summaries"]))] if results["summaries"] else []),
        *_octaves(results["octaves"]),
    ])  # fmt: skip


def _losses(rows: list[dict[str, Any]], differences: dict[str, Any]) -> list[str]:
    """Losses of networks by seed, and their differences from the first one's."""
    if not rows:
        return []
    cells = []
    for name in rows[0]["runs"]:
        runs, d = [r["runs"][name] for r in rows], differences.get(name)
        more = f"{d['mean']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})" if d else ""
        minutes = ", ".join(f"{r['minutes']:.1f}" for r in runs)
        cells.append([name, runs[0]["steps"], minutes, *(f"{r['loss']:.4f}" for r in runs), more])
    losses = [f"held-out loss, seed {r['seed']}" for r in rows]
    return ["", *table(["network", "steps", "min, by seed", *losses, "difference from the first (95 %)"], cells)]


def _octaves(energies: dict[str, list[float]]) -> list[str]:
    """Energy of sets of planes by octave."""
    if not energies:
        return []
    count = len(next(iter(energies.values())))
    head = ["planes", "mean", "1 to 2", *(f"to {2**k}" for k in range(2, count))]
    text = "Energy of planes about the mean of the training planes, whose own is 1, by frequency in half cycles a plane:"
    return ["", text, "", *table(head, ([name, *values] for name, values in energies.items()))]


WRITERS = {
    "changes": changes_table,
    "cross": cross_table,
    "gpu": gpu_table,
    "diffusion": by_columns(DIFFUSION),
    "fit": by_columns(FIT),
    "metrics": by_columns(METRICS),
    "points": by_columns(POINTS),
    "sample": by_columns(POINTS),
    "solvers": by_columns(SOLVERS),
    "spin": by_columns(SPIN),
    "subnormals": by_columns(SUBNORMALS),
    "train": by_columns(TRAIN),
    "stage1": stage1_table,
    "stage2": stage2_table,
    "table": paper_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check that the pages are up to date")
    check = parser.parse_args().check

    def fill(match: re.Match[str]) -> str:
        path = ROOT / "benchmarks" / "results" / f"{match[1]}.json"
        write = WRITERS.get(re.split("[_-]", match[1])[0], decode_table)
        return f"<!-- table {match[1]} -->\n{write(json.loads(path.read_text()))}\n<!-- end -->"

    for path in PAGES:
        page = path.read_text()
        filled = re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", fill, page, flags=re.S)
        if check and filled != page:
            sys.exit(f"{path} differs from benchmarks/results: run python benchmarks/make_tables.py")
        path.write_text(filled)


if __name__ == "__main__":
    main()
