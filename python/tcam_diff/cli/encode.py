"""``tcam encode``: planes for new volumes under a trained decoder. ``tcam export-latents``: those of the training volumes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tcam_diff import config as configs
from tcam_diff.autodecoder.config import EncodeConfig
from tcam_diff.autodecoder.encode import Encoder, TrainedRun, load_run
from tcam_diff.autodecoder.latents import Entry, LatentWriter
from tcam_diff.autodecoder.objective import Objective
from tcam_diff.autodecoder.planes import normalise
from tcam_diff.cli.common import console, duration, say, stop_on_interrupt, tracked
from tcam_diff.data.store import Record, Store
from tcam_diff.errors import UserError
from tcam_diff.training.distributed import device_of


def encode(
    run: Annotated[Path, typer.Argument(help="A folder of `tcam train-autodecoder`.")],
    store: Annotated[
        Path, typer.Argument(help="A folder that `tcam prepare` wrote, with the preprocessing of the training data.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the latent set: empty, or one that this command has begun.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. steps=2000 region=box.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of the store.")] = "test",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint's folder. [default: the last]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Find planes for the volumes of STORE with RUN's decoder frozen, and write them as a latent set.

    Ctrl-C stops; the same command goes on with the volumes that are missing.
    """
    config = configs.load(EncodeConfig, "encode", "default", overrides or [])
    trained = load_run(run, checkpoint)
    data = Store(store)
    _same_preprocessing(trained, data, run, store)
    records = data.of(split)
    writer = LatentWriter(out, trained.config, trained.decoder, _provenance(trained, data, config.model_dump(mode="json")))
    encode_records(trained, data, records, writer, config, device, quiet)


def encode_records(
    trained: TrainedRun,
    data: Store,
    records: list[Record],
    writer: LatentWriter,
    config: EncodeConfig,
    device: str = "auto",
    quiet: bool = False,
) -> list[Entry]:
    """Encode what is missing, group by group of ``config.batch`` volumes of one size, and write the set."""
    done: dict[str, Entry] = {r.name: e for r in records if (e := writer.find(r)) is not None}
    todo = sorted((r for r in records if r.name not in done), key=lambda r: r.shape)
    if done:
        say(f"{writer.folder}: {len(done)} of {len(records)} volumes are there already")
    groups: list[list[Record]] = []
    for record in todo:
        if not groups or groups[-1][0].shape != record.shape or len(groups[-1]) == config.batch:
            groups.append([])
        groups[-1].append(record)
    began = time.monotonic()
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=console, disable=quiet, transient=True) as bar,
        stop_on_interrupt("finished volumes are kept, and the same command goes on") as stop,
    ):
        task = bar.add_task("encode", total=len(groups) * config.steps, what="")
        encoder: Encoder | None = None
        for g, group in enumerate(groups):
            size = (group[0].shape[1], group[0].shape[2], group[0].shape[3])
            if encoder is None or encoder.size != size:
                encoder = Encoder(trained, config, size, device_of(device))

            def show(step: int, active: int, psnr: float, g: int = g, of: int = len(group)) -> None:
                what = f"group {g + 1}/{len(groups)}, {active} of {of} volumes, PSNR {psnr:.2f} dB"
                bar.update(task, completed=g * config.steps + step, what=what)

            found = encoder.encode({r.name: data.volume(r) for r in group}, show, stop)
            if found is None:
                raise UserError(
                    f"{writer.folder}: stopped with {len(done)} of {len(records)} volumes; the same command goes on"
                )
            for record in group:
                new = found[record.name]
                done[record.name] = writer.write(record, new.planes, new.psnr, new.steps)
            if not quiet and not console.is_terminal:
                say(f"group {g + 1}/{len(groups)}: mean PSNR {sum(e.psnr for e in found.values()) / len(found):.2f} dB")
    entries = [done[r.name] for r in records]
    _finish(writer, entries, f"encoded in {duration(time.monotonic() - began)}" if todo else "")
    return entries


def export_latents(
    run: Annotated[Path, typer.Argument(help="A folder of `tcam train-autodecoder`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the latent set.")],
    store: Annotated[Path | None, typer.Option(help="The training data, where they have moved.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint's folder. [default: the last]", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write the planes that RUN fitted to its training volumes as a latent set."""
    trained = load_run(run, checkpoint)
    data = Store(store or trained.config.data)
    _same_preprocessing(trained, data, run, data.folder)
    by_name = {r.name: r for r in data.records}
    writer = LatentWriter(out, trained.config, trained.decoder, _provenance(trained, data, None))
    entries = []
    raw = trained.raw_planes()
    first = by_name[trained.objects[0]]
    objective = Objective(trained.config, (first.shape[1], first.shape[2], first.shape[3]))
    for name in tracked(trained.objects, len(trained.objects), "exporting", quiet):
        record = by_name[name]
        planes = normalise(raw[name], trained.config.norm)
        psnr = objective.psnr(planes, trained.decoder, data.volume(record))
        entries.append(writer.write(record, planes, psnr, trained.step))
    _finish(writer, entries, "")


def _finish(writer: LatentWriter, entries: list[Entry], how: str) -> None:
    statistics = writer.finish(entries)
    share = ", ".join(f"{n} {s['mean_plane_energy_share']:.2f}" for n, s in statistics.items())
    psnr = [e.psnr for e in entries]
    say(
        f"{writer.folder}: {len(entries)} volumes{', ' + how if how else ''}; PSNR {sum(psnr) / len(psnr):.2f} dB "
        f"({min(psnr):.2f} to {max(psnr):.2f}) over whole volumes, noise off; energy of the mean planes: {share}"
    )


def _same_preprocessing(trained: TrainedRun, data: Store, run: Path, store: Path) -> None:
    if data.digest != trained.digest:
        raise UserError(
            f"{store}: prepared otherwise than the data of {run}; prepare it with the configuration in that store.json"
        )


def _provenance(trained: TrainedRun, data: Store, encoding: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "run": str(trained.folder.resolve()),
        "step": trained.step,
        "store": str(data.folder.resolve()),
        "store_digest": data.digest,
        "preprocessing": data.config,
        "encode": encoding,
    }
