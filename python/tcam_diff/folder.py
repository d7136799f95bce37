"""Folders of results with an index: a JSON file with the number of the format and checksums, written last and read first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from tcam_diff.errors import UserError, out_of_memory
from tcam_diff.files import reason, replacing, sha256
from tcam_diff.text import shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Folder:
    """A folder of one kind. It is unfinished without its index. Errors name the file and what to do."""

    path: Path
    index: str  # file name of the index
    made_by: str  # command that writes the folder, for error messages
    remedy: str  # advice for damaged files, for error messages
    formats: tuple[int, ...] = (1,)  # readable formats; the last one is written

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def read(self) -> dict[str, Any]:
        """Read the index. Raises UserError if it is missing or damaged, or has another format."""
        path = self / self.index
        if not path.is_file():
            raise UserError(f"{self.path}: not a folder that {self.made_by} finished ({self.index} is missing)")
        index = self.read_json(self.index)
        with self.reading():
            if index["format"] not in self.formats:
                known = " and ".join(map(str, self.formats))
                raise UserError(f"{path}: format {shown(index['format'])}, this version reads {known}")
        return index

    def read_json(self, name: str) -> dict[str, Any]:
        """Read the object in a JSON file. Raises UserError if it is missing or damaged."""
        with self.reading(name):
            content = json.loads((self / name).read_text())
            if not isinstance(content, dict):
                raise ValueError("expected an object")
            return content

    def read_tensors(self, name: str, checksum: str | None = None) -> dict[str, Tensor]:
        """Read all tensors of a safetensors file, which are finite, and compare it with its checksum.

        Raises UserError if it is damaged.
        """
        if checksum is not None:
            self.verify(name, checksum)
        with self.reading(name), safe_open(self / name, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for key, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{key} has NaN or infinite values")
            return tensors

    def verify(self, name: str, checksum: str) -> None:
        """Raise UserError if a file is missing or has another SHA-256 digest."""
        path = self / name
        if not path.is_file():
            raise UserError(f"{path}: missing; {self.remedy}")
        if sha256(path) != checksum:
            raise UserError(f"{path}: changed or damaged: its content does not match its checksum; {self.remedy}")

    @contextlib.contextmanager
    def reading(self, name: str | None = None) -> Iterator[None]:
        """Convert errors about a file, by default the index, to UserError: damaged content, or a file that cannot be read."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{error.filename or self / (name or self.index)}: cannot be read: {reason(error)}") from error
        except (
            ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError,
            pickle.UnpicklingError,
        ) as error:  # fmt: skip
            if out_of_memory(error) is not None:
                raise
            raise UserError(f"{self / (name or self.index)}: damaged: {fault(error)}; {self.remedy}") from error

    def write(self, content: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> None:
        """Write files, and an index with ``content`` and their checksums.

        Nothing is replaced before everything is written. The old index is deleted first and the new one appears last, so that
        old checksums never accompany new files.
        """
        index: dict[str, Any] = {"format": self.formats[-1], **content}
        if files:
            index["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        everything = {self.index: json.dumps(index, indent=1).encode(), **(files or {})}
        with contextlib.ExitStack() as stack:  # exits in reverse order
            for name, data in everything.items():
                file = stack.enter_context(replacing(self / name))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if files:
                stack.callback((self / self.index).unlink, missing_ok=True)


def tensor_bytes(
    tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None
) -> bytes:
    """Content of a safetensors file with ``metadata``, and with tensors converted to ``dtype`` if it is given."""
    from safetensors.torch import save

    return save({name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in tensors.items()}, metadata=metadata)


def fault(error: Exception) -> str:
    """Message of an error in a file's content, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{shown('.'.join(map(str, first['loc'])))}: {shown(first['msg'].lower(), 200)}"
    if isinstance(error, KeyError):
        return f"{shown(error)} is missing"
    return shown(error, 200) or type(error).__name__
