"""The binding raises an exception and never crashes, whatever Python passes."""

from __future__ import annotations

import ctypes
import itertools
import os
import random

import pytest
import torch

from tcam_ext import _C
from tcam_ext.activations import ACTIVATIONS, OUTPUT_ACTIVATIONS

CALLS = int(os.environ.get("TCAM_FUZZ_CALLS", "20000"))


def odd_objects(rng):
    """Objects that are not the tensor that a kernel expects."""
    t = torch.randn(2, 3, 4, 5)
    return [
        None,
        3,
        "planes",
        2.5,
        b"",
        object(),
        [t],
        {"a": 1},
        torch.Size([1]),
        torch.float32,
        t.numpy(),
        t.to("meta"),
        t.to_sparse(),
        t.transpose(0, 1),
        t[::2],
        t.expand(2, 3, 4, 5),
        t[:0],
        torch.empty(0),
        torch.tensor(1.0),
        t.int(),
        t.bool(),
        t.to(torch.complex64),
        t.half(),
        t.bfloat16(),
        t.double(),
        t.clone().requires_grad_(),
        torch.nn.Parameter(t),
        torch.zeros(2, 3, 4, 5, dtype=torch.uint8),
        t.as_strided((2, 3), (0, 0)),
        torch._neg_view(t),
        torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        torch.empty((2**40, 0)),
        torch.randn(1, 1, 1, 1, 1, 1),
    ]


def valid(rng):
    """Valid arguments of a kernel, to be spoiled one by one, and a tensor for the result."""
    c, *texels = (rng.randint(1, 4) for _ in range(4))
    widths = [rng.randint(1, 9) for _ in range(rng.randint(0, 2))] + [rng.randint(1, 3)]
    dtype = rng.choice([torch.float32, torch.float64])
    pairs = [rng.choice([(0, 1), (1, 2), (0, 2)]) for _ in range(rng.randint(1, 4))]
    reduce, on_grid, extra_channels = rng.randint(0, 2), rng.random() < 0.5, rng.randint(0, 2)
    first = rng.randint(1, len(pairs))
    groups = [first, len(pairs) - first] if first < len(pairs) else [first]
    n = [len(groups) * c + (0 if on_grid else extra_channels), *widths]
    batch = rng.randint(1, 2)
    planes = [torch.randn(batch, c, texels[a], texels[b], dtype=dtype) for a, b in pairs]
    weights = [torch.randn(n[i + 1], n[i], dtype=dtype) for i in range(len(widths))]
    rows, skips = widths[0], []
    if len(widths) == 3 and rng.random() < 0.7:  # the second layer reads the features too
        skips, rows = [(2, 32)], 32 + widths[1]
        weights[0] = torch.randn(rows, n[0], dtype=dtype)
    biases = [rng.choice([None, torch.randn(m, dtype=dtype)]) for m in [rows, *widths[1:]]]
    size = [rng.randint(1, 5) for _ in range(3)]
    box = []
    for s in size:
        lo = rng.randint(0, s - 1)
        box += [lo, rng.randint(lo + 1, s)]
    code = 0 if dtype == torch.float32 else 1
    options = dict(
        plane_axes=pairs,
        reduce=reduce,
        groups=groups,
        skips=skips,
        size=size,
        box=box,
        corners=rng.random() < 0.5,
        axes=3,
        activation=[(rng.randrange(len(ACTIVATIONS)), 1.0) for _ in widths[1:]],
        output_activation=(rng.randrange(len(OUTPUT_ACTIVATIONS)), 0.5),
        align_corners=rng.random() < 0.5,
        padding=rng.randint(0, 2),
        compute=code,
        out_dtype=code,
        formulation=rng.randint(0, 2) if reduce < 2 else 0,
    )
    bounds = points = objects = extra = None
    if on_grid:
        shape = (batch, widths[-1], box[1] - box[0], box[3] - box[2], box[5] - box[4])
        bounds = rng.choice([None, torch.randn(batch, 3, 2, dtype=torch.float64)])
    else:
        count = batch * rng.randint(1, 9)
        shape = (count, widths[-1])
        points = torch.randn(count, 3, dtype=dtype)
        objects = rng.choice([None, torch.randint(0, batch, (count,))])
        extra = torch.randn(count, extra_channels, dtype=dtype) if extra_channels else None
    return [planes, weights, biases, bounds, points, objects, extra], options, torch.empty(shape, dtype=dtype)


def spoil(rng, value, odd):
    """Change an element, a length, a number, or nothing, at random."""
    if isinstance(value, list) and rng.random() < 0.7:
        value = list(value)
        where = rng.randrange(len(value) + 1)
        if where == len(value):
            value.append(rng.choice(odd))
        elif rng.random() < 0.2:
            del value[where]
        else:
            value[where] = spoil(rng, value[where], odd)
        return value
    if isinstance(value, int) and rng.random() < 0.8:
        return rng.choice([-1, 0, 1, 2, 5, 17, 2**31, 2**62, -(2**63), 2**64, value + 1, float("nan")])
    return rng.choice(odd)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_calls_raise_and_never_crash():
    rng = random.Random(0)
    odd = odd_objects(rng)
    memory = torch.empty(1 << 22, dtype=torch.uint8)  # enough for most of these problems; otherwise the call must raise
    outcomes = {"ok": 0, "refused": 0}
    for _ in range(CALLS):
        tensors, options, out = valid(rng)
        for _ in range(rng.randint(0, 2)):
            if rng.random() < 0.5:
                i = rng.randrange(len(tensors))
                tensors[i] = spoil(rng, tensors[i], odd)
            else:
                name = rng.choice(list(options))
                options[name] = spoil(rng, options[name], odd)
        try:
            o = _C.Options()
            which = rng.randrange(4)
            wanted = {"grad_planes": which > 0, "grad_decoder": which > 0, "grad_points": which == 1, "grad_extra": which == 1}
            for name, value in {**options, **wanted}.items():
                setattr(o, name, value)
            if which == 3:
                x, to = (rng.choice([rng.choice(odd), torch.randn(3, rng.randint(1, 5), 2)]) for _ in range(2))
                numbers = [rng.choice([1, 2, 3, 4, 5, 0, -1, 2**40]) for _ in range(4)]
                _C.resample_axis(
                    x, to, *numbers, rng.random() < 0.5, rng.randint(-1, 3), rng.random() < 0.5,
                    rng.choice([None, None, rng.choice(odd)]), rng.random() < 0.5, rng.choice([1, 2, 0, -5, 2**31 - 1]),
                )  # fmt: skip
                outcomes["ok"] += 1
                continue
            call = _C.Call(*tensors, o)
            # A fresh small workspace, sometimes too small or not a tensor.
            workspace = memory if rng.random() < 0.95 else rng.choice([*odd, memory[:1000]])
            if rng.random() < 0.1:
                out = rng.choice(odd)
            if which == 0:
                call.workspace(False)
                call.forward(out, workspace)
            else:
                gp = [torch.empty_like(p) for p in tensors[0]]
                gd = [None if t is None else torch.empty_like(t) for t in (*tensors[1], *tensors[2])]
                if rng.random() < 0.2:
                    gp = spoil(rng, gp, odd)
                if rng.random() < 0.2:
                    gd = spoil(rng, gd, odd)
                if which == 1:
                    to = [None if t is None else torch.empty_like(t) for t in (tensors[4], tensors[6])]
                    if rng.random() < 0.2:
                        to[rng.randrange(2)] = rng.choice(odd)
                    call.backward(out, gp, gd, *to, workspace)
                else:
                    target = rng.choice([out, torch.zeros_like(out, dtype=torch.uint8), rng.choice(odd)])
                    more = [rng.randint(0, 2), 0.3, rng.random() < 0.3, torch.empty(1, dtype=torch.float64)]
                    if rng.random() < 0.2:
                        where = rng.randrange(4)
                        more[where] = spoil(rng, more[where], odd)
                    call.loss(target, *more, gp, gd, workspace)
            outcomes["ok"] += 1
        except (TypeError, ValueError, RuntimeError, OverflowError, BufferError, AttributeError, IndexError):
            outcomes["refused"] += 1
    assert min(outcomes.values()) > CALLS / 10, outcomes


def test_a_fake_tensor_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3, 4, 2)
    with pytest.raises(TypeError, match=r"expected a torch.Tensor"):
        _C.resample_axis(fake, torch.empty(3, 6, 2), 4, 6, 0, 6, False, 0, False, None, False, 1)


def test_activations_without_layers_are_refused():
    """They are copied to an array of fixed length. Without weights, too many once wrote past its end."""
    o = _C.Options()
    o.plane_axes, o.groups = [(0, 1)], [1]
    o.activation = [(0, 1.0)] * 1000
    with pytest.raises(ValueError, match="activation"):
        _C.Call([torch.zeros(1, 2, 3, 3)], [], [], None, torch.zeros(4, 3), None, None, o)


# ---- DLPack's table of functions -----------------------------------------------------------------


class Header(ctypes.Structure):
    """DLPackExchangeAPIHeader of dlpack.h."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p)]


def with_tables(*majors: int, last: int | None):
    """A type with a list of tables of these major versions, newest first; ``last``: the address of one more table."""
    headers = [Header(m, 0, last) for m in majors]
    for newer, older in itertools.pairwise(headers):
        newer.previous = ctypes.addressof(older)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    kind = type("Kind", (), {"__dlpack_c_exchange_api__": new(ctypes.addressof(headers[0]), b"dlpack_exchange_api", None)})
    kind.kept = headers
    return kind


@pytest.fixture
def bound():
    yield
    _C.bind(torch.Tensor, torch.nn.Parameter)


def torchs_table() -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")


def test_a_newer_table_leads_to_the_one_of_version_1(bound):
    kind = with_tables(3, 2, last=torchs_table())
    _C.bind(kind, torch.nn.Parameter)
    parameter = torch.nn.Parameter(torch.empty(2, 3), requires_grad=False)
    _C.normals(parameter, 0, 1, 1)  # read through the table of version 1
    assert parameter.isfinite().all()


def test_tables_of_other_versions_alone_are_refused(bound):
    with pytest.raises(RuntimeError, match=r"major versions 3, 2, .*version 1"):
        _C.bind(with_tables(3, 2, last=None), torch.nn.Parameter)
