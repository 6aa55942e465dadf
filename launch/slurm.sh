#!/usr/bin/env bash
# Several machines under SLURM: one launcher a machine, one process a GPU, the first machine as
# meeting point. Five minutes before the time limit the run saves a checkpoint, and the job is put
# into the queue again until the run is done.
#
#   sbatch --nodes 4 --gpus-per-node 8 --time 12:00:00 launch/slurm.sh \
#     zero3 configs/paper.yaml --training.output_dir /shared/runs/paper
#
# The first argument names a file of configs/accelerate. The run folder must lie on a disk that all
# machines share. Set the environment (modules, virtual environment) before sbatch, or here.
#SBATCH --job-name=quietstar
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
engine=${1:?usage: sbatch launch/slurm.sh STRATEGY CONFIG --training.output_dir DIR [--KEY VALUE ...]}
config=${2:?usage: sbatch launch/slurm.sh STRATEGY CONFIG --training.output_dir DIR [--KEY VALUE ...]}
shift 2
cd "${SLURM_SUBMIT_DIR:?to be started by sbatch}"
if [[ ! -f configs/accelerate/$engine.yaml ]]; then
  echo "launch/slurm.sh: there is no configs/accelerate/$engine.yaml; submit from the checkout" >&2
  exit 2
fi

output_dir=
arguments=("$@")
for ((i = 0; i < ${#arguments[@]}; i++)); do
  case ${arguments[i]} in
    --training.output_dir) output_dir=${arguments[i + 1]:-} ;;
    --training.output_dir=*) output_dir=${arguments[i]#*=} ;;
  esac
done
: "${output_dir:?give --training.output_dir, on a disk that all machines share}"
if [[ $output_dir == "~/"* ]]; then
  output_dir=$HOME/${output_dir#"~/"} # as the run does
fi
# Left by a job before: a run that fails at its start would be put into the queue for ever.
if [[ -f $output_dir/preempted && $(<"$output_dir/preempted") =~ ^[0-9]+$ ]]; then
  rm -- "$output_dir/preempted"
fi

main_address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-1}
port=$((20000 + SLURM_JOB_ID % 20000))

# The warning reaches this script only; srun forwards it to its own task on every machine.
warned=
training=
# shellcheck disable=SC2329  # the trap calls it
warn() {
  warned=1
  if [[ -n $training ]]; then
    kill -USR1 "$training" || true
  fi
}
trap warn USR1

# Each task starts the launcher and hands the warning down to the processes below it, and to no
# other process of the machine. The launcher would die of the signal: it starts with the signal
# ignored, and so do the training processes until they listen to it.
# shellcheck disable=SC2016  # SLURM_NODEID is that of each machine
srun --kill-on-bad-exit=1 bash -c '
  warn_below() {
    local child
    for child in $(pgrep -P "$1"); do
      kill -USR1 "$child" || true
      warn_below "$child"
    done
  }
  trap "" USR1
  accelerate launch --config_file "configs/accelerate/$1.yaml" --num_machines "$2" \
    --num_processes "$(($2 * $3))" --machine_rank "$SLURM_NODEID" --main_process_ip "$4" \
    --main_process_port "$5" --rdzv_backend c10d train.py --config "$6" --resume auto "${@:7}" &
  launcher=$!
  trap "warn_below $launcher" USR1
  status=0
  while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" && status=0 || status=$?
  done
  exit "$status"
' quietstar "$engine" "$SLURM_JOB_NUM_NODES" "$gpus" "$main_address" "$port" "$config" "$@" &
training=$!
status=0
# wait returns when the trap has run, too: wait until the training itself has ended.
while kill -0 "$training" 2>/dev/null; do
  wait "$training" && status=0 || status=$?
done

# Launchers replace exit codes; a run that was asked to stop and saved leaves this file.
if [[ -f $output_dir/preempted ]]; then
  echo "launch/slurm.sh: saved at step $(cat "$output_dir/preempted"); back into the queue"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
if [[ -n $warned && $status -ne 0 ]]; then
  echo "launch/slurm.sh: the time limit came before the run could save; back into the queue"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
