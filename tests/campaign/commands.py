"""The commands that the campaign kills, starves and runs twice, on inputs of a second, in forked processes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import runs
import torch
from shards import Tally
from tcam_diff import cli
from tcam_diff.autodecoder import artefact
from tcam_diff.autodecoder.latents import LatentSet
from tcam_diff.data.store import Store
from tcam_diff.errors import UserError
from tcam_diff.training import checkpoint

#: Modules that commands import, imported before processes fork.
for _module in ("tcam_diff.cli.app", "tcam_diff.data.prepare", "tcam_diff.evaluation.compare", "monai.transforms", "monai.data",
                "tcam_diff.autodecoder.report", "torch.utils.tensorboard"):  # fmt: skip
    importlib.import_module(_module)

#: Longest time that a command may take, in seconds. They take one to five.
LIMIT = 120


@dataclass
class Child:
    """A forked process that runs ``tcam``."""

    pid: int
    log: Path
    began: float

    @property
    def text(self) -> str:
        """What the command printed."""
        return self.log.read_text(errors="replace")

    def kill(self, number: int, group: bool = False) -> None:
        """Send a signal to the process, or to it and its workers."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def running(self) -> bool:
        """Whether the process has not ended. Its status stays for ``wait``."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, limit: float = LIMIT) -> int:
        """Wait for the end. Returns the exit status, minus a signal's number, or -999 after ``limit`` seconds."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - self.began > limit:
                self.kill(signal.SIGKILL, group=True)
                os.waitpid(self.pid, 0)
                return -999
            time.sleep(0.002)

    def orphans(self, patience: float = 5.0) -> bool:
        """Whether processes of the command's group are alive ``patience`` seconds after its end."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.02)
        os.killpg(self.pid, signal.SIGKILL)
        return True


def start(arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> Child:
    """Start ``tcam ARGUMENTS``, as its entry point does. ``before`` runs in the new process."""
    began, pid = time.monotonic(), os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return Child(pid, log, began)
    status = 70
    try:
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = ["tcam", *arguments]
        if before is not None:
            before()
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run ``tcam ARGUMENTS``. Returns the exit status and what it printed."""
    child = start(arguments, log, before)
    return child.wait(), child.text


@dataclass(frozen=True)
class Command:
    """A command with a result in a folder.

    Args:
        name: the command.
        arguments: function of the folder.
        digest: digest of the result, without times. Raises UserError while the result is unfinished or if it is damaged.
        finished: text in the refusal of a command that is repeated after its end; empty: it keeps the result.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    digest: Callable[[Path], str]
    finished: str = ""


def digest_of(*parts: Any) -> str:
    """Digest of tensors, arrays, files and of containers of these."""
    total = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in sorted(part, key=str):
                add(key)
                add(part[key])
        elif isinstance(part, list | tuple):
            for p in part:
                add(p)
        elif isinstance(part, torch.Tensor):
            add(part.detach().contiguous().view(torch.uint8).numpy() if part.ndim else part.item())
        elif isinstance(part, np.ndarray):
            total.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        elif isinstance(part, Path):
            total.update(part.read_bytes())
        else:
            total.update(repr(part).encode())

    add(parts)
    return total.hexdigest()


def _fitted(out: Path) -> str:
    fitted = artefact.load(out)
    return digest_of(fitted.planes, fitted.decoder.state_dict(), fitted.info.model_dump(mode="json"))


def _trained(out: Path) -> str:
    last = checkpoint.latest(out / "checkpoints")
    if last is None:
        raise UserError(f"{out}: no checkpoint")
    step, shared, shards = checkpoint.load(last)
    return digest_of(step, shared["task"], shards)


def _prepared(out: Path) -> str:
    store = Store(out)
    for record in store.records:
        store.verify(record)
    return digest_of([(r.name, r.split, r.info.model_dump(mode="json"), np.array(store.volume(r))) for r in store.records])


def _encoded(out: Path) -> str:
    latents = LatentSet(out)
    for entry in latents.entries:
        latents.verify(entry)
    return digest_of(
        [(e.model_dump(mode="json", exclude={"sha256"}), latents.planes(e)) for e in latents.entries],
        latents.decoder().state_dict(),
    )


def _sampled(out: Path) -> str:
    volumes = sorted(out.glob("*.nii.gz"))
    sidecars = [v.with_name(v.name.replace(".nii.gz", ".json")) for v in volumes]
    if len(volumes) < 3 or not all(s.is_file() for s in sidecars) or not (out / "contact-sheet.png").is_file():
        raise UserError(f"{out}: samples are missing")
    images = [nib.load(v) for v in volumes]
    return digest_of([(v.name, np.asarray(i.dataobj), i.affine) for v, i in zip(volumes, images, strict=True)])


class Bench:
    """Inputs of the commands, made in a folder."""

    def __init__(self, work: Path) -> None:
        self.work = work
        if (threads := len(os.listdir("/proc/self/task"))) > 1:
            raise RuntimeError(f"{threads} threads: a process that forks needs to have one; set OMP_NUM_THREADS=1")
        child = os.fork()  # this process stays without threads, so that others can fork from it
        if not child:
            try:
                self._make()
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError("the inputs could not be made")

    def _make(self) -> None:
        torch.set_num_threads(1)
        images = self.work / "images"
        images.mkdir()
        for i in range(8):
            data = (1000 * runs.blobs(i, (18, 16, 20))[0]).astype(np.int16)
            nib.save(nib.Nifti1Image(data, np.diag([1.0, 1.5, 2.0, 1.0])), images / f"case{i}.nii.gz")
        store = runs.make_store(self.work / "store").folder
        runs.run(store, self.work / "stage1")
        latents = runs.make_latents(self.work / "latents")
        runs.diffuse(latents, self.work / "stage2")

    def commands(self) -> list[Command]:
        w = self.work
        stage1 = [f"data={w / 'store'}", "device=cpu", *runs.SMALL, "evaluate_every=24"]
        stage2 = [f"latents={w / 'latents'}", "device=cpu", *runs.SMALL_DIFFUSION, "evaluate_every=16"]
        fit = ["steps=30", "channels=4", "widths=[16]", "stride=2"]
        encode = ["steps=12", "check_every=4", "batch=1"]

        def made(*arguments: str) -> Callable[[Path], list[str]]:
            return lambda out: [*arguments, "--out", str(out), "-q"]

        def resumed(*arguments: str) -> Callable[[Path], list[str]]:
            return lambda out: [*arguments, "--out", str(out), "-q", "--resume", "auto"]

        return [
            Command("fit", made("fit", str(w / "images" / "case0.nii.gz"), *fit), _fitted, "already contains a fitted volume"),
            Command("train-autodecoder", resumed("train-autodecoder", "fast", *stage1), _trained),
            Command("train-diffusion", resumed("train-diffusion", "tiny", *stage2), _trained),
            Command("prepare", made("prepare", str(w / "images"), "resize=[12,12,12]", "-j", "2"), _prepared),
            Command("encode", made("encode", str(w / "stage1"), str(w / "store"), *encode), _encoded),
            Command("sample", made("sample", str(w / "stage2"), "--n", "3", "--steps", "6", "--batch-size", "1"), _sampled),
        ]

    def command(self, name: str) -> Command:
        return next(c for c in self.commands() if c.name == name)


#: Names of the commands.
NAMES = ("fit", "train-autodecoder", "train-diffusion", "prepare", "encode", "sample")


def digest(command: Command, out: Path) -> str:
    """Digest of a result, computed in a forked process. Returns "unfinished: ..." or "ERROR: ..." if there is none."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            text = command.digest(out)
        except UserError as error:
            text = f"unfinished: {error}"
        except BaseException as error:
            text = f"ERROR: {type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text


def leftovers(out: Path) -> list[str]:
    """Temporary files that a finished command left in its folder."""
    return [str(p.relative_to(out)) for p in out.rglob(".*") if p.name.endswith("part") or p.name.startswith(".writing")]


def one_line(text: str) -> bool:
    """Whether a refusal is one line of the command's own, without a traceback."""
    lines = [line for line in text.splitlines() if line.startswith("tcam: ") and not line.startswith("tcam: warning")]
    return len(lines) == 1 and "Traceback" not in text


def on_inputs(test: Callable[..., None], name: str, seed: int, cases: int, work: Path, tally: Tally) -> None:
    """Run a test of a command: with the digest of its result and the seconds that it takes, both without a fault."""
    command = Bench(work).command(name)
    began = time.monotonic()
    status, text = run(command.arguments(work / "reference"), work / "log")
    whole = time.monotonic() - began
    want = digest(command, work / "reference")
    if status or want.startswith(("unfinished", "ERROR")):
        tally.fail("without a fault", f"exit status {status}, {want}\n{text}")
        return
    test(command, want, whole, random.Random(seed), cases, work, tally)
