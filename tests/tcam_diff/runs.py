"""Helpers for tests: small stores, latent sets and training runs, in separate processes if a test kills or distributes them."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.latents import LatentWriter
from tcam_diff.autodecoder.objective import make_decoder
from tcam_diff.autodecoder.planes import normalise, plane_sizes
from tcam_diff.autodecoder.train import AutodecoderTraining, train_autodecoder
from tcam_diff.cli import main
from tcam_diff.cli.app import app
from tcam_diff.data.store import Record, Store, StoreWriter, quantise
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.diffusion.config import DiffusionConfig, SampleConfig
from tcam_diff.diffusion.draw import Output, draw_samples
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.diffusion.train import DiffusionTraining, train_diffusion
from tcam_diff.errors import UserError
from tcam_diff.training import checkpoint
from tcam_diff.training.distributed import distributed
from typer.testing import CliRunner

SMALL = (
    "channels=6", "widths=[24, 24]", "steps=24", "batch=4", "stride=2", "log_every=4", "checkpoint_every=3", "evaluate_every=8",
    "ema_decay=0.9", "ssim_weight=0.05",
)  # fmt: skip

#: Processes fork from a server without threads that has imported everything, so that each starts in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tcam_diff.autodecoder.train", "tcam_diff.diffusion.train", "tcam_diff.diffusion.draw"])


def blobs(number: int, size: tuple[int, int, int]) -> np.ndarray:
    """Smooth volume (1, H, W, D) in [0, 1], different for every number."""
    rng = np.random.default_rng(number)
    axes = np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1 for n in size], indexing="ij")
    total = np.zeros(size)
    for _ in range(4):
        centre, width = rng.uniform(-0.6, 0.6, 3), rng.uniform(4, 12)
        total += rng.uniform(0.3, 0.8) * np.exp(-width * sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)))
    return total.clip(0, 1).astype(np.float32)[None]


#: NIfTI codes and units of the volumes, different from the defaults.
SPACE: Any = {"codes": (1, 3), "units": ("mm", "msec")}


def has_space(image: Any) -> bool:
    """Whether an image of nibabel has the codes and units of SPACE."""
    codes = int(image.header["qform_code"]), int(image.header["sform_code"])
    return (codes, image.header.get_xyzt_units()) == (SPACE["codes"], SPACE["units"])


def make_store(folder: Path, count: int = 7, held_out: int = 2, size: tuple[int, int, int] = (12, 10, 14)) -> Store:
    writer = StoreWriter(folder, {"percentiles": [0.0, 100.0]})
    records = []
    for i in range(count + held_out):
        split = "train" if i < count else "test"
        info = VolumeInfo(channels=1, shape=size, affine=np.diag([1.0, 1.5, 2.0, 1.0]), **SPACE, intensity=[(10.0, 20.0)])
        records.append(writer.write(f"blob{i}", split, quantise(blobs(i, size), "uint8"), info, []))
    writer.finish(records)
    return Store(folder)


def config(store: Path, *overrides: str) -> TrainConfig:
    return TrainConfig.load("fast", [f"data={store}", *SMALL, *overrides])


def run(store: Path, out: Path, overrides: tuple[str, ...] = (), resume: str | None = None) -> None:
    """Run ``train_autodecoder`` on one thread."""
    torch.set_num_threads(1)
    train_autodecoder(config(store, "device=cpu", *overrides), out, resume)


def steps(store: Path, out: Path, count: int, overrides: tuple[str, ...] = ()) -> None:
    """Train for ``count`` steps. Every rank writes the decoder, its last gradients and the planes."""
    torch.set_num_threads(1)
    with distributed("cpu") as group:
        task = AutodecoderTraining(config(store, *overrides), group, out)
        for i in range(count):
            task.step(i)
        state = {
            "gradients": [p.grad for p in task.decoder.parameters()],
            "decoder": list(task.decoder.state_dict().values()),
            "planes": {o: task.table.planes(o) for o in task.table.objects},
        }
        torch.save(state, out / f"rank-{group.rank}.pt")
        task.close()


def damage(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the state in a file of a checkpoint, and its checksum with it."""
    path = checkpoint.latest(folder)
    assert path is not None
    state = torch.load(path / name, weights_only=True)
    change(state)
    torch.save(state, path / name)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


# ---- stage 2 -------------------------------------------------------------------------------

SMALL_DIFFUSION = (
    "network.base=8", "network.head_channels=8", "network.dropout=0.1", "steps=16", "batch=4", "warmup_steps=2", "log_every=4",
    "checkpoint_every=3", "evaluate_every=8", "evaluate_volumes=4", "preview_steps=2", "prior=none", "timesteps=stratified",
    "network.norm_groups=32", "compute_dtype=float32",
)  # fmt: skip


def make_latents(
    folder: Path,
    count: int = 6,
    texels: tuple[int, int, int] = (8, 8, 8),
    seed: int = 0,
    split: str = "train",
    decoder_seed: int = 0,
) -> Path:
    """Latent set of smooth planes with C = 4, random combinations of a few patterns."""
    stage1 = config(folder / "no-store", "channels=4", f"plane_size={list(texels)}", "widths=[8]")
    g = torch.Generator().manual_seed(0)
    decoder = make_decoder(stage1.model_copy(update={"seed": decoder_seed}), 1)
    shapes = [(4, *size) for size in plane_sizes(texels)]
    common = [[torch.nn.functional.avg_pool2d(torch.randn(s, generator=g), 3, 1, 1) for s in shapes] for _ in range(4)]
    generator = torch.Generator().manual_seed(seed)
    writer = LatentWriter(folder, stage1, decoder, {"made": "for a test"})
    entries = []
    for i in range(count):
        weights = torch.cat([torch.ones(1), torch.randn(3, generator=generator)])
        planes = [sum(w * part[p] for w, part in zip(weights, common, strict=True)) for p in range(3)]
        shape = tuple(2 * n for n in texels)
        affine = np.diag([1.0, 1.5, 2.0, 1.0])
        affine[:3, 3] = i, 2.0, 3.0
        info = VolumeInfo(channels=1, shape=shape, affine=affine, **SPACE, intensity=[(-10.0 - i, 90.0 + i)])
        record = Record(info=info, name=f"v{seed}-{i}", split=split, dtype="uint8", sources=[], sha256=f"{i}")
        entries.append(writer.write(record, normalise([p[None] for p in planes]), 30.0, 100))
    writer.finish(entries)
    return folder


def diffusion_config(latents: Path, *overrides: str) -> DiffusionConfig:
    return DiffusionConfig.load("tiny", [f"latents={latents}", *SMALL_DIFFUSION, *overrides])


def diffuse(latents: Path, out: Path, overrides: tuple[str, ...] = (), resume: str | None = None) -> None:
    """Run ``train_diffusion`` on one thread."""
    torch.set_num_threads(1)
    train_diffusion(diffusion_config(latents, "device=cpu", *overrides), out, resume)


def diffusion_steps(latents: Path, out: Path, count: int, overrides: tuple[str, ...] = ()) -> None:
    """Train for ``count`` steps. Every rank writes the network and its last gradients."""
    torch.set_num_threads(1)
    with distributed("cpu") as group:
        task = DiffusionTraining(diffusion_config(latents, *overrides), group, out)
        for i in range(count):
            task.step(i)
        state = {
            "gradients": [p.grad for p in task.network.parameters()],
            "network": list(task.network.state_dict().values()),
            "checked": task.evaluate(),
        }
        torch.save(state, out / f"rank-{group.rank}.pt")


def sample(folder: Path, out: Path) -> None:
    """Draw five samples one at a time, on one thread."""
    torch.set_num_threads(1)
    draw_samples(folder, Output(out), range(5), SampleConfig(steps=3), batch_size=1, device="cpu")


# ---- processes -----------------------------------------------------------------------------


def _rank(rank: int, world: int, port: int, function, arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


def start(function, *arguments, world: int = 1) -> list:
    """Start a process for each of ``world`` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=_rank, args=(r, world, port, function, arguments)) for r in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(processes) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, process.exitcode


#: Voxels of the volumes of the small model.
SIZE = (16, 16, 16)


def sampler(model: TriplaneDiffusion, **changes: Any) -> Sampler:
    return Sampler(model, SampleConfig(**{"steps": 6} | changes))


def tcam(*arguments: Any, fails: bool = False) -> str:
    """The output of a command, or its error where it should fail."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if fails:
        assert isinstance(done.exception, UserError), (done.output, done.exception)
        return str(done.exception)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def command(*arguments: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which saves seconds of imports."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["tcam", *map(str, arguments)])
    with redirect_stdout(out), redirect_stderr(err), argv, mock.patch.dict(os.environ):
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
    if check:
        assert code == 0, err.getvalue()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
