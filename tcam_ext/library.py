"""The ops in torch.library: schemas, implementations (one for CPU and CUDA) and fakes. Their autograd is in autograd.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcam_ext import _C, activations

_library = torch.library.Library("tcam_ext", "DEF")
SymInts = list[int]


class KernelOptions(NamedTuple):
    """The options of an op.

    plane_axes: the row and column axis of each plane, ascending. groups: the number of planes of each group. skips: pairs of a
    layer that reads the features too and its first row of the first weights.
    """

    plane_axes: list[int]
    groups: list[int]
    reduce: str
    align_corners: bool
    padding: str
    skips: SymInts
    activation: list[str]
    output_activation: str
    compute: str
    noise_std: float
    noise_seed: int


class KernelGrid(NamedTuple):
    """The grid that an op decodes."""

    size: SymInts
    box: SymInts
    corners: bool
    bounds: Tensor | None
    extra: Tensor | None

    @property
    def shape(self) -> list[int]:
        return [self.box[2 * a + 1] - self.box[2 * a] for a in range(3)]


class KernelPoints(NamedTuple):
    """The points that an op decodes."""

    points: Tensor
    objects: Tensor | None
    extra: Tensor | None


class KernelTensors(NamedTuple):
    """The tensors of the planes and the decoder."""

    planes: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]


_SPELLED = {"Tensor | None": "Tensor?", "list[Tensor]": "Tensor[]", "list[Tensor | None]": "Tensor?[]", "list[int]": "int[]",
            "list[str]": "str[]", "int": "SymInt", "SymInts": "SymInt[]"}  # fmt: skip


def _fields(record: Any) -> str:
    """The fields of a record as arguments of a schema."""
    types = {name: t.__forward_arg__ for name, t in record.__annotations__.items()}
    return ", ".join(f"{_SPELLED.get(t, t)} {name}" for name, t in types.items())


_TENSORS, _OPTIONS, _GRID, _POINTS = (_fields(r) for r in (KernelTensors, KernelOptions, KernelGrid, KernelPoints))
_PT2 = (torch.Tag.pt2_compliant_tag,)
for _schema in (
    f"decode_grid({_TENSORS}, {_OPTIONS}, {_GRID}, ScalarType out_dtype, *, int tile=0) -> Tensor",
    f"decode_grid_backward(Tensor grad_volume, {_TENSORS}, {_OPTIONS}, {_GRID}, bool grad_planes, bool grad_decoder, "
    "bool grad_extra, *, int tile=0) -> Tensor[]",
    f"decode_grid_loss(Tensor target, {_TENSORS}, {_OPTIONS}, {_GRID}, str loss, float beta, bool per_object, "
    "bool grad_planes, bool grad_decoder, bool grad_extra, *, int tile=0) -> Tensor[]",
    f"decode_points({_TENSORS}, {_OPTIONS}, {_POINTS}, ScalarType out_dtype, *, int formulation=0) -> Tensor",
    f"decode_points_backward(Tensor grad_out, {_TENSORS}, {_OPTIONS}, {_POINTS}, bool grad_planes, bool grad_decoder, "
    "bool grad_extra, bool grad_points, *, int formulation=0) -> Tensor[]",
    "normals(Tensor like, int sequence, SymInt seed) -> Tensor",
    "resample_axis(Tensor x, int texels, SymInt size, SymInt lo, SymInt hi, bool align_corners, str padding_mode, "
    "bool corners, Tensor? bounds, bool adjoint) -> Tensor",
):
    _library.define(_schema, tags=_PT2)

_DTYPES = {getattr(torch, name): code for code, name in enumerate(_C.dtypes) if hasattr(torch, name)}
#: Options that the kernels take as an index into a table of names.
_NAMES = {"reduce": _C.reductions, "padding": _C.paddings, "compute": _C.dtypes}


class _Workspaces:
    """Keeps one CPU workspace of up to KEEP bytes, so that a training loop does not page-fault on fresh memory at every step.

    On CUDA torch's allocator caches memory."""

    KEEP = 64 << 20

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
#: If set, forward calls in this context are appended to it instead of run (explain.py).
explaining: ContextVar[list[_Call] | None] = ContextVar("explaining", default=None)


def orders_planes(device: torch.device) -> bool:
    """Whether the kernels of a device take planes of grids only with rows that run over the lower axis."""
    return device.type != "cpu"


def storage_dtype(compute: str) -> torch.dtype:
    """The dtype that the kernels read and sum in; half tensors are widened first."""
    return torch.float64 if compute == "float64" else torch.float32


@lru_cache
def _activation(name: str) -> tuple[int, float]:
    return activations.hidden("activation", name)[:2]


@lru_cache
def _output_activation(name: str) -> tuple[int, float]:
    return activations.output("output_activation", name)[:2]


def _result_device() -> str | None:
    return None if explaining.get() is None else "meta"


class _Call:
    """A call of the kernels: tensors, options, and which gradients are wanted."""

    def __init__(
        self,
        tensors: KernelTensors,
        options: KernelOptions,
        where: KernelGrid | KernelPoints,
        out_dtype: torch.dtype,
        wanted: Sequence[bool] = (),
        **more: int,
    ) -> None:
        compute = options.compute
        self.dtype = storage_dtype(compute)
        if compute == "float32 or tf32":  # not allow_tf32, which raises after a user has set this newer flag
            compute = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"

        def dense(t: Tensor | None) -> Tensor | None:
            if t is None or (t.dtype is self.dtype and t.is_contiguous()):  # most are: a conversion costs a microsecond
                return None if t is None else t.detach()
            return t.detach().to(self.dtype).contiguous()

        self.tensors = KernelTensors(*([dense(t) for t in group] for group in tensors))  # type: ignore[arg-type]
        self.device = tensors.planes[0].device
        o = _C.Options()
        converted = {
            "plane_axes": list(zip(options.plane_axes[::2], options.plane_axes[1::2], strict=True)),
            "skips": list(zip(options.skips[::2], options.skips[1::2], strict=True)),
            "activation": [_activation(name) for name in options.activation],
            "output_activation": _output_activation(options.output_activation),
            "compute": compute,
        }
        for name, value in zip(KernelOptions._fields, options, strict=True):
            value = converted.get(name, value)
            setattr(o, name, _NAMES[name].index(value) if name in _NAMES else value)
        o.out_dtype = _DTYPES[out_dtype]
        o.grad_planes, o.grad_decoder, o.grad_extra, o.grad_points = (*wanted, *[False] * (4 - len(wanted)))
        o.threads = torch.get_num_threads()
        for name, value in more.items():
            setattr(o, name, value)
        self.is_loss = False
        self.points, self.extra = None, dense(where.extra)
        if isinstance(where, KernelGrid):
            o.size, o.box, o.corners = list(where.size), list(where.box), where.corners
            self._call = _C.Call(*self.tensors, where.bounds, None, None, self.extra, o)
        else:
            self.points = dense(where.points)
            o.axes = where.points.shape[1]
            self._call = _C.Call(*self.tensors, None, self.points, where.objects, self.extra, o)

    def _workspace(self, backward: bool) -> Tensor:
        return _workspaces.take(self._call.workspace(backward), self.device)

    def explain(self, output: int, shared_limit: int, warpgroups: bool) -> str:
        return self._call.explain(output, shared_limit, warpgroups)

    def forward(self, out: Tensor) -> None:
        if (calls := explaining.get()) is not None:
            calls.append(self)
        elif out.numel():
            workspace = self._workspace(False)
            self._call.forward(out, workspace)
            _workspaces.give_back(workspace)

    def backward(self, grad_out: Tensor, to: _Gradients) -> None:
        if grad_out.numel() == 0:
            to.zero()
        elif to.list():
            workspace = self._workspace(True)
            self._call.backward(grad_out.detach().contiguous(), to.planes, to.decoder, to.points, to.extra, workspace)
            _workspaces.give_back(workspace)

    def loss(self, target: Tensor, loss: str, beta: float, per_object: bool, losses: Tensor, to: _Gradients) -> None:
        if (calls := explaining.get()) is not None:
            self.is_loss = True
            calls.append(self)
        elif target.numel() == 0:
            to.zero()
        else:
            workspace = self._workspace(bool(to.list()))
            target = target.detach().contiguous()
            self._call.loss(target, _C.losses.index(loss), beta, per_object, losses, to.planes, to.decoder, to.extra, workspace)
            _workspaces.give_back(workspace)


class _Gradients:
    """New tensors for the wanted gradients: planes, weights, biases that are not None, extra, points."""

    def __init__(
        self,
        tensors: KernelTensors,
        wanted: Sequence[bool],
        dtype: torch.dtype | None = None,
        leading: Sequence[int] = (),
        extra: Tensor | None = None,
        points: Tensor | None = None,
    ) -> None:
        def like(t: Tensor, leading: Sequence[int] = ()) -> Tensor:
            return t.new_empty([*leading, *t.shape], dtype=t.dtype if dtype is None else dtype)

        grad_planes, grad_decoder, grad_extra, grad_points = (*wanted, *[False] * (4 - len(wanted)))
        self.planes = [like(t) for t in tensors.planes] if grad_planes else []
        self.decoder: list[Tensor | None] = (
            [None if t is None else like(t, leading) for t in (*tensors.weights, *tensors.biases)] if grad_decoder else []
        )
        self.extra = like(extra) if grad_extra and extra is not None else None
        self.points = like(points) if grad_points and points is not None else None

    def list(self) -> list[Tensor]:
        return [t for t in (*self.planes, *self.decoder, self.extra, self.points) if t is not None]

    def zero(self) -> None:
        for t in self.list():
            t.zero_()


def _unpack(where: type, arguments: Sequence[Any]) -> tuple[KernelTensors, KernelOptions, Any, Sequence[Any]]:
    """The arguments of an op as records, and those that follow them; ``where``: KernelGrid or KernelPoints."""
    options = len(KernelOptions._fields)
    end = 3 + options + len(where._fields)  # type: ignore[attr-defined]
    return (
        KernelTensors(*arguments[:3]),
        KernelOptions(*arguments[3 : 3 + options]),
        where(*arguments[3 + options : end]),
        arguments[end:],
    )


def _decode_grid(*arguments: Any, tile: int = 0) -> Tensor:
    tensors, options, grid, (out_dtype,) = _unpack(KernelGrid, arguments)
    volume = _decode_grid_fake(*arguments)
    _Call(tensors, options, grid, out_dtype, tile=tile).forward(volume)
    return volume


def _decode_grid_fake(*arguments: Any, tile: int = 0) -> Tensor:
    tensors, _, grid, (out_dtype,) = _unpack(KernelGrid, arguments)
    shape = [tensors.planes[0].shape[0], tensors.weights[-1].shape[0], *grid.shape]
    volume: Tensor = tensors.planes[0].new_empty(shape, dtype=out_dtype, device=_result_device())
    return volume


def _decode_grid_backward(grad_volume: Tensor, *arguments: Any, tile: int = 0) -> list[Tensor]:
    tensors, options, grid, wanted = _unpack(KernelGrid, arguments)
    call = _Call(tensors, options, grid, grad_volume.dtype, wanted, tile=tile)
    to = _Gradients(call.tensors, wanted, None, (), call.extra)
    call.backward(grad_volume, to)
    return _as_inputs(to, _Gradients(tensors, wanted, None, (), grid.extra))


def _as_inputs(gradients: _Gradients, like: _Gradients) -> list[Tensor]:
    return [t.to(kind.dtype) for t, kind in zip(gradients.list(), like.list(), strict=True)]


def _decode_grid_backward_fake(grad_volume: Tensor, *arguments: Any, tile: int = 0) -> list[Tensor]:
    tensors, _, grid, wanted = _unpack(KernelGrid, arguments)
    return _Gradients(tensors, wanted, None, (), grid.extra).list()


def _decode_grid_loss(target: Tensor, *arguments: Any, tile: int = 0) -> list[Tensor]:
    """The sum of the losses for each object, float64, then the gradients of these sums in float32 or float64."""
    tensors, options, grid, (loss, beta, per_object, *wanted) = _unpack(KernelGrid, arguments)
    call = _Call(tensors, options, grid, torch.float32, wanted, tile=tile)
    batch = tensors.planes[0].shape[0]
    to = _Gradients(call.tensors, wanted, None, [batch] if per_object else [], call.extra)
    losses = torch.zeros(batch, dtype=torch.float64, device=target.device)
    call.loss(target, loss, beta, per_object, losses, to)
    return [losses, *to.list()]


def _decode_grid_loss_fake(target: Tensor, *arguments: Any, tile: int = 0) -> list[Tensor]:
    tensors, options, grid, (_, _, per_object, *wanted) = _unpack(KernelGrid, arguments)
    batch = tensors.planes[0].shape[0]
    losses = tensors.planes[0].new_empty([batch], dtype=torch.float64)
    to = _Gradients(tensors, wanted, storage_dtype(options.compute), [batch] if per_object else [], grid.extra)
    return [losses, *to.list()]


def _decode_points(*arguments: Any, formulation: int = 0) -> Tensor:
    tensors, options, points, (out_dtype,) = _unpack(KernelPoints, arguments)
    out = _decode_points_fake(*arguments)
    _Call(tensors, options, points, out_dtype, formulation=formulation).forward(out)
    return out


def _decode_points_fake(*arguments: Any, formulation: int = 0) -> Tensor:
    tensors, options, points, (out_dtype,) = _unpack(KernelPoints, arguments)
    features = tensors.planes[0].shape[1] * len(options.groups)
    n = tensors.weights[-1].shape[0] if tensors.weights else features
    return points.points.new_empty([points.points.shape[0], n], dtype=out_dtype, device=_result_device())


def _decode_points_backward(grad_out: Tensor, *arguments: Any, formulation: int = 0) -> list[Tensor]:
    tensors, options, points, wanted = _unpack(KernelPoints, arguments)
    call = _Call(tensors, options, points, grad_out.dtype, wanted, formulation=formulation)
    to = _Gradients(call.tensors, wanted, None, (), call.extra, call.points)
    call.backward(grad_out, to)
    return _as_inputs(to, _Gradients(tensors, wanted, None, (), points.extra, points.points))


def _decode_points_backward_fake(grad_out: Tensor, *arguments: Any, formulation: int = 0) -> list[Tensor]:
    tensors, _, points, wanted = _unpack(KernelPoints, arguments)
    return _Gradients(tensors, wanted, None, (), points.extra, points.points).list()


def _normals(like: Tensor, sequence: int, seed: int) -> Tensor:
    out = _normals_fake(like, sequence, seed)
    _C.normals(out, sequence, seed, torch.get_num_threads())
    return out


def _normals_fake(like: Tensor, sequence: int, seed: int) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, device=like.device)


def _resample_axis(x: Tensor, *arguments: Any) -> Tensor:
    out = _resample_axis_fake(x, *arguments)
    texels, size, lo, hi, align_corners, padding_mode, corners, bounds, adjoint = arguments
    padding = _C.paddings.index(padding_mode)
    _C.resample_axis(
        x.detach().contiguous(), out, texels, size, lo, hi, align_corners, padding, corners, bounds, adjoint,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _resample_axis_fake(x: Tensor, *arguments: Any) -> Tensor:
    texels, _, lo, hi, *_, adjoint = arguments
    return x.new_empty([x.shape[0], texels if adjoint else hi - lo, x.shape[2]])


for _name, _implementation, _fake in (
    ("decode_grid", _decode_grid, _decode_grid_fake),
    ("decode_grid_backward", _decode_grid_backward, _decode_grid_backward_fake),
    ("decode_grid_loss", _decode_grid_loss, _decode_grid_loss_fake),
    ("decode_points", _decode_points, _decode_points_fake),
    ("decode_points_backward", _decode_points_backward, _decode_points_backward_fake),
    ("normals", _normals, _normals_fake),
    ("resample_axis", _resample_axis, _resample_axis_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _device)
    torch.library.register_fake(f"tcam_ext::{_name}", _fake, lib=_library)

decode_grid = torch.ops.tcam_ext.decode_grid.default
decode_grid_backward = torch.ops.tcam_ext.decode_grid_backward.default
decode_grid_loss = torch.ops.tcam_ext.decode_grid_loss.default
#: Without weights it returns the features of the planes.
decode_points = torch.ops.tcam_ext.decode_points.default
decode_points_backward = torch.ops.tcam_ext.decode_points_backward.default
#: Standard normals, float32, in the shape (B, ...) of a tensor: element f of object b as csrc/maths/noise.h defines it.
normals = torch.ops.tcam_ext.normals.default
#: Linear interpolation along the middle axis of (outer, texels, inner) to voxels [lo, hi) of ``size``, or its adjoint.
resample_axis = torch.ops.tcam_ext.resample_axis.default
