#!/usr/bin/env bash
# Runs benchmarks/run_gpu.py, the checks and measurements that need a GPU, with $PYTHON (default: python3).
#
#     TCAM_COMMIT=$(git rev-parse --short HEAD) benchmarks/run_gpu.sh first OUT     # at most 420 s
#     TCAM_COMMIT=$(git rev-parse --short HEAD) benchmarks/run_gpu.sh second OUT    # at most 330 s, right after, on the same machine
exec "${PYTHON:-python3}" "$(dirname "$0")/run_gpu.py" "$@"
