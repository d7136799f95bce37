"""The page of ``tcam report``: volumes, tables, curves, protocol, hardware and commands."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tcam_diff.autodecoder.report import curve_groups
from tcam_diff.config import Config
from tcam_diff.data.store import Record, Store, unit
from tcam_diff.diffusion.config import DistillConfig
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.report import CURVES
from tcam_diff.errors import UserError
from tcam_diff.evaluation.content import p_values
from tcam_diff.evaluation.distances import convergence
from tcam_diff.evaluation.generation import STATISTICS
from tcam_diff.evaluation.reconstruction import METRICS, Reconstruction, find_reconstructions
from tcam_diff.evaluation.sets import read_unit
from tcam_diff.files import writable_folder, write_bytes
from tcam_diff.folder import Folder
from tcam_diff.machine import machine, read_machine
from tcam_diff.progress import Progress, ProgressCallback
from tcam_diff.report import niivue, viewer
from tcam_diff.report.inputs import SEGMENTATION, Inputs, Sample, Summary, find_inputs, find_store
from tcam_diff.report.viewer import Column
from tcam_diff.report.volumes import Shown, fitting, shown
from tcam_diff.tables.render import segmentations
from tcam_diff.training.logger import read_metrics
from tcam_diff.training.report import Content, Table, curves, folded, markup, page, paragraph

#: Most bytes of a page: below 25 MB, which mail and web servers take.
MOST_BYTES = 24_000_000
#: Most columns of a viewer: a browser has 16 WebGL contexts for a page.
MOST_COLUMNS = 12
NO_VIEWER = (
    "The page has pictures instead of a viewer, because tcam was built without NiiVue: install it again where npm is on PATH, "
    f"or run `{niivue.PACK}` and give its file to `tcam report` as --niivue."
)


@dataclass(frozen=True)
class Choice:
    """What of the volumes a page shows."""

    volumes: int = 3  # most of a kind
    size: int = 128  # most voxels along an axis
    channel: int = 0


@dataclass(frozen=True)
class Written:
    """What was written."""

    bytes: int
    volumes: int
    remarks: list[str]  # what the page lacks


def report(
    paths: Sequence[Path],
    out: Path,
    *,
    store: Path | None = None,
    choice: Choice | None = None,
    package: Path | None = None,
    progress: ProgressCallback | None = None,
) -> Written:
    """Write a page about runs, latent sets, samples, evaluations, segmentations and tables.

    Args:
        paths: their folders, in any order.
        out: the file.
        store: the real volumes; None: the store that the folders name.
        choice: the volumes to show; default: ``Choice()``.
        package: npm package of the viewer; None: what this package was built with.
        progress: called after every volume.

    Raises:
        UserError: a folder is of no known kind, damaged, or of other volumes than the store.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; expected the name of a file, for example {out / 'report.html'}")
    writable_folder(out.parent)
    choice, script = choice or Choice(), viewer.script(package)
    inputs = find_inputs(paths)
    real = find_store(inputs, store)
    columns = find_columns(inputs, real, choice, progress)
    if not (columns or inputs.tables or inputs.segmentations):
        raise UserError("nothing to show: expected a run of `tcam train-autodecoder`, samples, or --store STORE")
    remarks = []
    if columns and real is None:
        remarks = ["There are no real volumes, because none of the folders names a store: --store STORE adds them."]
    sections = [*tables(inputs), *trainings(inputs), *origin(inputs, real)]
    title = "Real, reconstructed and generated volumes"
    viewers = [("Volumes", columns)] if columns else []
    return write_page(out, title, "", viewers, sections, script if columns else "", remarks)


def write_page(
    out: Path,
    title: str,
    introduction: str,
    viewers: Sequence[tuple[str, Sequence[Column]]],
    sections: Sequence[tuple[str, Content]],
    script: str,
    remarks: Sequence[str] = (),
) -> Written:
    """Write a page with viewers, under their headings, before other sections.

    Volumes are shrunk until the page has at most MOST_BYTES. Without ``script`` there are pictures in place of viewers, and a
    remark says so. Raises UserError if there are too many volumes.
    """
    volumes = [v for _, columns in viewers for column in columns for v in column.volumes]
    remarks = [*remarks, *([] if script or not viewers else [NO_VIEWER])]
    introductions = [text for text in (introduction, *remarks) if text]
    scripts = [script, viewer.CODE.read_text()] if script else []
    shown: list[tuple[str, Content]] = [(heading, viewer.still(columns)) for heading, columns in viewers]

    def made() -> bytes:
        return page(title, [*shown, *sections], viewer.STYLE.read_text(), scripts, introductions).encode()

    if script:
        most = MOST_BYTES - len(made()) - 2000 * len(volumes)  # names and details
        files = iter(fitting(volumes, most * 3 // 4))
        shown = [(heading, viewer.live(columns, files)) for heading, columns in viewers]
    content = made()
    write_bytes(out, content)
    return Written(len(content), len(volumes), remarks)


# ---- volumes -------------------------------------------------------------------------------


def find_columns(inputs: Inputs, store: Store | None, choice: Choice, progress: ProgressCallback | None = None) -> list[Column]:
    """The real volumes, their reconstructions, and generated volumes. Raises UserError if there are too many kinds."""
    sources = inputs.rebuilding if store is not None else []
    if 1 + len(sources) + len(inputs.samples) > MOST_COLUMNS:
        raise UserError(f"{len(sources) + len(inputs.samples)} runs and folders with volumes; a page takes {MOST_COLUMNS - 1}")
    again = {path: find_reconstructions(store, path)[: choice.volumes] for path in sources if store is not None}
    records = {r.record.name: r.record for found in again.values() for r in found}
    if store is not None and not records:
        records = {r.name: r for r in store.records[: choice.volumes]}
    samples = {path: found[: choice.volumes] for path, found in inputs.samples.items()}
    total = len(records) + sum(map(len, again.values())) + sum(map(len, samples.values()))
    done = itertools.count(1)

    def read(name: str, data: torch.Tensor, info: Any) -> Shown:
        if progress is not None:
            progress(Progress(next(done), total))
        return shown(name, data, info, choice.channel, choice.size)

    def real(r: Record) -> Shown:
        assert store is not None
        return read(r.name, unit(torch.tensor(store.volume(r))), r.info)

    def rebuilt(r: Reconstruction) -> Shown:
        return read(r.record.name, r.read(), r.record.info)

    def drawn(s: Sample) -> Shown:
        volume = read_unit(s.case)
        return read(s.case.name, torch.from_numpy(volume.data), volume.info)

    columns = [Column("real", [real(r) for r in records.values()])] if records else []
    for path, found in again.items():
        columns.append(Column(_title("reconstructed", path, again), [rebuilt(r) for r in found], follows=True))
    for path, cases in samples.items():
        columns.append(Column(_title("generated", path, samples), [drawn(s) for s in cases]))
    return columns


def _title(kind: str, path: Path, of: Any) -> str:
    return kind if len(of) == 1 else f"{kind}: {path}"


# ---- tables and curves ---------------------------------------------------------------------


def tables(inputs: Inputs) -> list[tuple[str, Content]]:
    """A section for each result of ``tcam evaluate`` and ``tcam segment``, and each table and figure of the paper."""
    sections: list[tuple[str, Content]] = [
        (f"{'Reconstructions' if summary.groups else 'Generated volumes'}: {path}", _table(path, summary))
        for path, summary in inputs.evaluations.items()
    ]
    sections += [(f"Segmentation: {path}", _segmentation(path, content)) for path, content in inputs.segmentations.items()]
    for path, files in inputs.tables.items():
        sections += [(f"{f.stem.replace('-', ' ').capitalize()}: {path}", _made(f)) for f in files]
    return sections


def _segmentation(path: Path, content: dict[str, Any]) -> list[Content]:
    with Folder(path, SEGMENTATION, "`tcam segment`", "run `tcam segment` again").reading():
        text = "\n\n".join(segmentations([{**row, "model": row["images"]} for row in content["rows"]]))
        protocol = folded("Protocol", _yaml(content["protocol"]))
    picture = path / "segmentation.png"
    return [*from_markdown(text), *([picture.read_bytes()] if picture.is_file() else []), protocol]


def _made(file: Path) -> Content:
    """A table of ``tcam table``, which is Markdown, or a picture."""
    return file.read_bytes() if file.suffix == ".png" else from_markdown(file.read_text())


def from_markdown(text: str) -> list[Content]:
    """Paragraphs, tables and commands of the Markdown of tables/render.py, whose blocks are apart by empty lines."""
    parts: list[Content] = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if block.startswith("### "):
            parts.append(paragraph(block.removeprefix("### ")))
        elif block.startswith("```"):
            parts.append(folded("Commands", "\n".join(lines[1:-1])))
        elif block.startswith("| "):
            head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            parts.append(Table(head, rows))
        else:
            parts.append(paragraph(block))
    return parts


def _table(path: Path, summary: Summary) -> list[Content]:
    of = summary.groups or summary.sets
    names = dict.fromkeys(name for figures in of.values() for name in figures)
    head = ["", "better", *(f"{group} ({_count(figures)})" for group, figures in of.items())]
    rows = []
    for name in names:
        if summary.groups:
            title, better = METRICS.get(name, (name, ""))
        else:
            title, better = STATISTICS.get(name, (name, ""))
        rows.append([title, better, *(figures.get(name, "") for figures in of.values())])
    beside = f"{' '.join(_fakes(summary))} beside {summary.protocol.get('real', '')}"
    text = f"{beside}; mean (95 % interval over volumes)"
    parts: list[Content] = [paragraph(text), Table(head, rows)]
    if summary.critics:
        parts.append(paragraph("Wasserstein distances by critics; low is close; compare within one line's critics alone:"))
        parts.append(Table(["set", "W"], [[name, convergence(name, of)] for name, of in summary.critics.items()]))
    if summary.told_apart:
        tests = [[name, p_values(beside)] for name, beside in summary.told_apart.items()]
        parts.append(paragraph("Bright voxels: p-values of Kolmogorov-Smirnov tests; below 0.05 sets differ:"))
        parts.append(Table(["set", "p (beside)"], tests))
    volumes = path / "volumes.csv"
    if volumes.is_file():
        lines = volumes.read_text(errors="replace").splitlines()
        parts.append(folded(f"Every volume ({len(lines) - 1})", "\n".join(lines[:MOST_LINES])))
    return [*parts, folded("Protocol", _yaml(summary.protocol))]


#: Lines of volumes.csv that a page shows.
MOST_LINES = 200


def _count(figures: Any) -> str:
    count = next((f.volumes for f in figures.values()), 0)
    return f"{count} volume{'' if count == 1 else 's'}"


def trainings(inputs: Inputs) -> list[tuple[str, Content]]:
    """A section with figures, curves and the configuration of each training."""
    sections: list[tuple[str, Content]] = []
    for path in inputs.runs:
        metrics = read_metrics(path)
        kind, config, groups = _training(inputs, path, metrics)
        parts: list[Content] = [_figures(metrics)]
        if metrics:
            parts.append(markup(curves(metrics, groups), "curves"))
        sections.append((f"Training, {kind}: {path}", [*parts, folded("Configuration", config.yaml())]))
    return sections


def _training(inputs: Inputs, path: Path, metrics: Sequence[dict[str, Any]]) -> tuple[str, Config, Sequence[Sequence[str]]]:
    """What a run trains, its configuration, and the metrics of its curves."""
    if path in inputs.stage1:
        return "stage 1", inputs.stage1[path], curve_groups(metrics)
    if path in inputs.stage2:
        return "stage 2", inputs.stage2[path], CURVES
    if path in inputs.distilled:
        return "distillation", inputs.distilled[path], [["loss"], ["distance", "prior_distance"]]
    if path in inputs.compressions:
        config = inputs.compressions[path]
        return f"rival {config.model}", config, [["loss", "error"], ["psnr", "held_out_psnr"]]
    return "rival's latent diffusion", inputs.latent_diffusions[path], [["loss", "evaluation_loss"]]


def _figures(metrics: Sequence[dict[str, Any]]) -> dict[str, object]:
    last: dict[str, Any] = {}
    for record in metrics:
        last |= {k: v for k, v in record.items() if v is not None}
    known = {
        "steps": ("step", "{}"),
        "time": ("seconds", "{:.0f} s"),
        "rate": ("steps_per_second", "{:.2f} steps/s at the end"),
        "peak memory": ("memory_gb", "{:.2f} GB"),
        "PSNR of training volumes": ("psnr", "{:.2f} dB"),
        "validation loss": ("validation_loss", "{:.4f}"),
        "loss on training volumes": ("training_loss", "{:.4f}"),
    }
    return {title: form.format(last[name]) for title, (name, form) in known.items() if name in last}


# ---- where it comes from -------------------------------------------------------------------


def origin(inputs: Inputs, store: Store | None, commands: str = "") -> list[tuple[str, Content]]:
    """Sections with the preparation of the data, the machines and the commands, which are ``commands`` where they are known."""
    sections: list[tuple[str, Content]] = []
    if store is not None:
        splits = sorted({r.split for r in store.records})
        parts = ", ".join(f"{sum(r.split == s for r in store.records)} in the split {s}" for s in splits)
        volumes = paragraph(f"{store.folder}: {parts}. Volumes are in [0, 1] after this preparation.")
        sections.append(("Data", [volumes, folded("Preparation", _yaml(store.config))]))
    machines = {f"training {path}": read_machine(path) for path in inputs.runs} | {"this page": machine()}
    kinds = list(dict.fromkeys(kind for of in machines.values() for kind in of))
    rows = [[what, *([of.get(k, "") for k in kinds] if of else ["not recorded"])] for what, of in machines.items()]
    sections.append(("Hardware", Table(["", *kinds], rows)))
    return [*sections, ("Commands", commands or "\n".join(_commands(inputs)))]


def _commands(inputs: Inputs) -> list[str]:
    """The commands that make the folders, from their settings."""
    lines = [["train-autodecoder", path / "config.yaml", "--out", path] for path in inputs.stage1]
    lines += [["baseline", "train", path / "config.yaml", "--out", path] for path in inputs.compressions]
    for path, latents in inputs.latents.items():
        provenance = latents.index.get("provenance", {})
        changes = [f"{k}={v}" for k, v in (provenance.get("encode") or {}).items() if v is not None]
        kind = ["encode", provenance.get("run", "RUN"), provenance.get("store", "STORE"), *changes]
        lines.append([*(kind if changes else ["export-latents", kind[1]]), "--out", path])
    lines += [["train-diffusion", path / "config.yaml", "--out", path] for path in inputs.stage2]
    lines += [["distill", config.model, "--out", path, *_changed(config)] for path, config in inputs.distilled.items()]
    lines += [["baseline", "train", path / "config.yaml", "--out", path] for path in inputs.latent_diffusions]
    lines += [_sampling(inputs, path, samples) for path, samples in inputs.samples.items()]
    for path, summary in inputs.evaluations.items():
        given = summary.protocol | summary.protocol.get("options", {})
        known = ("split", "lpips", "size", "features", "critics")
        more = [x for k in known if (v := given.get(k)) not in (None, 0) for x in (f"--{k}", v)]
        lines.append(["evaluate", given.get("real", "STORE"), *_fakes(summary), *more, "--out", path])
    return [shlex.join(["tcam", *map(str, line)]) for line in lines]


def _changed(config: DistillConfig) -> list[str]:
    """KEY=VALUE of the keys that differ from the preset."""
    plain = DistillConfig.load("default").model_dump(mode="json")
    return [f"{k}={v}" for k, v in config.model_dump(mode="json").items() if k != "model" and v != plain[k]]


def _fakes(summary: Summary) -> list[str]:
    """The folders that were compared."""
    fakes = summary.protocol.get("fake", "FAKE")
    return [str(f) for f in fakes] if isinstance(fakes, list) else [str(fakes)]


def _sampling(inputs: Inputs, path: Path, samples: Sequence[Sample]) -> list[Any]:
    settings = samples[0].settings
    if "rival" in settings:
        options = ["--seed", settings["sampling"]["seed"], "--dtype", settings.get("dtype")]
        return ["baseline", "sample", "RUN", "--n", len(samples), *options, "--out", path]
    models = [run for run in (*inputs.stage2, *inputs.distilled) if _identity(run) == settings.get("model")]
    named = {k: v for k, v in settings["sampling"].items() if v is not None} | {"dtype": settings.get("dtype")}
    if settings.get("label") is not None:
        named["label"] = settings["label"]
    given: list[Any] = []
    for k, v in named.items():
        given += [] if v is None else [f"--{k.replace('_', '-')}", *(v if isinstance(v, list) else [v])]
    first = ["--first", settings["index"]] if settings.get("index") else []
    size = ["--size", *settings["size"]] if isinstance(settings.get("size"), list) else []
    guided = ["--known", "FILE"] if settings.get("known") else []
    return ["sample", models[0] if models else "MODEL", "--n", len(samples), *first, *given, *size, *guided, "--out", path]


def _identity(run: Path) -> str:
    """Identity of the model of a run, which its samples have; "" where it has none yet."""
    try:
        return TriplaneDiffusion.load(run, torch.device("cpu")).identity
    except UserError:
        return ""


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
