# Shared by the launchers; source it. `run` prints a command, and runs it unless --dry-run was given.
# shellcheck shell=bash
set -euo pipefail

DRY_RUN=""

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if [[ -z $DRY_RUN ]]; then
    "$@"
  fi
}

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# The header comment of a script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# need NAME VALUE: refuse an empty setting, and say how to give it.
need() {
  [[ -n $2 ]] || die "--$1 is missing; see --help"
}

# Words of an array as one shell-quoted string.
quoted() {
  local out
  printf -v out ' %q' "$@"
  printf '%s' "${out# }"
}

# The software version of a TPU VM for its kind of chip.
tpu_version() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    *) die "--type $1: give --version too; known kinds are v2, v3, v4, v5litepod (v5e), v5p and v6e" ;;
  esac
}
