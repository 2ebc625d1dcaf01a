#!/usr/bin/env bash
# The papers' five benchmarks through lighteval, on a checkpoint that pspo_jax.export wrote: figures that others can compare.
# It needs a GPU, network, and an environment of its own: pip install 'lighteval[math,vllm]'
#
#   scripts/eval_lighteval.sh EXPORTED_FOLDER OUT_FOLDER [--dry-run]
#
# Settings are those of open-rs and PSPO: one sample a problem, temperature .6, top-p .95, 32,768 new tokens.
# MATH-500 and AIME24 are lighteval's own tasks; AMC23, Minerva and OlympiadBench come from the file named in
# LIGHTEVAL_TASKS (open-rs's src/open_r1/evaluate.py) and are left out without it.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0"
  exit 2
fi
model=$1
out=$2
dry=${3:-}

if [ ! -f "$model/config.json" ]; then
  echo "$model: holds no config.json; name a folder that pspo_jax.export wrote" >&2
  exit 2
fi
if [ "$dry" != "--dry-run" ] && ! command -v lighteval >/dev/null; then
  echo "lighteval: not installed; pip install 'lighteval[math,vllm]'" >&2
  exit 2
fi

arguments="model_name=$model,dtype=bfloat16,max_model_length=32768,gpu_memory_utilization=0.8"
arguments="$arguments,generation_parameters={max_new_tokens:32768,temperature:0.6,top_p:0.95}"

run() {
  if [ "$dry" = "--dry-run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

for task in math_500 aime24; do
  run lighteval vllm "$arguments" "lighteval|$task|0" --output-dir "$out" --save-details
done
if [ -n "${LIGHTEVAL_TASKS:-}" ]; then
  for task in amc23 minerva olympiadbench; do
    run lighteval vllm "$arguments" "custom|$task|0" --custom-tasks "$LIGHTEVAL_TASKS" --output-dir "$out" --save-details
  done
else
  echo "LIGHTEVAL_TASKS is not set: amc23, minerva and olympiadbench are left out" >&2
fi
