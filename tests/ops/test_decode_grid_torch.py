"""decode_grid as a torch op: opcheck, torch.compile, autocast, checkpointing, frozen and empty inputs."""

from __future__ import annotations

from dataclasses import replace

import problems
import pytest
import torch

import tcam_ext
from tcam_ext import library


@pytest.mark.parametrize("widths", [(1,), (9, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", problems.DEVICES)
def test_opcheck(device, widths, bias):
    p = problems.make(widths=widths, bias=bias).to(torch.float32, device=device)
    options = problems.flat_options(p, "float32")
    torch.library.opcheck(library.decode_grid, (p.planes, p.weights, p.biases, *options, torch.float32))
    grad = torch.randn(1, widths[-1], *p.size, device=device)
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(library.decode_grid_backward, (grad, p.planes, p.weights, p.biases, *options, *wanted, False))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.card])])
def test_compiles_without_graph_breaks(device, dynamic):
    torch._dynamo.reset()
    p = problems.make().to(torch.float32, True, device)

    def f(planes, weights, biases):
        return tcam_ext.decode_grid([2 * q for q in planes], weights, biases, p.size, activation="silu").square().sum()

    eager = torch.autograd.grad(f(p.planes, p.weights, p.biases), p.tensors)
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    got = torch.autograd.grad(compiled(p.planes, p.weights, p.biases), p.tensors)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiles_under_autocast_and_with_aot_eager():
    torch._dynamo.reset()
    p = problems.make().to(torch.float32, requires_grad=True)

    def f(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tcam_ext.decode_grid(torch.nn.functional.linear(x, w), p.weights, p.biases, p.size)

    x, w = torch.randn(1, 3, 5, 6, 6), torch.eye(6, requires_grad=True)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_autocast_sets_the_compute_dtype_and_keeps_gradient_dtypes():
    p = problems.make(**problems.SMALL_OPERATING_POINT).to(torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = p.call(tcam_ext.decode_grid)
        mixed = replace(p, planes=[q.bfloat16() for q in p.planes]).call(tcam_ext.decode_grid)
    assert torch.equal(inside, p.call(tcam_ext.decode_grid, compute_dtype=torch.bfloat16))
    assert mixed.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(inside.sum(), p.tensors))


def test_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    p = problems.make().to(torch.float32, requires_grad=True)
    want = torch.autograd.grad(p.call(tcam_ext.decode_grid).square().sum(), p.tensors)
    for reentrant in (False, True):
        out = checkpoint(
            lambda *t: replace(p, planes=list(t[:3]), weights=list(t[3:6]), biases=list(t[6:])).call(tcam_ext.decode_grid),
            *p.tensors,
            use_reentrant=reentrant,
        )
        if reentrant:
            for t in p.tensors:
                t.grad = None
            out.square().sum().backward()
            got = [t.grad for t in p.tensors]
        else:
            got = torch.autograd.grad(out.square().sum(), p.tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_second_derivatives_raise_natively_and_work_in_the_reference():
    p = problems.make(widths=(6, 2), size=(3, 4, 2), activation="tanh").to(torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r'impl="reference"'):
        torch.autograd.grad(p.call(tcam_ext.decode_grid).sum(), p.tensors, create_graph=True)

    def f(*t):
        return replace(p, planes=list(t[:3]), weights=list(t[3:5]), biases=list(t[5:])).call(
            tcam_ext.decode_grid, impl="reference"
        )

    assert torch.autograd.gradgradcheck(f, p.tensors)


def test_forward_mode_raises_instead_of_a_zero_tangent():
    import torch.autograd.forward_ad as fwd

    p = problems.make().to(torch.float32)
    with fwd.dual_level():
        dual = fwd.make_dual(p.planes[0], torch.ones_like(p.planes[0]))
        with pytest.raises((RuntimeError, NotImplementedError)):
            replace(p, planes=[dual, *p.planes[1:]]).call(tcam_ext.decode_grid)


def test_a_frozen_decoder_and_frozen_planes():
    p = problems.make().to(torch.float32, requires_grad=True)
    full = torch.autograd.grad(p.call(tcam_ext.decode_grid).sum(), p.tensors)
    for wanted in (p.tensors[:3], p.tensors[3:], p.tensors[3:4], p.tensors[1:2]):
        q = p.to(torch.float32)
        chosen = [i for i, t in enumerate(p.tensors) if any(t is x for x in wanted)]
        for i in chosen:
            q.tensors[i].requires_grad_(True)
        got = torch.autograd.grad(q.call(tcam_ext.decode_grid).sum(), [q.tensors[i] for i in chosen])
        assert all(torch.equal(g, full[i]) for g, i in zip(got, chosen, strict=True))


def test_empty_batch_and_meta_tensors():
    p = problems.make(batch=0).to(torch.float32, requires_grad=True)
    out = p.call(tcam_ext.decode_grid)
    assert out.shape == (0, 2, 6, 7, 8)
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(out.sum(), p.tensors))
    meta = problems.make().to(torch.float32)
    meta = replace(meta, planes=[q.to("meta") for q in meta.planes], weights=[w.to("meta") for w in meta.weights],
                   biases=[b.to("meta") for b in meta.biases])  # fmt: skip
    assert meta.call(tcam_ext.decode_grid).shape == (1, 2, 6, 7, 8)


def test_inference_mode_and_negated_views():
    p = problems.make().to(torch.float32)
    with torch.inference_mode():
        assert torch.equal(p.call(tcam_ext.decode_grid), p.call(tcam_ext.decode_grid))
    negated = replace(p, planes=[torch._neg_view(q) for q in p.planes]).call(tcam_ext.decode_grid)
    assert torch.equal(negated, replace(p, planes=[-q for q in p.planes]).call(tcam_ext.decode_grid))
