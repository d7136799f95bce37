"""Tables and figures of the paper: run what is missing, then write the rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from tcam_diff.data.store import Store, unit
from tcam_diff.errors import UserError
from tcam_diff.evaluation.picture import sheet, strip
from tcam_diff.evaluation.reconstruction import find_reconstructions
from tcam_diff.evaluation.sets import read_set
from tcam_diff.files import locked_folder, write_bytes, write_text
from tcam_diff.progress import ProgressCallback, StopCallback
from tcam_diff.tables import rows as of
from tcam_diff.tables.config import TableConfig
from tcam_diff.tables.paper import PUBLISHED
from tcam_diff.tables.plan import GENERATORS, OURS, RIVALS, Plan
from tcam_diff.tables.render import markdown
from tcam_diff.tables.steps import run
from tcam_diff.training.report import png

matplotlib.use("Agg")
from matplotlib import pyplot as plt

#: Figures of the paper by number: title, and the table whose models they show.
FIGURES = {
    3: ("Reconstructions of ours and of the rivals, with their errors", 1),
    5: ("New volumes of ours and of the rivals", 3),
    6: ("New volumes of ours, decoded at the training size and at twice it", 3),
    7: ("New volumes with and without cross-attention, and with concatenated planes", 3),
}


def make_table(
    number: int,
    folder: Path,
    config: TableConfig,
    *,
    seeds: int = 1,
    equal_steps: bool = False,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> str | None:
    """Train, evaluate and collate what a table needs.

    Args:
        number: 1 to 4.
        folder: folder of all tables of one protocol, which they share: data, runs, table-N.json, table-N.md.
        config: the protocol.
        seeds: seeds of every training (tables 1 and 3).
        equal_steps: whether rivals are also trained for as many steps as ours (table 1).
        progress: called before every step, which ``what`` names.
        stop: asked all the time; a stopped table continues in the next call.

    Returns:
        The table as Markdown; None if ``stop`` ended the work.

    Raises:
        UserError: a step failed, or the folder has a table of another protocol.
    """
    _claim(folder, config)
    plan = Plan(folder, config, seeds, equal_steps)
    steps = plan.steps(number)
    with locked_folder(folder):
        if not run(folder, steps, progress, stop):
            return None
        records = [of.read(folder / "steps" / f"{s.record}.json") for s in steps]
        content: dict[str, Any] = {
            "table": number,
            "seeds": 1 if number in (2, 4) else seeds,
            "data": _data(plan, "store-channels" if number == 2 else "store"),
            "protocol": config.model_dump(mode="json"),
            "steps": records,
            "rows": {1: of.table1, 2: of.table2, 3: of.table3, 4: of.table4}[number](plan),
        }
        content["machine"] = _machine([r["machine"] for r in records])
        if number == 1:
            content["comparisons"] = of.comparisons(folder, content["rows"])
        if number == 3:
            content["sets"] = of.sets(plan)
        if number == 4:
            write_bytes(folder / "table-4.png", rate_picture(content["rows"], _rivals(plan)))
        text = markdown(content)
        write_text(folder / f"table-{number}.json", json.dumps(content, indent=1))
        write_text(folder / f"table-{number}.md", text + "\n")
        return text


def _machine(machines: Sequence[dict[str, str]]) -> dict[str, str]:
    """Machine of all steps, with the packages of each; of several machines, or numbers of threads, their processors."""
    packages = "; ".join(dict.fromkeys(m["packages"] for m in machines))
    alone = {json.dumps({k: v for k, v in m.items() if k != "packages"}, sort_keys=True) for m in machines}
    processors = "; ".join(dict.fromkeys(m["processor"] for m in machines))
    several = {"processor": f"{processors} (not all steps on the same: see their times)"} if len(alone) > 1 else {}
    return {**machines[-1], **several, "packages": packages}


def _claim(folder: Path, config: TableConfig) -> None:
    """Write the protocol of a folder. Raises UserError if it has another one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    if path.is_file() and TableConfig.load(path) != config:
        raise UserError(f"{folder}: has tables of another protocol ({path}); choose another folder")
    write_text(path, config.yaml())


def _data(plan: Plan, name: str) -> str:
    store = Store(plan.folder / name)
    channels, h, w, d = store.records[0].info.array_shape
    training = sum(r.split == "train" for r in store.records)
    what = "cohort made from the MNI152 template" if plan.config.data is None else Path(plan.config.data).name
    others = len(store.records) - training
    return f"{what}, {training} training and {others} other volumes of {h} x {w} x {d}, {channels} channel(s)"


def _rivals(plan: Plan) -> list[of.Row]:
    """Training volumes of the rivals of table 1, if it is there."""
    path = plan.folder / "table-1.json"
    rows = of.read(path)["rows"] if path.is_file() else []
    return [r for r in rows if r["model"] in RIVALS and r["volumes_are"] == "training"]


def rate_picture(rows: list[of.Row], rivals: list[of.Row]) -> bytes:
    """PNG of PSNR over latents per voxel: ours, the rivals of table 1 on the same volumes, and published points."""
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    axis.plot([r["ratio"] for r in rows], [r["psnr"] for r in rows], "o-", label="TCAM-Diff, measured")
    voxels = rows[0]["latents"] / rows[0]["ratio"]
    for name in RIVALS:
        points = [r for r in rivals if r["model"] == name]
        if points:
            x, y = [r["latents"] / voxels for r in points], [r["figures"]["psnr"]["mean"] for r in points]
            axis.plot(x, y, "s", label=f"{of.TITLES[name]}, measured")
    ratios = [r["ratio"] for r in rows] + [p["latents"] / p["voxels"] for p in PUBLISHED]
    for p in PUBLISHED:
        ratio, label = p["latents"] / p["voxels"], f"{p['model']}, {p['data']}"
        axis.plot(ratio, p["psnr"], "x", color="grey")
        left, side = (-4, "right") if 2 * ratio > min(ratios) + max(ratios) else (4, "left")  # towards the middle
        axis.annotate(label, (ratio, p["psnr"]), fontsize=6, xytext=(left, 4), textcoords="offset points", ha=side)
    axis.plot([], [], "x", color="grey", label="published, on other data: not comparable")
    axis.set_xlabel("latents per voxel")
    axis.set_ylabel("PSNR of training volumes, dB")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    return png(figure)


def make_figure(
    number: int,
    folder: Path,
    config: TableConfig,
    *,
    progress: ProgressCallback | None = None,
    stop: StopCallback | None = None,
) -> Path | None:
    """Draw a figure, after the steps of its table. For arguments and errors see ``make_table``.

    Returns:
        The picture; None if ``stop`` ended the work.
    """
    _claim(folder, config)
    plan = Plan(folder, config)
    with locked_folder(folder):
        if not run(folder, plan.steps(FIGURES[number][1]), progress, stop):
            return None
        path = folder / f"figure-{number}.png"
        write_bytes(path, {3: _figure3, 5: _figure5, 6: _figure6, 7: _figure7}[number](plan))
        return path


def _figure3(plan: Plan) -> bytes:
    """For a training and a held-out volume: the original, and reconstructions with five times their errors."""
    store = Store(plan.folder / "store")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for model, folders in plan.reconstructions(0).items():
        for f in folders:
            for r in find_reconstructions(store, plan.folder / f):
                if r.record in (store.in_split("train")[0], store.in_split(plan.config.held_out)[0]):
                    found.setdefault(r.record.name, {})[model] = r.read()
    strips = []
    for name, of_model in found.items():
        record = next(r for r in store.records if r.name == name)
        truth = unit(torch.tensor(store.volume(record)))[0].numpy()
        kind = "training" if record.split == "train" else "held out"
        original = strip(truth, record.info.affine)
        strips += [(f"{name}, {kind}", original), ("", np.full_like(original, 255))]
        for model in (OURS, *RIVALS):
            got = of_model[model][0].numpy()
            strips.append((of.TITLES[model], strip(got, record.info.affine)))
            strips.append((f"{of.TITLES[model]}: 5 x error", strip(5 * np.abs(got - truth), record.info.affine)))
    return png(sheet(strips, 2))


def _samples(plan: Plan, name: str, title: str, count: int = 4) -> list[tuple[str, np.ndarray]]:
    volumes = read_set(plan.folder / f"seed-0/{name}-samples", lambda v: v, most=count).volumes
    affine = Store(plan.folder / "store").records[0].info.affine
    return [(title if i == 0 else "", strip(v[0].numpy(), affine)) for i, v in enumerate(volumes)]


def _figure5(plan: Plan) -> bytes:
    store = Store(plan.folder / "store")
    real = store.in_split(plan.config.held_out)[:4]
    strips = [("held-out volumes" if i == 0 else "", strip(unit(torch.tensor(store.volume(r)))[0].numpy(), r.info.affine))
              for i, r in enumerate(real)]  # fmt: skip
    strips += _samples(plan, "diffusion", of.TITLES[OURS])
    for name in ("ldm-vae-gan", "ldm-vq-gan", "gaussian"):
        if name in plan.generators:
            strips += _samples(plan, name, GENERATORS[name])
    return png(sheet(strips, 4))


def _figure6(plan: Plan) -> bytes:
    from tcam_diff.diffusion.config import SampleConfig
    from tcam_diff.diffusion.model import TriplaneDiffusion
    from tcam_diff.diffusion.sampling import Sampler

    model = TriplaneDiffusion.load(plan.folder / "seed-0/diffusion")
    planes = Sampler(model, SampleConfig(steps=plan.config.sample_steps)).sample([0, 1])
    strips, info = [], model.geometry.info
    for scale in (1, 2):
        h, w, d = (scale * n for n in info.shape)
        for i, volume in enumerate(model.decode(planes, (h, w, d))):
            strips.append((f"sample {i}, {h} x {w} x {d}", strip(volume[0].numpy(), info.resized((h, w, d)).affine, 256)))
    return png(sheet(strips, 2))


def _figure7(plan: Plan) -> bytes:
    strips = _samples(plan, "diffusion", of.TITLES[OURS])
    for name in ("no-cross", "concatenated"):
        if name in plan.generators:
            strips += _samples(plan, name, GENERATORS[name])
    return png(sheet(strips, 4))
