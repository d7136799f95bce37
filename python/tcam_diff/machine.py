"""The machine and the versions with which something was computed."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import tcam_ext
from tcam_diff.files import write_text
from tcam_ext import _C

#: File in a run's folder: the machine on which the run began.
MACHINE = "machine.json"


def machine() -> dict[str, str]:
    """What computes here: processor, GPUs, memory, system and versions."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores to use, {torch.get_num_threads()} threads",
        "GPU": ", ".join(f"{g.name} ({g.total_memory / 2**30:.0f} GiB)" for g in gpus) or "none",
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}",
        "packages": f"torch {torch.__version__}, tcam_ext {tcam_ext.__version__}{_commit()}",
    }


def products(name: str, device: torch.device) -> torch.dtype:
    """Type of the products of a network of torch's layers. "auto" is bfloat16 where the device multiplies it."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or _C.cpu_has_bf16() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]


def write_machine(folder: Path, more: dict[str, str]) -> None:
    """Write the machine to the folder of a run, with ``more``."""
    write_text(folder / MACHINE, json.dumps(machine() | more, indent=1))


def read_machine(folder: Path) -> dict[str, str]:
    """The machine on which a run began; empty where it was not written or cannot be read."""
    try:
        content = json.loads((folder / MACHINE).read_text())
        return {str(k): str(v) for k, v in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _commit() -> str:
    """Commit of a checkout from which the packages are imported, with "+changes" if its sources differ; "" elsewhere."""
    root = Path(tcam_ext.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not (root / ".git").exists() or not (commit := git("rev-parse", "--short", "HEAD")):
            return ""
        return f" (commit {commit}{'+changes' if git('status', '--porcelain', '--', 'csrc', 'python', 'tcam_ext') else ''})"
    except OSError:  # without git
        return ""


def _processor() -> str:
    """Name of the CPU's model."""
    try:
        name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        name = None
    return name[1] if name else platform.processor() or platform.machine()
