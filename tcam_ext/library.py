"""torch.library: schemas, implementations (one for CPU and CUDA) and fakes of the ops. Autograd is autograd.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tcam_ext import _C

_library = torch.library.Library("tcam_ext", "DEF")
_INPUTS = "Tensor[] planes, Tensor[] weights, Tensor?[] biases"
_OPTIONS = (  # in the order of Call.__init__
    "SymInt[] size, SymInt[] box, str activation, str output_activation, bool align_corners, str padding_mode, str compute"
)
_PT2 = (torch.Tag.pt2_compliant_tag,)
_library.define(f"decode_grid({_INPUTS}, {_OPTIONS}, ScalarType out_dtype, *, int tile=0) -> Tensor", tags=_PT2)
_library.define(
    f"decode_grid_backward(Tensor grad_volume, {_INPUTS}, {_OPTIONS}, bool grad_planes, bool grad_decoder, *, int tile=0)"
    " -> Tensor[]",
    tags=_PT2,
)
_library.define(
    f"decode_grid_loss(Tensor target, {_INPUTS}, {_OPTIONS}, str loss, float beta, bool per_object, bool grad_planes, "
    "bool grad_decoder, *, int tile=0) -> Tensor[]",
    tags=_PT2,
)
_library.define("resample_plane(Tensor plane, SymInt[] size, bool align_corners, str padding_mode) -> Tensor", tags=_PT2)

# The codes of csrc/problem.h.
_DTYPE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_TF32 = 5  # TCAM_TF32
_PADDING = {"border": 0, "zeros": 1}


class _Workspaces:
    """Keeps the last CPU workspace up to a size, so that a training loop does not fault the same pages in at every step.

    On CUDA torch's allocator does that."""

    KEEP = 64 << 20  # bytes

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, size: int, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=device)
        try:
            kept = self._kept.pop()  # atomic: two threads never get the same memory
        except IndexError:
            return torch.empty(size, dtype=torch.uint8)
        return kept if kept.numel() >= size else torch.empty(size, dtype=torch.uint8)

    def give_back(self, workspace: Tensor) -> None:
        if workspace.device.type == "cpu" and workspace.numel() <= self.KEEP and not self._kept:
            self._kept.append(workspace)


_workspaces = _Workspaces()


def storage_dtype(compute: str) -> torch.dtype:
    """The dtype that the kernels read and sum in: half inputs are widened on entry."""
    return torch.float64 if compute == "float64" else torch.float32


def volume_shape(planes: Sequence[Tensor], weights: Sequence[Tensor], box: Sequence[int]) -> list[int]:
    return [planes[0].shape[0], weights[-1].shape[0], box[1] - box[0], box[3] - box[2], box[5] - box[4]]


class _Call:
    """The tensors and options of an op as the kernels take them."""

    def __init__(
        self,
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
        *,
        out_dtype: torch.dtype,
        tile: int,
    ) -> None:
        self.dtype = storage_dtype(compute)
        if compute == "float32 or tf32":  # allow_tf32 is not read: it raises once a user has set this newer flag
            compute = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"

        def dense(t: Tensor) -> Tensor:
            return t.detach().to(self.dtype).contiguous()

        self.tensors = (
            [dense(t) for t in planes],
            [dense(t) for t in weights],
            [None if t is None else dense(t) for t in biases],
        )
        self.options = _C.Options(
            list(size),
            list(box),
            _C.activations.index(activation),
            _C.output_activations.index(output_activation),
            align_corners,
            _PADDING[padding_mode],
            _TF32 if compute == "tf32" else _DTYPE[getattr(torch, compute)],
            _DTYPE[out_dtype],
            torch.get_num_threads(),
            tile,
        )

    def workspace(self, backward: bool, grad_planes: bool, grad_decoder: bool) -> Tensor:
        size = _C.decode_grid_workspace(*self.tensors, self.options, backward, grad_planes, grad_decoder)
        return _workspaces.take(size, self.tensors[0][0].device)


# In what follows ``inputs`` are planes, weights, biases and the options of _OPTIONS.


def _decode_grid(*inputs: Any, tile: int = 0) -> Tensor:
    *inputs, out_dtype = inputs  # type: ignore[assignment]
    call = _Call(*inputs, out_dtype=out_dtype, tile=tile)
    volume = _decode_grid_fake(*inputs, out_dtype)
    workspace = call.workspace(False, False, False)
    _C.decode_grid(*call.tensors, call.options, volume, workspace)
    _workspaces.give_back(workspace)
    return volume


def _decode_grid_fake(*inputs: Any, tile: int = 0) -> Tensor:
    planes, weights, box, out_dtype = inputs[0], inputs[1], inputs[4], inputs[-1]
    volume: Tensor = planes[0].new_empty(volume_shape(planes, weights, box), dtype=out_dtype)
    return volume


class _Gradients:
    """Fresh tensors for the gradients wanted: planes, then weights, then the biases there are."""

    def __init__(
        self, inputs: Sequence[Any], grad_planes: bool, grad_decoder: bool, dtype: torch.dtype, leading: Sequence[int] = ()
    ) -> None:
        planes, weights, biases = inputs[:3]

        def like(t: Tensor, leading: Sequence[int] = ()) -> Tensor:
            return t.new_empty([*leading, *t.shape], dtype=dtype)

        self.planes = [like(t) for t in planes] if grad_planes else []
        self.decoder: list[Tensor | None] = (
            [None if t is None else like(t, leading) for t in (*weights, *biases)] if grad_decoder else []
        )

    def list(self) -> list[Tensor]:
        return [*self.planes, *(t for t in self.decoder if t is not None)]


def _decode_grid_backward(grad_volume: Tensor, *inputs: Any, tile: int = 0) -> list[Tensor]:
    *inputs, grad_planes, grad_decoder = inputs  # type: ignore[assignment]
    call = _Call(*inputs, out_dtype=grad_volume.dtype, tile=tile)
    grads = _Gradients(call.tensors, grad_planes, grad_decoder, call.dtype)
    if grad_volume.numel() == 0:
        for t in grads.list():
            t.zero_()
    elif grads.list():
        workspace = call.workspace(True, grad_planes, grad_decoder)
        grad_volume = grad_volume.detach().contiguous()
        _C.decode_grid_backward(grad_volume, *call.tensors, call.options, grads.planes, grads.decoder, workspace)
        _workspaces.give_back(workspace)
    return [t.to(inputs[0][0].dtype) for t in grads.list()]


def _decode_grid_backward_fake(grad_volume: Tensor, *inputs: Any, tile: int = 0) -> list[Tensor]:
    grad_planes, grad_decoder = inputs[-2:]
    return _Gradients(inputs, grad_planes, grad_decoder, inputs[0][0].dtype).list()


def _decode_grid_loss(target: Tensor, *inputs: Any, tile: int = 0) -> list[Tensor]:
    """Sums of the loss for each object, float64, then their gradients in float32 or float64, undivided."""
    *inputs, loss, beta, per_object, grad_planes, grad_decoder = inputs  # type: ignore[assignment]
    call = _Call(*inputs, out_dtype=torch.float32, tile=tile)
    batch = inputs[0][0].shape[0]
    grads = _Gradients(call.tensors, grad_planes, grad_decoder, call.dtype, [batch] if per_object else [])
    losses = torch.zeros(batch, dtype=torch.float64, device=target.device)
    if target.numel() == 0:
        for t in grads.list():
            t.zero_()
    else:
        workspace = call.workspace(bool(grads.list()), grad_planes, grad_decoder)
        _C.decode_grid_loss(
            target.detach().contiguous(),
            *call.tensors,
            call.options,
            _C.losses.index(loss),
            beta,
            per_object,
            losses,
            grads.planes,
            grads.decoder,
            workspace,
        )
        _workspaces.give_back(workspace)
    return [losses, *grads.list()]


def _decode_grid_loss_fake(target: Tensor, *inputs: Any, tile: int = 0) -> list[Tensor]:
    planes, compute = inputs[0], inputs[9]
    per_object, grad_planes, grad_decoder = inputs[-3:]
    batch = planes[0].shape[0]
    losses = planes[0].new_empty([batch], dtype=torch.float64)
    grads = _Gradients(inputs, grad_planes, grad_decoder, storage_dtype(compute), [batch] if per_object else [])
    return [losses, *grads.list()]


def _resample_plane(plane: Tensor, size: Sequence[int], align_corners: bool, padding_mode: str) -> Tensor:
    out = _resample_plane_fake(plane, size, align_corners, padding_mode)
    _C.resample_plane(plane.detach().contiguous(), out, align_corners, _PADDING[padding_mode], torch.get_num_threads())
    return out


def _resample_plane_fake(plane: Tensor, size: Sequence[int], align_corners: bool, padding_mode: str) -> Tensor:
    return plane.new_empty([size[0], size[1], plane.shape[2]])


for _name, _implementation, _fake in (
    ("decode_grid", _decode_grid, _decode_grid_fake),
    ("decode_grid_backward", _decode_grid_backward, _decode_grid_backward_fake),
    ("decode_grid_loss", _decode_grid_loss, _decode_grid_loss_fake),
    ("resample_plane", _resample_plane, _resample_plane_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _device)
    torch.library.register_fake(f"tcam_ext::{_name}", _fake, lib=_library)

decode_grid = torch.ops.tcam_ext.decode_grid.default
decode_grid_backward = torch.ops.tcam_ext.decode_grid_backward.default
decode_grid_loss = torch.ops.tcam_ext.decode_grid_loss.default
#: Bilinear resampling of a channels-last plane (m0, m1, C) to ``size`` voxels: the maps A, B, G of kernels by hand.
resample_plane = torch.ops.tcam_ext.resample_plane.default
