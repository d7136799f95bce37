"""Dense decodes the way other projects do them, beside the ops.

    python benchmarks/bench_projects.py [--sizes 64 128] [--repeats 5] [--projects NAME...] [--json FILE]

"project" is the project's own sampling and decoding, written again from its published shapes (tests/ops/peers.py), for all
voxels of a grid, in its own chunks of points. With gradients the loss is a sum with random weights, and each chunk is
back-propagated before the next. In bfloat16 the project runs under autocast. "tcam_ext" is the module of
`tcam_ext.nn.from_...`, called with a size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from tcam_ext.nn import from_eg3d, from_kplanes, from_nfd, from_openlrm, from_ssdnerf, from_triposr

sys.path.insert(0, str(harness.ROOT / "tests" / "ops"))
import peers

PROJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "EG3D": (peers.Eg3d, lambda d: from_eg3d(d, box_warp=d.width)),
    "OpenLRM": (peers.OpenLrm, from_openlrm),
    "TripoSR": (peers.TripoSr, from_triposr),
    "NFD": (peers.Nfd, lambda d: from_nfd(d.net)),
    "NFD, no Fourier features": (lambda: peers.Nfd(False), lambda d: from_nfd(d.net)),
    "SSDNeRF, density": (peers.SsdNerf, from_ssdnerf),
    "K-Planes, 4 scales": (lambda: KPlanes(), lambda d: from_kplanes(d.field)),
}


class KPlanes(torch.nn.Module):
    """K-Planes' published field of four scales in a cube, with the planes of an argument."""

    channels, texels, width, chunk = 32, 64, 2.0, 2**19

    def __init__(self) -> None:
        super().__init__()
        self.field = peers.KPlanes(base=self.texels)
        self.field.aabb.data = torch.tensor([[-1.0] * 3, [1.0] * 3])

    def forward(self, planes: Any, xyz: Tensor) -> Any:
        return self.field(xyz)


UNUSED = {"allow_unused": True, "materialize_grads": True}  # the colours of SSDNeRF
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def outputs(out: Any, axis: int = -1) -> Tensor:
    """Outputs of a decode side by side along an axis; of TripoSR the density and the colours after their activations."""
    if isinstance(out, Tensor):
        return out
    return torch.cat([out[k] for k in (("density_act", "color") if "color" in out else sorted(out))], axis)


class Case:
    """A project with its planes and a grid of n^3 from corner to corner."""

    def __init__(self, name: str, n: int) -> None:
        torch.manual_seed(0)
        make, of = PROJECTS[name]
        self.peer = make().float()
        self.n, self.ours = n, of(self.peer)
        self.planes = torch.randn(1, 3, self.peer.channels, self.peer.texels, self.peer.texels, requires_grad=True)
        axis = torch.linspace(-1, 1, n) * (self.peer.width / 2)
        self.xyz = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(1, -1, 3)
        self.inputs = [self.planes, *(p for p in self.peer.parameters() if p.requires_grad)]
        if isinstance(self.peer, KPlanes):
            self.planes, self.inputs = self.peer.field.grids, self.inputs[1:]
        with torch.no_grad():
            self.grad = torch.randn(1, n**3, outputs(self.peer(self.planes, self.xyz[:, :8])).shape[-1])

    def project(self, what: str, dtype: torch.dtype) -> Callable[[], Any]:
        """The project's decode, in chunks."""

        def decode(xyz: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return outputs(self.peer(self.planes, xyz))

        def forward() -> Tensor:
            with torch.no_grad():
                return torch.cat([decode(x) for x in self.xyz.split(self.peer.chunk, 1)], 1)

        def both() -> list[Tensor]:
            total: list[Tensor] = []
            for x, g in zip(self.xyz.split(self.peer.chunk, 1), self.grad.split(self.peer.chunk, 1), strict=True):
                out = decode(x)
                grads = torch.autograd.grad(out, self.inputs, g.to(out.dtype), **UNUSED)
                total = [a + b for a, b in zip(total, grads, strict=True)] if total else list(grads)
            return total

        return forward if what == "forward" else both

    def tcam(self, what: str, dtype: torch.dtype) -> Callable[[], Any]:
        """Ours: the whole grid in one call."""
        size, options = (self.n,) * 3, {"compute_dtype": dtype}
        grad = self.grad.mT.reshape(1, -1, *size)

        def decode() -> Tensor:
            return outputs(self.ours.grid(self.planes, size, **options), 1)

        def forward() -> Tensor:
            with torch.no_grad():
                return decode()

        return forward if what == "forward" else lambda: torch.autograd.grad(decode(), self.inputs, grad, **UNUSED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--projects", nargs="+", choices=list(PROJECTS), default=list(PROJECTS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    for key, value in harness.environment().items():
        print(f"# {key}: {value}")
    print(harness.HEADER)
    rows = []
    for name in a.projects:
        for n in a.sizes:
            case = Case(name, n)
            want = case.project("forward", torch.float32)()
            got = case.tcam("forward", torch.float32)().flatten(2).mT
            error = float((got - want).norm() / want.norm())
            if not error < 1e-3:  # both are in float32; tests/ops/test_projects.py compares in float64
                sys.exit(f"{name}, {n}^3: the decodes differ by {error:.1e}")
            for dtype_name, dtype in TYPES.items():
                for what in ("forward", "forward+backward"):
                    runs = {"project": case.project(what, dtype), "tcam_ext": case.tcam(what, dtype)}
                    times = harness.interleave(runs, a.repeats)
                    if "project" not in times:
                        continue
                    for rival, seconds in times.items():
                        row = harness.row(f"{name}, {dtype_name}", n, what, rival, seconds)
                        row.ratio = statistics.median(times["project"]) / row.seconds
                        print(harness.line(row), flush=True)
                        rows.append(row)
    if a.json:
        harness.write_json(a.json, rows)


if __name__ == "__main__":
    main()
