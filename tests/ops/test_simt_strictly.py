"""A test of the emulator: sanitizers report nothing in the kernels, and the tests find planted faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import simt

pytestmark = [*simt.skip_where_it_cannot_run, pytest.mark.exhaustive, pytest.mark.timeout(1800)]


def run_tests(library: Path, selected: str, preload: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the selected tests of the kernels on the emulator against a library, in a new process."""
    env = {**os.environ, "TCAM_SIMT_LIBRARY": str(library), "LD_PRELOAD": preload, **environment}
    files = [f"tests/ops/{name}.py" for name in ("test_simt", "test_simt_fused", "test_simt_points")]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", selected, *files]
    return subprocess.run(command, env=env, cwd=simt.ROOT, capture_output=True, text=True)


def runtime(name: str) -> str:
    assert simt.CXX is not None
    path = subprocess.run([*simt.CXX.split(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"no {name}")
    return path


def test_address_and_undefined_behaviour(tmp_path):
    preload = f"{runtime('libasan.so')} {runtime('libubsan.so')}"
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    selected = "(values and float64 and silu) or box or (losses and mse) or dtypes or normals or noise"
    selected += " or (mirror and bfloat16) or (fused_gradients and bfloat16 and one) or (points and not fused)"
    selected += " or (fused_points and 64) or product_of or resampling"
    done = run_tests(simt.build(tmp_path, *flags), selected, preload, ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0, done.stdout + done.stderr


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
import ctypes, problems, raw, torch
kernels = raw.Kernels(ctypes.CDLL({library!r}), "cuda", (0, None))
p = problems.make(channels=2, texels=(2, 3, 2), widths=(18, 17, 2), size=(2, 3, 7)).to(torch.float32)
fused = problems.make(channels=2, texels=(2, 3, 2), widths=(64, 64, 1), size=(13, 4, 33)).to(torch.float32)
deep = problems.make(channels=2, texels=(2, 3, 2), widths=(64, 64, 64, 2), size=(2, 3, 33)).to(torch.float32)
for order in (0, 1, 2):
    kernels.library.simt_schedule(order, order == 1, 0, 5, 1)
    if "general" in {parts!r}:
        kernels.forward(p)
        kernels.forward(p, 5)
        kernels.loss(p, torch.rand(1, 2, 2, 3, 7), "mse")
        kernels.resample(torch.rand(2, 9, 3), 4, 9, 0, 9, adjoint=True)
    if "forward" in {parts!r}:
        kernels.forward(fused, 3)
    if "backward" in {parts!r}:
        kernels.library.simt_device(227 << 10, 1)  # one block walks all columns
        kernels.loss(deep, torch.rand(1, 2, 2, 3, 33), "mse", compute=3)
        kernels.loss(deep, torch.rand(1, 2, 2, 3, 33), "mse", compute=3, grads=(True, False))
        kernels.library.simt_device(227 << 10, 2)
    if "points" in {parts!r}:
        xyz, grad = torch.rand(90, 3) * 2 - 1, torch.rand(90, 2)
        for formulation in (1, 2):
            kernels.points(p, xyz, grad, formulation=formulation, tile=50)
        kernels.points(deep, xyz, grad, compute=3, tile=70)
        kernels.normals(2, 70, 1, 3)
print("finished")
"""


PARTS = ("general", "forward", "backward", "points")


def races(
    tmp_path: Path, csrc: Path = simt.ROOT / "csrc", parts: tuple[str, ...] = PARTS, first: bool = False
) -> tuple[int, str]:
    """The number of data races between barriers in small calls, by ThreadSanitizer, and its log; ``first``: stop at one."""
    library = simt.build(tmp_path, "-O1", "-g", "-fsanitize=thread", csrc=csrc)
    script = DRIVER.format(tests=str(simt.ROOT / "tests" / "ops"), library=str(library), parts=parts)
    env = {
        **os.environ,
        "LD_PRELOAD": runtime("libtsan.so"),
        "TSAN_OPTIONS": f"exitcode=0 halt_on_error={int(first)}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    return done.stderr.count("WARNING: ThreadSanitizer: data race"), done.stdout + done.stderr


def test_no_races_between_barriers(tmp_path):
    count, log = races(tmp_path)
    assert "finished" in log
    assert count == 0, log


def mutated(tmp_path: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc with one fault."""
    csrc = tmp_path / "csrc"
    shutil.copytree(simt.ROOT / "csrc", csrc)
    path = csrc / "cuda" / file
    text = path.read_text()
    assert old in text, f"{file} has no {old!r}: the fault must be planted elsewhere"
    path.write_text(text.replace(old, new, 1))
    return csrc


#: Barriers without which a race or a deadlock shows, and the part of the driver in which it does.
BARRIERS = {
    "general": ("general", "gemm.cuh", "    __syncthreads();\n", ""),
    "forward step": ("forward", "fused_forward.cuh", "meet();  // all warps have read the maps\n        if (f", "if (f"),
    "backward start": ("backward", "fused_backward.cuh", "    __syncthreads();\n    if (tid", "    if (tid"),
    "backward step": ("backward", "fused_backward_chain.cuh", "meet();  // all warps have read the maps", ""),
    "backward maps": ("backward", "fused_backward_chain.cuh", "ptx::wait_copies();\n      meet();", "ptx::wait_copies();"),
    "sums over k": ("backward", "grid_kernels.cuh", "__syncthreads();  // the sums of this step", "// "),
    "copies of delta_1": ("backward", "grid_kernels.cuh", "__syncwarp();  // the group is there", "// "),
    "tile read": ("backward", "fused_backward_chain.cuh", "barrier_wait(read + tile", "barrier_arrive(read + tile"),
    "tile written": ("backward", "fused_backward_outer.cuh", "barrier_wait(written + w", "barrier_arrive(written + w"),
}


@pytest.mark.parametrize("barrier", sorted(BARRIERS))
def test_a_missing_barrier_is_a_race(barrier, tmp_path):
    part, *fault = BARRIERS[barrier]
    count, log = races(tmp_path, mutated(tmp_path, *fault), (part,), first=True)
    assert count > 0 or "finished" not in log


BARRIER = "__syncthreads();\n"
FAULTS = {
    "no barrier after the load": ("gemm.cuh", BARRIER + "  Tile tile;", "  Tile tile;"),
    "no barrier after the products": ("gemm.cuh", "left, b_sum);\n    " + BARRIER, "left, b_sum);\n"),
    "the last row tile is missing": ("gemm.cuh", "(m + Tile::rows - 1) / Tile::rows", "m > Tile::rows ? m / Tile::rows : 1"),
    "the last depth is not read": ("gemm.cuh", "left -= depth; left > 0;", "left -= depth; left >= depth;"),
    "weights of the taps swapped": ("grid_kernels.cuh", "t.w_lo * (u.w_lo", "t.w_lo * (u.w_hi"),
    "a group of delta_1 before its copies end": ("grid_kernels.cuh", "wait_copies<last - 1>", "wait_copies<last>"),
    "texels above forgotten": ("grid_kernels.cuh", "first_tap(taps, count, r + 1)", "first_tap(taps, count, r)"),
    "a region's sum replaces the one before": (
        "sums.cuh",
        "before[i] += sum[i]",
        "before[i] = sum[i]",
    ),
    "half of the lanes forgotten": ("mlp_kernels.cuh", "int other = 16;", "int other = 8;"),
    "partial sums replaced": (
        "gemm.cuh",
        "columns + c; }\n  TCAM_DEVICE const Real* reads(int split, int64_t r, int c) const { return at(split, r, c); }",
        "columns + c; }\n  TCAM_DEVICE const Real* reads(int, int64_t, int) const { return nullptr; }",
    ),
    "partial sums of rows replaced": ("gemm.cuh", "m + row0 + r] += sum;", "m + row0 + r] = sum;"),
    "a map not cleared": ("grid.cuh", "m < 3; ++m) c.clear(", "m < 1; ++m) c.clear("),
    "no wait for the copies": ("fused_forward.cuh", "ptx::wait_copies();\n        meet();", "meet();"),
    "no fence of registers": ("fused_tile.cuh", "ptx::warpgroup_fence();", ""),
    "no fence after the panels": ("fused_tile.cuh", "if (MT == 1) ptx::products_fence();", ""),
    "products whose group stays open": ("fused_tile.cuh", "ptx::warpgroup_commit();", ""),
    "no wait for the products": ("fused_tile.cuh", "ptx::warpgroup_wait();", ""),
    "another swizzle for wgmma": ("fused_tile.cuh", "((chunk ^ row) & 7) << 3", "((chunk ^ row ^ 1) & 7) << 3"),
    "no fence after a given tile": ("fused_backward_chain.cuh", "if (MT == 1) ptx::products_fence();", ""),
    "a given tile's blocks swapped": (
        "fused_backward_outer.cuh",
        "delta.at(b * given_block",
        "delta.at((blocks - 1 - b) * given_block",
    ),
    "two registers of a fragment swapped": ("fused_tile.cuh", "pack_relu(c[0][2], c[0][3])", "pack_relu(c[1][0], c[1][1])"),
    "another swizzle for the weights": ("fused_tile.cuh", "((lane >> 3) & 1) ^ swizzle", "((lane >> 3) & 1) ^ (swizzle ^ 2)"),
    "rows past the end are written": (
        "fused_forward.cuh",
        "if (i >= maps.ni || j >= maps.nj) return;",
        "if (j >= maps.nj) return;",
    ),
    "the low halves of the last layer forgotten": ("fused_tile.cuh", "T::round(w - T::widen(high))", "uint16_t(0)"),
    "a bit of the masks shifted": ("fused_backward_chain.cuh", "<< (15 - (s % 4 * 4 + r))", "<< (15 - (s % 4 * 4 + (r ^ 1)))"),
    "the mask of another layer": (
        "fused_backward_chain.cuh",
        "stored_mask(p, top - u, at",
        "stored_mask(p, top, at",
    ),
    "the panel of another layer": (
        "fused_backward_chain.cuh",
        "(forward_products(at.p) + back) * N * N",
        "forward_products(at.p) * N * N",
    ),
    "voxels past the end count": ("fused_backward_chain.cuh", "&& k + n * 8 < p.maps.nk && (n", "&& (n"),
    "rows of dW swapped": (
        "fused_backward_outer.cuh",
        "r = row + half * 8 + lane.g",
        "r = row + (half ^ 1) * 8 + lane.g",
    ),
    "half of the sums of delta": ("fused_backward_outer.cuh", "if (half == right)", "if (half == 0)"),
    "half of the sums of delta with wgmma": (
        "fused_backward_outer.cuh",
        "T::mma(row_sum[b], a,",
        "if (half) T::mma(row_sum[b], a,",
    ),
    "the sums of a slab replace those before": ("fused_backward_outer.cuh", "lane.t * 2 + e] += sum", "lane.t * 2 + e] = sum"),
    "columns of delta_1 in another order": (
        "fused_tile.cuh",
        "at / 2 % 4 * 8 + at / 8 % 4 * 2",
        "at / 8 % 4 * 8 + at / 2 % 4 * 2",
    ),
    "no scale": ("scale.cuh", "frexpf(most, &from);", ";"),
    "a scale that is not undone": ("fused_mlp.cuh", "    factor_ = scale_ + 4;", "    factor_ = scale_ + 1;"),
    "a tile of the sums over i forgotten": ("grid.cuh", "add_axis_sum(partial_g_", "if (i0 == 0) add_axis_sum(partial_g_"),
    "the bias of the layer below the last": ("fused_mlp_kernels.cuh", "sum * p.bias[r]", "sum"),
    "two corners of a point swapped": (
        "points_kernels.cuh",
        "begin + r.hi * p.columns[q] + c.lo",
        "begin + r.hi * p.columns[q] + c.hi",
    ),
    "a wave's texels replace the one before": (
        "points_kernels.cuh",
        "sums[e] += static_cast<Real>",
        "sums[e] = static_cast<Real>",
    ),
    "a wave's integers are added again": ("points_kernels.cuh", "fixed[e] = 0;", ";"),
    "floats for integers": ("points_kernels.cuh", "fixed_exponent = 45", "fixed_exponent = 4"),
    "the slope of one axis for the other": (
        "points_kernels.cuh",
        "if (a == p.row_axis[q]) sum[a] += by_row",
        "if (a == p.row_axis[q]) sum[a] += by_column",
    ),
    "a point's object forgotten": ("points_kernels.cuh", "(object < 0 ? 0 : object) * p.rows", "0 * p.rows"),
    "noise of the box's voxels": ("points_kernels.cuh", "!p.points ? p.box.number(point)", "!p.points ? point"),
    "words of a block swapped": ("points_kernels.cuh", "const int f = w * blocks + b;", "const int f = (w ^ 1) * blocks + b;"),
    "noise of another object": ("points_kernels.cuh", "p.object(point) : n.grid_object", "p.object(point) : 0"),
    "what 32 points leave is forgotten": (
        "fused_rows.cuh",
        "    part(wave, volume, objective, loss, output, whole, 1, count - whole);\n",
        "",
    ),
    "channels of delta_1 in another order": (
        "fused_mlp_kernels.cuh",
        "const int c = delta1_column(static_cast<int>(e % padded));",
        "const int c = static_cast<int>(e % padded);",
    ),
    "outputs of points in another order": ("fused_mlp_kernels.cuh", "planar[e % channels * count + e / channels]", "planar[e]"),
    "zeros that are none": ("fused_rows.cuh", "c.clear(maps.a,", "if (false) c.clear(maps.a,"),
    "a texel's voxels begin too late": ("resample.cu", "< r - 1 + 2 *", "< r + 2 *"),
    "no barrier before the next texel": ("resample.cu", "__syncthreads();  // range is read", ""),
    "no barrier before the tree": ("sums.cuh", "[threadIdx.x] = value;\n  " + BARRIER, "[threadIdx.x] = value;\n"),
}


#: The tests that must find a fault, by the file of the fault.
FINDERS = {
    "gemm.cuh": "(values and relu and float64) or losses",
    "sums.cuh": "(values and relu and float64) or losses",
    "mlp_kernels.cuh": "values and relu and float64",
    "grid_kernels.cuh": "(values and relu and float64) or losses",
    "grid.cuh": "(values and relu and float64) or fused_gradients",
    "fused_tile.cuh": "fused_kernel or loses or (fused_gradients and one)",
    "fused_forward.cuh": "fused_kernel",
    "fused_backward_chain.cuh": "fused_gradients",
    "fused_backward_outer.cuh": "fused_gradients",
    "fused_mlp.cuh": "float16",
    "fused_mlp_kernels.cuh": "fused_gradients or fused_points",
    "fused_rows.cuh": "fused_points",
    "scale.cuh": "float16 and not mirror",
    "points_kernels.cuh": "points or product_of or noise",
    "resample.cu": "resampling or normals",
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_planted_fault_is_found(fault, tmp_path):
    library = simt.build(tmp_path, csrc=mutated(tmp_path, *FAULTS[fault]))
    done = run_tests(library, FINDERS[FAULTS[fault][0]])
    assert done.returncode in (1, simt.DIED) or done.returncode < 0, f"{fault}: not found\n{done.stdout[-2000:]}"
