"""Layers above the first that read the features: every op equals the formula, in CPU and CUDA kernels and in the reference."""

from __future__ import annotations

import emulated
import problems
import pytest
import simt
import torch
from torch.nn.functional import linear

import tcam_ext
from tcam_ext import _C

SKIPS = [(1,), (2,), (1, 3)]
SAMPLINGS = [
    {},
    dict(reduce="concat_channel_major", plane_axes=((1, 0), (2, 1))),
    dict(reduce="sum", padding_mode="zeros"),
    dict(reduce="prod", plane_axes=((0, 1), (0, 2), (1, 2), (0, 2)), groups=(2, 2)),
]
WIDTHS = (19, 37, 33, 12, 3)


@pytest.fixture(params=["cpu", "cuda kernels", "reference"])
def impl(request, monkeypatch):
    """The argument ``impl`` for a backend."""
    if request.param == "cuda kernels":
        if simt.CXX is None:
            pytest.skip("no C++ compiler")
        emulated.replace_kernels(monkeypatch, request.getfixturevalue("simt_library"))
    return "reference" if request.param == "reference" else "native"


def make(skips, widths=WIDTHS, extra=0, **options):
    """A problem whose weights at ``skips`` read the features before the layer below."""
    p = problems.make(channels=4, texels=(5, 6, 7), widths=widths, batch=2, activation="tanh", skips=skips, **options)
    if extra:
        p.weights[0] = torch.cat((p.weights[0], torch.randn(widths[0], extra, dtype=torch.float64)), 1)
    read = p.weights[0].shape[1]
    for i in skips:
        p.weights[i] = torch.cat((torch.randn(widths[i], read, dtype=torch.float64) / read**0.5, p.weights[i]), 1)
    return p


def formula(p, features):
    """Outputs of features (..., F)."""
    h = features
    for i, (w, b) in enumerate(zip(p.weights, p.biases, strict=True)):
        h = h if not i else torch.cat((features, h), -1) if i in p.options["skips"] else h
        h = linear(h, w, b)
        h = h.tanh() if i < len(p.weights) - 1 else h
    return h


def sampled(p):
    return {k: v for k, v in p.options.items() if k not in ("activation", "skips", "extra")}


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: s.get("reduce", "concat"))
@pytest.mark.parametrize("skips", SKIPS, ids=str)
def test_grids(impl, skips, sampling, extra):
    p = make(skips, extra=extra, **sampling).to(torch.float64, requires_grad=True)
    more = torch.randn(2, extra, *p.size, dtype=torch.float64, requires_grad=True) if extra else None
    features = tcam_ext.sample_grid(p.planes, p.size, impl="reference", **sampled(p)).movedim(1, -1)
    if more is not None:
        features = torch.cat((features, more.movedim(1, -1)), -1)
    want = formula(p, features).movedim(-1, 1)
    inputs = [*p.tensors, *([] if more is None else [more])]
    got = p.call(tcam_ext.decode_grid, extra=more, impl=impl)
    assert problems.relative(got, want) < 1e-12
    grad = torch.randn_like(want)
    want_grads, grads = (torch.autograd.grad(out, inputs, grad) for out in (want, got))
    assert problems.gradient_error(list(grads), list(want_grads)) < 1e-11


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: s.get("reduce", "concat"))
@pytest.mark.parametrize("skips", SKIPS, ids=str)
def test_points(impl, skips, sampling):
    p = make(skips, **sampling).to(torch.float64, requires_grad=True)
    xyz = (torch.rand(2, 300, 3, dtype=torch.float64) * 2.4 - 1.2).requires_grad_()
    want = formula(p, tcam_ext.sample_points(p.planes, xyz, impl="reference", **sampled(p)))
    got = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz, impl=impl, **p.options)
    assert problems.relative(got, want) < 1e-12
    grad = torch.randn_like(want)
    want_grads, grads = (torch.autograd.grad(out, [*p.tensors, xyz], grad) for out in (want, got))
    assert problems.gradient_error(list(grads), list(want_grads)) < 1e-11


@pytest.mark.parametrize("reduction", ["mean", "none_batch"])
def test_losses(impl, reduction):
    p = make((1, 3)).to(torch.float64, requires_grad=True)
    target = torch.rand(2, 3, *p.size, dtype=torch.float64)
    options = {**p.options, "loss": "mse", "reduction": reduction}
    got = tcam_ext.decode_grid_loss(p.planes, p.weights, p.biases, target, impl=impl, **options)
    each = (p.call(tcam_ext.decode_grid, impl="reference") - target).square().flatten(1).mean(1)
    want = each if reduction == "none_batch" else each.mean()
    assert problems.relative(got, want) < 1e-12
    weights = torch.tensor([0.3, 2.0], dtype=torch.float64) if reduction == "none_batch" else torch.ones(())
    grads, want_grads = (torch.autograd.grad((out * weights).sum(), p.tensors) for out in (got, want))
    assert problems.gradient_error(list(grads), list(want_grads)) < 1e-11


@pytest.mark.parametrize("noise_mode", ["point", "texel"])
def test_all_layers_read_the_same_noise(impl, noise_mode):
    p = make((2,), noise_std=0.3, noise_seed=7, noise_mode=noise_mode)
    want = p.call(tcam_ext.decode_grid, impl="reference")
    assert problems.relative(p.call(tcam_ext.decode_grid, impl=impl), want) < 1e-6  # normals are float32
    assert problems.relative(p.call(tcam_ext.decode_grid, impl="reference", noise_std=0.0, noise_seed=None), want) > 0.01


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_other_types_of_products(dtype, limit):
    p = make((1, 3), widths=(64, 96, 64, 40, 2)).to(torch.float64, requires_grad=True)
    mine = p.to(torch.float32, requires_grad=True)
    got, want = mine.call(tcam_ext.decode_grid, compute_dtype=dtype), p.call(tcam_ext.decode_grid, impl="reference")
    assert problems.relative(got, want) < limit
    grad = torch.randn_like(want)
    grads, want_grads = torch.autograd.grad(got, mine.tensors, grad.float()), torch.autograd.grad(want, p.tensors, grad)
    assert problems.gradient_error(list(grads), list(want_grads)) < 10 * limit


def test_compiles_without_graph_breaks():
    p = make((1, 3)).to(torch.float32, requires_grad=True)

    def loss(planes, weights, biases):
        return tcam_ext.decode_grid(planes, weights, biases, p.size, **p.options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    results = [torch.autograd.grad(f(p.planes, p.weights, p.biases), p.tensors) for f in (loss, compiled)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_boxes_and_threads_keep_the_bits():
    p = make((1, 3)).to(torch.float32, requires_grad=True)
    whole = p.call(tcam_ext.decode_grid)
    assert torch.equal(p.call(tcam_ext.decode_grid, box=((1, 5), (2, 6), (0, 7))), whole[:, :, 1:5, 2:6, :7])
    grad = torch.randn_like(whole)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(torch.autograd.grad(p.call(tcam_ext.decode_grid), p.tensors, grad))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("skips", "kind", "message"),
    [
        ((0,), ValueError, r"skips\[0\].*1 to 3.*got 0"),
        ((4,), ValueError, r"skips\[0\].*1 to 3.*got 4"),
        ((2, 1), ValueError, r"skips\[1\].*3 to 3.*got 1"),
        (2, TypeError, "skips.*int"),
        ((1.0,), TypeError, r"skips\[0\].*1.0"),
        ((2,), ValueError, r"weights\[2\].*12 features \(skips\)"),
    ],
)
def test_bad_input(skips, kind, message):
    with pytest.raises(kind, match=message):
        make(()).call(tcam_ext.decode_grid, skips=skips)


def test_wide_layers_are_refused_with_advice():
    p = make((1,), widths=(300, 300, 1))
    with pytest.raises(ValueError, match=r'skips.*512 outputs.*620; impl="reference"'):
        p.call(tcam_ext.decode_grid)
    assert p.call(tcam_ext.decode_grid, impl="reference").isfinite().all()


def test_a_module_has_their_shapes():
    decoder = tcam_ext.TriplaneDecoder(4, (16, 20, 8), 2, skips=(1, 2), activation="silu")
    assert [tuple(m.weight.shape) for m in decoder.layers()] == [(16, 12), (20, 28), (8, 32), (2, 8)]
    planes = torch.randn(1, 3, 4, 5, 5)
    volume = decoder(planes, (6, 6, 6))
    torch.testing.assert_close(volume, decoder(planes, (6, 6, 6), impl="reference"), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"skips.*\(1, 2\)"):
        decoder.sequential()
    with pytest.raises(ValueError, match=r"skips\[0\].*none.*got 1"):
        tcam_ext.TriplaneDecoder(4, (16,), 2, skips=(1,))


@pytest.mark.skipif(not _C.has_cuda, reason="built without CUDA")
def test_fused_kernels_are_refused_with_the_reason():
    p = make((1,), widths=(64, 64, 64, 1))
    p.options["activation"] = "relu"
    told = tcam_ext.explain(
        lambda: p.to(torch.float32).call(tcam_ext.decode_grid, compute_dtype=torch.bfloat16), device="sm_90a"
    )
    assert "(skips)" in told["values"]
