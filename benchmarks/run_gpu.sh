#!/usr/bin/env bash
# Everything a GPU is needed for, in one go: build, test, measure, sanitize; on request the CPU kernels too.
# Results land in benchmarks/results.
#
#     benchmarks/run_gpu.sh [FOLDER]      FOLDER: where JSON and logs go (default: benchmarks/results)
#
# PYTHON chooses the interpreter, whose environment must have torch with CUDA and the extras [dev]; STEPS the steps, by default
# "build info ceiling test forward large decoders points diffusion profile sanitize" ("cpu" on request). A step that fails is named at
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
want() { [[ " ${STEPS:-build info ceiling test forward large decoders points diffusion profile sanitize} " == *" $1 "* ]]; }
bench="benchmarks/bench_decode_grid.py --device cuda"
want build && TCAM_CUDA=on step build "$python" setup.py -q build_ext --inplace
want info && step info "$python" -m tcam_ext.info
ceiling() {
  nvcc -std=c++17 -O3 "-arch=sm_${TORCH_CUDA_ARCH_LIST//./}" benchmarks/mma_rate.cu -o "$out/mma_rate" &&
    "$out/mma_rate" | tee "$out/mma_rate_$card.json"
  local status=$?
  rm -f "$out/mma_rate"
  return $status
}
want ceiling && step ceiling ceiling
want test && step test "$python" -m pytest -m gpu tests/ops
want forward && step forward "$python" $bench --cases tcam --sizes 128 256 --repeats 10 --json "$out/decode_grid_$card.json"
want large && step large "$python" $bench --cases tcam --sizes 512 --repeats 3 --json "$out/decode_grid_${card}_512.json"
want decoders && step decoders "$python" $bench --cases nfd eg3d --sizes 256 --json "$out/decode_grid_${card}_decoders.json"
points() {
  "$python" benchmarks/bench_decode_points.py --device cuda --points 262144 4194304 --json "$out/points_$card.json" &&
    "$python" benchmarks/bench_sample.py --device cuda --json "$out/sample_$card.json"
}
want points && step points points
diffusion="benchmarks/bench_diffusion.py --device cuda --presets brats pancreas --batch 1 8"
want diffusion && step diffusion "$python" $diffusion --json "$out/diffusion_$card.json"
want profile && step profile "$python" $bench --cases tcam --sizes 256 --rivals 'ours bfloat16' 'ours tf32' 'ours float32' --profile
# torch's caching allocator would hide overruns inside its segments, and hand out blocks that look initialised.
want sanitize && for tool in memcheck racecheck initcheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -m gpu -x \
    tests/ops/test_decode_grid.py tests/ops/test_decode_grid_loss.py tests/ops/test_cuda.py tests/ops/test_conventions.py tests/ops/test_noise.py \
    -k "axes or compute_dtype or one_layer or decode_then_loss or mirror or conventions or normals or own"
done
# On request: the host's CPU may be one that the CPU kernels' figures are missing for.
if want cpu; then
  isa=$("$python" -c 'from tcam_ext import _C; print(_C.cpu_isa())')
  OMP_NUM_THREADS=2 step cpu taskset -c 0,1 "$python" benchmarks/bench_decode_grid.py --cases tcam --sizes 128 --repeats 3 \
    --rivals 'naive float32' 'naive bfloat16 MLP' 'ours float32' 'ours bfloat16' --json "$out/decode_grid_${isa}_128.json"
fi
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
