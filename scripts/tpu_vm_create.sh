#!/usr/bin/env bash
# Create a TPU VM (one host or a pod slice).
#
#   scripts/tpu_vm_create.sh --name NAME --zone ZONE --type v5litepod-8 [--project P] [--version V] [--spot] [--dry-run]
#
# --type     v5litepod-8 (v5e), v6e-8, v5p-8, v4-8 ...: the number is of chips (of cores for v4 and v5p)
# --version  software of the VM; chosen by --type if it is left out
# --spot     cheaper, can be taken away at any time: use tpu_pod_run.sh --recreate, which begins again where it stopped

# shellcheck source=scripts/launch.sh
source "$(dirname "$0")/launch.sh"

name="" zone="" type="" version="" more=()
while (($#)); do
  case $1 in
    --name) value "$@" && name=$2 && shift 2 ;;
    --zone) value "$@" && zone=$2 && shift 2 ;;
    --type) value "$@" && type=$2 && shift 2 ;;
    --version) value "$@" && version=$2 && shift 2 ;;
    --project) value "$@" && more+=(--project "$2") && shift 2 ;;
    --spot) more+=(--spot) && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    *) die "$1: no such option; see --help" ;;
  esac
done
need name "$name" && need zone "$zone" && need type "$type"
[[ -n $version ]] || version=$(tpu_version "$type")
tool gcloud
supervise

code=0
run gcloud compute tpus tpu-vm create "$name" --zone "$zone" --accelerator-type "$type" --version "$version" "${more[@]}" || code=$?
[[ -z $SIGNAL ]] || { say "$name may have been created all the same" && ended "$code"; }
exit "$code"
