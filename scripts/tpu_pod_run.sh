#!/usr/bin/env bash
# Train on every worker of a TPU slice: copy the code, install it, start it, restart it, follow worker 0.
#
#   scripts/tpu_pod_run.sh --name NAME --zone ZONE [--project P] [--env KEY=VALUE]... [--retries 20]
#                          [--recreate --type v6e-64 [--on-demand]] [--dry-run] -- ARGUMENTS OF pspo_jax.train
#
# The same command runs on all workers, and JAX finds the others by the TPU's metadata. --run.dir must be a folder that all
# workers share, such as a mounted bucket. After a failure the run goes on from its last checkpoint.
# --recreate  when the slice was taken away, ask for another one by tpu_queued_resource.sh, then go on

# shellcheck source=scripts/launch.sh
source "$(dirname "$0")/launch.sh"

here=$(cd "$(dirname "$0")/.." && pwd)
name="" zone="" type="" project=() exports=() retries=20 recreate="" demand=() train=()
while (($#)); do
  case $1 in
    --name) name=$2 && shift 2 ;;
    --zone) zone=$2 && shift 2 ;;
    --type) type=$2 && shift 2 ;;
    --project) project=(--project "$2") && shift 2 ;;
    --env) exports+=("$2") && shift 2 ;;
    --retries) retries=$2 && shift 2 ;;
    --recreate) recreate=1 && shift ;;
    --on-demand) demand=(--on-demand) && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && train=("$@") && break ;;
    *) die "$1: no such option; arguments of pspo_jax.train stand behind --; see --help" ;;
  esac
done
need name "$name" && need zone "$zone"
[[ -z $recreate || -n $type ]] || die "--recreate needs --type"
case " ${train[*]} " in
  *" --run.dir"*) ;;
  *) die "give --run.dir behind --, a folder that all workers share" ;;
esac

where=(--zone "$zone" "${project[@]}")
everywhere() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$1"
}

install() {
  local archive
  archive=$(mktemp --suffix .tar.gz)
  run tar --exclude .git --exclude .venv --exclude runs -C "$here" -czf "$archive" .
  run gcloud compute tpus tpu-vm scp "$archive" "$name:pspo_jax.tar.gz" "${where[@]}" --worker=all
  rm -f "$archive"
  everywhere 'mkdir -p pspo_jax && tar -C pspo_jax -xzf pspo_jax.tar.gz && cd pspo_jax && python3 -m venv .venv && .venv/bin/pip install --quiet -e ".[tpu]"'
}

# Each worker keeps its log; worker 0's is what comes back.
start() {
  local settings=""
  ((${#exports[@]} == 0)) || settings="export $(quoted "${exports[@]}"); "
  everywhere "cd pspo_jax && ${settings}set -o pipefail; .venv/bin/python -m pspo_jax.train $(quoted "${train[@]}") 2>&1 | if [ \"\${TPU_WORKER_ID:-\$(hostname | grep -o '[0-9]*\$')}\" = 0 ]; then tee train.log; else cat > train.log; fi"
}

gone() {
  [[ -n $recreate && -z $DRY_RUN ]] || return 1
  local state
  state=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format 'value(state)' 2>/dev/null || echo MISSING)
  [[ $state != READY ]]
}

again() {
  local queue=("$here/scripts/tpu_queued_resource.sh" --name "$name" "${where[@]}")
  run "${queue[@]}" --delete || true
  run "${queue[@]}" --type "$type" "${demand[@]}"
}

install
for ((attempt = 0; attempt <= retries; attempt++)); do
  if start; then
    exit 0
  fi
  printf 'attempt %d of %d failed; the run goes on from its last checkpoint\n' "$attempt" "$retries"
  if gone; then
    again
    install
  fi
  sleep 10
done
die "gave up after $retries retries"
