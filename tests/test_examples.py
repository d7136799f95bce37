"""The scripts of examples/ run, and the files that tools read agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def run(name, *arguments):
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_function_is_fitted():
    text = run("fit_a_function.py", "--steps", "120", "--size", "24")
    same, finer = (float(x) for x in re.findall(r"([\d.]+) dB", text))
    assert same > 20
    assert finer > 20


def test_a_decoder_is_replaced():
    text = run("replace_a_decoder.py", "--points", "3000")
    assert float(text.split()[-1]) < 1e-5


@pytest.mark.exhaustive
def test_both_stages_are_trained_and_sampled():
    text = run("train_and_sample.py", "--steps", "100", "--cases", "6", "--size", "16")
    assert "planes of 4 training and 2 held-out volumes" in text
    assert "new volumes: (2, 1, 16, 16, 16), and at twice the resolution (2, 1, 32, 32, 32)" in text


def test_the_citation_has_the_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = (ROOT / "tcam_ext" / "_version.py").read_text()
    assert f'"{found["version"]}"' in version
    assert found["preferred-citation"]["title"].startswith("TCAM-Diff")


@pytest.mark.exhaustive
def test_the_stub_of_the_compiled_module_agrees_with_it(tmp_path):
    """mypy's stubtest compares every name, signature and type that both know."""
    allowed = tmp_path / "allowed"
    allowed.write_text("tcam_ext._C.Call\ntcam_ext._C.Options\n")  # pybind11's metaclass
    command = [sys.executable, "-m", "mypy.stubtest", "tcam_ext._C", "--allowlist", str(allowed)]
    command += ["--mypy-config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
