#!/usr/bin/env bash
# What only a GPU can show: the tests marked gpu, the step and the sweep, as figures and a table.
#   launch/gpu_bench.sh [FOLDER]          default runs/gpu_bench
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu_bench}
mkdir -p "$out"
failed=0  # one that fails must not cost the figures of the others
python -m pytest -m gpu 2>&1 | tee "$out/tests.txt" || failed=1
for dtype in float32 bfloat16; do
  python -m benchmarks.step --dtype "$dtype" --json "$out/step_$dtype.json" | tee -a "$out/table.txt" || failed=1
  python -m benchmarks.rollout --dtype "$dtype" --json "$out/rollout_$dtype.json" | tee -a "$out/table.txt" || failed=1
  python -m benchmarks.decode --dtype "$dtype" --json "$out/decode_$dtype.json" | tee -a "$out/table.txt" || failed=1
done
python -m benchmarks.sweep --dtype bfloat16 --json "$out/sweep.json" --plot "$out/sweep.html" \
  | tee -a "$out/table.txt" || failed=1
echo "figures: $out"
exit "$failed"
