"""Rehearse benchmarks/run_gpu.py without a GPU, in an environment like that of a bare GPU machine.

    make rehearse                                both calls, every step, on the CPU with small volumes
    python benchmarks/rehearse.py --short        only imports, test collection and a build in place, with the installed torch

The rehearsal works in a copy of the tree without .git and in a fresh virtual environment: Python 3.12 if PATH has it, torch
2.11.0, an old setuptools, without pytest-timeout, pydantic and tcam_ext. nvcc compiles the same files as on a GPU machine.
Nsight Compute, compute-sanitizer and nvidia-smi are stand-ins that check their arguments and run the command.

The rehearsal fails if a step fails, produces no results, or writes more than 8 files or a file above 16 MiB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
TORCH = "2.11.0"
PACKAGES = ["setuptools==68.1.2", "pybind11", "ninja", "pytest", "hypothesis", "numpy", "wheel"]
MISSING = ["pytest_timeout", "pydantic", "tcam_ext", "tcam_diff", "monai", "nibabel", "lpips"]
FILES, BYTES = 8, 16 << 20
#: Options of the tools; True: the option takes a value.
TOOLS = {
    "ncu": {
        **dict.fromkeys(("--clock-control", "--target-processes", "--kernel-name", "--launch-count", "--section"), True),
        **dict.fromkeys(("--metrics", "--export", "--import", "--page", "--print-units"), True), "--force-overwrite": False,
    },
    "compute-sanitizer": {"--tool": True, "--target-processes": True, "--error-exitcode": True, "--print-limit": True},
    "nvidia-smi": {},
}  # fmt: skip
STAND_IN = """#!{python}
import os, subprocess, sys
known, name, at, given = {known!r}, {name!r}, 1, {{}}
while at < len(sys.argv) and sys.argv[at].startswith("-"):
    if sys.argv[at] not in known:
        sys.exit(f"{{name}}: no such option: {{sys.argv[at]}}")
    takes = known[sys.argv[at]]
    given[sys.argv[at]] = sys.argv[at + 1] if takes else True
    at += 2 if takes else 1
if name == "compute-sanitizer" and given.get("--tool") not in ("memcheck", "racecheck", "initcheck", "synccheck"):
    sys.exit(f"{{name}}: no such tool: {{given.get('--tool')}}")
if "--import" in given:
    if not os.path.exists(given["--import"]):
        sys.exit(f"{{name}}: no such file: {{given['--import']}}")
    print("a stand-in's report")
command = sys.argv[at:]
print(f"{{name}}, a stand-in, runs {{' '.join(command)}}", flush=True)
status = subprocess.call(command) if command else 0
if "--export" in given:
    open(given["--export"] + ".ncu-rep", "w").write("a stand-in's report")
sys.exit(status)
"""
RATE = """#!/bin/sh
echo '{"card": "a stand-in", "processors": 0}'
echo '{"what": "mma.sync", "tflops": 0.0}'
"""
faults: list[str] = []


def fail(text: str) -> None:
    faults.append(text)
    print(f"FAULT: {text}", flush=True)


def stop(text: str) -> NoReturn:
    sys.exit(f"rehearse: {text}")


def find_python() -> str:
    """Python 3.12, as on the GPU machine, if it is installed; else this one."""
    for candidate in (shutil.which("python3.12"), *sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))):
        if candidate and subprocess.run([str(candidate), "-c", "import venv"], capture_output=True).returncode == 0:
            return str(candidate)
    return sys.executable


def copy_tree(to: Path) -> None:
    """Copy the files that git tracks or would add, without .git."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], capture_output=True, text=True)
    if listed.returncode:
        stop(f"not a checkout: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def torchs_packages() -> list[Path]:
    """Top-level files and folders of torch and its dependencies in this process's environment."""
    seen: set[str] = set()
    left, paths = ["torch"], {}
    while left:
        name = re.split(r"[^\w.-]", left.pop())[0].lower()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in seen or name == "setuptools":
            continue
        seen.add(name)
        left += [r for r in distribution.requires or [] if "extra ==" not in r]
        for file in distribution.files or []:
            top = Path(str(distribution.locate_file(file.parts[0])))
            if file.parts[0] != ".." and file.parts[0] != "__pycache__":
                paths[top] = None
    return list(paths)


def make_environment(folder: Path, short: bool) -> Path:
    python = sys.executable if short else find_python()
    if short:
        venv.create(folder, with_pip=True)
    else:
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    made = folder / "bin" / "python"
    pip = [str(made), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PACKAGES], check=True)
    if short:  # reuse the installed torch; only the whole rehearsal downloads it
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for path in torchs_packages():
            (borrowed / path.name).symlink_to(path)
        site = subprocess.run(
            [str(made), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
        )
        (Path(site.stdout.strip()) / "borrowed.pth").write_text(f"{borrowed}\n")
    else:
        subprocess.run([*pip, f"torch=={TORCH}"], check=True)
    says = "import sys, torch, setuptools; print(sys.version.split()[0], torch.__version__, setuptools.__version__)"
    print("Python, torch, setuptools:", subprocess.run([str(made), "-c", says], capture_output=True, text=True).stdout.strip())
    for name in MISSING:
        if subprocess.run([str(made), "-c", f"import {name}"], capture_output=True, cwd=folder).returncode == 0:
            stop(f"{name} is in the environment that should lack it")
    return made


def make_tools(folder: Path, python: Path) -> None:
    folder.mkdir()
    texts = {name: STAND_IN.format(python=python, known=known, name=name) for name, known in TOOLS.items()}
    for name, text in {**texts, "mma_rate": RATE}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)


def run(name: str, command: list[str], tree: Path, environment: dict[str, str], limit: float = 600) -> str:
    """Run a command; its output. An exit status other than 0 is recorded as a fault."""
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        fail(f"{name}: status {done.returncode}\n" + (done.stdout + done.stderr)[-3000:])
    return done.stdout + done.stderr


def rehearse_short(tree: Path, python: Path, environment: dict[str, str]) -> None:
    """Build in place, import everything that the calls import, collect their tests."""
    run("build in place", [str(python), "setup.py", "-q", "build_ext", "--inplace"], tree, environment)
    for path in sorted((tree / "benchmarks").glob("*.py")):
        done = subprocess.run([str(python), str(path), "--help"], cwd=tree, env=environment, capture_output=True, text=True)
        needs_more = "is missing; run pip" in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
        if done.returncode and not needs_more:
            fail(f"{path.name} --help: status {done.returncode}\n{done.stderr[-2000:]}")
        if needs_more and path.stem in ("bench_decode_grid", "bench_decode_points", "bench_sample", "one_call", "run_gpu"):
            fail(f"{path.name} needs a package that the GPU machine lacks: {done.stderr}")
    script = "import sys; sys.path.insert(0, 'benchmarks'); import harness; print(harness.environment()['commit'])"
    commit = run("environment", [str(python), "-c", script], tree, environment)
    if commit.strip() != environment["TCAM_COMMIT"]:
        fail(f"the commit of results: expected {environment['TCAM_COMMIT']}, got {commit.strip()!r}")
    collected = run(
        "collection", [str(python), "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "tests/ops"], tree, environment
    )
    if "test_cuda.py" not in collected or "warning" in collected.lower():
        fail(f"collection: expected the tests of test_cuda.py and no warning\n{collected[-2000:]}")
    run("selftest", [str(python), "-m", "tcam_ext.selftest", "--tiny", "--size", "0", "--device", "cpu"], tree, environment)


def rehearse(tree: Path, python: Path, environment: dict[str, str], out: Path) -> None:
    """Run both calls and check their results."""
    if not shutil.which("nvcc", path=environment["PATH"]):
        stop("nvcc is needed to compile the CUDA kernels")
    wanted = {
        "first": ["mma_rate", "selftest", "rivals", "test_cuda"],
        "second": ["memcheck", "racecheck", "synccheck", "ceilings", "other_tests"],
    }
    for call, steps in wanted.items():
        folder = out / call
        command = ["bash", "benchmarks/run_gpu.sh", call, str(folder), "--device", "cpu", "--size", "24", "--patience", "10"]
        print(run(f"run_gpu.sh {call}", command, tree, environment, 3600)[-4000:], flush=True)
        brought = [p for p in folder.rglob("*") if p.is_file()]
        if len(brought) > FILES or any(p.stat().st_size > BYTES or not p.stat().st_size for p in brought):
            sizes = [(p.name, p.stat().st_size) for p in brought]
            fail(f"{call}: expected at most {FILES} files of 1 byte to 16 MiB, got {sizes}")
        rows = [json.loads(line) for line in (folder / f"{call}.jsonl").read_text().splitlines()]
        summary = json.loads((folder / f"{call}.json").read_text())
        if summary["environment"]["commit"] != environment["TCAM_COMMIT"]:
            fail(f"{call}: the commit is missing in {summary['environment']}")
        before = 0
        for at, row in enumerate(rows):
            if "step" not in row:
                continue
            if row["status"]:
                fail(f"{call}: {row['step']} ended with status {row['status']}")
            if (
                row["step"] in steps
                and row["step"] != "mma_rate"
                and not any("step" not in r and "call" not in r for r in rows[before:at])
            ):
                fail(f"{call}: {row['step']} produced no results")
            before = at + 1
        for step in set(steps) - {r.get("step") for r in rows}:
            fail(f"{call}: {step} did not run")
        if summary["kernels"]["wrong"] or not summary["kernels"]["right"]:
            fail(f"{call}: kernels {summary['kernels']}")
    if not (out / "second" / "profile.ncu-rep").exists():
        fail("second: no profile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="imports, test collection and a build in place only")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tcam-rehearsal-") as made:
        work = (a.keep or Path(made)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        tree = work / "tree"
        copy_tree(tree)
        python = make_environment(work / "venv", a.short)
        make_tools(work / "tools", python)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("TCAM_", "PYTHON", "VIRTUAL_ENV"))}
        environment |= {
            "PATH": f"{work / 'tools'}:{work / 'venv' / 'bin'}:{environment['PATH']}",
            "PYTHON": str(python),
            "TCAM_COMMIT": "rehearsal",
            "TCAM_RATE": str(work / "tools" / "mma_rate"),
            "TCAM_CPU_SETS": "avx2",
            "TORCH_CUDA_ARCH_LIST": "9.0a",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if a.short:
            environment["TCAM_CUDA"] = "off"
            rehearse_short(tree, python, environment)
        else:
            rehearse(tree, python, environment, work / "out")
    print(f"rehearsal: {len(faults)} faults" if faults else "rehearsal: every step produced its results")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
