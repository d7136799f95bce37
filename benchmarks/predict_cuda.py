"""Predict the time of the fused CUDA kernels at 512^3 on a Hopper GPU from the compiled instructions.

    python benchmarks/predict_cuda.py [--clock 1.755] [--json FILE]

The operating point has 42 channels, four hidden layers of 128, one output and bfloat16 products. The kernels of csrc/cuda are
compiled with the constants of this case, so that the loop over steps contains exactly the instructions of a step, and nvdisasm
lists it. A step of the backward kernels covers 128 voxels on a multiprocessor, with one chain warp and one outer warp on each
of its four schedulers:

    tensor  = (products of both warps) C;   chain = (its products) C + X (its other instructions) + W
    time    = steps max(tensor, chain) / clock, launch by launch

C is the cycles of an m16n8k16 product on a scheduler at the reported rate of mma.sync (63 % of 4096 FLOP per cycle and
multiprocessor: 6.35). X = 0.7 is the share of other instructions that products do not hide. W = 400 is the cycles of waiting
per step. C, X and W are assumptions; benchmarks/mma_rate.cu measures C. Exposed memory traffic (delta_1 and its partial sums)
and the launches of the slabs are added.

The script needs nvcc and nvdisasm (from the toolkit or from Triton).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "ops"))
import test_resources as compiled  # noqa: E402

SOURCE = """
#include "{csrc}/cuda/fused_backward.cuh"
#include "{csrc}/cuda/fused_forward.cuh"
namespace tcam {{
template <bool head, int layer>
__global__ void __launch_bounds__(FusedBackwardKernel<ptx::BFloat16, 128>::threads, 1) backward_launch(FusedBackward p) {{
  p.head = head, p.layer = layer, p.products = 3, p.n_out = 1, p.weighted = p.compares = true, p.loss = Loss::smooth_l1;
  p.scale = p.last_scale = nullptr, p.dtype = TCAM_F32, p.voxel_stride = 1;
  p.output_activation.kind = OutputActivation::sigmoid;
  FusedBackwardKernel<ptx::BFloat16, 128>::run(p);
}}
template __global__ void backward_launch<true, 4>(FusedBackward);
template __global__ void backward_launch<false, 3>(FusedBackward);
template __global__ void backward_launch<false, 2>(FusedBackward);
__global__ void __launch_bounds__(384, 1) forward_launch(FusedForward p) {{
  p.n_out = 1, p.dtype = TCAM_F32, p.output_activation.kind = OutputActivation::sigmoid;
  FusedForwardKernel<ptx::BFloat16, 128, 2, 12, 1, 3>::run(p);
}}
}}
"""
#: (Name, iterations of the loop over layers forward, iterations of the loop over layers backward) of each launch. The last
#: layer backward is outside the loop.
LAUNCHES = {"b1ELi4E": ("head, layer 4", 3, 0), "b0ELi3E": ("layer 3", 1, 1), "b0ELi2E": ("layer 2", 0, 2)}
OUTER_PRODUCTS = 4 * 72  # four tiles of a step, with a quarter of dW each
PROCESSORS, VOXELS = 132, 512**3
CYCLES = 4096 / (4096 / 4) / 0.63  # of m16n8k16 (4096 FLOP) on one of four schedulers
EXPOSED, WAIT = 0.7, 400
TRAFFIC_MS, SLABS_MS = {"H200": 12.0, "H100": 17.0}, 2.5


def count(cubin: Path) -> dict[str, tuple[int, int]]:
    """The products and the other instructions of a chain warp's step, for each launch."""
    counts = {}
    for name, (_, forward, back) in LAUNCHES.items():
        # The outer warps' loops have 72 products.
        loops = [b for b in compiled.loops(cubin, f"backward_launch.*{name}") if b["HMMA"] > 72]
        inner = [b for b in loops if b["HMMA"] == 256 and b["LDSM"] == 64]
        step = min((b for b in loops if b not in inner), key=Counter.total, default=None) or min(loops, key=Counter.total)
        products, all_of_it = step["HMMA"], step.total()
        for body, runs in zip(
            sorted(inner, key=lambda b: -b["F2FP"] - b["STSM"]), [n for n in (forward, back) if n > 1], strict=False
        ):
            products += (runs - 1) * body["HMMA"]
            all_of_it += (runs - 1) * body.total()
        counts[name] = products, all_of_it - products
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clock", type=float, default=1.755, help="GHz (1.98 at most)")
    parser.add_argument("--card", choices=sorted(TRAFFIC_MS), default="H200")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="csrc of another checkout, to compare")
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    if compiled.NVCC is None or compiled.disassembler() is None:
        sys.exit("predict_cuda.py needs nvcc and nvdisasm (Triton, which comes with torch, has one)")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        source = Path(folder) / "launches.cu"
        source.write_text(SOURCE.format(csrc=a.csrc.resolve()))
        arch = "-gencode=arch=compute_90a,code=sm_90a"
        subprocess.run([compiled.NVCC, "-std=c++17", "-O3", "-cubin", arch, str(source), "-o", str(cubin)], check=True)
        counted = count(cubin)
        (forward,) = [b for b in compiled.loops(cubin, "forward_launch") if b["HMMA"] == 784][:1]
    per_ms = a.clock * 1e6
    rows, total = [], 0.0
    print(f"{'launch':<14} {'products':>8} {'other':>6} {'tensor':>7} {'chain':>7} {'cycles':>7} {'ms':>6}")
    for name, (products, other) in counted.items():
        tensor, chain = (products + OUTER_PRODUCTS) * CYCLES, products * CYCLES + EXPOSED * other + WAIT
        ms = VOXELS / 128 / PROCESSORS * max(tensor, chain) / per_ms
        total += ms
        rows.append(
            {"launch": LAUNCHES[name][0], "products": products, "other": other, "tensor": tensor, "chain": chain, "ms": ms}
        )
        cycles = f"{tensor:>7.0f} {chain:>7.0f} {max(tensor, chain):>7.0f}"
        print(f"{LAUNCHES[name][0]:<14} {products:>8} {other:>6} {cycles} {ms:>6.1f}")
    # A step of the forward kernel covers 32 voxels of each of 12 warps, three per scheduler.
    bound = VOXELS / 384 / PROCESSORS * 3 * forward["HMMA"] * CYCLES / per_ms
    decode = bound / 0.87
    more = TRAFFIC_MS[a.card] + SLABS_MS
    print(f"launches {total:.1f} ms; delta_1 and partial sums {TRAFFIC_MS[a.card]:.0f}, slabs {SLABS_MS} ms ({a.card})")
    figures = {"forward": decode, "loss+gradients": total + more, "forward+backward": total + more + decode}
    for what, ms in figures.items():
        print(f"predicted at {a.clock} GHz: {what:<17} {ms:6.1f} ms" + (" (87 % of its bound)" if what == "forward" else ""))
    if a.json:
        a.json.write_text(
            json.dumps({"clock_ghz": a.clock, "card": a.card, "rows": rows, "predicted_ms": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
