#!/usr/bin/env bash
# Train on the GPUs of this machine: one process drives all of them, or one process each.
#
#   scripts/multi_gpu.sh [--processes N] [--port 9876] [--retries 3] [--wait 5] [--grace 120] [--dry-run]
#                        -- ARGUMENTS OF pspo_jax.train
#
# --processes  1: one process for all GPUs (simplest); N: N processes, each with its share of the GPUs
# --retries    how often a run that failed or was killed begins again from its last checkpoint; bad input (exit code 2),
#              a stop and the end of run.hours (exit code 75) are never retried
# --wait       seconds before the first retry; each further wait is twice as long
# --grace      seconds that the processes have to save and end after SIGTERM, SIGINT or SIGHUP, before they are killed
#
# PYTHON names the interpreter (default python3). CUDA_VISIBLE_DEVICES, if it is set, lists the GPUs that are shared out.
# A signal reaches every process; the launcher leaves when all have ended, with 0 if all of them saved.

# shellcheck source=scripts/launch.sh
source "$(dirname "$0")/launch.sh"

processes=1 port=9876 retries=3 train=()
while (($#)); do
  case $1 in
    --processes) value "$@" && processes=$2 && shift 2 ;;
    --port) value "$@" && port=$2 && shift 2 ;;
    --retries) value "$@" && retries=$2 && shift 2 ;;
    --wait) value "$@" && FIRST_WAIT=$2 && shift 2 ;;
    --grace) value "$@" && GRACE=$2 && shift 2 ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && train=("$@") && break ;;
    *) die "$1: no such option; arguments of pspo_jax.train stand behind --; see --help" ;;
  esac
done
number --processes "$processes" 1 && number --port "$port" 1 && number --retries "$retries" 0
number --wait "$FIRST_WAIT" 0 && number --grace "$GRACE" 0
((port < 65536)) || die "--port $port: must be less than 65536"
python=${PYTHON:-python3}
tool "$python"

# The GPUs that there are, as a list; without any, as many as there are processes.
gpus=() count=0
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
else
  count=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || count=0
  mapfile -t gpus < <(seq 0 $(((count > 0 ? count : processes) - 1)))
fi
((${#gpus[@]} % processes == 0)) || die "--processes $processes: does not divide the ${#gpus[@]} GPUs"

free_port() {
  ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null
}

once() {
  local i share=$((${#gpus[@]} / processes)) command IFS=,
  if ((processes == 1)); then
    run "$python" -m pspo_jax.train "${train[@]}"
    return
  fi
  [[ -n $DRY_RUN ]] || free_port || die "--port $port: another process listens there; stop it, or choose another --port"
  for ((i = 0; i < processes; i++)); do
    command=(env "CUDA_VISIBLE_DEVICES=${gpus[*]:i*share:share}" "$python" -m pspo_jax.train "${train[@]}"
      --distributed.coordinator "127.0.0.1:$port" --distributed.processes "$processes" --distributed.process "$i")
    show "${command[@]}"
    [[ -n $DRY_RUN ]] || begin "${command[@]}"
  done
  [[ -n $DRY_RUN ]] || attend
}

supervise
persist "$retries" once
