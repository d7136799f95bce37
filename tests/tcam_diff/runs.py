"""Small training runs, in processes of their own where a test kills them or wants several."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import torch
from tcam_diff import config as configs
from tcam_diff.autodecoder.config import TrainConfig
from tcam_diff.autodecoder.train import Autodecoder
from tcam_diff.cli.train_autodecoder import FREE, train
from tcam_diff.cli.training import prepare_folder
from tcam_diff.data.store import Store, StoreWriter, quantise
from tcam_diff.training.ranks import ranks

SMALL = (
    "channels=6", "widths=[24, 24]", "steps=24", "batch=4", "stride=2", "log_every=4", "checkpoint_every=3", "evaluate_every=8",
    "ema_decay=0.9", "ssim_weight=0.05",
)  # fmt: skip

#: Forks of a server that has imported everything and has never started a thread: each process costs milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tcam_diff.cli.train_autodecoder"])


def blobs(number: int, size: tuple[int, int, int]) -> np.ndarray:
    """(1, H, W, D) in [0, 1], smooth, different for every number."""
    rng = np.random.default_rng(number)
    axes = np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1 for n in size], indexing="ij")
    total = np.zeros(size)
    for _ in range(4):
        centre, width = rng.uniform(-0.6, 0.6, 3), rng.uniform(4, 12)
        total += rng.uniform(0.3, 0.8) * np.exp(-width * sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)))
    return total.clip(0, 1).astype(np.float32)[None]


def make_store(folder: Path, count: int = 7, held_out: int = 2, size: tuple[int, int, int] = (12, 10, 14)) -> Store:
    writer = StoreWriter(folder, {"percentiles": [0.0, 100.0]})
    records = []
    for i in range(count + held_out):
        split = "train" if i < count else "test"
        affine = np.diag([1.0, 1.5, 2.0, 1.0])
        records.append(writer.write(f"blob{i}", split, quantise(blobs(i, size), "uint8"), affine, [(10.0, 20.0)], []))
    writer.finish(records)
    return Store(folder)


def config(store: Path, *overrides: str) -> TrainConfig:
    return configs.load(TrainConfig, "train", "fast", [f"data={store}", *SMALL, *overrides])


def run(store: Path, out: Path, overrides: tuple[str, ...] = (), resume: str | None = None) -> None:
    """As ``tcam train-autodecoder`` does, on one thread."""
    torch.set_num_threads(1)
    wanted = config(store, *overrides)
    with ranks("cpu") as group:
        at = prepare_folder(out, wanted, resume, group, FREE)
        train(wanted, out, group, at, quiet=True)


def steps(store: Path, out: Path, count: int, overrides: tuple[str, ...] = ()) -> None:
    """``count`` steps; every rank writes the decoder's gradients of the last one, and the decoder."""
    torch.set_num_threads(1)
    with ranks("cpu") as group:
        task = Autodecoder(config(store, *overrides), group, out)
        for i in range(count):
            task.step(i)
        found = {
            "gradients": [p.grad for p in task.decoder.parameters()],
            "decoder": list(task.decoder.state_dict().values()),
            "planes": {o: task.table.planes(o) for o in task.table.objects},
        }
        torch.save(found, out / f"rank-{group.rank}.pt")
        task.close()


def _rank(rank: int, world: int, port: int, function, arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


def start(function, *arguments, world: int = 1) -> list:
    """Processes of ``world`` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = [CONTEXT.Process(target=_rank, args=(r, world, port, function, arguments)) for r in range(world)]
    for process in found:
        process.start()
    return found


def finish(processes) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, process.exitcode
