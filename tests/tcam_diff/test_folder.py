"""Folders with an index: atomic writing, and errors that name the file and what to do."""

from __future__ import annotations

import pytest
import torch
from tcam_diff.errors import UserError
from tcam_diff.folder import Folder, tensor_bytes


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path, "index.json", "`tcam make`", "make it again", formats=(1, 2))
    folder.write({"what": "a test"}, {"a.safetensors": tensor_bytes({"x": torch.arange(3)}, {"k": "v"}), "b.txt": b"text"})
    return folder


def test_what_is_written_is_read(folder):
    index = folder.read()
    assert (index["format"], index["what"], list(index["sha256"])) == (2, "a test", ["a.safetensors", "b.txt"])
    for name, checksum in index["sha256"].items():
        folder.verify(name, checksum)
    assert torch.equal(folder.read_tensors("a.safetensors", index["sha256"]["a.safetensors"])["x"], torch.arange(3))
    assert sorted(p.name for p in folder.path.iterdir()) == ["a.safetensors", "b.txt", "index.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"not a folder that `tcam make` finished \(index.json is missing\)"),
        ("{", r"index\.json: damaged: .*; make it again"),
        ("[]", r"index\.json: damaged: expected an object; make it again"),
        ("{}", r"index\.json: damaged: 'format' is missing; make it again"),
        ('{"format": 3}', r"index\.json: format 3, this version reads 1 and 2"),
    ],
)
def test_an_index_that_cannot_be_used(folder, text, message):
    path = folder / "index.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=message):
        folder.read()


def test_a_changed_file_and_a_missing_one(folder):
    index, path = folder.read(), folder / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"a\.safetensors: changed or damaged: .*; make it again"):
        folder.read_tensors("a.safetensors", index["sha256"]["a.safetensors"])
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"a\.safetensors: damaged: .*; make it again"):
        folder.read_tensors("a.safetensors")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.safetensors: missing; make it again"):
        folder.verify("a.safetensors", index["sha256"]["a.safetensors"])


def test_a_failed_write_changes_nothing(folder):
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    with pytest.raises(TypeError):
        folder.write({"what": "new"}, {"b.txt": b"new", "a.safetensors": "no bytes"})  # the second one fails
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before


def test_an_interrupted_write_leaves_no_index(folder, monkeypatch):
    """Old checksums never accompany new files."""
    from tcam_diff import files

    replace = files.os.replace

    def killed(source, target):
        if str(target).endswith("b.txt"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.write({"what": "new"}, {"a.safetensors": b"new", "b.txt": b"new"})
    with pytest.raises(UserError, match=r"index.json is missing"):
        folder.read()
    assert sorted(p.name for p in folder.path.iterdir()) == ["a.safetensors", "b.txt"]


def test_tensors_that_are_not_finite(folder):
    folder.write({}, {"a.safetensors": tensor_bytes({"x": torch.tensor([1.0, float("nan")])})})
    with pytest.raises(UserError, match=r"a\.safetensors: damaged: x has NaN or infinite values; make it again"):
        folder.read_tensors("a.safetensors")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": "' + "x" * 5000 + '"}', '{"format": "a\\nb"}', '{"a\xff"'])
def test_a_damaged_index_is_refused_in_one_short_line(folder, text):
    (folder / "index.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError) as error:
        folder.read()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
