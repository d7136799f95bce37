"""What the folders given to ``tcam report`` are, and the store of real volumes that they name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tcam_diff.autodecoder import latents
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.baselines.config import CompressionConfig, LatentDiffusionConfig
from tcam_diff.config import read_settings
from tcam_diff.data import store as stores
from tcam_diff.data.nifti import is_nifti
from tcam_diff.data.sources import Case
from tcam_diff.data.store import Store
from tcam_diff.diffusion.config import DiffusionConfig, DistillConfig
from tcam_diff.errors import UserError
from tcam_diff.evaluation.critic import Score
from tcam_diff.evaluation.reconstruction import Mean
from tcam_diff.evaluation.sets import sidecar_of
from tcam_diff.files import reason
from tcam_diff.folder import Folder
from tcam_diff.text import shown

SUMMARY, SEGMENTATION = "summary.json", "segmentation.json"
KINDS = (
    "a run of `tcam train-autodecoder`, `tcam train-diffusion`, `tcam distill` or `tcam baseline train`, a set of "
    "`tcam encode` or `tcam export-latents`, or a folder of `tcam sample`, `tcam baseline sample`, `tcam evaluate`, "
    "`tcam segment`, `tcam table` or `tcam figure`"
)


class Summary(BaseModel):
    """Result of ``tcam evaluate``: of reconstructions, in groups, or of sets of generated volumes."""

    protocol: dict[str, Any]
    groups: dict[str, dict[str, Mean]] = {}
    sets: dict[str, dict[str, Mean]] = {}
    critics: dict[str, list[Score]] = {}
    told_apart: dict[str, dict[str, float]] = {}


@dataclass(frozen=True)
class Sample:
    """A generated volume, and the settings in its JSON file."""

    case: Case
    settings: dict[str, Any]


@dataclass
class Inputs:
    """Folders by kind."""

    stage1: dict[Path, TrainConfig] = field(default_factory=dict)
    latents: dict[Path, LatentSet] = field(default_factory=dict)
    stage2: dict[Path, DiffusionConfig] = field(default_factory=dict)
    distilled: dict[Path, DistillConfig] = field(default_factory=dict)
    compressions: dict[Path, CompressionConfig] = field(default_factory=dict)  # of rivals
    latent_diffusions: dict[Path, LatentDiffusionConfig] = field(default_factory=dict)  # of rivals
    samples: dict[Path, list[Sample]] = field(default_factory=dict)
    evaluations: dict[Path, Summary] = field(default_factory=dict)
    segmentations: dict[Path, dict[str, Any]] = field(default_factory=dict)
    tables: dict[Path, list[Path]] = field(default_factory=dict)  # files of finished tables and figures

    @property
    def runs(self) -> list[Path]:
        """Folders of trainings."""
        return [*self.stage1, *self.stage2, *self.distilled, *self.compressions, *self.latent_diffusions]

    @property
    def rebuilding(self) -> list[Path]:
        """Folders with reconstructions."""
        return [*self.stage1, *self.latents, *self.compressions]


def find_inputs(paths: Sequence[Path]) -> Inputs:
    """Recognise folders by their files. Raises UserError for one that is of none of KINDS, or damaged."""
    inputs = Inputs()
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; expected {KINDS}")
        if latents.is_latent_set(path):
            inputs.latents[path] = LatentSet(path)
        elif finished := _tables(path):
            inputs.tables[path] = finished
        elif (path / SEGMENTATION).is_file():
            folder = Folder(path, SEGMENTATION, "`tcam segment`", "run `tcam segment` again")
            inputs.segmentations[path] = folder.read_json(SEGMENTATION)
        elif (path / "config.yaml").is_file():
            _add_run(inputs, path)
        elif (path / SUMMARY).is_file():
            inputs.evaluations[path] = _read_summary(path)
        elif samples := _samples(path):
            inputs.samples[path] = samples
        else:
            names = ", ".join(sorted(shown(p.name) for p in path.iterdir())[:4])
            raise UserError(f"{path}: expected {KINDS}; it has {names or 'no files'}")
    return inputs


def find_store(inputs: Inputs, store: Path | None) -> Store | None:
    """The store of real volumes: ``store``, or the one that the inputs name; None if they name none.

    Raises UserError if it does not exist, or if they name several.
    """
    if store is not None:
        return Store(store)
    named = [(path, config.data) for path, config in inputs.stage1.items()]
    named += [(path, rival.data) for path, rival in inputs.compressions.items()]
    named += [(path, s.index.get("provenance", {}).get("store") or s.config.data) for path, s in inputs.latents.items()]
    named += [
        (path, str(summary.protocol["real"])) for path, summary in inputs.evaluations.items() if "real" in summary.protocol
    ]
    found: dict[Path, Path] = {}
    for path, name in named:
        if not (Path(name) / stores.INDEX).is_file():
            raise UserError(f"{path}: names the store {name}, which is not there; give its place: --store STORE")
        found.setdefault(Path(name).resolve(), path)
    if len(found) > 1:
        (first, of_first), (second, of_second), *_ = found.items()
        raise UserError(
            f"{of_second}: is of the store {second}, {of_first} of {first}; make a page for each, or choose one with --store"
        )
    return Store(next(Path(name) for _, name in named)) if named else None


def _add_run(inputs: Inputs, path: Path) -> None:
    settings = path / "config.yaml"
    keys = read_settings(settings)
    if "autoencoder" in keys:
        inputs.latent_diffusions[path] = LatentDiffusionConfig.load(settings)
    elif "adversarial_weight" in keys:
        inputs.compressions[path] = CompressionConfig.load(settings)
    elif "data" in keys:
        inputs.stage1[path] = TrainConfig.load(settings)
    elif "teacher_steps" in keys:
        inputs.distilled[path] = DistillConfig.load(settings)
    elif "latents" in keys:
        inputs.stage2[path] = DiffusionConfig.load(settings)
    else:
        raise UserError(f"{settings}: expected the key data or latents, as in a run of training; got {shown(', '.join(keys))}")


def _tables(path: Path) -> list[Path]:
    """Tables and figures in a folder of `tcam table` or `tcam figure`, in the order of their names."""
    if not (path / "steps").is_dir():
        return []
    return sorted([*path.glob("table-*.md"), *path.glob("table-*.png"), *path.glob("figure-*.png")])


def _read_summary(path: Path) -> Summary:
    folder = Folder(path, SUMMARY, "`tcam evaluate`", "run `tcam evaluate` again")
    content = folder.read_json(SUMMARY)
    with folder.reading(SUMMARY):
        return Summary.model_validate(content)


def _samples(path: Path) -> list[Sample]:
    """The samples of a folder: volumes with a JSON file that has the settings of the sampling."""
    found = []
    for file in sorted(p for p in path.iterdir() if is_nifti(p)):
        sidecar = sidecar_of(file)
        if not sidecar.is_file():
            continue
        try:
            settings = json.loads(sidecar.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{sidecar}: cannot be read: {shown(reason(error))}; draw the sample again") from error
        if isinstance(settings, dict) and isinstance(settings.get("sampling"), dict):
            found.append(Sample(Case(sidecar.name.removesuffix(".json"), (file,)), settings))
    return found
