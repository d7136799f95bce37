"""Noise of the features (equation 7 of the paper), and extra features of voxels."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import problems
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tcam_ext
from tcam_ext import _C, library, reference

# ---- the generator -----------------------------------------------------------------------------

#: Counter, key and result, published with Random123 (kat_vectors, philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_philox_has_its_published_values(counter, key, want):
    assert tuple(_C.philox(counter, key)) == want
    assert tuple(int(x) for x in reference.philox([torch.tensor([c]) for c in counter], key)) == want


@problems.examples(100)
@given(
    objects=st.integers(1, 3), shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    sequence=st.integers(0, 16), seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
@pytest.mark.parametrize("device", problems.DEVICES)
def test_normals_are_the_transform_of_philox(device, objects, shape, sequence, seed):
    like = torch.empty(objects, *shape, device=device)
    got = library.normals(like, sequence, seed).cpu().double()
    want = reference.texel_normals(like.cpu(), sequence, seed).double()
    # For u near 1 the radius is the root of a difference, so the error is absolute.
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_normals_are_normal():
    x = library.normals(torch.empty(1, 1 << 22), 0, 1).double()
    n = x.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((x**power).mean()) - moment) < 5 * (spread / n) ** 0.5, power
    below = torch.special.ndtr(x).sort().values.flatten()  # Kolmogorov-Smirnov
    assert float((below - torch.arange(n) / n).abs().max()) < 2.2 / n**0.5
    pairs = x.view(4, -1)  # words of a block, neighbours, and other keys
    others = [library.normals(torch.empty(1, n), *key).double().view(4, -1) for key in ((0, 2), (1, 1))]
    rows = torch.cat((pairs, pairs.roll(1, 1), *others))
    correlation = torch.corrcoef(rows) - torch.eye(16)
    assert float(correlation.abs().max()) < 6 / pairs.shape[1] ** 0.5


def test_bits_of_normals_do_not_depend_on_threads_or_instruction_sets(threads):
    def checksum() -> str:
        return str(library.normals(torch.empty(2, 50_001), 3, 99).view(torch.int32).long().sum().item())

    threads(1)
    want = checksum()
    threads(3)
    assert checksum() == want
    script = "import torch; from tcam_ext import library; x = library.normals(torch.empty(2, 50_001), 3, 99)"
    script += "; print(x.view(torch.int32).long().sum().item())"
    for isa in ("portable", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "TCAM_CPU_ISA": isa}, capture_output=True, text=True
        )
        if "not an instruction set" not in done.stderr:
            assert done.stdout.strip() == want, isa


# ---- decoding ------------------------------------------------------------------------------------


def tensors(p):
    extra = p.options.get("extra")
    return [*p.tensors, *([] if extra is None else [extra])]


def convert(p, dtype, device="cpu"):
    q = p.to(dtype, requires_grad=True, device=device)
    if q.options.get("extra") is not None:
        extra = q.options["extra"].detach().to(device, dtype, copy=True).requires_grad_()
        q = replace(q, options={**q.options, "extra": extra})
    return q


@st.composite
def noisy_problems(draw):
    """Problems with smooth activations: with kinks, the last bits of the noise put some voxels on the other side."""
    p = draw(problems.problems(activation="silu", output_activation="sigmoid"))
    std = draw(st.sampled_from([0.0, 0.32, 2.0]))
    p.options |= {
        "noise_std": std,
        "noise_seed": draw(st.integers(0, 2**63 - 1)),
        "noise_mode": draw(st.sampled_from(["point", "texel"])),
    }
    width = draw(st.integers(0, 3))
    if width:
        p.options["extra"] = torch.randn(p.planes[0].shape[0], width, *p.size, dtype=torch.float64)
        p.weights[0] = torch.cat((p.weights[0], torch.randn(p.weights[0].shape[0], width, dtype=torch.float64)), 1)
    return p


@problems.examples(60)
@given(p=noisy_problems())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", problems.DEVICES)
def test_equals_the_float64_reference(device, p, dtype):
    """The noise is float32 also in float64."""
    exact, mine = convert(p, torch.float64), convert(p, dtype, device)
    want, got = exact.call(reference.decode_grid), mine.call(tcam_ext.decode_grid)
    assert problems.relative(got, want) < problems.FORWARD_LIMIT["float32"]
    grad = torch.rand_like(want)  # positive: if a plane has one texel, all gradients are sums, which could cancel
    want_grads = torch.autograd.grad(want, tensors(exact), grad)
    grads = torch.autograd.grad(got, tensors(mine), grad.to(device, dtype))
    assert problems.gradient_error(list(grads), list(want_grads)) < problems.GRADIENT_LIMIT["float32"]


@problems.examples(40)
@given(p=noisy_problems(), reduction=st.sampled_from(["mean", "sum", "none_batch"]))
@pytest.mark.parametrize("device", problems.DEVICES)
def test_the_loss_equals_the_float64_reference(device, p, reduction):
    exact, mine = convert(p, torch.float64), convert(p, torch.float32, device)
    target = -torch.rand(p.planes[0].shape[0], p.weights[-1].shape[0], *p.size)  # all slopes of one sign

    def loss(op, q, t):
        return op(q.planes, q.weights, q.biases, t, loss="mse", reduction=reduction, **q.options)

    want = loss(reference.decode_grid_loss, exact, target.double())
    got = loss(tcam_ext.decode_grid_loss, mine, target.to(device))
    assert problems.relative(got, want) < 1e-5
    weight = torch.rand_like(want)
    want_grads = torch.autograd.grad(want, tensors(exact), weight)
    grads = torch.autograd.grad(got, tensors(mine), weight.to(device, torch.float32))
    assert problems.gradient_error(list(grads), list(want_grads)) < problems.GRADIENT_LIMIT["float32"]


POINT = {"noise_std": 0.32, "noise_seed": 5}
SAMPLINGS = [
    {}, {"reduce": "sum"}, {"reduce": "prod"}, {"reduce": "concat_channel_major", "plane_axes": ((1, 0), (2, 1))},
    {"reduce": "mean", "plane_axes": ((1, 2), (1, 2), (0, 1), (0, 2))},
]  # fmt: skip


@pytest.mark.parametrize("mode", ["point", "texel"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("device", problems.DEVICES)
def test_a_box_has_the_noise_of_the_whole_bit_for_bit(device, sampling, mode, threads):
    p = problems.make(channels=6, widths=(20, 9, 2), size=(11, 13, 60), batch=2, **sampling, **POINT, noise_mode=mode)
    p = p.to(torch.float32, device=device)
    threads(1)
    whole = p.call(tcam_ext.decode_grid)
    threads(3)
    for box in (((0, 11), (0, 13), (0, 60)), ((3, 9), (12, 13), (5, 44)), ((10, 11), (0, 1), (59, 60))):
        part = p.call(tcam_ext.decode_grid, box=box)
        assert torch.equal(part, whole[(..., *(slice(*b) for b in box))])
    assert not torch.equal(whole, p.call(tcam_ext.decode_grid, noise_seed=6))
    assert not torch.equal(whole, p.call(tcam_ext.decode_grid, noise_seed=5 + 2**40))


@pytest.mark.parametrize("device", problems.DEVICES)
def test_objects_have_noise_of_their_own_and_points_that_of_voxels(device):
    size = (5, 6, 7)
    p = problems.make(size=size, widths=(12, 3), activation="tanh", batch=1, **POINT).to(torch.float32, device=device)
    p = replace(p, planes=[q.expand(2, *q.shape[1:]).contiguous() for q in p.planes])
    volume = p.call(tcam_ext.decode_grid)
    assert not torch.equal(volume[0], volume[1])
    axes = [2 * (torch.arange(n, device=device) + 0.5) / n - 1 for n in size]
    xyz = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).float().expand(2, -1, -1, -1, -1)
    at = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz, **p.options).movedim(-1, 1)
    torch.testing.assert_close(at, volume, rtol=1e-5, atol=1e-6)
    index = torch.tensor([0, 1, 1, 0], device=device)
    ragged = tcam_ext.decode_points(p.planes, p.weights, p.biases, xyz[0].reshape(-1, 3)[:4], batch_index=index, **p.options)
    want = reference.decode_points(p.planes, p.weights, p.biases, xyz[0].reshape(-1, 3)[:4], batch_index=index, **p.options)
    torch.testing.assert_close(ragged, want, rtol=1e-5, atol=1e-6)


def test_noise_is_std_times_a_normal_added_to_the_features():
    """With an identity as decoder the extra features appear in the output."""
    p = problems.make(channels=6, size=(9, 10, 11), widths=(18,), bias=False).to(torch.float32)
    p.weights[0] = torch.eye(18)
    eps = (p.call(tcam_ext.decode_grid, noise_std=0.5, noise_seed=3) - p.call(tcam_ext.decode_grid)).movedim(1, -1) / 0.5
    n = 9 * 10 * 11
    want = reference.normals(3, torch.arange(n), torch.zeros(n, dtype=torch.int64), 0, 18)
    torch.testing.assert_close(eps.reshape(n, 18).double(), want, rtol=1e-5, atol=3e-6)


def test_gradcheck():
    p = problems.make(channels=2, texels=(2, 3, 2), widths=(5, 2), size=(2, 3, 2), activation="tanh").to(torch.float64, True)
    p.weights[0] = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    extra = torch.randn(1, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    for mode in ("point", "texel"):

        def decode(extra, *given, mode=mode):
            planes, weights, biases = given[:3], given[3:5], given[5:]
            return tcam_ext.decode_grid(
                planes, weights, biases, p.size, extra=extra, activation="tanh", noise_mode=mode, **POINT
            )

        assert torch.autograd.gradcheck(decode, (extra, *p.planes, *p.weights, *p.biases), fast_mode=True)


def test_opcheck():
    p = problems.make().to(torch.float32)
    options = list(problems.flat_options(p, "float32"))
    at = library.KernelOptions._fields.index("noise_std")
    options[at : at + 2] = 0.5, 7
    options[-1] = torch.randn(6 * 7 * 8, 2)
    p.weights[0] = torch.randn(16, 17)
    torch.library.opcheck(library.decode_grid, (p.planes, p.weights, p.biases, *options, torch.float32))
    grad = torch.randn(1, 2, *p.size)
    torch.library.opcheck(library.decode_grid_backward, (grad, p.planes, p.weights, p.biases, *options, True, True, True))
    more = ("mse", 0.3, True, True, True, True)
    torch.library.opcheck(library.decode_grid_loss, (grad, p.planes, p.weights, p.biases, *options, *more))
    torch.library.opcheck(library.normals, (p.planes[0], 2, 7))


@pytest.mark.slow
def test_a_compiled_step_takes_any_seed():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    decoder = tcam_ext.TriplaneDecoder(4, (8, 8))
    planes, target = torch.randn(1, 3, 4, 6, 6), torch.rand(1, 1, 6, 6, 6)
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(seed):
        return decoder.loss(planes, target, noise_std=0.3, noise_seed=seed)

    for seed in range(6):
        torch.testing.assert_close(step(seed), decoder.loss(planes, target, noise_std=0.3, noise_seed=seed))
    assert counter.frame_count <= 3  # sizes 0, 1, and any other


def test_only_what_extra_needs_is_computed():
    p = problems.make(size=(9, 9, 9)).to(torch.float32)
    p.weights[0] = torch.randn(16, 17)
    extra = torch.randn(1, 2, 9, 9, 9, requires_grad=True)
    volume = p.call(tcam_ext.decode_grid, extra=extra)
    want = p.call(reference.decode_grid, extra=extra)
    grad = torch.randn_like(volume)
    grads, want_grads = torch.autograd.grad(volume, extra, grad), torch.autograd.grad(want, extra, grad)
    torch.testing.assert_close(grads, want_grads, rtol=1e-4, atol=1e-5)
    target = torch.rand_like(volume)
    loss = tcam_ext.decode_grid_loss(p.planes, p.weights, p.biases, target, extra=extra)
    again = reference.decode_grid_loss(p.planes, p.weights, p.biases, target, extra=extra)
    torch.testing.assert_close(torch.autograd.grad(loss, extra), torch.autograd.grad(again, extra), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"noise_std": -1, "noise_seed": 1}, ValueError, "noise_std.*-1"),
        ({"noise_std": float("nan"), "noise_seed": 1}, ValueError, "noise_std.*nan"),
        ({"noise_std": "0.3"}, TypeError, "noise_std.*str"),
        ({"noise_std": 0.3}, ValueError, "noise_seed.*None"),
        ({"noise_std": 0.3, "noise_seed": -1}, ValueError, "noise_seed.*-1"),
        ({"noise_std": 0.3, "noise_seed": 2**63}, ValueError, r"noise_seed.*2\^63"),
        ({"noise_seed": 0.5}, TypeError, "noise_seed.*0.5"),
        ({"noise_std": 0.3, "noise_seed": 1, "noise_mode": "voxel"}, ValueError, "noise_mode.*point, texel.*voxel"),
        ({"extra": 3}, TypeError, "extra.*int"),
        ({"extra": torch.zeros(1, 2, 6, 7, 8)}, ValueError, r"weights\[0\].*17.*extra"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_bad_input(options, kind, message, impl):
    p = problems.make().to(torch.float32)
    with pytest.raises(kind, match=message):
        p.call(tcam_ext.decode_grid, impl=impl, **options)


def test_bad_extra():
    p = problems.make().to(torch.float32)
    p.weights[0] = torch.randn(16, 17)
    with pytest.raises(ValueError, match=r"extra.*\(1, 2, 6, 7, 8\).*\(1, 2, 6, 7, 7\)"):
        p.call(tcam_ext.decode_grid, extra=torch.zeros(1, 2, 6, 7, 7))
    with pytest.raises(TypeError, match=r"extra.*int64"):
        p.call(tcam_ext.decode_grid, extra=torch.zeros(1, 2, 6, 7, 8, dtype=torch.int64))
