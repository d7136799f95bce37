"""Time decode_grid and its rivals on the same inputs in one run.

    python benchmarks/bench_decode_grid.py                 64^3, 96^3, 128^3, three decoders
    python benchmarks/bench_decode_grid.py --large         256^3, 512^3 forward, 512^3 with gradients
    python benchmarks/bench_decode_grid.py --scaling       time over size and width, with log-log fits
    python benchmarks/bench_decode_grid.py --device cuda --cases tcam --sizes 128 256 512

TCAM_CPU_ISA=avx2 (avx512, portable) selects the CPU kernels. --json FILE writes the figures for make_tables.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tcam_ext
from tcam_ext.reference import Taps, linear_taps, sample_plane


@dataclass
class Decoder:
    name: str
    channels: int
    widths: tuple[int, ...]
    activation: str


DECODERS = {
    "tcam": Decoder("operating point", 42, (128, 128, 128, 128, 1), "relu"),
    "nfd": Decoder("NFD-like", 32, (128, 128, 1), "relu"),
    "eg3d": Decoder("EG3D-like", 32, (64, 4), "softplus"),
    "deep": Decoder("10 layers of 64", 40, (*[64] * 9, 4), "silu"),
    "wide": Decoder("4 layers of 512", 42, (512, 512, 512, 1), "relu"),
}
#: The passes that are timed, and the products per layer of each: backward recomputes one, loss+gradients none. (The fused CUDA
#: kernels recompute more; their rate is computed from these numbers too.)
PRODUCTS = {"forward": 1, "forward+backward": 4, "loss+gradients": 3}
AUTOTUNE = "max-autotune-no-cudagraphs"  # without graphs: in a CUDA graph the next chunk would overwrite the output of the last
PLANE = 64
CHUNK_VOXELS = {"cpu": 8 * 128**2, "cuda": 2**21}  # of one step of the naive decode, rounded to slices of x


class Case:
    def __init__(self, decoder: Decoder, size: int, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.decoder, self.size, self.device = decoder, size, device
        self.chunk = max(1, min(8 if device == "cpu" else size, CHUNK_VOXELS[device] // size**2))
        n = (3 * decoder.channels, *decoder.widths)
        planes = [torch.randn(1, decoder.channels, PLANE, PLANE) for _ in range(3)]
        weights = [torch.randn(n[i + 1], n[i]) * (2 / n[i]) ** 0.5 for i in range(len(n) - 1)]
        biases = [0.1 * torch.randn(m) for m in n[1:]]
        self.planes, self.weights, self.biases = (
            [t.to(device).requires_grad_() for t in tensors] for tensors in (planes, weights, biases)
        )
        self.inputs = [*self.planes, *self.weights, *self.biases]
        self.act = tcam_ext.activations.hidden("activation", decoder.activation)
        self.taps = Taps(*(t.to(device) for t in linear_taps(0, size, size, PLANE, False, "border")))
        self.coordinates = (torch.arange(size, device=device) + 0.5) / size * 2 - 1

    @property
    def flop(self) -> float:
        """FLOP of the products of the layers above the first, forward."""
        w = self.decoder.widths
        return 2.0 * self.size**3 * sum(w[i] * w[i + 1] for i in range(len(w) - 1))

    # ---- the rivals --------------------------------------------------------------------

    def mlp(self, h: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        for i in range(first, len(self.weights)):
            if i:
                h = self.act(h)
            h = F.linear(h, self.weights[i].to(dtype), self.biases[i].to(dtype))
        return torch.sigmoid(h.float())

    def naive_chunk(self, x0: int, dtype: torch.dtype) -> Tensor:
        u = self.coordinates
        x, y, z = torch.meshgrid(u[x0 : x0 + self.chunk], u, u, indexing="ij")
        features = []
        for plane, (rows, columns) in zip(self.planes, ((x, y), (y, z), (x, z)), strict=True):
            grid = torch.stack((columns, rows), -1).view(1, 1, -1, 2)
            features.append(F.grid_sample(plane, grid, align_corners=False, padding_mode="border")[0, :, 0].t())
        return self.mlp(torch.cat(features, -1).to(dtype), 0, dtype)

    def factored_chunk(self, x0: int) -> Tensor:
        inside = slice(x0, x0 + self.chunk)
        taps = [Taps(*(t[inside] for t in self.taps)), self.taps, self.taps]
        maps = []
        for plane, w, (a, b) in zip(
            self.planes,
            self.weights[0].split(self.decoder.channels, 1),
            ((0, 1), (1, 2), (0, 2)),
            strict=True,
        ):
            projected = F.linear(plane.movedim(1, -1), w).movedim(-1, 1)
            maps.append(sample_plane(projected, taps[a], taps[b])[0].movedim(0, -1))
        h = maps[0].unsqueeze(2) + (maps[1].unsqueeze(0) + maps[2].unsqueeze(1)) + self.biases[0]
        return self.mlp(h.view(-1, h.shape[-1]), 1, torch.float32)

    def autocast_chunk(self, x0: int) -> Tensor:
        """A chunk of the naive decode under autocast."""
        with torch.autocast(self.device, dtype=torch.bfloat16):
            return self.naive_chunk(x0, torch.float32)

    def checkpointed_chunk(self, x0: int) -> Tensor:
        decoded: Tensor = checkpoint(self.naive_chunk, x0, torch.float32, use_reentrant=False)
        return decoded

    def chunked(self, chunk: Callable[[int], Tensor], what: str) -> list[Tensor]:
        """Decode all chunks. Each chunk's graph is freed before the next is built."""
        step = self.size**2
        shape = (self.size**3, self.decoder.widths[-1]) if what != "loss+gradients" else ()
        out = torch.zeros(shape, device=self.device)
        grads = [torch.zeros_like(t) for t in self.inputs] if what != "forward" else []
        with torch.set_grad_enabled(what != "forward"):
            for x0 in range(0, self.size, self.chunk):
                part = chunk(x0)
                at = slice(x0 * step, x0 * step + part.shape[0])
                if what == "loss+gradients":
                    value = F.smooth_l1_loss(part, self.other_rows[at], beta=0.3, reduction="sum") / self.other.numel()
                    out += value.detach()
                    gradients = torch.autograd.grad(value, self.inputs)
                else:
                    out[at] = part.detach()
                    gradients = torch.autograd.grad(part, self.inputs, self.other_rows[at]) if grads else ()
                for g, t in zip(grads, gradients, strict=True):
                    g += t
        return [out, *grads]

    def ours(self, compute: torch.dtype | str, what: str, noise: str | None = None) -> list[Tensor]:
        mlp = (self.planes, self.weights, self.biases)
        options: dict[str, Any] = {} if noise is None else {"noise_std": 0.32, "noise_seed": 1, "noise_mode": noise}
        options |= {"activation": self.decoder.activation, "output_activation": "sigmoid", "compute_dtype": compute}
        if what == "loss+gradients":
            loss = tcam_ext.decode_grid_loss(*mlp, self.other, **options)
            return [loss.detach(), *torch.autograd.grad(loss, self.inputs)]
        with torch.set_grad_enabled(what != "forward"):
            out = tcam_ext.decode_grid(*mlp, (self.size,) * 3, **options)
            return [out.detach(), *(torch.autograd.grad(out, self.inputs, self.other) if what != "forward" else ())]

    def rivals(self, what: str, names: list[str]) -> dict[str, Callable[[], list[Tensor]]]:
        if what != "forward":  # grad_output, or the target
            self.other = torch.rand(1, self.decoder.widths[-1], *(self.size,) * 3, device=self.device)
            self.other_rows = self.other.view(self.decoder.widths[-1], -1).t().contiguous()
        torch._dynamo.reset()

        def compiled(chunk: Callable[..., Tensor], *more: Any, mode: str = "default") -> Callable[[], list[Tensor]]:
            fast = torch.compile(chunk, fullgraph=True, mode=mode)
            return lambda: self.chunked(lambda x: fast(x, *more), what)

        def naive(dtype: torch.dtype) -> Callable[[], list[Tensor]]:
            return lambda: self.chunked(lambda x: self.naive_chunk(x, dtype), what)

        everyone: dict[str, Callable[[], Callable[[], list[Tensor]]]] = {
            "naive float32": lambda: naive(torch.float32),
            "naive compiled": lambda: compiled(self.naive_chunk, torch.float32),
            "naive bfloat16 MLP": lambda: naive(torch.bfloat16),
            "naive bfloat16 autocast": lambda: lambda: self.chunked(self.autocast_chunk, what),
            "naive bfloat16 compiled": lambda: compiled(self.autocast_chunk),
            "naive max-autotune": lambda: compiled(self.naive_chunk, torch.float32, mode=AUTOTUNE),
            "naive bfloat16 max-autotune": lambda: compiled(self.autocast_chunk, mode=AUTOTUNE),
            "naive checkpointed": lambda: lambda: self.chunked(self.checkpointed_chunk, what),
            "factored PyTorch float32": lambda: lambda: self.chunked(self.factored_chunk, what),
            "ours float32": lambda: lambda: self.ours(torch.float32, what),
            "ours tf32": lambda: lambda: self.ours("tf32", what),
            "ours bfloat16": lambda: lambda: self.ours(torch.bfloat16, what),
            "ours float16": lambda: lambda: self.ours(torch.float16, what),
            "ours float32, point noise": lambda: lambda: self.ours(torch.float32, what, "point"),
            "ours float32, texel noise": lambda: lambda: self.ours(torch.float32, what, "texel"),
            "ours bfloat16, point noise": lambda: lambda: self.ours(torch.bfloat16, what, "point"),
            "ours bfloat16, texel noise": lambda: lambda: self.ours(torch.bfloat16, what, "texel"),
        }
        return {n: everyone[n]() for n in names if self.differs(n, what)}

    def differs(self, name: str, what: str) -> bool:
        """Whether a rival differs from the others in this pass: checkpointing does only with a backward."""
        return name != "naive checkpointed" or what != "forward"


RIVALS = {
    "cpu": [
        "naive float32",
        "naive compiled",
        "naive bfloat16 MLP",
        "naive bfloat16 compiled",
        "naive max-autotune",
        "factored PyTorch float32",
        "ours float32",
        "ours bfloat16",
        "ours float32, point noise",
        "ours float32, texel noise",
    ],
    "cuda": [
        "naive float32",
        "naive compiled",
        "naive checkpointed",
        "naive bfloat16 autocast",
        "naive bfloat16 compiled",
        "naive max-autotune",
        "naive bfloat16 max-autotune",
        "factored PyTorch float32",
        "ours float32",
        "ours tf32",
        "ours bfloat16",
        "ours float16",
        "ours bfloat16, point noise",
        "ours bfloat16, texel noise",
    ],
}


def finish(r: harness.Row, case: Case, peak: dict[str, float]) -> harness.Row:
    """The row with the rate of the products of the layers above the first and its share of the peak."""
    if case.flop:
        r.gflops = case.flop * PRODUCTS[r.what] / r.seconds / 1e9
        if r.rival.startswith("ours"):
            kind = r.rival.removeprefix("ours ").split(",")[0]
            r.of_peak = r.gflops / (peak.get(kind) or peak["float32"])
    return r


def compare(
    cases: list[str],
    sizes: list[int],
    names: list[str],
    repeats: int,
    peak: dict[str, float],
    device: str,
    keep: Callable[[list[harness.Row]], None],
    budget: float | None,
    jsonl: Path | None,
) -> list[harness.Row]:
    """Time the rivals of every case and size. ``keep`` gets the rows so far after each comparison, so that a later failure
    loses none. With a ``budget`` in seconds, rivals run one after the other for at most that long each, instead of taking
    turns."""
    rows: list[harness.Row] = []
    for key in cases:
        for size in sizes:
            case = Case(DECODERS[key], size, device)
            for what in PRODUCTS:
                runs = case.rivals(what, names)
                times = {}
                if budget is None:
                    times = harness.interleave(runs, repeats, device)
                for name in runs if budget is not None else ():
                    try:
                        times[name] = harness.measure(runs[name], repeats, budget, device)
                    except Exception as error:
                        print(f"# {name}: left out, {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
                        continue
                    harness.append(jsonl, harness.row(case.decoder.name, size, what, name, times[name]))
                base = statistics.median(times["naive float32"]) if "naive float32" in times else None
                for name, t in times.items():
                    r = finish(harness.row(case.decoder.name, size, what, name, t), case, peak)
                    r.ratio = base / r.seconds if base else None
                    if budget is None:
                        r.memory_mb = round(harness.peak_memory(runs[name], device), 1)
                        harness.append(jsonl, r)
                    rows.append(r)
                    print(harness.line(r), flush=True)
                keep(rows)
    return rows


def large(peak: dict[str, float]) -> list[harness.Row]:
    rows = []
    small = Case(DECODERS["tcam"], 96)
    naive = {w: statistics.median(harness.measure(small.rivals(w, ["naive float32"])["naive float32"], 3)) for w in PRODUCTS}
    for size, what in ((256, "forward"), *((512, w) for w in PRODUCTS)):
        case = Case(DECODERS["tcam"], size)
        scaled = naive[what] * (size / 96) ** 3
        rows.append(harness.row(case.decoder.name, size, what, "naive float32", [scaled]))
        rows[-1].extrapolated, rows[-1].ratio = True, 1.0
        print(harness.line(rows[-1]), flush=True)
        for name in ("ours float32", "ours bfloat16") if peak["bfloat16"] else ("ours float32",):
            run = case.rivals(what, [name])[name]
            times: list[float] = []

            def once(run: Callable[[], Any] = run, times: list[float] = times) -> Any:
                start = harness.time.perf_counter()
                out = run()
                times.append(harness.time.perf_counter() - start)
                return out

            memory = harness.peak_memory(once)
            r = finish(harness.row(case.decoder.name, size, what, name, times), case, peak)
            r.ratio, r.memory_mb = scaled / r.seconds, round(memory, 1)
            rows.append(r)
            print(harness.line(r), flush=True)
    return rows


def profile(case: str, size: int, compute: str) -> None:
    """Print the time of every CUDA kernel in one call of each pass of tcam_ext."""
    problem = Case(DECODERS[case], size, "cuda")
    for what in PRODUCTS:
        run = problem.rivals(what, [compute])[compute]
        run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        print(f"\n{case}, {size}^3, {what}, {compute}")
        print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=16, max_name_column_width=90))


def slope(x: list[float], y: list[float]) -> float:
    """The least-squares slope of log y over log x."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    return sum((p - ma) * (q - mb) for p, q in zip(a, b, strict=True)) / sum((p - ma) ** 2 for p in a)


def scaling(repeats: int, peak: dict[str, float]) -> tuple[list[harness.Row], dict[str, float]]:
    rows, fits = [], {}
    sizes, widths = (32, 48, 64, 96, 128, 192), (32, 64, 96, 128, 192, 256)
    for what in PRODUCTS:
        seconds = []
        for size in sizes:
            case = Case(DECODERS["tcam"], size)
            run = case.rivals(what, ["ours float32"])["ours float32"]
            rows.append(
                finish(
                    harness.row("size", size, what, "ours float32", harness.measure(run, repeats, 60)),
                    case,
                    peak,
                )
            )
            seconds.append(rows[-1].seconds)
            print(harness.line(rows[-1]), flush=True)
        fits[f"{what}: exponent of the number of voxels, 32^3 to 192^3"] = slope([float(s) ** 3 for s in sizes], seconds)
        seconds = []
        for width in widths:
            case = Case(Decoder(f"width {width}", 42, (width,) * 4 + (1,), "relu"), 64)
            run = case.rivals(what, ["ours float32"])["ours float32"]
            rows.append(
                finish(
                    harness.row(f"width {width}", 64, what, "ours float32", harness.measure(run, repeats, 60)),
                    case,
                    peak,
                )
            )
            seconds.append(rows[-1].seconds)
            print(harness.line(rows[-1]), flush=True)
        fits[f"{what}: exponent of the hidden layers' products, widths 32 to 256"] = slope(
            [float(w) ** 2 for w in widths], seconds
        )
    for name, value in fits.items():
        print(f"{name}: {value:.3f}")
    return rows, fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(DECODERS), default=["tcam", "nfd", "eg3d"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 96, 128])
    parser.add_argument("--rivals", nargs="+", choices=sorted({r for names in RIVALS.values() for r in names}))
    parser.add_argument("--device", choices=sorted(RIVALS), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="time 256^3 and 512^3; naive rows are extrapolated from 96^3")
    parser.add_argument("--scaling", action="store_true", help="time over size and width, with log-log fits")
    parser.add_argument("--profile", action="store_true", help="list the CUDA kernels of tcam_ext; needs --device cuda")
    parser.add_argument("--budget", type=float, help="seconds for each rival; rivals then run one after the other")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--jsonl", type=Path, help="append each figure to this file as soon as it is measured")
    a = parser.parse_args()
    environment = harness.environment()
    for key, value in environment.items():
        print(f"# {key}: {value}")
    if a.device == "cuda" and (a.large or a.scaling):
        parser.error("--large and --scaling are for the CPU; --device cuda takes any --sizes")
    if a.profile:
        if a.device != "cuda":
            parser.error("--profile: expected --device cuda")
        for key in a.cases:
            for size in a.sizes:
                for name in a.rivals or ["ours bfloat16"]:
                    profile(key, size, name)
        return
    peak = harness.peak(a.device)
    print("# peak, GFLOP/s: " + ", ".join(f"{k} {v:.0f}" for k, v in peak.items() if v))
    print(harness.HEADER)
    fits: dict[str, float] = {}

    def keep(rows: list[harness.Row]) -> None:
        if a.json:
            harness.write_json(a.json, rows, peak_gflops=peak, fits=fits)

    if a.large:
        rows = large(peak)
    elif a.scaling:
        rows, fits = scaling(a.repeats, peak)
    else:
        rows = compare(a.cases, a.sizes, a.rivals or RIVALS[a.device], a.repeats, peak, a.device, keep, a.budget, a.jsonl)
    keep(rows)
    if a.json:
        print(f"wrote {a.json}")


if __name__ == "__main__":
    main()
