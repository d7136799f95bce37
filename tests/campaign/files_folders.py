"""Oracles of the product's own folders: fitted volumes, latent sets, models, checkpoints of both stages, and stores."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from files_oracles import Wrong, call, check, plainly
from tcam_diff.autodecoder import artefact
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.autodecoder.planes import PLANE_NAMES
from tcam_diff.autodecoder.train import train_autodecoder
from tcam_diff.data.check import check_store
from tcam_diff.data.store import Store, StoreWriter, one_shape
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.diffusion.data import LatentData
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.train import train_diffusion
from tcam_diff.errors import UserError
from tcam_diff.training import checkpoint as checkpoints
from torch import Tensor

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def plain_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, parsed here."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = torch.frombuffer(bytearray(body[begin:end]), dtype=TYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def same_tensors(got: Mapping[str, Tensor], want: Mapping[str, Tensor], what: str) -> None:
    """Compare tensors with those of a file. They are floats, finite and of the same values."""
    check(set(got) == set(want), f"{what}: {sorted(got)}, but {sorted(want)} in the file")
    for name, tensor in want.items():
        check(got[name].is_floating_point() and bool(torch.isfinite(got[name]).all()), f"{what}: {name} is not finite")
        check(got[name].shape == tensor.shape and torch.equal(got[name].double(), tensor.double()), f"{what}: {name} differs")


def sound(info: VolumeInfo, entry: Mapping[str, Any]) -> None:
    """Check metadata: positive sizes, a regular affine, finite intensities; and that they are those of the file."""
    check(min(info.array_shape) > 0 and np.isfinite(info.affine).all(), f"unsound metadata: {info}")
    check(abs(np.linalg.det(info.affine)) > 0 and min(info.spacing) > 0, f"singular affine: {info.affine}")
    check(np.isfinite(info.intensity).all(), f"intensities: {info.intensity}")
    check(info.qform is None or np.isfinite(info.qform).all(), f"qform: {info.qform}")
    check(np.array_equal(info.affine, np.array(entry["affine"], float)), "another affine than in the file")
    check(list(info.shape) == [int(n) for n in entry["shape"]][-3:], "another shape than in the file")


def decodes(fitted: artefact.FittedVolume) -> None:
    """Decode a volume to a small size, in slabs."""
    slabs = call(lambda: list(fitted.decode((3, 4, 2), slab=1)))
    check(all(s.shape == (fitted.info.channels, 3, 4, 1) and np.isfinite(s).all() for s in slabs), "decoded to other voxels")


def safetensors(seeds: Path, folder: Path) -> None:
    """Judge a fitted volume, a latent set or a model."""
    for index, judge in (("manifest.json", fitted), ("latents.json", latents), ("model.json", model)):
        if (folder / index).exists():
            judge(folder)
            return
    for read in (artefact.load, LatentSet, TriplaneDiffusion.load):
        try:
            call(read, folder)
        except UserError as error:
            refusal = error
        else:
            raise Wrong("read without an index")
    raise refusal


def fitted(folder: Path) -> None:
    volume, index = call(artefact.load, folder), json.loads((folder / "manifest.json").read_text())
    planes = dict(zip(PLANE_NAMES, (p[0] for p in volume.planes), strict=True))
    same_tensors(
        planes, {k: v[0] for k, v in plainly(plain_tensors, folder / "planes.safetensors").items() if k in planes}, "planes"
    )
    same_tensors(volume.decoder.state_dict(), plainly(plain_tensors, folder / "decoder.safetensors"), "decoder")
    sound(volume.info, index["tcam"])
    decodes(volume)


def latents(folder: Path) -> None:
    latent_set = call(LatentSet, folder)
    call(LatentData, folder)
    same_tensors(call(latent_set.decoder).state_dict(), plainly(plain_tensors, folder / "decoder.safetensors"), "decoder")
    for entry, written in zip(latent_set.entries, latent_set.index["volumes"], strict=True):
        call(latent_set.verify, entry)
        planes = dict(zip(PLANE_NAMES, call(latent_set.planes, entry), strict=True))
        want = plainly(plain_tensors, folder / f"planes/{entry.name}.safetensors")
        same_tensors(planes, {name: want[name] for name in PLANE_NAMES}, entry.name)
        sound(entry.info, written)
        decodes(call(latent_set.fitted, entry.name))


def model(folder: Path) -> None:
    loaded, index = call(TriplaneDiffusion.load, folder), json.loads((folder / "model.json").read_text())
    centre = {} if loaded.centre is None else {f"centre.{n}": m for n, m in zip(PLANE_NAMES, loaded.centre.mean, strict=True)}
    network = dict(loaded.network.state_dict()) | centre
    same_tensors(network, plainly(plain_tensors, folder / "network.safetensors"), "network")
    same_tensors(loaded.decoder.state_dict(), plainly(plain_tensors, folder / "decoder.safetensors"), "decoder")
    sound(loaded.geometry.info, index["geometry"])
    check(len(loaded.identity) == 64, "no identity")
    if loaded.length > 20_000:  # other texels than those of the sound model are possible, but large planes take long
        return
    x = torch.linspace(-1, 1, loaded.length)[None]
    label = torch.zeros(1, dtype=torch.long) if loaded.geometry.classes else None
    estimate = call(loaded.estimate, x, torch.full((1,), 500.0), label)
    check(estimate.shape == (1, 2 * loaded.length), "an estimate of another size")
    if max(float(t.abs().max()) for t in network.values()) > 1e3:  # such weights are finite, but what they make need not be
        return
    check(torch.isfinite(estimate).all(), "an estimate that is not finite")
    decodes(loaded.volume(call(loaded.planes, x)))


# ---- checkpoints -----------------------------------------------------------------------------


def train_config(seeds: Path) -> TrainConfig:
    """Configuration of the run of stage 1."""
    changes = ("channels=2", "widths=[4]", "plane_size=3", "stride=2", "steps=100", "batch=2", "evaluate_every=100")
    return TrainConfig.load("fast", [f"data={seeds / 'store'}", "checkpoint_every=100", "device=cpu", "prefetch=0", *changes])


def diffusion_config(seeds: Path) -> DiffusionConfig:
    """Configuration of the run of stage 2."""
    changes = ("network.base=4", "network.multipliers=[1]", "network.attention_levels=[]", "steps=100", "evaluate_every=100")
    return DiffusionConfig.load(
        "tiny", [f"latents={seeds / 'latents'}", "checkpoint_every=100", "device=cpu", "batch=2", "preview_steps=0", *changes]
    )


def checkpoint(seeds: Path, folder: Path) -> None:
    """Resume a run: its state is that of the checkpoint, and it makes another step."""
    try:
        stage2 = b"latents" in (folder / "config.yaml").read_bytes()
    except OSError:
        stage2 = any(b"optimiser" in p.read_bytes() and b"network" in p.read_bytes() for p in folder.rglob("shared.pt"))
    train: Callable[..., Any] = train_diffusion if stage2 else train_autodecoder
    config: Any = diffusion_config(seeds) if stage2 else train_config(seeds)
    last = call(checkpoints.latest, folder / "checkpoints")
    if last is not None:
        step, shared, shards = call(checkpoints.load, last)
        for name, part in (("shared.pt", shared), ("shard-0-of-1.pt", shards[0])):
            want = plainly(lambda name=name: torch.load(last / name, map_location="cpu", weights_only=True))  # type: ignore[misc]
            check(same_state(part, want), f"{name}: another state than in the file")
    kept: list[Any] = []
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == 1 and last is not None:
            task = kept[0]
            state = task.shared_state()
            check(all(same_state(state[k], shared["task"][k]) for k in state if k != "optimiser"), "resumed with another state")
            check(
                stage2 or same_state(task.shard_state(), shards[0]), "resumed with other planes"
            )  # stage 2 has no state of a rank
        return asked == 3

    outcome = call(train, config, folder, "auto", started=kept.append, stop=stop)
    check(outcome.step == (0 if last is None else step) + 2, f"it ended at step {outcome.step}")
    check(kept[0].finite(), "parameters that are not finite")


def same_state(got: Any, want: Any) -> bool:
    """Whether two states are equal, with tensors of equal values."""
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype or got.layout != want.layout:
            return False
        return (
            want.is_meta
            or want.numel() > 10**7
            or want.layout != torch.strided
            or bool(((got == want) | ((got != got) & (want != want))).all())
        )
    if isinstance(want, dict):
        return isinstance(got, dict) and got.keys() == want.keys() and all(same_state(got[k], want[k]) for k in want)
    if isinstance(want, list | tuple):
        return isinstance(got, list | tuple) and len(got) == len(want) and all(map(same_state, got, want))
    return bool(got == want or (got != got and want != want))


# ---- stores ----------------------------------------------------------------------------------


def store(seeds: Path, folder: Path) -> None:
    prepared, index = call(Store, folder), json.loads((folder / "store.json").read_text())
    problems = call(lambda: list(check_store(prepared)))
    check(len(problems) == len(prepared.records), "a case without a result of check-data")
    writer = call(StoreWriter, folder, prepared.config)
    for record, entry, problem in zip(prepared.records, index["cases"], problems, strict=True):
        try:
            call(prepared.verify, record)
        except UserError as error:
            first, second = (re.sub("0x[0-9a-f]+", "", text) for text in (problem, str(error)))
            check(first == second, f"check-data says {problem}, verify {error}")
            raise
        check(not problem, f"check-data says: {problem}")
        path, array = prepared.path(record), call(prepared.volume, record)
        check(path.resolve().parent == (folder / "cases").resolve(), f"{path} is outside the store")
        want = plainly(lambda path=path: np.load(path, allow_pickle=False))  # type: ignore[misc]
        check(np.array_equal(array, want, equal_nan=True) and array.dtype == want.dtype, "other voxels than in the file")
        check(
            array.shape == record.info.array_shape and array.dtype.name in ("uint8", "float16"), f"{array.dtype} {array.shape}"
        )
        if record.labels_sha256 is not None:
            labels = call(prepared.labels, record)
            check(labels.shape == record.info.shape and labels.dtype == np.uint8, f"labels {labels.dtype} {labels.shape}")
        sound(record.info, entry)
        check(len(record.info.intensity) == record.info.channels, "intensities are missing")
        again = call(writer.find, record.name, record.sources)
        check(again is None or again.name == record.name, "the record of another case")
    if prepared.records:
        call(one_shape, folder, prepared.records)
    call(prepared.in_split, "train")
