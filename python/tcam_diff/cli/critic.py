"""``tcam critic``: how far generated volumes are from real ones."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tcam_diff import config as configs
from tcam_diff.cli.common import say, tracked
from tcam_diff.errors import UserError
from tcam_diff.files import writable_folder, write_text


def critic(
    real: Annotated[Path, typer.Argument(help="Real volumes: a store of `tcam prepare`, or NIfTI files in any layout.")],
    fake: Annotated[Path, typer.Argument(help="A folder of `tcam sample`, or other volumes; {seed} is replaced by each seed.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FAKE2] [KEY=VALUE]...",
            help="Another generator's volumes, scored by the same critic; changes to the critic, e.g. size=64 epochs=50.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Critics, each with its own start and split.")] = 3,
    split: Annotated[str | None, typer.Option(help="Of REAL. [default: all]", show_default=False)] = None,
    intensity: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Physical values at 0 and 1, of files that do not say: stores and samples do. [default: files are in 0 to 1]",
            show_default=False,
        ),
    ] = None,
    controls: Annotated[bool, typer.Option(help="Score also real against real, and against blurred real, volumes.")] = True,
    out: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """The Wasserstein distance of FAKE (and FAKE2) from REAL, by a critic trained for the purpose (WGAN-GP): mean ± standard
    deviation over seeds, lower is nearer.

    Values depend on size, scale and critic: compare only those of one table.
    """
    import torch

    from tcam_diff.evaluation.critic import CriticConfig, Score, blurred, halves, prepare, score
    from tcam_diff.evaluation.sets import read_set
    from tcam_diff.training.distributed import device_of

    others = [m for m in more or [] if "=" not in m]
    if len(others) > 1:
        raise UserError(f"expected at most two generators, FAKE and FAKE2, got {' '.join([str(fake), *others])}")
    config = configs.load(CriticConfig, "critic", "default", [m for m in more or [] if "=" in m])
    device = device_of(config.device)
    if out is not None:
        writable_folder(out.parent)

    def read(path: Path, what: str, part: str | None = None) -> torch.Tensor:
        return read_set(
            path, lambda v: prepare(v, config), split=part, intensity=intensity,
            tracked=lambda items, total: tracked(items, total, f"reading {what}", quiet),
        )  # fmt: skip

    truth = read(real, "real", split)
    given = [fake, *map(Path, others)]
    if len(set(given)) < len(given):
        raise UserError(f"FAKE2: expected another folder than FAKE, got {fake} twice")
    sets: dict[Path, torch.Tensor] = {}
    rows: dict[str, list[Score]] = {}
    for seed in range(seeds):
        fakes = {}
        for f in given:
            path = Path(str(f).replace("{seed}", str(seed)))
            if path not in sets:
                sets[path] = read(path, path.name)
                if sets[path].shape[1:] != truth.shape[1:]:
                    raise UserError(f"{path}: its volumes have {sets[path].shape[1]} channels, the real ones {truth.shape[1]}")
            fakes[str(f)] = sets[path]
        a, b = halves(truth, seed)
        jobs: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {"": (truth, fakes)}
        if controls:
            jobs["control: real"] = (a, {"control: real": b})
            if config.ndim == 3:
                for sigma in (1.0, 2.0):
                    name = f"control: real, blurred by {sigma:g} voxels"
                    jobs[name] = (a, {name: blurred(b, sigma).half()})
        for name, (reals, against) in jobs.items():
            label = f"seed {seed}" + (f", {name}" if name else "")
            found = _scored(label, score, reals, against, config, seed, device, quiet)
            for what in against:
                rows.setdefault(what, []).append(found)
    say(f"real: {real}, {len(truth)} volumes; critics see {config.size} voxels an axis; held-out W, lower is nearer")
    for what, scores in rows.items():
        distances = [s.distance[what] for s in scores]
        spread = f" ± {statistics.stdev(distances):.3g}" if len(distances) > 1 else ""
        doubt = "" if all(s.valid for s in scores) else "  (not converged: no epoch had a gradient norm near 1)"
        counts = scores[0].counts
        trained = statistics.fmean(s.train_distance for s in scores)
        norm = statistics.fmean(s.gradient_norm for s in scores)
        say(
            f"{what}: {statistics.fmean(distances):.4g}{spread}   ({scores[0].real_count} real and {counts[what]} fake ones "
            f"scored; on the training volumes {trained:.4g}, gradient norm {norm:.2f}){doubt}"
        )
    if out is not None:
        found_ = {
            "real": str(real),
            "config": config.model_dump(),
            "scores": {k: [asdict(s) for s in v] for k, v in rows.items()},
        }
        write_text(out, json.dumps(found_, indent=1))


def _scored(label: str, score: Any, reals: Any, fakes: Any, config: Any, seed: int, device: Any, quiet: bool) -> Any:
    """With a progress bar over epochs."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tcam_diff.cli.common import console

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("W {task.fields[w]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task("critic", total=config.epochs, w="-")
        return score(reals, fakes, config, seed, device, lambda e, w, n: bar.update(task, completed=e, w=f"{w:.3g}"))
