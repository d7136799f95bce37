"""torch.library: schemas, CPU implementations and fakes of the ops. Autograd lives in autograd.py, outside the ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tcam_ext import _C

_library = torch.library.Library("tcam_ext", "DEF")
_OPTIONS = (
    "SymInt[] size, SymInt[] box, str activation, str output_activation, bool align_corners, str padding_mode, "
    "str compute, ScalarType out_dtype"
)
_PT2 = (torch.Tag.pt2_compliant_tag,)
_library.define(
    f"decode_grid(Tensor[] planes, Tensor[] weights, Tensor?[] biases, {_OPTIONS}, int tile=0) -> Tensor",
    tags=_PT2,
)
_library.define(
    f"decode_grid_backward(Tensor grad_volume, Tensor[] planes, Tensor[] weights, Tensor?[] biases, {_OPTIONS}, "
    "bool grad_planes, bool grad_decoder, int tile=0) -> Tensor[]",
    tags=_PT2,
)
_library.define("resample_plane(Tensor plane, SymInt[] size, bool align_corners, str padding_mode) -> Tensor", tags=_PT2)

# The codes of csrc/problem.h.
_DTYPE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_PADDING = {"border": 0, "zeros": 1}


def _options(
    size: Sequence[int],
    box: Sequence[int],
    activation: str,
    output_activation: str,
    align_corners: bool,
    padding_mode: str,
    compute: str,
    out_dtype: torch.dtype,
    tile: int,
) -> _C.Options:
    storage = _storage(compute)
    return _C.Options(
        list(size),
        list(box),
        _C.activations.index(activation),
        _C.output_activations.index(output_activation),
        align_corners,
        _PADDING[padding_mode],
        3 if compute == "bfloat16" else _DTYPE[storage],
        _DTYPE[out_dtype],
        torch.get_num_threads(),
        tile,
    )


def _storage(compute: str) -> torch.dtype:
    """The dtype that the CPU kernel reads: half inputs are widened on entry."""
    return torch.float64 if compute == "float64" else torch.float32


class _Workspaces:
    """Keeps the last CPU workspace up to a size, so that a training loop does not fault the same pages in at every step."""

    KEEP = 64 << 20  # bytes

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        try:
            kept = self._kept.pop()  # atomic: two threads never get the same memory
        except IndexError:
            return torch.empty(size, dtype=torch.uint8)
        return kept if kept.numel() >= size else torch.empty(size, dtype=torch.uint8)

    def give_back(self, workspace: Tensor) -> None:
        if workspace.numel() <= self.KEEP and not self._kept:
            self._kept.append(workspace)


_workspaces = _Workspaces()


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype).contiguous()


def _volume_shape(planes: Sequence[Tensor], weights: Sequence[Tensor], box: Sequence[int]) -> list[int]:
    return [planes[0].shape[0], weights[-1].shape[0], box[1] - box[0], box[3] - box[2], box[5] - box[4]]


def _decode_grid_cpu(
    planes: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    size: Sequence[int],
    box: Sequence[int],
    activation: str,
    output_activation: str,
    align_corners: bool,
    padding_mode: str,
    compute: str,
    out_dtype: torch.dtype,
    tile: int = 0,
) -> Tensor:
    dtype = _storage(compute)
    p, w = [_dense(t, dtype) for t in planes], [_dense(t, dtype) for t in weights]
    b = [None if t is None else _dense(t, dtype) for t in biases]
    options = _options(size, box, activation, output_activation, align_corners, padding_mode, compute, out_dtype, tile)
    volume = torch.empty(_volume_shape(planes, weights, box), dtype=out_dtype)
    workspace = _workspaces.take(_C.decode_grid_workspace(p, w, b, options, False, False, False))
    _C.decode_grid_cpu(p, w, b, options, volume, workspace)
    _workspaces.give_back(workspace)
    return volume


def _decode_grid_fake(
    planes: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    size: Sequence[int],
    box: Sequence[int],
    activation: str,
    output_activation: str,
    align_corners: bool,
    padding_mode: str,
    compute: str,
    out_dtype: torch.dtype,
    tile: int = 0,
) -> Tensor:
    return planes[0].new_empty(_volume_shape(planes, weights, box), dtype=out_dtype)


def _empty_gradients(
    planes: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    grad_planes: bool,
    grad_decoder: bool,
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    def like(t: Tensor) -> Tensor:
        return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)

    return (
        [like(t) for t in planes] if grad_planes else [],
        [like(t) for t in weights] if grad_decoder else [],
        [None if t is None else like(t) for t in biases] if grad_decoder else [],
    )


def _decode_grid_backward_cpu(
    grad_volume: Tensor,
    planes: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    size: Sequence[int],
    box: Sequence[int],
    activation: str,
    output_activation: str,
    align_corners: bool,
    padding_mode: str,
    compute: str,
    out_dtype: torch.dtype,
    grad_planes: bool,
    grad_decoder: bool,
    tile: int = 0,
) -> list[Tensor]:
    """Gradients of planes (if wanted), then of weights and of the biases there are (if wanted)."""
    dtype = _storage(compute)
    p, w = [_dense(t, dtype) for t in planes], [_dense(t, dtype) for t in weights]
    b = [None if t is None else _dense(t, dtype) for t in biases]
    gp, gw, gb = _empty_gradients(planes, weights, biases, grad_planes, grad_decoder, dtype)
    grads = [*gp, *gw, *(t for t in gb if t is not None)]
    if grad_volume.numel() == 0:
        for t in grads:
            t.zero_()
    elif grads:
        options = _options(size, box, activation, output_activation, align_corners, padding_mode, compute, out_dtype, tile)
        workspace = _workspaces.take(_C.decode_grid_workspace(p, w, b, options, True, grad_planes, grad_decoder))
        _C.decode_grid_backward_cpu(grad_volume.detach().contiguous(), p, w, b, options, gp, [*gw, *gb], workspace)
        _workspaces.give_back(workspace)
    return [t.to(planes[0].dtype) for t in grads]


def _decode_grid_backward_fake(
    grad_volume: Tensor,
    planes: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    size: Sequence[int],
    box: Sequence[int],
    activation: str,
    output_activation: str,
    align_corners: bool,
    padding_mode: str,
    compute: str,
    out_dtype: torch.dtype,
    grad_planes: bool,
    grad_decoder: bool,
    tile: int = 0,
) -> list[Tensor]:
    gp, gw, gb = _empty_gradients(planes, weights, biases, grad_planes, grad_decoder, None)
    return [*gp, *gw, *(t for t in gb if t is not None)]


def _resample_plane(plane: Tensor, size: Sequence[int], align_corners: bool, padding_mode: str) -> Tensor:
    out = _resample_plane_fake(plane, size, align_corners, padding_mode)
    _C.resample_plane(plane.detach().contiguous(), out, align_corners, _PADDING[padding_mode], torch.get_num_threads())
    return out


def _resample_plane_fake(plane: Tensor, size: Sequence[int], align_corners: bool, padding_mode: str) -> Tensor:
    return plane.new_empty([size[0], size[1], plane.shape[2]])


_library.impl("decode_grid", _decode_grid_cpu, "CPU")
_library.impl("decode_grid_backward", _decode_grid_backward_cpu, "CPU")
_library.impl("resample_plane", _resample_plane, "CPU")
_library.impl("resample_plane", _resample_plane, "CUDA")
torch.library.register_fake("tcam_ext::decode_grid", _decode_grid_fake, lib=_library)
torch.library.register_fake("tcam_ext::decode_grid_backward", _decode_grid_backward_fake, lib=_library)
torch.library.register_fake("tcam_ext::resample_plane", _resample_plane_fake, lib=_library)

decode_grid = torch.ops.tcam_ext.decode_grid.default
decode_grid_backward = torch.ops.tcam_ext.decode_grid_backward.default
#: Bilinear resampling of a channels-last plane (m0, m1, C) to ``size`` voxels: the maps A, B, G of kernels by hand.
resample_plane = torch.ops.tcam_ext.resample_plane.default
