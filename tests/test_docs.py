"""The pages that are generated are up to date, and what they quote exists."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tcam_ext
from tcam_ext import conventions

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_generated_pages_are_up_to_date():
    done = subprocess.run([sys.executable, str(DOCS / "make_docs.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tables_of_measurements_are_up_to_date():
    make = DOCS.parent / "benchmarks" / "make_tables.py"
    done = subprocess.run([sys.executable, str(make), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tables_of_the_campaign_are_up_to_date():
    report = DOCS.parent / "tests" / "campaign" / "report.py"
    done = subprocess.run([sys.executable, str(report), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["use_it.md", "../README.md"])
def test_quoted_calls_exist(page):
    """Every block of Python parses; every op in it takes the keywords that it is given; every preset is one."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert blocks
    for call in (node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "tcam_ext":
            op = getattr(tcam_ext, call.func.attr)
            taken = inspect.signature(op).parameters
            assert all(k.arg is None or k.arg in taken for k in call.keywords), ast.unparse(call)
    for name in set(re.findall(r"conventions\.(\w+)\.", "\n".join(blocks))):
        assert name in conventions.CONVENTIONS
