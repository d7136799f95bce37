"""The compiled module (csrc/bindings.cpp, csrc/call.h)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

version: str
source_hash: str
compiler: str
activations: tuple[str, ...]
output_activations: tuple[str, ...]
losses: tuple[str, ...]
dtypes: tuple[str, ...]
paddings: tuple[str, ...]
reductions: tuple[str, ...]
formulations: tuple[str, ...]
max_layers: int
max_width: int
max_out: int
max_planes: int
max_axes: int
skip_step: int
max_noise_objects: int

class Options:
    plane_axes: Sequence[tuple[int, int]]
    reduce: int
    groups: list[int]
    skips: list[tuple[int, int]]
    noise_std: float
    noise_seed: int
    size: Sequence[int]
    box: Sequence[int]
    corners: bool
    axes: int
    activation: Sequence[tuple[int, float]]
    output_activation: tuple[int, float]
    align_corners: bool
    padding: int
    compute: int
    out_dtype: int
    grad_planes: bool
    grad_decoder: bool
    grad_points: bool
    grad_extra: bool
    threads: int
    formulation: int
    tile: int

class Call:
    def __init__(
        self,
        planes: list[Tensor],
        weights: list[Tensor],
        biases: list[Tensor | None],
        bounds: Tensor | None,
        points: Tensor | None,
        objects: Tensor | None,
        extra: Tensor | None,
        options: Options,
    ) -> None: ...
    def workspace(self, backward: bool) -> int: ...
    def explain(self, output: int, shared_limit: int, warpgroups: bool) -> str: ...
    def forward(self, out: Tensor, workspace: Tensor) -> None: ...
    def backward(
        self,
        grad_out: Tensor,
        planes: list[Tensor],
        decoder: list[Tensor | None],
        points: Tensor | None,
        extra: Tensor | None,
        workspace: Tensor,
    ) -> None: ...
    def loss(
        self,
        target: Tensor,
        loss: int,
        beta: float,
        per_object: bool,
        losses: Tensor,
        planes: list[Tensor],
        decoder: list[Tensor | None],
        extra: Tensor | None,
        workspace: Tensor,
    ) -> None: ...

def bind(tensor: type, parameter: type) -> None: ...
def cpu_isa() -> str: ...
def cpu_bf16_is_fast() -> bool: ...
def cpu_has_bf16() -> bool: ...
def cpu_forked() -> bool: ...
def cpu_peak_flops(kind: int, seconds: float, threads: int) -> float: ...

has_cuda: bool

def normals(out: Tensor, sequence: int, seed: int, threads: int) -> None: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def problem_layout() -> list[tuple[str, int, int, int, str]]: ...
def cuda_info() -> dict[str, Any]: ...
def cuda_device(device: int) -> tuple[int, bool]: ...
def resample_axis(
    x: Tensor,
    out: Tensor,
    texels: int,
    size: int,
    lo: int,
    hi: int,
    align_corners: bool,
    padding: int,
    corners: bool,
    bounds: Tensor | None,
    adjoint: bool,
    threads: int,
) -> None: ...
