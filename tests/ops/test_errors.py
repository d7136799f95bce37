"""Bad input raises ValueError, TypeError or IndexError with the argument's name, before any kernel runs."""

from __future__ import annotations

import problems
import pytest
import torch

import tcam_ext

P = problems.make().to(torch.float32)
NAN = float("nan")


def call(**change):
    arguments = dict(planes=P.planes, weights=P.weights, biases=P.biases, size=P.size)
    arguments.update(change)
    return tcam_ext.decode_grid(
        arguments.pop("planes"),
        arguments.pop("weights"),
        arguments.pop("biases"),
        arguments.pop("size"),
        **arguments,
    )


CASES = [
    (dict(planes=3), TypeError, "planes"),
    (dict(planes=P.planes[:2]), ValueError, "planes.*3 tensors.*2"),
    (dict(planes=torch.randn(1, 4, 5, 6, 7)), ValueError, r"planes.*\(1, 4, 5, 6, 7\)"),
    (dict(planes=torch.randn(3, 5, 6, 6)), ValueError, "planes.*5 dimensions"),
    (dict(planes=[]), ValueError, "planes.*3 tensors.*0"),
    (dict(planes=[], plane_axes=()), ValueError, "planes.*at least one"),
    (dict(plane_axes=((0, 1), (1, 2), (2, 2))), ValueError, r"plane_axes\[2\].*\(2, 2\)"),
    (dict(plane_axes=((0, 1), (1, 2), (0, 3))), ValueError, r"plane_axes\[2\].*0 to 2"),
    (dict(plane_axes=((0, 1), (1, 2), 2)), ValueError, r"plane_axes\[2\].*pair"),
    (dict(plane_axes=((0, 1), (1, 2))), ValueError, "planes.*2 tensors.*3"),
    (dict(reduce="max"), ValueError, "reduce.*concat.*max"),
    (dict(reduce="sum"), ValueError, r"weights\[0\].*5.*15"),
    (dict(reduce="sum", groups=(2, 1)), ValueError, r"weights\[0\].*10.*15"),
    (dict(reduce="sum", groups=(2, 2)), ValueError, r"groups.*add up to the 3 planes.*\(2, 2\)"),
    (dict(reduce="prod", groups=(3, 0)), ValueError, r"groups.*1 or more.*\(3, 0\)"),
    (dict(reduce="prod", groups=3), TypeError, "groups.*int"),
    (dict(reduce="prod", groups=(1.0, 2)), TypeError, r"groups\[0\].*1.0"),
    (dict(groups=(1, 2)), ValueError, 'groups.*None with reduce="concat".*(1, 2)'),
    (dict(grid="nodes"), ValueError, "grid.*cells.*nodes"),
    (dict(bounds=((0, 1), (0, 1))), ValueError, r"bounds.*\(3, 2\).*\(2, 2\)"),
    (dict(bounds="all"), TypeError, "bounds.*str"),
    (dict(bounds=((0, 1), (0, 1), (0, NAN))), ValueError, "bounds.*finite"),
    (dict(bounds=((0, 1), (0, 1), (1, 1))), ValueError, "bounds.*lo != hi"),
    (dict(planes=[P.planes[0][0], *P.planes[1:]]), ValueError, r"planes\[0\].*4 dimensions"),
    (dict(planes=[P.planes[0], P.planes[1][:, :4], P.planes[2]]), ValueError, r"planes\[1\]"),
    (dict(planes=[P.planes[0], None, P.planes[2]]), TypeError, r"planes\[1\].*NoneType"),
    (dict(planes=[q[:, :, :0] for q in P.planes]), ValueError, "planes"),
    (dict(planes=[P.planes[0].double(), *P.planes[1:]]), TypeError, r"planes\[1\].*float64.*float32"),
    (dict(planes=[q.int() for q in P.planes]), TypeError, "planes.*int32"),
    (dict(planes=[q.to_sparse() for q in P.planes]), TypeError, r"planes\[0\].*sparse"),
    (dict(planes=[q.to("meta") for q in P.planes]), ValueError, r"weights\[0\].*meta.*cpu"),
    (dict(weights=[P.weights[0][:, :14], *P.weights[1:]]), ValueError, r"weights\[0\].*15.*14"),
    (dict(weights=[P.weights[0], P.weights[0], P.weights[2]]), ValueError, r"weights\[1\]"),
    (dict(weights=[]), ValueError, "weights"),
    (dict(weights=P.weights[0], biases=P.biases), TypeError, "weights.*sequence"),
    (dict(weights=[w.half() for w in P.weights]), TypeError, r"weights\[0\].*float16"),
    (dict(biases=P.biases[:2]), ValueError, "biases.*3.*2"),
    (dict(biases=[P.biases[1], *P.biases[1:]]), ValueError, r"biases\[0\]"),
    (dict(biases=[P.biases[0][None], *P.biases[1:]]), ValueError, r"biases\[0\].*1 dimensions"),
    (dict(size=(4, 5)), ValueError, "size"),
    (dict(size=7), ValueError, "size"),
    (dict(size=(4, 5, NAN)), TypeError, r"size\[2\].*nan"),
    (dict(size=(4, 5.0, 6)), TypeError, r"size\[1\].*5.0"),
    (dict(size=(4, True, 6)), TypeError, r"size\[1\]"),
    (dict(size=(4, 0, 6)), ValueError, r"size\[1\].*got 0"),
    (dict(size=(4, 5, -6)), ValueError, r"size\[2\].*-6"),
    (dict(size=(4, 5, 2**31)), ValueError, r"size\[2\]"),
    (dict(box=((0, 6), (0, 7))), ValueError, "box"),
    (dict(box=((0, 6), (0, 7), (3, 3))), ValueError, r"box\[2\].*\(3, 3\)"),
    (dict(box=((0, 6), (0, 7), (3, 9))), ValueError, r"box\[2\].*8.*\(3, 9\)"),
    (dict(box=((-1, 6), (0, 7), (0, 8))), ValueError, r"box\[0\]"),
    (dict(box=((0, 6), (0, NAN), (0, 8))), TypeError, r"box\[1\]\[1\]"),
    (dict(box=((0, 6, 1), (0, 7), (0, 8))), ValueError, r"box\[0\]"),
    (dict(activation="swish"), ValueError, "activation.*relu.*swish"),
    (dict(activation=["relu"]), ValueError, "activation.*2 hidden layers.*relu"),
    (dict(activation=["relu", "swish"]), ValueError, r"activation\[1\].*swish"),
    (dict(activation="relu(2)"), ValueError, "activation.*no parameter"),
    (dict(activation="softplus(-1)"), ValueError, "activation.*softplus.*1e-06"),
    (dict(activation="sine(fast)"), ValueError, "activation.*sine.*fast"),
    (dict(activation=None), ValueError, "activation"),
    (dict(output_activation="relu"), ValueError, "output_activation"),
    (dict(padding_mode="circular"), ValueError, "padding_mode"),
    (dict(align_corners=1), TypeError, "align_corners"),
    (dict(compute_dtype=torch.int8), TypeError, "compute_dtype"),
    (dict(compute_dtype="float32"), TypeError, "compute_dtype"),
    (dict(out_dtype=torch.uint8), TypeError, "out_dtype"),
    (dict(impl="cuda"), ValueError, "impl"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), CASES, ids=[f"{i}-{next(iter(c[0]))}" for i, c in enumerate(CASES)])
def test_bad_input(change, kind, message):
    with pytest.raises(kind, match=message):
        call(**change)


@pytest.mark.parametrize(
    "change",
    [c[0] for c in CASES if "impl" not in c[0]],
    ids=[str(i) for i, c in enumerate(CASES) if "impl" not in c[0]],
)
def test_the_reference_checks_the_same(change):
    with pytest.raises((ValueError, TypeError)):
        call(**change, impl="reference")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (problems.make(channels=513, widths=(4, 1)), "planes.*512.*513"),
        (problems.make(widths=(600, 1)), r"weights\[0\].*512.*600"),
        (problems.make(widths=(8, 257)), r"weights\[1\].*256.*257"),
        (problems.make(widths=(4,) * 17), "weights.*16 layers.*17"),
        (problems.make(plane_axes=((0, 1),) * 49), "planes.*48 planes.*49"),
    ],
)
def test_beyond_the_kernels_limits_the_message_names_the_reference(problem, message):
    with pytest.raises(ValueError, match=message + r'.*impl="reference"'):
        problem.call(tcam_ext.decode_grid)
    assert problem.call(tcam_ext.decode_grid, impl="reference").isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_build_without_cuda_refuses_cuda_tensors_with_advice(monkeypatch):
    monkeypatch.setattr(tcam_ext.checks._C, "has_cuda", False)
    q = P.to(torch.float32, device="cuda")
    with pytest.raises(NotImplementedError, match=r'without CUDA.*impl="reference"'):
        q.call(tcam_ext.decode_grid)
    got = q.call(tcam_ext.decode_grid, impl="reference")
    torch.testing.assert_close(got.cpu(), P.call(tcam_ext.decode_grid), rtol=1e-4, atol=1e-4)


# ---- points --------------------------------------------------------------------------------------

PAIR = problems.make(batch=2).to(torch.float32)
XYZ = torch.zeros(2, 5, 3)
POINT_CASES = [
    (dict(xyz=3), ValueError, "xyz.*int"),
    (dict(xyz=XYZ.int()), ValueError, "xyz.*floating.*int32"),
    (dict(xyz=XYZ[..., :1]), ValueError, "xyz.*coordinates"),
    (dict(xyz=XYZ[..., :2]), ValueError, r"plane_axes\[1\].*0 to 1"),
    (dict(xyz=XYZ[:1]), ValueError, r"xyz.*B = 2.*\(1, 5, 3\)"),
    (dict(xyz=XYZ[0]), ValueError, "xyz.*B = 2"),
    (dict(xyz=XYZ.to("meta")), ValueError, "xyz.*cpu.*meta"),
    (dict(batch_index=torch.zeros(5, dtype=torch.int64)), ValueError, "batch_index.*xyz"),
    (dict(xyz=XYZ[0], batch_index=torch.zeros(4, dtype=torch.int64)), ValueError, "batch_index"),
    (dict(xyz=XYZ[0], batch_index=torch.zeros(5)), TypeError, "batch_index.*int64"),
    (dict(extra=torch.zeros(2, 4, 3)), ValueError, "extra|weights"),
    (dict(extra=torch.zeros(2, 5, 3)), ValueError, r"weights\[0\].*18"),
    (dict(bounds=torch.zeros(3, 3, 2)), ValueError, "bounds"),
    (dict(impl="cuda"), ValueError, "impl"),
]


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), POINT_CASES, ids=[str(i) for i in range(len(POINT_CASES))])
def test_bad_input_of_points(change, error, message, impl):
    arguments = {"xyz": XYZ, "impl": impl, **change}
    with pytest.raises(error, match=message):
        tcam_ext.decode_points(PAIR.planes, PAIR.weights, PAIR.biases, **arguments)


def test_an_object_that_is_not_there():
    index = torch.tensor([0, 1, 2, 0, -1])
    for more in ({}, {"bounds": [(0.0, 1.0)] * 3}, {"impl": "reference"}):
        with pytest.raises(IndexError, match=r"batch_index\[2\].*0 to 1.*2"):
            tcam_ext.decode_points(PAIR.planes, PAIR.weights, PAIR.biases, XYZ[0], batch_index=index, **more)


class Annotated(torch.Tensor):
    """A tensor with metadata, as MONAI's MetaTensor: its functions return such tensors again."""


@pytest.mark.parametrize("op", ["decode_grid", "decode_grid_loss", "decode_points", "sample_grid", "sample_points"])
def test_subclasses_with_metadata_are_taken_as_plain_tensors(op):
    p = problems.make(batch=2).to(torch.float32)
    xyz, target = torch.rand(2, 9, 3) * 2 - 1, torch.rand(2, p.weights[-1].shape[0], *p.size)

    def call(wrap):
        planes = [wrap(t.clone()).requires_grad_() for t in p.planes]
        weights, biases = [wrap(w) for w in p.weights], [wrap(b) for b in p.biases]
        arguments = {
            "decode_grid": (planes, weights, biases, p.size),
            "decode_grid_loss": (planes, weights, biases, wrap(target)),
            "decode_points": (planes, weights, biases, wrap(xyz)),
            "sample_grid": (planes, p.size),
            "sample_points": (planes, wrap(xyz)),
        }[op]
        options = p.options if op.startswith("decode") else {}
        out = getattr(tcam_ext, op)(*arguments, **options)
        return [out, *torch.autograd.grad(out.square().sum(), planes)]

    want, got = call(lambda t: t), call(lambda t: t.as_subclass(Annotated))
    assert type(got[0]) is torch.Tensor
    assert all(torch.equal(torch.as_tensor(a), b) for a, b in zip(got, want, strict=True))
