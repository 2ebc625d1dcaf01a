#!/usr/bin/env bash
# Train on every worker of a TPU slice: copy the code, install it, start it, restart it, follow worker 0.
#
#   scripts/tpu_pod_run.sh --name NAME --zone ZONE [--project P] [--env NAME[=VALUE]]... [--retries 20] [--wait 10]
#                          [--grace 120] [--recreate --type v6e-64 [--on-demand]] [--dry-run]
#                          -- ARGUMENTS OF pspo_jax.train
#   scripts/tpu_pod_run.sh --name NAME --zone ZONE [--project P] --stop
#
# The same command runs on all workers, and JAX finds the others by the TPU's metadata. --run.dir must be a folder that all
# workers share, such as gs://BUCKET/FOLDER. After a failure the run goes on from its last checkpoint.
# --env       pass a variable on; without =VALUE its value here, which keeps a secret such as HF_TOKEN out of `ps`. Values
#             travel in a file that only its owner can read, and are never printed
# --retries   how often a run that failed or was cut off begins again; bad input (exit code 2), a stop and the end of
#             run.hours (exit code 75) are not retried
# --wait      seconds before the first retry; each further wait is twice as long
# --grace     seconds that the trainers have to save and end after SIGTERM, SIGINT or SIGHUP, before they are killed
# --recreate  when the slice was taken away, ask for another one by tpu_queued_resource.sh, then go on
# --stop      stop what runs on the workers, after it has saved

# shellcheck source=scripts/launch.sh
source "$(dirname "$0")/launch.sh"

here=$(cd "$(dirname "$0")/.." && pwd)
name="" zone="" type="" project=() exports=() retries=20 recreate="" demand=() train=() stop="" given=("$@") clean=() bare=""
FIRST_WAIT=10
while (($#)); do
  case $1 in
    --name) value "$@" && name=$2 && shift 2 ;;
    --zone) value "$@" && zone=$2 && shift 2 ;;
    --type) value "$@" && type=$2 && shift 2 ;;
    --project) value "$@" && project=(--project "$2") && shift 2 ;;
    --env) value "$@" && exports+=("$2") && shift 2 ;;
    --retries) value "$@" && retries=$2 && shift 2 ;;
    --wait) value "$@" && FIRST_WAIT=$2 && shift 2 ;;
    --grace) value "$@" && GRACE=$2 && shift 2 ;;
    --recreate) recreate=1 && shift ;;
    --on-demand) demand=(--on-demand) && shift ;;
    --stop) stop=1 && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && train=("$@") && break ;;
    *) die "$(name_of "$1"): no such option; arguments of pspo_jax.train stand behind --; see --help" ;;
  esac
done
need name "$name" && need zone "$zone"
number --retries "$retries" 0 && number --wait "$FIRST_WAIT" 0 && number --grace "$GRACE" 0
[[ -z $recreate || -n $type ]] || die "--recreate needs --type"
case " ${train[*]} $stop" in
  *" --run.dir"* | *1) ;;
  *) die "give --run.dir behind --, a folder that all workers share" ;;
esac
for item in "${exports[@]}"; do
  [[ ${item%%=*} =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "--env $(name_of "$item"): must be NAME or NAME=VALUE"
  [[ $item == *=* || -n ${!item+set} ]] || die "--env $item: is not set here; export it, or give --env $item=VALUE"
  if [[ $item == *=* ]] && secret "${item%%=*}"; then
    export "${item?}"
    bare=1
  fi
done
# A secret on the command line can be read by everybody who lists processes: begin again without it.
if [[ -n $bare ]]; then
  for ((i = 0; i < ${#given[@]}; i++)); do
    [[ ${given[i]} != -- ]] || break
    clean+=("${given[i]}")
    if [[ ${given[i]} == --env ]] && secret "${given[i + 1]%%=*}"; then
      i=$((i + 1))
      clean+=("${given[i]%%=*}")
    fi
  done
  exec bash "$0" "${clean[@]}" "${given[@]:i}"
fi
tool gcloud tar

where=(--zone "$zone" "${project[@]}")
ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command)
names=("${exports[@]%%=*}")

# What a worker runs. The trainer has a session of its own and writes to a file, so that it survives a lost connection until
# it is stopped; train.pid and train.code tell what became of it.
# shellcheck disable=SC2016  # the worker's shell is to read it
leads='[ "${TPU_WORKER_ID:-$(hostname | grep -o "[0-9]*$")}" = 0 ]'
begin_there="cd pspo_jax || exit 1
if grep -aq pspo_jax.train \"/proc/\$(cat train.pid 2>/dev/null)/cmdline\" 2>/dev/null; then
  echo \"\$(hostname): a trainer runs already; stop it with --stop\" >&2; exit 2
fi
[ ! -f train.env ] || . ./train.env # ${names[*]}
rm -f train.code
setsid .venv/bin/python -m pspo_jax.train $(quoted "${train[@]}") >train.log 2>&1 </dev/null &
pid=\$!; echo \$pid >train.pid
if $leads; then tail -n +1 --pid=\$pid -f train.log; fi
wait \$pid; code=\$?; echo \$code >train.code; rm -f train.pid; exit \$code"
stop_there="cd pspo_jax 2>/dev/null && pid=\$(cat train.pid 2>/dev/null) || exit 0
there() { grep -aq pspo_jax.train \"/proc/\$pid/cmdline\" 2>/dev/null; }
there || exit 0
kill -TERM \$pid; n=0
while there && [ \$n -lt $((GRACE * 5)) ]; do sleep 0.2; n=\$((n + 1)); done
if there; then kill -KILL -\$pid; fi
if $leads; then tail -n 3 train.log; fi; exit 0"
install_there='mkdir -p pspo_jax && tar -C pspo_jax -xzf pspo_jax.tar.gz && rm -f pspo_jax.tar.gz && cd pspo_jax && python3 -m venv .venv && .venv/bin/pip install --quiet -e ".[tpu,gcs]"'

# write_env FILE: the variables as a shell's assignments.
write_env() {
  local item value
  for item in "${exports[@]}"; do
    value=${item#*=}
    [[ $item == *=* ]] || value=${!item}
    printf 'export %s=%s\n' "${item%%=*}" "$(quoted "$value")"
  done >"$1"
}

temporary=""
clear_up() {
  [[ -z $temporary ]] || rm -rf "$temporary"
}
trap clear_up EXIT

# What is not copied to the workers: secrets, and what .gitignore names, above all runs and downloaded weights.
LEFT_OUT=(.git .venv .env .jax_cache .pytest_cache .ruff_cache .mypy_cache .hypothesis __pycache__ '*.egg-info' ./build ./dist ./runs
  ./weights ./site)

install() {
  local code=0 more=()
  temporary=$(mktemp -d) # readable by its owner alone
  if ((${#exports[@]})); then # a dry run writes it too, and clears it up like any other
    more=(-C "$temporary" train.env)
    write_env "$temporary/train.env"
    chmod 600 "$temporary/train.env"
  fi
  run tar "${LEFT_OUT[@]/#/--exclude=}" -czf "$temporary/code.tar.gz" -C "$here" . "${more[@]}" || code=$?
  ((code)) || run gcloud compute tpus tpu-vm scp "$temporary/code.tar.gz" "$name:pspo_jax.tar.gz" "${where[@]}" \
    --worker=all || code=$?
  clear_up
  temporary=""
  ((code)) || run "${ssh[@]}" "$install_there" || code=$?
  return "$code"
}

# gcloud need not pass a worker's exit code on: a worker that refused its input (2), or whose run.hours are over (75),
# has written it down.
written() {
  local codes
  codes=$(timeout 60 "${ssh[@]}" 'cat pspo_jax/train.code' </dev/null 2>/dev/null) || true
  grep -xm1 2 <<<"$codes" || grep -xm1 75 <<<"$codes"
}

gone() {
  [[ -n $recreate ]] || return 1
  local state
  state=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format 'value(state)' 2>/dev/null) || state=MISSING
  [[ $state != READY ]]
}

again() {
  local queue=("$here/scripts/tpu_queued_resource.sh" --name "$name" "${where[@]}")
  run "${queue[@]}" --delete || true
  run "${queue[@]}" --type "$type" "${demand[@]}"
}

# Nothing of the attempt before may be left on a worker: also after a stop, when only the connection was closed.
stop_workers() {
  local code=0 signal=$SIGNAL
  SIGNAL="" # this child is to run
  begin timeout -k 5 "$((GRACE + 60))" "${ssh[@]}" "$stop_there"
  attend || code=$?
  SIGNAL=${SIGNAL:-$signal}
  ((code == 0)) || say "the workers could not be told to stop; try the same with --stop"
  return "$code"
}

installed="" tried=""
attempt() {
  local code=0
  if [[ -n $tried ]] && gone; then
    installed=""
    again || return
  elif [[ -n $tried ]]; then
    stop_workers || return 1
  fi
  [[ -n $installed ]] || install || return
  installed=1
  [[ -z $DRY_RUN ]] || { show "${ssh[@]}" "$begin_there" && return; }
  [[ -z $SIGNAL ]] || return 1
  show "${ssh[@]}" "$begin_there"
  tried=1
  begin "${ssh[@]}" "$begin_there"
  attend || code=$?
  if [[ -n $SIGNAL ]]; then
    stop_workers
    return
  fi
  if ((code != 0 && code != 2 && code != 75)); then
    code=$(written || echo "$code")
  fi
  return "$code"
}

if [[ -n $stop ]]; then
  show "${ssh[@]}" "$stop_there"
  [[ -n $DRY_RUN ]] || "${ssh[@]}" "$stop_there" </dev/null
  exit
fi
ON_DEATH=("${ssh[@]}" "$stop_there")
supervise
persist "$retries" attempt
