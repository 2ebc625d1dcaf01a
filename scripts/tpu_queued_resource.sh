#!/usr/bin/env bash
# Ask for a TPU slice and wait in the queue until there is one; spot by default.
#
#   scripts/tpu_queued_resource.sh --name NAME --zone ZONE --type v6e-64 [--project P] [--version V] [--on-demand]
#                                  [--valid-for 6h] [--delete] [--dry-run]
#
# The resource is NAME-queue, the node in it NAME.
# --valid-for  give up after this long in the queue
# --delete     delete the resource and its node instead

# shellcheck source=scripts/launch.sh
source "$(dirname "$0")/launch.sh"

name="" zone="" type="" version="" kind=(--spot) valid=() project=() delete=""
while (($#)); do
  case $1 in
    --name) value "$@" && name=$2 && shift 2 ;;
    --zone) value "$@" && zone=$2 && shift 2 ;;
    --type) value "$@" && type=$2 && shift 2 ;;
    --version) value "$@" && version=$2 && shift 2 ;;
    --project) value "$@" && project=(--project "$2") && shift 2 ;;
    --on-demand) kind=() && shift ;;
    --valid-for) value "$@" && valid=(--valid-until-duration "$2") && shift 2 ;;
    --delete) delete=1 && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    *) die "$1: no such option; see --help" ;;
  esac
done
need name "$name" && need zone "$zone"

[[ -n $delete ]] || need type "$type"
[[ -n $version || -n $delete ]] || version=$(tpu_version "$type")
tool gcloud
supervise

if [[ -n $delete ]]; then
  run gcloud compute tpus queued-resources delete "$name-queue" --zone "$zone" "${project[@]}" --force --quiet
  exit
fi
run gcloud compute tpus queued-resources create "$name-queue" --node-id "$name" --zone "$zone" \
  --accelerator-type "$type" --runtime-version "$version" "${kind[@]}" "${valid[@]}" "${project[@]}"

state="" failed=0
while [[ -z $DRY_RUN && -z $SIGNAL && $state != ACTIVE ]]; do
  if ! state=$(gcloud compute tpus queued-resources describe "$name-queue" --zone "$zone" "${project[@]}" \
    --format 'value(state.state)' </dev/null); then
    state="not told" failed=$((failed + 1)) # gcloud has said why
    ((failed < 5)) || { say "gave up after $failed failures in a row; $name-queue may still be waiting" && exit 1; }
  else
    failed=0
  fi
  printf '%s %s-queue: %s\n' "$(date -u +%H:%M:%S)" "$name" "$state"
  case $state in
    FAILED | SUSPENDED) die "$name-queue is $state; delete it with --delete and ask again" ;;
    ACTIVE) ;;
    *) pause 30 ;;
  esac
done
if [[ -n $SIGNAL ]]; then
  say "$name-queue stays in the queue; the same command with --delete takes it out"
  ended 1
fi
