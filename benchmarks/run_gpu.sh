#!/usr/bin/env bash
# Everything a GPU is needed for, in one go: build, test, measure, sanitize; and the CPU kernels where the host has AVX-512.
# Results land in benchmarks/results.
#
#     benchmarks/run_gpu.sh [FOLDER]      FOLDER: where JSON and logs go (default: benchmarks/results)
#
# PYTHON chooses the interpreter, whose environment must have torch with CUDA and the extras [dev]. A step that fails is named at
# the end and does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:-benchmarks/results}
mkdir -p "$out"
failed=()
step() {
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/gpu_$name.log" || failed+=("$name")
}

nvidia-smi
card=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "_"))') || exit 1
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + ("a" if a == 9 else ""))')
export TORCH_CUDA_ARCH_LIST
TCAM_CUDA=on step build "$python" setup.py -q build_ext --inplace
step info "$python" -m tcam_ext.info
step test "$python" -m pytest -m gpu tests/ops
step bench "$python" benchmarks/bench_decode_grid.py --device cuda --cases tcam --sizes 128 256 512 --repeats 10 \
  --json "$out/decode_grid_$card.json"
step decoders "$python" benchmarks/bench_decode_grid.py --device cuda --cases nfd eg3d --sizes 256 --repeats 10 \
  --json "$out/decode_grid_${card}_decoders.json"
for tool in memcheck racecheck initcheck; do
  step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -m gpu -x tests/ops/test_decode_grid.py \
    -k "axes or batch or most_channels"
done
# The host's CPU may be one that the CPU kernels' figures are missing for.
isa=$("$python" -c 'from tcam_ext import _C; print(_C.cpu_isa())')
if [[ $isa == avx512* ]]; then
  OMP_NUM_THREADS=2 step cpu taskset -c 0,1 "$python" benchmarks/bench_decode_grid.py --cases tcam --sizes 128 --repeats 5 \
    --rivals 'naive float32' 'naive bfloat16 MLP' 'ours float32' 'ours bfloat16' --json "$out/decode_grid_${isa}_128.json"
fi
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
