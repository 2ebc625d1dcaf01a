#!/usr/bin/env bash
# Train on the GPUs of this machine: one process drives all of them, or one process each.
#
#   scripts/multi_gpu.sh [--processes N] [--port 9876] [--retries 3] [--dry-run] -- ARGUMENTS OF pspo_jax.train
#
# --processes  1: one process for all GPUs (simplest); N: N processes, each with its share of the GPUs

# shellcheck source=scripts/launch.sh
source "$(dirname "$0")/launch.sh"

processes=1 port=9876 retries=3 train=()
while (($#)); do
  case $1 in
    --processes) processes=$2 && shift 2 ;;
    --port) port=$2 && shift 2 ;;
    --retries) retries=$2 && shift 2 ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && train=("$@") && break ;;
    *) die "$1: no such option; arguments of pspo_jax.train stand behind --; see --help" ;;
  esac
done
python=${PYTHON:-python3}

once() {
  if ((processes == 1)); then
    run "$python" -m pspo_jax.train "${train[@]}"
    return
  fi
  local gpus share pids=() status=0
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
  ((gpus > 0)) || gpus=$processes
  ((gpus % processes == 0)) || die "--processes $processes: does not divide the $gpus GPUs"
  share=$((gpus / processes))
  for ((i = 0; i < processes; i++)); do
    run env "CUDA_VISIBLE_DEVICES=$(seq -s, $((i * share)) $(((i + 1) * share - 1)))" \
      "$python" -m pspo_jax.train "${train[@]}" --distributed.coordinator "127.0.0.1:$port" \
      --distributed.processes "$processes" --distributed.process "$i" &
    pids+=($!)
    [[ -z $DRY_RUN ]] || wait "${pids[$i]}"
  done
  [[ -z $DRY_RUN ]] || return 0
  trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
  for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
  done
  return "$status"
}

for ((attempt = 0; attempt <= retries; attempt++)); do
  if once; then
    exit 0
  fi
  printf 'attempt %d of %d failed; the run goes on from its last checkpoint\n' "$attempt" "$retries"
  sleep 5
done
die "gave up after $retries retries"
