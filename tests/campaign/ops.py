"""Random problems of every op, compared with the reference in float64 by the limits of tcam_ext.testing.

python tests/campaign/ops.py SHARD NUMBER [--seed S]      repeat one problem, for example: ops-decode_points-0 17
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import shards as campaign  # puts the packages and the tests of the ops on the path
import torch
from op_problems import AtPoints, Case, Draw, draw_case
from problems import away_from_kinks
from torch import Tensor

import tcam_ext
from tcam_ext import activations, reference, testing
from tcam_ext.losses import LOSSES

OPS = ("decode_grid", "decode_grid_loss", "decode_points", "sample_grid", "sample_points")
#: The instruction set of each shard of an op; where a machine does not have it, the shard runs with its best.
ISAS = ("amx", "avx512bf16", "avx2", "portable", "avx512")
PROBLEMS = 10_000  # of each op


def limit(table: dict[str, float], *names: Any) -> float:
    """The largest limit of some dtypes. Rounding to float16 has that of bfloat16."""
    return max(table[str(n).removeprefix("torch.").replace("float16", "bfloat16").replace("bb", "b")] for n in names)


def arranged(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.mT.contiguous().mT
    return torch.stack((t, t), -1)[..., 0] if layout == "strided" else t


class Inputs:
    """The arguments of a case in a dtype.

    Args:
        dtype: of all tensors but the points.
        points: dtype of the points.
        wanted: for each leaf, whether it requires gradients.
        module: whether the weights are those of a TriplaneDecoder.
    """

    def __init__(self, case: Case, dtype: torch.dtype, points: torch.dtype, wanted: list[bool], module: bool = False) -> None:
        self.op, p = case.op, case.problem.to(dtype)
        self.options = dict(p.options)
        self.module = decoder_of(p, dtype) if module else None
        if self.module is not None:
            p.weights = [m.weight for m in self.module.layers()]
            p.biases = [m.bias for m in self.module.layers()]
        #: Planes, weights, biases, extra features and points.
        self.leaves = p.tensors
        if "extra" in self.options:
            self.options["extra"] = self.options["extra"].to(dtype, copy=True)
            self.leaves.append(self.options["extra"])
        if isinstance(p, AtPoints):
            p.xyz = p.xyz.to(points, copy=True)
            self.leaves.append(p.xyz)
        for t, want in zip(self.leaves, wanted, strict=False):
            t.requires_grad_(want)
        planes, weights = ([arranged(t, case.layout) for t in ts] for ts in (p.planes, p.weights))
        self.problem = replace(p, planes=planes, weights=weights, options=self.options)

    def call(self, backend: Any, *target: Tensor, **more: Any) -> Any:
        """The case's op, of tcam_ext or of the reference, or the decoder's method."""
        p = self.problem
        place = p.xyz if isinstance(p, AtPoints) else p.size
        if self.module is not None:
            methods = {"decode_grid": self.module, "decode_points": self.module.points, "decode_grid_loss": self.module.loss}
            return methods[self.op](p.planes, *target, place, **self.options, **more)
        mlp = (p.weights, p.biases) if p.weights else ()
        return getattr(backend, self.op)(p.planes, *mlp, *target, place, **self.options, **more)


def decoder_of(p: testing.Problem, dtype: torch.dtype) -> tcam_ext.TriplaneDecoder:
    """A decoder with the weights of a problem."""
    channels, extra = p.planes[0].shape[1], p.weights[0].shape[1] - testing.plane_features(p)
    decoder = tcam_ext.TriplaneDecoder(
        channels, [len(w) for w in p.weights[:-1]], len(p.weights[-1]), extra_channels=extra, bias=p.biases[0] is not None,
        dtype=dtype, plane_axes=p.options["plane_axes"], reduce=p.options["reduce"],
        groups=p.options["groups"],
    )  # fmt: skip
    for layer, w, b in zip(decoder.layers(), p.weights, p.biases, strict=True):
        layer.weight.data.copy_(w)
        if b is not None:
            layer.bias.data.copy_(b)
    return decoder


def check(op: str, seed: int, number: int) -> Iterator[tuple[str, float, float]]:
    """Compare a problem with the reference: yields what is compared, its error and its limit."""
    draw = Draw(f"{seed} {number}")
    torch.manual_seed(draw.getrandbits(32))
    case = draw_case(draw, op)
    exact = Inputs(case, torch.float64, torch.float64, [True] * len(case.wanted))
    target, terms = [], None
    if op == "decode_grid_loss":
        wanted, out = against(case, exact)
        target.append(wanted)
        values = out.detach().nan_to_num()  # the mean of nothing is NaN
        # The kernel scales gradients last, after their roundings to bfloat16. Those in float16 are scaled as a GradScaler does.
        grad = torch.ones_like(out) if case.arithmetic == "bfloat16" else torch.rand_like(out)
        grad = grad * 2**10 if case.dtype == torch.float16 else grad
        dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    else:
        out, trusted = masked(case, exact)
        values = out.detach() if case.arithmetic != "bfloat16" else exact.call(reference).detach()
        grad = (torch.rand_like(out) if noisy(case) else torch.randn_like(out)) * trusted
        dtype = case.more.get("out_dtype", case.dtype)
        p = exact.problem
        if p.weights and not noisy(case):
            terms = testing.terms_of(p, p.xyz if isinstance(p, AtPoints) else None)
    mine = Inputs(case, case.dtype, case.points, case.wanted, case.module)
    got = native(case, mine, *target)
    expect(got, out, dtype)
    yield "forward", testing.relative(got.nan_to_num(), values, terms), limit(testing.FORWARD_LIMIT, case.arithmetic, dtype)
    if got.requires_grad:
        grad = grad.to(dtype)
        want = list(torch.autograd.grad(out, exact.leaves, grad.double()))
        yield from gradient_errors(case, exact, mine, want, got, grad)


def noisy(case: Case) -> bool:
    return "noise_seed" in case.problem.options


def expect(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    if got.dtype != dtype or got.shape != want.shape:
        raise AssertionError(f"{got.dtype} {tuple(got.shape)}, expected {dtype} {tuple(want.shape)}")


def masked(case: Case, exact: Inputs) -> tuple[Tensor, Tensor]:
    """The reference's result and a mask of the outputs with gradients to trust; see tcam_ext.testing.masked_reference."""
    p = exact.problem
    if case.arithmetic == "bfloat16":
        out, trusted = rounded_as_the_kernel(p)
    elif case.arithmetic == "float64" or not has_kinks(p):
        out = exact.call(reference)
        return out, torch.ones_like(out)
    else:
        out, trusted = testing.masked_reference(p)
    return (out.movedim(1, -1), trusted.movedim(1, -1)) if isinstance(p, AtPoints) else (out, trusted)


def has_kinks(p: testing.Problem) -> bool:
    names = activations.hidden_layers(p.options.get("activation", "relu"), max(len(p.weights) - 1, 0))
    kinks = any(n.split("(")[0] in testing.PIECEWISE_LINEAR for n in names)
    return bool(p.weights) and (kinks or p.options.get("output_activation") == "clamp")


class RoundedProduct(torch.autograd.Function):
    """A product that rounds what it multiplies to bfloat16, forward and backward, as AVX512_BF16 does."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
        h, w = testing.round_bfloat16(h), testing.round_bfloat16(w)
        ctx.save_for_backward(h, w)
        return h @ w.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, w = ctx.saved_tensors
        grad = testing.round_bfloat16(grad)
        return grad @ w, grad.flatten(0, -2).mT @ h.flatten(0, -2)


def rounded_as_the_kernel(p: testing.Problem) -> tuple[Tensor, Tensor]:
    """The outputs with bfloat16 products after the first layer, and a mask, as tcam_ext.testing.masked_reference gives them.

    Grids of products of planes have bfloat16 products in the first layer too, unless they have extra features.
    """
    options = {k: v for k, v in p.options.items() if k not in ("activation", "output_activation")}
    multiplied = options.get("reduce") == "prod" and max(options.get("groups") or [len(p.planes)]) > 1
    if multiplied and options.get("extra") is None and not isinstance(p, AtPoints):
        same = torch.eye(p.weights[0].shape[1], dtype=torch.float64)
        features = replace(p, weights=[same], biases=[None], options=options).call(reference.decode_grid).movedim(1, -1)
        z = RoundedProduct.apply(features, p.weights[0])
        z = z if p.biases[0] is None else z + p.biases[0]
    else:
        first = replace(p, weights=p.weights[:1], biases=p.biases[:1], options=options)
        z = first.call(reference.decode_grid).movedim(1, -1)
    trusted = torch.ones(z.shape[:-1], dtype=torch.float64)
    names = activations.hidden_layers(p.options["activation"], len(p.weights) - 1)
    for name, w, b in zip(names, p.weights[1:], p.biases[1:], strict=True):
        if name in testing.PIECEWISE_LINEAR:
            trusted *= (z.detach().abs() > 1e-4).all(-1)
        z = RoundedProduct.apply(activations.hidden("activation", name)(z), w)
        z = z if b is None else z + b
    out = activations.output("output_activation", p.options["output_activation"])(z)
    return out.movedim(-1, 1), trusted.unsqueeze(1)


def native(case: Case, mine: Inputs, *target: Tensor) -> Tensor:
    """The kernel's result, which has the same bits for one thread and two."""
    more = {**case.more, **case.objective}
    if case.preactivation and case.op in ("decode_grid", "decode_points"):
        more["return_preactivation"] = True
    results = []
    for threads in {1, case.threads}:
        torch.set_num_threads(threads)
        results.append(mine.call(tcam_ext, *target, **more))
    got, *others = (r[0] if isinstance(r, tuple) else r for r in results)
    if not all(torch.equal(got.nan_to_num(), o.nan_to_num()) for o in others):
        raise AssertionError("one thread gives other bits than two")
    return got


def against(case: Case, exact: Inputs) -> tuple[Tensor, Tensor]:
    """A target and the loss. The target is away from the kinks of the loss unless all is float64."""
    exact.op = "decode_grid"
    volume, trusted = masked(case, exact)
    want, objective = volume.detach(), case.objective
    if case.target == torch.uint8:
        target = torch.randint(0, 256, want.shape, dtype=torch.uint8)
    elif case.arithmetic == "float64":
        target = torch.rand_like(want).to(case.target)
    else:
        side = torch.where(torch.rand_like(want) < 0.5, 1.0, -1.0) if case.layout == "last" else -1.0
        size = want.square().mean().sqrt() if want.numel() else 0.0
        target = want + side * (1 + size) * (1 + torch.rand_like(want))
        exceeds = case.target == torch.float16 and not target.half().isfinite().all()
        target = target.to(torch.float32 if exceeds else case.target)
    if case.arithmetic != "float64" and (target.dtype == torch.uint8 or not trusted.all()):
        objective["loss"] = "mse"
    if case.arithmetic == "bfloat16":
        objective["reduction"] = "sum"
    if float(trusted.mean()) < 0.5:
        case.wanted = [False] * len(case.wanted)
    elif not trusted.all():  # without a slope there
        target = torch.where(trusted > 0, target.double(), want)
        target = target.to(torch.float64 if case.dtype == torch.float64 else torch.float32)
    real = target.double() / 255 if target.dtype == torch.uint8 else target.double()
    each = LOSSES[objective["loss"]](volume, real, objective["beta"])
    reduction = objective["reduction"]
    return target, each.flatten(1).mean(1) if reduction == "none_batch" else getattr(each, reduction)()


def gradient_errors(
    case: Case, exact: Inputs, mine: Inputs, want: list[Tensor], got: Tensor, grad: Tensor
) -> Iterator[tuple[str, float, float]]:
    """Compare the gradients of the inputs that require them."""
    found = iter(torch.autograd.grad(got, [t for t in mine.leaves if t.requires_grad], grad))
    grads = [next(found) if t.requires_grad else w.to(t.dtype) for t, w in zip(mine.leaves, want, strict=True)]
    for g, t in zip(grads, mine.leaves, strict=True):
        expect(g, t, t.dtype)
    grads, want = map(list, zip(*map(without_overflow, grads, want), strict=True))
    p = exact.problem
    if isinstance(p, AtPoints):
        *want, want_xyz = want
        *grads, xyz_grad = grads
        near = limit(testing.GRADIENT_LIMIT, case.arithmetic, case.points)
        if mine.leaves[-1].requires_grad and (case.arithmetic == "float64" or p.options["padding_mode"] != "reflection"):
            scale = want_xyz.norm().clamp_min(max(1e-3 * max(float(w.norm()) for w in want), 1e-30))
            difference = (xyz_grad.double() - want_xyz) * away_from_kinks(unit(p), p)
            yield "gradient of points", float(difference.norm() / scale), near
    own = [g if t.requires_grad else w for g, w, t in zip(grads, want, mine.leaves, strict=False)]
    yield "gradient", testing.gradient_error(own, want), limit(testing.GRADIENT_LIMIT, case.arithmetic, case.dtype)


def without_overflow(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients, with 0 where the right one is beyond the dtype, or nearly so; there ``got`` must be, too."""
    most = torch.finfo(got.dtype).max
    beyond = want.abs() > 0.99 * most
    if not bool((got * want.sign() > 0.98 * most)[beyond].all()):
        raise AssertionError(f"gradients are {got[beyond]}, expected {want[beyond]}")
    return got.masked_fill(beyond, 0), want.masked_fill(beyond, 0)


def unit(p: AtPoints) -> Tensor:
    """The points of a problem between -1 and 1."""
    if "bounds" not in p.options:
        return p.xyz.detach()
    bounds = torch.tensor(p.options["bounds"], dtype=torch.float64)
    if bounds.dim() == 3:
        objects = p.options.get("batch_index")
        bounds = bounds[objects] if objects is not None else bounds.view(len(bounds), *[1] * (p.xyz.dim() - 2), -1, 2)
    return (p.xyz.detach() - bounds[..., 0]) / (bounds[..., 1] - bounds[..., 0]) * 2 - 1


# ---- shards ----------------------------------------------------------------------------------


def run(op: str, isa: str, name: str, seed: int, count: int, work: Path, tally: campaign.Tally, first: int = 0) -> None:
    """Run the problems ``first`` to ``count`` - 1 in a process with an instruction set; after a crash, the rest in another."""
    environment = {**os.environ, "TCAM_CPU_ISA": isa} if has(isa) else dict(os.environ)
    number = first
    while number < count:
        command = [sys.executable, __file__, "--worker", op, str(seed), str(number), str(count)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                record({"shard": name, "seed": seed, "number": number}, json.loads(line), tally)
                number += 1
        if process.returncode:
            tally.fail({"shard": name, "seed": seed, "number": number}, f"exit status {process.returncode}")
            number += 1


def record(case: dict[str, Any], row: dict[str, Any], tally: campaign.Tally) -> None:
    """Enter the errors of a problem."""
    for what, error, most in row["errors"]:
        tally.measure(f"error / limit, {what}", error / most)
    wrong = [f"{what}: error {error:.3g}, limit {most:g}" for what, error, most in row["errors"] if not error < most]
    if row["exception"] or wrong:
        tally.fail(case, row["exception"] or "; ".join(wrong))
    else:
        tally.count("right")


def errors_of(op: str, seed: int, number: int) -> dict[str, Any]:
    """The errors of a problem and the text of an exception."""
    errors: list[tuple[str, float, float]] = []
    exception = ""
    try:
        for row in check(op, seed, number):
            errors.append(row)
    except Exception:
        exception = traceback.format_exc()
    return {"errors": errors, "exception": exception}


def has(isa: str) -> bool:
    """Whether this machine has an instruction set."""
    probe = [sys.executable, "-c", "import tcam_ext"]
    return subprocess.run(probe, env={**os.environ, "TCAM_CPU_ISA": isa}, capture_output=True).returncode == 0


def shards() -> list[campaign.Shard]:
    """The shards of all ops."""
    return [
        campaign.Shard(f"ops-{op}-{i}", PROBLEMS // len(ISAS), partial(run, op, isa, f"ops-{op}-{i}"))
        for op in OPS
        for i, isa in enumerate(ISAS)
    ]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        op, *numbers = sys.argv[2:]
        seed, first, end = map(int, numbers)
        for number in range(first, end):
            print(json.dumps(errors_of(op, seed, number)), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", metavar="SHARD", choices=[s.name for s in shards()])
    parser.add_argument("number", type=int, metavar="NUMBER")
    parser.add_argument("--seed", type=int, default=0, help="seed of the campaign (default: 0)")
    arguments = parser.parse_args()
    shard = next(s for s in shards() if s.name == arguments.shard)
    tally = campaign.Tally()
    own = campaign.seed_of(shard.name, arguments.seed)
    shard.run(own, arguments.number + 1, Path(), tally, first=arguments.number)  # type: ignore[call-arg]
    print(dict(tally.outcomes), tally.most)
    raise SystemExit(bool(tally.failures))


if __name__ == "__main__":
    main()
