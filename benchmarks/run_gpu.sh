#!/usr/bin/env bash
# Everything that only a card can show, in two calls: see benchmarks/run_gpu.py, which this runs with $PYTHON (python3).
#
#     TCAM_COMMIT=$(git rev-parse --short HEAD) benchmarks/run_gpu.sh first OUT     # at most 420 s
#     TCAM_COMMIT=$(git rev-parse --short HEAD) benchmarks/run_gpu.sh second OUT    # at most 330 s, at once, on the same machine
exec "${PYTHON:-python3}" "$(dirname "$0")/run_gpu.py" "$@"
