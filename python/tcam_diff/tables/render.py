"""Tables as Markdown, from the content of their JSON files: measured rows, then those that the paper prints."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from typing import Any

from tcam_diff.evaluation.content import p_values
from tcam_diff.evaluation.generation import STATISTICS
from tcam_diff.tables.paper import PUBLISHED, TABLES
from tcam_diff.tables.rows import TITLES, Row, mean_and_deviation

#: What each table shows.
NAMES = {
    1: "Reconstruction",
    2: "Segmentation of reconstructions",
    3: "Distance of generated from real volumes",
    4: "Latents against quality",
}


def markdown(content: dict[str, Any]) -> str:
    """A table's page."""
    number = int(content["table"])
    rows = content["rows"]
    made = segmentations(rows) if number == 2 else {1: _table1, 3: _table3, 4: _table4}[number](content)
    machine = content["machine"]
    where = machine["processor"] if machine["GPU"] == "none" else machine["GPU"]
    heading, columns, printed = TABLES[number]
    commands = "\n".join(f"tcam {shlex.join(s['command'])}" for s in content["steps"])
    minutes = sum(s["seconds"] for s in content["steps"]) / 60
    return "\n\n".join(
        [
            f"### Table {number}. {NAMES[number]}",
            f"Measured: {content['data']}; {content['seeds']} seed{'s' if content['seeds'] > 1 else ''}; {where}, "
            f"{machine['packages']}; {minutes:.0f} min in all.",
            *made,
            f"Printed in the paper, on its data sets and machines, not to be compared with the figures above. {heading}:",
            grid(columns, printed),
            f"Commands, in the folder of the table:\n\n```\n{commands}\n```",
        ]
    )


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table1(content: dict[str, Any]) -> list[str]:
    rows: list[Row] = content["rows"]
    parts = []
    for kind in ("training", "held out"):
        lines: list[list[str]] = []
        for model in dict.fromkeys(r["model"] for r in rows):
            of = [r for r in rows if r["model"] == model and r["volumes_are"] == kind]
            if not of:
                continue
            lines.append(
                [
                    TITLES[model],
                    f"{of[0]['latents']:,}",
                    *(_figure(of, metric, form) for metric, form in (("mse", ".6f"), ("ssim", ".4f"), ("psnr", ".2f"))),
                    *_trainings(of, kind),
                ]
            )
        count = next(r["volumes"] for r in rows if r["volumes_are"] == kind)
        what = "Training volumes" if kind == "training" else "Held-out volumes, for TCAM-Diff encoded with the decoder frozen"
        spread = "mean ± standard deviation over seeds" if content["seeds"] > 1 else "mean (95 % interval over volumes)"
        parts.append(f"{what} ({count}); {spread}:")
        columns = ["model", "latents", "MSE ↓", "SSIM ↑", "PSNR, dB ↑"]
        columns += ["steps", "training, min", "peak GB", "last fifth, dB"] if kind == "training" else ["encoding, s a volume"]
        parts.append(grid(columns, lines))
    parts.append(
        "“last fifth”: gain in PSNR in the last fifth of the training, on eight of its volumes; 0 where the curve was flat. "
        "Rivals encode a volume in one pass of their network."
    )
    parts.append(_bars(content["comparisons"]))
    return parts


def _trainings(rows: Sequence[Row], kind: str) -> list[str]:
    """Cells on the trainings of a model, or on the encoding of held-out volumes."""
    if kind != "training":
        seconds = [r["encoding_seconds"] for r in rows if r["encoding_seconds"] is not None]
        return [mean_and_deviation(seconds, ".1f") if seconds else "one pass"]
    return [
        f"{statistics.fmean(r['steps'] for r in rows):.0f}",
        mean_and_deviation([r["seconds"] / 60 for r in rows], ".1f"),
        mean_and_deviation([r["memory_gb"] for r in rows], ".2f"),
        mean_and_deviation([r["late_gain_db"] for r in rows], ".2f"),
    ]


def _figure(rows: Sequence[Row], metric: str, form: str) -> str:
    values = [r["figures"][metric] for r in rows if metric in r["figures"]]
    if not values:
        return "-"
    if len(values) == 1:
        v = values[0]
        return f"{v['mean']:{form}} ({v['low']:{form}} to {v['high']:{form}})"
    return mean_and_deviation([v["mean"] for v in values], form)


def _bars(comparisons: dict[str, Any]) -> str:
    lines: list[list[str]] = []
    for kind, by_seed in comparisons.items():
        for c in by_seed:
            reached, memory = "-", "-"
            if kind == "training":
                share = c["time_to_its_psnr"]
                reached, memory = "not reached" if share is None else f"{share:.2f} of its time", f"{c['memory_ratio']:.2f}"
            pairs = ((c["mse_ratio"], c["intervals"]["mse_ratio"], ".3f"),
                     (c["ssim_difference"], c["intervals"]["ssim_difference"], "+.4f"))  # fmt: skip
            cells = [f"{value:{form}} ({low:{form}} to {high:{form}})" for value, (low, high), form in pairs]
            better = TITLES[c["better_rival"]], TITLES[c["better_rival_by_ssim"]]
            lines.append([kind, str(c["seed"]), better[0], cells[0], reached, better[1], cells[1], memory])
    columns = ["volumes", "seed", "better rival by MSE", "MSE, ratio", "time to its PSNR", "better rival by SSIM"]
    columns += ["SSIM, difference", "memory, ratio"]
    return (
        "TCAM-Diff beside the better rival at equal time, with 95 % intervals over volumes (paired); its memory beside the "
        "smaller of both rivals':\n\n" + grid(columns, lines)
    )


def segmentations(rows: Sequence[Row]) -> list[str]:
    """Paragraphs and tables of the rows of `tcam segment`, which have the model of the images as "model"."""
    parts = []
    order = ("split", "reference")
    for key in dict.fromkeys(tuple(r[k] for k in order) for r in rows):
        chosen = [r for r in rows if tuple(r[k] for k in order) == key]
        labels = list(dict.fromkeys(r["label"] for r in chosen))
        lines: list[list[str]] = []
        for model, group in dict.fromkeys((r["model"], r["group"]) for r in chosen):
            for metric in ("f1", "precision", "recall", "specificity", "accuracy"):
                of = {r["label"]: r for r in chosen if (r["model"], r["group"]) == (model, group)}
                line = [TITLES.get(str(model), str(model)), metric]
                line += [_pair(of[label]["metrics"][metric]) for label in labels]
                for label in labels:
                    share = of[label]["share"] if metric == "f1" else None
                    line.append("" if share is None else _pair(share))
                lines.append(line)
        reference = {"truth": "ground truth", "original": "segmentation of the original"}[key[1]]
        count = chosen[0]["volumes"]
        parts.append(f"Split {key[0]}, {count} volumes, against the {reference}; higher is better; mean ± SD over trainings:")
        parts.append(grid(["images", "metric", *labels, *(f"F1 / F1 of originals, {n}" for n in labels)], lines))
    return parts


def _pair(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value["std"] is not None else "")


def _table3(content: dict[str, Any]) -> list[str]:
    lines: list[list[str]] = []
    for r in content["rows"]:
        trained, norms, ends = zip(*r["critics"], strict=True)
        ended = ", ".join(f"{ends.count(e)} {e}" for e in dict.fromkeys(ends))
        critics = f"{mean_and_deviation(trained, '.3g')}; {mean_and_deviation(norms, '.2f')}; {ended}"
        lines.append(
            [
                r["pair"], str(r["seed"]), mean_and_deviation(r["ours"], ".3g"), mean_and_deviation(r["other"], ".3g"),
                critics + ("" if r["valid"] else "; NOT CONVERGED"), " : ".join(map(str, r["scored"])),
                f"{r['ours_seconds'] / 60:.1f} : {r['seconds'] / 60:.1f}",
                f"{r['ours_memory_gb']:.2f} : {r['memory_gb']:.2f}",
            ]
        )  # fmt: skip
    controls = content["rows"][0]["controls"]
    named = {k.removeprefix("control: "): mean_and_deviation(v, ".3g") for k, v in controls.items()}
    control = "; ".join(f"{name}: {value}" for name, value in named.items())
    parts = [
        f"W from {content['rows'][0]['real']} volumes, critics of {content['rows'][0]['critic_size']}³ voxels; low is close; "
        "mean ± SD over critics, which differ in initial weights and split, not in the samples; a pair has its own critics, so "
        "compare the two figures of one line alone. The latent diffusions of rivals have the time of ours, the other trainings "
        "its steps:",
        grid(
            [
                "TCAM-Diff beside",
                "seed",
                "TCAM-Diff",
                "the other",
                "critics: W in training; gradient norm; end",
                "scored, real : ours : other",
                "training, min",
                "peak GB",
            ],
            lines,
        ),
        f"Controls, half of the real volumes against the other: {control}.",
    ]
    return [*parts, *sets_text(content["sets"])]


def sets_text(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Statistics of sets of volumes: with one seed with intervals over volumes, with several the deviation over seeds."""
    first = summaries[0]

    def cell(label: str, name: str) -> str:
        figures = [s["sets"][label][name] for s in summaries if name in s["sets"].get(label, {})]
        if not figures:
            return "-"
        if len(summaries) == 1:
            return f"{figures[0]['mean']:.4g} ({figures[0]['low']:.3g} to {figures[0]['high']:.3g})"
        return mean_and_deviation([f["mean"] for f in figures], ".3g")

    names = [s for s in STATISTICS if any(s in of for of in first["sets"].values())]
    rows = [["of a good generator", *(STATISTICS[n][1] for n in names)]]
    rows += [[label, *(cell(label, n) for n in names)] for label in first["sets"]]
    voxels = " x ".join(map(str, first["protocol"]["voxels"]))
    counts = ", ".join(f"{label}: {count}" for label, count in first["counts"].items())
    spread = "mean (95 % interval)" if len(summaries) == 1 else f"mean ± SD over {len(summaries)} seeds"
    tests = [
        [label, *(p_values(s["told_apart"][label]) if label in s["told_apart"] else "-" for s in summaries)]
        for label in first["told_apart"]
    ]
    return [
        f"Samples beside real volumes, at {voxels} voxels; {spread}. Volumes: {counts}; for FID and MMD "
        f"{first['volumes_for_fid_and_mmd']} of each, from {first['real']}; features: {first['protocol']['features']}:",
        grid(["set", *(STATISTICS[n][0] for n in names)], rows),
        "Bright voxels, p-values of two-sample Kolmogorov-Smirnov tests (0.05 or more does not show that sets are alike):",
        grid(["set", *(f"p (beside), seed {i}" for i in range(len(summaries)))], tests),
    ]


def _table4(content: dict[str, Any]) -> list[str]:
    lines = []
    for r in content["rows"]:
        figures = [
            "-" if r[m] is None else f"{r[m]:{form}} ({low:{form}} to {high:{form}})"
            for m, form in (("mse", ".6f"), ("ssim", ".4f"), ("psnr", ".2f"))
            for low, high in [r["intervals"].get(m, (None, None))]
        ]
        cost = [f"{r['seconds'] / 60:.1f}", f"{r['memory_gb']:.2f}"]
        lines.append([str(r["channels"]), f"{r['latents']:,}", f"{r['ratio']:.3f}", *figures, *cost])
    columns = ["C", "latents", "latents per voxel", "MSE ↓", "SSIM ↑", "PSNR, dB ↑", "training, min", "peak GB"]
    published = [[p["model"], p["data"], f"{p['latents']:,}", f"{p['psnr']:.1f}"] for p in PUBLISHED]
    return [
        f"TCAM-Diff, {content['rows'][0]['volumes']} training volumes; mean (95 % interval over volumes):",
        grid(columns, lines),
        "Published by others, on other data with other scaling, never as a ratio to the figures above:",
        grid(["model", "data", "latents", "PSNR, dB"], published),
    ]
