"""Solvers at few evaluations of a trained model, beside heun with 100.

    python benchmarks/bench_solvers.py RUN2 [--distilled RUN4] [--n 16] [--json FILE]

RUN2 is a run of `tcam train-diffusion` with prior=gaussian, RUN4 one of `tcam distill` from it. All solvers start from the
same noise and take the model's grid. "difference" is the root mean square of the states' difference from heun's with 50
intervals, over the standard deviation of these. "spread" is the standard deviation of a solver's states about their mean over
that of heun's. With two and more evaluations a distilled model adds new noise, so its states are others.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import harness
import torch
from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.sampling import Sampler

#: Solvers and evaluations in each interval.
SOLVERS = {"heun": 2, "ab2": 1, "multirate": 1}
EVALUATIONS = (4, 8, 16, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="run of `tcam train-diffusion`, or a model's folder")
    parser.add_argument("--distilled", type=Path, help="run of `tcam distill` from the model")
    parser.add_argument("--n", type=int, default=16, help="samples")
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    for key, value in harness.environment().items():
        print(f"# {key}: {value}")
    model = TriplaneDiffusion.load(a.model)
    noise, numbers = Sampler(model).noise(range(a.n)), range(a.n)

    def draw(solver: str, steps: int, model: TriplaneDiffusion = model) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        states = Sampler(model, SampleConfig(solver=solver, steps=steps)).integrate(noise, numbers)  # type: ignore[arg-type]
        return states, time.perf_counter() - start

    reference, seconds = draw("heun", 50)
    deviation = float((reference - reference.mean(0)).std())
    rows = [row("heun", 100, reference, reference, deviation, seconds)]
    for solver, each in SOLVERS.items():
        for evaluations in EVALUATIONS:
            states, seconds = draw(solver, evaluations // each)
            rows.append(row(solver, evaluations, states, reference, deviation, seconds))
    if a.distilled:
        distilled = TriplaneDiffusion.load(a.distilled)
        for evaluations in (1, 2, 4):
            states, seconds = draw("consistency", evaluations, distilled)
            rows.append(row("consistency", evaluations, states, reference, deviation, seconds))
    if a.json:
        harness.write_json(a.json, rows)


def row(
    solver: str, evaluations: int, states: torch.Tensor, reference: torch.Tensor, deviation: float, seconds: float
) -> dict[str, object]:
    difference = float((states - reference).square().mean().sqrt()) / deviation
    spread = float((states - states.mean(0)).std()) / deviation
    print(
        f"{solver:<10} {evaluations:>4} evaluations: difference {difference:.4f}, spread {spread:.3f}, {seconds:.1f} s",
        flush=True,
    )
    return {
        "solver": solver, "evaluations": evaluations, "samples": len(states), "difference": difference, "spread": spread,
        "seconds": seconds,
    }  # fmt: skip


if __name__ == "__main__":
    main()
