"""``python -m tcam_ext.selftest``: its cases pass on the emulated CUDA kernels, and it reports wrong kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import emulated
import pytest
import simt
import torch

from tcam_ext import testing
from tcam_ext.selftest import cases, volumes

ROOT = simt.ROOT


@pytest.fixture
def on_emulated_cuda(monkeypatch, simt_library):
    emulated.replace_kernels(monkeypatch, simt_library)
    monkeypatch.setattr(cases, "on_cuda", lambda device: True)


needs_emulator = [*simt.skip_where_it_cannot_run, pytest.mark.slow]


def marked(function):
    for mark in needs_emulator:
        function = mark(function)
    return function


@marked
def test_every_case_on_the_emulated_kernels(on_emulated_cuda):
    """The cases that run on a GPU: correct kernels stay within every limit."""
    kinds = set()
    for name, case in cases.all_cases("cpu", tiny=True).items():
        torch.manual_seed(0)
        for part, error, limit in case():
            assert error < limit, (name, part)
            kinds.add(part)
    assert "gradients" in kinds
    assert not any("not fused" in part for part in kinds)


@marked
def test_the_checks_of_a_large_volume_on_the_emulated_kernels(on_emulated_cuda):
    torch.manual_seed(0)
    p = testing.make(**volumes.OPERATING_POINT, size=(20, 20, 20))
    for part, error, limit in volumes.LargeVolume(p, "cpu", torch.bfloat16).all():
        assert error < limit, part


@pytest.mark.parametrize("fault", ["a slab is skipped", "a slab is counted twice"])
def test_the_sums_of_gradients_show_a_part_that_is_missing(monkeypatch, fault):
    """On the CPU kernels, with gradients spoiled at voxels other than the random ones."""
    torch.manual_seed(0)
    p = testing.make(**{**volumes.OPERATING_POINT, "channels": 4}, size=(24, 24, 24))
    real = torch.autograd.grad

    def spoiled(outputs, inputs, grad_outputs=None, **options):
        if isinstance(grad_outputs, torch.Tensor) and grad_outputs.dim() == 5:
            grad_outputs = grad_outputs.clone()
            grad_outputs[:, :, 20:22] *= 0 if fault == "a slab is skipped" else 2
        return real(outputs, inputs, grad_outputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", spoiled)
    passed = {part: error < limit for part, error, limit in volumes.LargeVolume(p, "cpu", torch.float32).all()}
    assert not passed["sums of all gradients"]


def run(tmp_path, *arguments, fault="", status=0):
    """Run the command with a fault planted in its processes."""
    (tmp_path / "sitecustomize.py").write_text(fault)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "tcam_ext.selftest", "--device", "cpu", *arguments, "--jsonl", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_right_machine(tmp_path):
    text, rows = run(tmp_path, "--tiny", "--size", "16")
    assert "every kernel is right" in text
    assert "FAILED" not in text
    assert {r["what"] for r in rows if "what" in r} == {"forward", "loss+gradients", "forward+backward"}
    assert all(r["error"] < r["limit"] for r in rows if "error" in r)


CRASH = "import sys\nif '--worker' in sys.argv:\n    from tcam_ext import library\n    library.normals = lambda *a: {}\n"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("__import__('os').kill(__import__('os').getpid(), 11)", "exit status -11"),
        ("__import__('time').sleep(100)", "no output for 6 s"),
        ("1 / 0", "ZeroDivisionError"),
        ("a[0].new_full(a[0].shape, 0.5, dtype=__import__('torch').float32)", None),
    ],
)
def test_a_kernel_that_crashes_hangs_raises_or_errs_fails_and_the_others_go_on(tmp_path, fault, why):
    fault = CRASH.format(fault)
    seconds = "6" if why and why.startswith("no output") else "60"
    text, rows = run(tmp_path, "--tiny", "--only", "no", "--case-seconds", seconds, fault=fault, status=1)
    verdicts = {}
    for row in rows:
        if "error" in row:
            right = row["error"] is not None and row["error"] < row["limit"]
            verdicts[row["kernel"]] = verdicts.get(row["kernel"], True) and right
            assert why is None or right or why in row["why"]
    assert verdicts == {"noise of each point": True, "noise of each texel": False, "normals": False}
    assert "SOME KERNELS ARE WRONG" in text


def test_bad_arguments(tmp_path):
    for arguments, message in (
        (("--device", "tpu"), 'expected "cpu"'),
        (("--only", "nothing of the kind"), "--list"),
        (("--size", "3"), "at least 8"),
    ):
        done = subprocess.run([sys.executable, "-m", "tcam_ext.selftest", *arguments], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert message in done.stderr


def test_what_fails_at_a_large_volume_does_not_stop_the_rest(monkeypatch):
    def broken(self):
        raise RuntimeError("out of memory, say")
        yield

    monkeypatch.setattr(volumes.LargeVolume, "loss", broken)
    rows = list(volumes.speed("cpu", 12, budget=0.1))
    assert [r["why"] for r in rows if r.get("part") == "raised"] == ["RuntimeError: out of memory, say"]
    timed = {r["what"] for r in rows if r.get("rival", "").startswith("tcam_ext")}
    assert timed == {"forward", "forward+backward"}
