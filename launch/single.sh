#!/usr/bin/env bash
# One process: a laptop, a workstation, or one GPU.
#
#   launch/single.sh configs/smollm2_math.yaml --data.train openstax.jsonl
#
# Every key of the config can follow as --key value (quietstar train --help lists them).
set -euo pipefail
config=${1:?usage: launch/single.sh CONFIG [--KEY VALUE ...]}
shift
exec accelerate launch --num_processes 1 --num_machines 1 --dynamo_backend no \
  "$(dirname "$0")/../train.py" --config "$config" "$@"
