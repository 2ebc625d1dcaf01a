# Shared by the launchers; source it. It prints commands without secrets, runs them as children that are stopped together
# with the launcher, and repeats commands that a retry can help.
# shellcheck shell=bash
set -euo pipefail

DRY_RUN=""
GRACE=120     # seconds that a child has to end after it was asked to
FIRST_WAIT=5  # seconds before the first retry; each further wait is twice as long, up to five minutes
SIGNAL=""     # the signal that asked this launcher to stop
LIFE=""       # pipe to the watch
CHILDREN=()
ON_DEATH=()   # command that the watch runs when the launcher was killed before its children had ended

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

say() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
}

# The header comment of a script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# need NAME VALUE: refuse an empty setting, and name the option that sets it.
need() {
  [[ -n $2 ]] || die "--$1 is missing; see --help"
}

# value WORDS...: the first word is an option, and a value must follow it.
value() {
  (($# > 1)) || die "$1: needs a value; see --help"
}

# number OPTION VALUE LEAST: refuse a value that is not a whole number of at least LEAST.
number() {
  if [[ ! $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
    die "$1 $2: must be a whole number of at least $3"
  fi
}

# name_of WORD: the part of a word before =, for messages.
name_of() {
  printf '%s' "${1%%=*}"
}

# tool NAME...: refuse to begin without these programs.
tool() {
  local name
  for name; do
    [[ -n $DRY_RUN ]] || command -v "$name" >/dev/null || die "$name: not found; install it, or add its folder to PATH"
  done
}

# Words of an array as one string that any POSIX shell reads as the same words.
quoted() {
  local word out=""
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      out+=" $word"
    else
      out+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s' "${out# }"
}

# secret NAME: whether a variable or an option of this name holds a secret. --model.tokenizer and max_new_tokens do not.
secret() {
  local name=${1#--}
  if [[ $1 == --* ]]; then
    [[ ${name,,} =~ (^|[._-])(token|key|secret|password|passwd|credentials?)$ ]]
  else
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ && ${name^^} == *@(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)* ]]
  fi
}

# concealed TEXT: REPLY becomes the text without the values of secret variables of this environment, and without
# passwords in addresses. No subshell, here and in what follows: bash loses a SIGINT that comes while it waits for one.
concealed() {
  local name names known
  REPLY=$1
  mapfile -t names < <(compgen -e)
  for name in "${names[@]}"; do
    known=${!name}
    if secret "$name" && ((${#known} >= 6)); then
      REPLY=${REPLY//"$known"/***}
    fi
  done
  while [[ $REPLY =~ (.*://[^/@:]*:)[^/@*]+(@.*) ]]; do
    REPLY="${BASH_REMATCH[1]}***${BASH_REMATCH[2]}"
  done
}

# show COMMAND...: the command as it could be typed, without secrets.
show() {
  local word hidden="" line="+"
  for word; do
    if [[ -n $hidden ]]; then
      word="***"
    elif [[ $word == *=* ]] && secret "${word%%=*}"; then
      word="${word%%=*}=***"
    fi
    hidden=""
    [[ $word != --* || $word == *=* ]] || ! secret "$word" || hidden=1
    concealed "$word"
    [[ $REPLY == *'***'* ]] || printf -v REPLY '%q' "$REPLY"
    line+=" $REPLY"
  done
  printf '%s\n' "$line"
}

# alive PID: whether the process runs; one that has ended and was not waited for does not.
alive() {
  local stat
  kill -0 "$1" 2>/dev/null || return 1
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
  stat=${stat##*) }
  [[ ${stat%% *} != Z ]]
}

# The watch outlives a launcher that is killed: it then stops the children as the launcher would have. It reads +PID when
# one has begun and -PID when it has ended.
watch() {
  trap '' INT TERM HUP QUIT
  local line pid end
  local -A left=()
  while read -r line; do
    case $line in
      +*) left[${line#+}]=1 ;;
      -*) unset "left[${line#-}]" ;;
    esac
  done
  ((${#left[@]})) || return 0
  kill -TERM "${!left[@]}" 2>/dev/null || true
  ((${#ON_DEATH[@]} == 0)) || timeout -k 5 "$((GRACE + 60))" "${ON_DEATH[@]}" </dev/null >&2 || true
  end=$((SECONDS + GRACE))
  for pid in "${!left[@]}"; do
    while alive "$pid" && ((SECONDS < end)); do
      sleep 0.2
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
}

# Call once, before the first child.
supervise() {
  [[ -z $DRY_RUN ]] || return 0
  tool setsid timeout
  set -m # a process group of its own for the watch
  coproc WATCH { watch; } 2>&2
  set +m
  exec {LIFE}>&"${WATCH[1]}"
  eval "exec ${WATCH[1]}>&- ${WATCH[0]}<&-"
  local name
  for name in INT TERM HUP QUIT; do
    # shellcheck disable=SC2064  # the name is meant to be filled in now
    trap "signalled $name" "$name"
  done
}

# The first signal asks the children to end, a second one ends them.
signalled() {
  if [[ -n $SIGNAL ]]; then
    GRACE=0
  else
    SIGNAL=$1
    say "SIG$1: stopping; a second signal kills what runs"
  fi
}

# begin COMMAND...: start a child in a session of its own, so that a terminal's Ctrl-C reaches it once, through us.
begin() {
  [[ -z $SIGNAL ]] || return 0
  (
    printf '+%s\n' "$BASHPID" >&"$LIFE"
    exec {LIFE}>&-
    exec setsid "$@"
  ) </dev/null &
  CHILDREN+=($!)
}

nap() {
  sleep 0.3 >/dev/null 2>&1 {LIFE}>&- &
  wait $! || true
}

# attend: return when all children have ended, with 0 if all succeeded, with 2 if one refused its input, else with the
# largest exit code. Once a stop was asked for they get SIGTERM; then, and once one has failed, GRACE seconds are left.
attend() {
  local i pid code worst=0 end=""
  local -A told=()
  while ((${#CHILDREN[@]})); do
    for i in "${!CHILDREN[@]}"; do
      pid=${CHILDREN[i]} code=0
      if ! alive "$pid"; then
        wait "$pid" || code=$?
        kill -KILL -- "-$pid" 2>/dev/null || true # workers that it has left behind
        printf -- '-%s\n' "$pid" >&"$LIFE"
        unset "CHILDREN[i]"
        ((code == 0 || worst == 2)) || worst=$((code == 2 || code > worst ? code : worst))
      elif [[ -n $SIGNAL && -z ${told[$pid]:-} ]]; then
        kill -TERM "$pid" 2>/dev/null || true
        told[$pid]=1 end=$((SECONDS + GRACE))
      elif [[ -n $end ]] && ((SECONDS >= end || GRACE == 0)); then
        kill -KILL -- "-$pid" 2>/dev/null || true
      fi
    done
    ((worst == 0)) || [[ -n $end ]] || end=$((SECONDS + GRACE))
    ((${#CHILDREN[@]} == 0)) || nap
  done
  return "$worst"
}

# run COMMAND...: print a command, and run it as a child unless --dry-run was given.
run() {
  show "$@"
  [[ -n $DRY_RUN ]] && return
  begin "$@"
  attend
}

# ended CODE: leave after a stop, with 0 if all that ran ended well.
ended() {
  local code=$1
  if ((code)); then
    code=143
    [[ $SIGNAL != INT ]] || code=130
  fi
  exit "$code"
}

# pause SECONDS, or until a stop is asked for.
pause() {
  local end=$((SECONDS + $1))
  while [[ -z $SIGNAL ]] && ((SECONDS < end)); do
    nap
  done
}

# persist RETRIES COMMAND...: run until it succeeds, and leave when a retry cannot help: after a stop, after bad input,
# when run.hours are over (exit code 75), or when RETRIES are used up.
persist() {
  local retries=$1 attempt code seconds=$FIRST_WAIT why
  shift
  for ((attempt = 1; ; attempt++)); do
    code=0
    "$@" || code=$?
    [[ -z $SIGNAL ]] || ended "$code"
    ((code)) || return 0
    ((code != 2)) || die "the input was refused (exit code 2), so it is not tried again"
    ((code != 130)) || exit 130
    if ((code == 75)); then
      say "run.hours are over (exit code 75); the same command carries the run on"
      exit 75
    fi
    why="failed with exit code $code"
    ((code <= 128)) || why="was killed by signal $((code - 128))"
    if ((attempt > retries)); then
      say "attempt $attempt $why; gave up after $retries retries"
      exit 1
    fi
    say "attempt $attempt $why; retry $attempt of $retries in $seconds s, from the last checkpoint"
    pause "$seconds"
    [[ -z $SIGNAL ]] || ended 1
    ((code > 128)) || seconds=$((seconds * 2 < 300 ? seconds * 2 : 300))
  done
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
