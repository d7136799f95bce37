"""The script of the viewer of `tcam report`, which a build takes from npm."""

from __future__ import annotations

import os
import time

import pytest
from tcam_diff.report import niivue


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A function that puts a shell script in place of npm."""
    monkeypatch.setattr(niivue, "SCRIPT", tmp_path / "built.js")

    def put(text: str) -> None:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")

    return put


def test_a_build_without_npm_says_so(npm, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert niivue.fetch() == "npm is not on PATH"


def test_a_build_without_a_network_goes_on(npm):
    npm("exit 1")
    assert "failed" in niivue.fetch()
    assert not niivue.SCRIPT.exists()


def test_a_build_does_not_wait_for_ever(npm, monkeypatch):
    npm("exec sleep 60")
    monkeypatch.setattr(niivue, "PATIENCE", 1)
    start = time.monotonic()
    assert "took more than 1 s" in niivue.fetch()
    assert time.monotonic() - start < 20


def test_a_build_takes_no_other_package(npm):
    npm("echo other > niivue.tgz")
    assert "not the package of NiiVue" in niivue.fetch()
    assert not niivue.SCRIPT.exists()


def test_a_script_with_its_licence_is_kept(npm):
    npm("exit 1")
    niivue.SCRIPT.write_text(niivue._comment() + "const niivue = {};")
    assert niivue.fetch() == ""
    text = niivue.SCRIPT.read_text()
    assert "Redistributions in binary form must reproduce" in text
    assert niivue.VERSION in text.splitlines()[0]
