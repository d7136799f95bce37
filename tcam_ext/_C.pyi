"""The compiled module (csrc/bindings.cpp)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

version: str
source_hash: str
compiler: str
activations: tuple[str, ...]
output_activations: tuple[str, ...]
losses: tuple[str, ...]

class Options:
    def __init__(
        self,
        size: Sequence[int],
        box: Sequence[int],
        activation: int,
        output_activation: int,
        align_corners: bool,
        padding: int,
        compute: int,
        out_dtype: int,
        threads: int,
        tile: int = 0,
    ) -> None: ...

def bind(tensor: type, parameter: type) -> None: ...
def cpu_isa() -> str: ...
def cpu_has_bf16() -> bool: ...
def cpu_forked() -> bool: ...
def cpu_peak_flops(kind: int, seconds: float, threads: int) -> float: ...

has_cuda: bool

def cuda_info() -> dict[str, Any]: ...
def decode_grid_workspace(
    planes: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    options: Options,
    backward: bool,
    grad_planes: bool,
    grad_decoder: bool,
) -> int: ...
def decode_grid(
    planes: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    options: Options,
    volume: Tensor,
    workspace: Tensor,
) -> None: ...
def decode_grid_backward(
    grad_volume: Tensor,
    planes: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    options: Options,
    grad_planes: list[Tensor],
    grad_decoder: list[Tensor | None],
    workspace: Tensor,
) -> None: ...
def decode_grid_loss(
    target: Tensor,
    planes: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    options: Options,
    loss: int,
    beta: float,
    per_object: bool,
    losses: Tensor,
    grad_planes: list[Tensor],
    grad_decoder: list[Tensor | None],
    workspace: Tensor,
) -> None: ...
def resample_plane(plane: Tensor, out: Tensor, align_corners: bool, padding: int, threads: int) -> None: ...
