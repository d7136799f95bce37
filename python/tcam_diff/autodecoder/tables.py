"""Tables of planes and Adam moments of many objects, with one row per object.

A step updates only the rows of the objects that it visits, and each row has its own step counter for the bias corrections
(algorithm.md 7.4). torch.optim.Adam over one dense tensor would touch every row at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from tcam_diff.autodecoder.planes import PLANE_NAMES, plane_sizes
from tcam_diff.errors import UserError

Name = int | str

KINDS = ("value", "exp_avg", "exp_avg_sq")


@dataclass
class Rows:
    """Rows of some objects on the device."""

    numbers: list[int]  # of the rows
    leaves: list[Tensor]  # planes (B, C, rows, columns) with gradients
    state: dict[str, list[list[Tensor]]]  # tensors that Adam changes, by kind, plane and object


class PlaneTable:
    """Planes, Adam moments and step counters of objects.

    Args:
        objects: numbers or names of the objects.
        channels: channels C of the planes.
        texels: texels along x, y, z.
        device: device of the fetched rows, by default the CPU.
        dtype: type of the tables.
        where: "device", "host" (pinned memory if the device is a GPU) or "disk" (memory-mapped files in ``folder``).
        folder: folder of the files for "disk".

    Raises:
        UserError: the files cannot be created.
    """

    def __init__(
        self,
        objects: Sequence[Name],
        channels: int,
        texels: Sequence[int],
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        where: str = "device",
        folder: Path | None = None,
    ) -> None:
        self.objects, self.device = list(objects), device or torch.device("cpu")
        self.row = {o: i for i, o in enumerate(self.objects)}
        self.shapes = [(channels, *size) for size in plane_sizes(texels)]
        self.where, self.folder, self.dtype = where, folder, dtype
        self.tables = {
            kind: [self._table(kind, name, s) for name, s in zip(PLANE_NAMES, self.shapes, strict=True)] for kind in KINDS
        }
        on = self.device if where == "device" else torch.device("cpu")
        self.steps = torch.zeros(3, len(self.objects), dtype=torch.float32, device=on)

    def _table(self, kind: str, name: str, shape: tuple[int, int, int]) -> Tensor:
        full = (len(self.objects), *shape)
        if self.where == "disk":
            if self.folder is None:
                raise ValueError("where='disk' needs a folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{kind}-{name}.bin"
            file.unlink(missing_ok=True)  # a new file is filled with zeros
            numel = torch.Size(full).numel()
            try:
                return torch.from_file(str(file), shared=True, size=numel, dtype=self.dtype).view(full)
            except RuntimeError as error:
                raise UserError(f"{file}: cannot be created: {error}; free some space or take tables=host") from error
        if self.where == "host":
            return torch.zeros(full, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        return torch.zeros(full, dtype=self.dtype, device=self.device)

    def fill(self, make: Callable[[Any], list[Tensor]]) -> None:
        """Set the planes of each object to ``make(object)``, three tensors (1, C, rows, columns)."""
        for o, i in self.row.items():
            for table, plane in zip(self.tables["value"], make(o), strict=True):
                table[i].copy_(plane[0])

    def planes(self, name: Name) -> list[Tensor]:
        """Planes (1, C, rows, columns) of an object, on the device."""
        return [t[self.row[name]].unsqueeze(0).to(self.device) for t in self.tables["value"]]

    def fetch(self, objects: Sequence[Name]) -> Rows:
        """The rows of objects, on the device."""
        numbers = [self.row[o] for o in objects]
        state = {
            kind: [[t[i].to(self.device, non_blocking=True) for i in numbers] for t in self.tables[kind]] for kind in KINDS
        }
        return Rows(numbers, [torch.stack(rows).requires_grad_() for rows in state["value"]], state)

    @torch.no_grad()
    def update(
        self, rows: Rows, *, lr: float, beta2: float, eps: float, clip: float, active: Sequence[bool] | None = None
    ) -> Tensor:
        """Update rows by one step of Adam, with each object's gradients clipped to norm ``clip``.

        Rows that are not ``active`` stay as they are.

        Returns:
            The gradient norms (B,) before clipping.
        """
        grads = [leaf.grad for leaf in rows.leaves if leaf.grad is not None]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
        factor = (clip / (norms + 1e-6)).clamp(max=1).to(grads[0].dtype)
        for g in grads:
            g.mul_(factor.view(-1, 1, 1, 1))
        counters = [[self.steps[p, i].to(self.device) for i in rows.numbers] for p in range(3)]
        chosen = active or [True] * len(rows.numbers)
        if not any(chosen):
            return norms

        def of_chosen(planes: Iterable[Iterable[Tensor]]) -> list[Tensor]:
            return [row for plane in planes for row, a in zip(plane, chosen, strict=True) if a]

        adam(
            of_chosen(rows.state["value"]),
            of_chosen(g.unbind(0) for g in grads),
            of_chosen(rows.state["exp_avg"]),
            of_chosen(rows.state["exp_avg_sq"]),
            [],
            of_chosen(counters),
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=beta2,
            lr=lr,
            weight_decay=0.0,
            eps=eps,
            maximize=False,
        )
        if self.where != "device" and self.device.type != "cpu":
            for kind in KINDS:
                for table, plane in zip(self.tables[kind], rows.state[kind], strict=True):
                    for i, row in zip(rows.numbers, plane, strict=True):
                        table[i].copy_(row, non_blocking=True)
            for p in range(3):
                for i, c in zip(rows.numbers, counters[p], strict=True):
                    self.steps[p, i] = c
        return norms

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, on the CPU."""
        tables = {f"{kind}.{name}": t.cpu() for kind in KINDS for name, t in zip(PLANE_NAMES, self.tables[kind], strict=True)}
        return {"objects": self.objects, "steps": self.steps.cpu(), **tables}

    def load(self, shards: Sequence[dict[str, Any]]) -> None:
        """Load the rows from the states of any number of ranks.

        Raises ValueError if a state is damaged, or an object is in none of them.
        """
        missing = set(self.row)
        for shard in shards:
            pairs = [(i, self.row[o]) for i, o in enumerate(shard["objects"]) if o in self.row]
            missing -= set(shard["objects"])
            if not pairs:
                continue
            self._check(shard)
            source, target = (torch.tensor(x) for x in zip(*pairs, strict=True))
            for kind in KINDS:
                for name, table in zip(PLANE_NAMES, self.tables[kind], strict=True):
                    table[target.to(table.device)] = shard[f"{kind}.{name}"][source].to(table)
            self.steps[:, target.to(self.steps.device)] = shard["steps"][:, source].to(self.steps)
        if missing:
            raise ValueError(f"no planes of {len(missing)} of the {len(self.row)} objects")

    def _check(self, shard: dict[str, Any]) -> None:
        """Raise ValueError unless the tensors of a state have the types and sizes of this table, and finite values."""
        count = len(shard["objects"])
        tables = {f"{k}.{n}": (count, *s) for k in KINDS for n, s in zip(PLANE_NAMES, self.shapes, strict=True)}
        for key, shape in (tables | {"steps": (3, count)}).items():
            dtype = self.steps.dtype if key == "steps" else self.dtype
            if shard[key].shape != shape or shard[key].dtype != dtype:
                raise ValueError(f"{key}: expected {dtype} {shape}, got {shard[key].dtype} {tuple(shard[key].shape)}")
            if not all(row.isfinite().all() for row in shard[key]):
                raise ValueError(f"{key} has NaN or infinite values")

    @staticmethod
    def bytes(count: int, channels: int, texels: Sequence[int], itemsize: int = 4) -> int:
        """Bytes of the tables of ``count`` objects."""
        return count * len(KINDS) * channels * sum(h * w for h, w in plane_sizes(texels)) * itemsize
