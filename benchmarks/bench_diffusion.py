"""Time an evaluation and a training step of stage 2's network, and the decoding of a sample.

python benchmarks/bench_diffusion.py [--presets brats ...] [--batch 1 8] [--device cuda] [--compile] [--json FILE]

"of peak" is the rate of the multiply-adds divided by that of torch's product of two large matrices. "decode share" is the share
of decoding, at twice the planes' size, in drawing one volume (heun, 50 intervals).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import harness
import torch
from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.diffusion.network import TriplaneUNet
from torch.utils.flop_counter import FlopCounterMode

import tcam_ext

#: preset: (C, texels along each axis)
SIZES = {"tiny": (6, 16), "cohort": (8, 32), "small": (16, 32), "brats": (42, 64), "pancreas": (42, 128), "colon": (42, 256)}
EVALUATIONS = 100  # of heun, 50 intervals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(SIZES), default=["cohort", "small"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the network with max-autotune-no-cudagraphs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    environment = harness.environment()
    for key, value in environment.items():
        print(f"# {key}: {value}")
    peaks = harness.peak(a.device) if a.device == "cuda" else harness.cpu_matrix_peak()
    device, rows = torch.device(a.device), []
    head = f"{'preset':<10} {'batch':>5} {'products':<9} {'GMAC':>7} {'forward s':>10} {'of peak':>8}"
    print(f"{head} {'training s':>11} {'of peak':>8} {'decode s':>9} {'share':>7}")
    for preset in a.presets:
        channels, size = SIZES[preset]
        network = TriplaneUNet(channels, DiffusionConfig.load(preset).network).placed(device)
        decoder = tcam_ext.TriplaneDecoder(channels, [128] * 4, 1).to(device).requires_grad_(False)
        planes = [torch.randn(1, channels, size, size, device=device) for _ in range(3)]
        volume = (2 * size,) * 3
        compute = torch.bfloat16 if device.type == "cuda" else None
        decoding = harness.measure(
            lambda d=decoder, p=planes, v=volume, c=compute: d(p, v, compute_dtype=c), a.repeats, device=a.device
        )
        for batch in a.batch:
            for products in ("float32", "bfloat16"):
                if products not in peaks:
                    continue
                rows.append(measure(preset, network, channels, size, batch, products, peaks, a, statistics.median(decoding)))
    if a.json:
        harness.write_json(a.json, rows, peak_gflops=peaks)


def measure(
    preset: str, network: TriplaneUNet, channels: int, size: int, batch: int, products: str, peaks: dict[str, float],
    a: argparse.Namespace, decoding: float,
) -> dict[str, object]:  # fmt: skip
    device = torch.device(a.device)
    x = [torch.randn(batch, channels, size, size, device=device) for _ in range(3)]
    inputs = (x, torch.rand(batch, device=device) * 1000, None, None, x if network.config.prior_input else None)
    called = torch.compile(network, mode="max-autotune-no-cudagraphs") if a.compile else network

    def evaluate() -> None:
        with torch.no_grad(), torch.autocast(a.device, torch.bfloat16, enabled=products == "bfloat16"):
            called(*inputs)

    def step() -> None:
        with torch.autocast(a.device, torch.bfloat16, enabled=products == "bfloat16"):
            noise, x0 = called(*inputs)
        sum(p.float().square().mean() for p in (*noise, *x0)).backward()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    macs = counter.get_total_flops() / 2
    network.eval()
    forward = statistics.median(harness.measure(evaluate, a.repeats, device=a.device))
    network.train()
    training = statistics.median(harness.measure(step, a.repeats, device=a.device))
    peak = peaks[products] * 1e9
    row = {
        "preset": preset, "batch": batch, "products": products, "compiled": a.compile, "gmac": macs / 1e9,
        "forward_s": forward, "forward_of_peak": 2 * macs / forward / peak,
        "training_s": training, "training_of_peak": 6 * macs / training / peak,
        "decode_s": decoding, "decode_share": decoding / (decoding + EVALUATIONS * forward / batch),
    }  # fmt: skip
    print(
        f"{preset:<10} {batch:>5} {products:<9} {macs / 1e9:7.1f} {forward:10.4f} {row['forward_of_peak']:8.1%} "
        f"{training:11.4f} {row['training_of_peak']:8.1%} {decoding:9.4f} {row['decode_share']:7.1%}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
