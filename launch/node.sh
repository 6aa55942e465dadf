#!/usr/bin/env bash
# All GPUs of one machine.
#
#   launch/node.sh zero2 configs/smollm2_math.yaml --data.train openstax.jsonl
#
# The first argument names a file of configs/accelerate (ddp, zero1, zero2, zero3, zero3_offload,
# fsdp2, or a *_cpu twin). As many processes as there are GPUs; NUM_PROCESSES=4 takes fewer.
# Relative paths, those of data and output too, start at the checkout, wherever it is called from.
set -euo pipefail
strategy=${1:?usage: launch/node.sh STRATEGY CONFIG [--KEY VALUE ...]}
config=${2:?usage: launch/node.sh STRATEGY CONFIG [--KEY VALUE ...]}
shift 2
cd "$(dirname "$0")/.."
file=configs/accelerate/$strategy.yaml
if [[ ! -f $file ]]; then
  echo "launch/node.sh: there is no $file; known:" configs/accelerate/*.yaml >&2
  exit 2
fi
processes=()
if [[ -n ${NUM_PROCESSES:-} ]]; then
  processes=(--num_processes "$NUM_PROCESSES")
elif command -v nvidia-smi >/dev/null; then
  processes=(--num_processes "$(nvidia-smi --list-gpus | wc -l)")
elif [[ $strategy != *_cpu ]]; then
  echo "launch/node.sh: found no GPU (there is no nvidia-smi). launch/cpu.sh runs on CPUs;" \
    "NUM_PROCESSES=2 launch/node.sh ... starts anyway." >&2
  exit 2
fi
exec accelerate launch --config_file "$file" "${processes[@]}" train.py --config "$config" "$@"
