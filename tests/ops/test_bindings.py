"""The binding: whatever Python passes, an exception and never a crash."""

from __future__ import annotations

import os
import random

import pytest
import torch

from tcam_ext import _C

CALLS = int(os.environ.get("TCAM_FUZZ_CALLS", "20000"))


def odd_objects(rng):
    """Anything that is not the tensor a kernel wants."""
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
    """Arguments that a kernel would run on, to be spoiled one by one."""
    c, h, w, d = (rng.randint(1, 4) for _ in range(4))
    widths = [rng.randint(1, 9) for _ in range(rng.randint(0, 2))] + [rng.randint(1, 3)]
    dtype = rng.choice([torch.float32, torch.float64])
    n = [3 * c, *widths]
    planes = [torch.randn(1, c, *s, dtype=dtype) for s in ((h, w), (w, d), (h, d))]
    weights = [torch.randn(n[i + 1], n[i], dtype=dtype) for i in range(len(widths))]
    biases = [rng.choice([None, torch.randn(m, dtype=dtype)]) for m in widths]
    size = [rng.randint(1, 5) for _ in range(3)]
    box = []
    for s in size:
        lo = rng.randint(0, s - 1)
        box += [lo, rng.randint(lo + 1, s)]
    code = 0 if dtype == torch.float32 else 1
    options = [
        size,
        box,
        rng.randint(0, 4),
        rng.randint(0, 2),
        rng.random() < 0.5,
        rng.randint(0, 1),
        code,
        code,
        1,
        0,
    ]
    out = torch.empty(1, widths[-1], box[1] - box[0], box[3] - box[2], box[5] - box[4], dtype=dtype)
    return planes, weights, biases, options, out


def spoil(rng, value, odd):
    """One change at random: an element, a length, a number, or nothing."""
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
    memory = torch.empty(1 << 22, dtype=torch.uint8)  # enough for most of these problems; else the call must refuse it
    outcomes = {"ok": 0, "refused": 0}
    for _ in range(CALLS):
        planes, weights, biases, options, out = valid(rng)
        arguments = [planes, weights, biases, options, out]
        for _ in range(rng.randint(0, 2)):
            i = rng.randrange(5)
            arguments[i] = spoil(rng, arguments[i], odd)
        planes, weights, biases, options, out = arguments
        if not isinstance(options, list):  # a tensor of 2^40 elements would be walked through here, not in the binding
            continue
        try:
            o = _C.Options(*options)
            which = rng.randrange(4)
            if which == 0:
                # A small workspace of one's own, and now and then one that is too small or no tensor at all.
                _C.decode_grid_workspace(planes, weights, biases, o, False, False, False)
                workspace = memory if rng.random() < 0.95 else rng.choice([*odd, memory[:1000]])
                _C.decode_grid(planes, weights, biases, o, out, workspace)
            elif which in (1, 2):
                if not all(isinstance(x, list) for x in (planes, weights, biases)):
                    continue
                gp = [torch.empty_like(p) for p in planes]
                gd = [
                    *(torch.empty_like(w) for w in weights),
                    *(None if b is None else torch.empty_like(b) for b in biases),
                ]
                if rng.random() < 0.2:
                    gp = spoil(rng, gp, odd)
                if rng.random() < 0.2:
                    gd = spoil(rng, gd, odd)
                if which == 1:
                    _C.decode_grid_backward(out, planes, weights, biases, o, gp, gd, memory)
                else:
                    target = rng.choice([out, torch.zeros_like(out, dtype=torch.uint8), rng.choice(odd)])
                    extra = [rng.randint(0, 2), 0.3, rng.random() < 0.3, torch.empty(1, dtype=torch.float64)]
                    if rng.random() < 0.2:
                        where = rng.randrange(4)
                        extra[where] = spoil(rng, extra[where], odd)
                    _C.decode_grid_loss(target, planes, weights, biases, o, *extra, gp, gd, memory)
            else:
                _C.resample_plane(
                    rng.choice([rng.choice(odd), torch.randn(3, 4, 2)]),
                    rng.choice([rng.choice(odd), torch.empty(5, 6, 2)]),
                    rng.random() < 0.5,
                    rng.randint(-1, 2),
                    rng.choice([1, 2, 0, -5, 2**31 - 1]),
                )
            outcomes["ok"] += 1
        except (TypeError, ValueError, RuntimeError, OverflowError, BufferError, AttributeError):
            outcomes["refused"] += 1
    assert min(outcomes.values()) > CALLS / 10, outcomes


def test_a_fake_tensor_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3, 4, 2)
    with pytest.raises(TypeError, match=r"expected a torch.Tensor"):
        _C.resample_plane(fake, torch.empty(5, 6, 2), False, 0, 1)
