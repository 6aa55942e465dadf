#!/usr/bin/env bash
# One process: a laptop, a workstation, or one GPU.
#
#   launch/single.sh configs/smollm2_math.yaml --data.train openstax.jsonl
#
# Every key of the config can follow as --key value (quietstar train --help lists them).
set -euo pipefail
config=${1:?usage: launch/single.sh CONFIG [--KEY VALUE ...]}
shift
# Without a launcher in between the exit codes are the run's own: 2 for a mistake of the user, 75 for
# a run that a signal (SIGTERM, SIGUSR1) asked to stop and that saved: start it again with
# --resume auto.
exec python "$(dirname "$0")/../train.py" --config "$config" "$@"
