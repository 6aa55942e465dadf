#!/usr/bin/env bash
# Two processes on CPUs: to try a strategy on a laptop, or in a test.
#
#   launch/cpu.sh fsdp2 configs/tiny.yaml
#
# The first argument is ddp, fsdp2, or the name of a *_cpu file of configs/accelerate without that
# ending (zero1, zero2, zero3, zero3_offload). NUM_PROCESSES=4 starts four.
# Relative paths, those of data and output too, start at the checkout, wherever it is called from.
set -euo pipefail
strategy=${1:?usage: launch/cpu.sh STRATEGY CONFIG [--KEY VALUE ...]}
config=${2:?usage: launch/cpu.sh STRATEGY CONFIG [--KEY VALUE ...]}
shift 2
cd "$(dirname "$0")/.."
processes=${NUM_PROCESSES:-2}
train=(train.py --config "$config" "$@")
case $strategy in
  ddp | fsdp2)
    # accelerate launch starts a single process where there is no GPU.
    export ACCELERATE_USE_CPU=true
    if [[ $strategy == fsdp2 ]]; then
      export ACCELERATE_USE_FSDP=true
    fi
    exec torchrun --nproc-per-node "$processes" --rdzv-backend c10d --rdzv-endpoint localhost:0 "${train[@]}"
    ;;
esac
file=configs/accelerate/${strategy}_cpu.yaml
if [[ ! -f $file ]]; then
  echo "launch/cpu.sh: there is no $file; known: ddp fsdp2" configs/accelerate/*_cpu.yaml >&2
  exit 2
fi
exec accelerate launch --config_file "$file" --num_processes "$processes" "${train[@]}"
