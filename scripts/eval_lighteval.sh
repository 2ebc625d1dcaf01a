#!/usr/bin/env bash
# The papers' five benchmarks by lighteval, on a checkpoint that pspo_jax.export wrote, for comparison with others.
# It needs a GPU, network, and an environment of its own: pip install 'lighteval[math,vllm]'
#
#   scripts/eval_lighteval.sh EXPORTED_FOLDER OUT_FOLDER [--dry-run]
#
# Settings are those of open-rs and PSPO: one sample for each problem, temperature 0.6, top-p 0.95, 32,768 new tokens.
# MATH-500 and AIME24 are lighteval's own tasks; AMC23, Minerva and OlympiadBench come from the file named in
# LIGHTEVAL_TASKS (open-rs's src/open_r1/evaluate.py) and are left out without it.
# shellcheck source=scripts/launch.sh
source "$(dirname "$0")/launch.sh"

words=()
for word; do
  case $word in
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage && exit 0 ;;
    -*) die "$word: no such option; see --help" ;;
    *) words+=("$word") ;;
  esac
done
((${#words[@]} == 2)) || die "name an exported folder and a folder for the results; see --help"
model=${words[0]} out=${words[1]}
[[ -f $model/config.json ]] || die "$model: holds no config.json; name a folder that pspo_jax.export wrote"
[[ -n $DRY_RUN ]] || command -v lighteval >/dev/null || die "lighteval: not installed; pip install 'lighteval[math,vllm]'"
supervise

arguments="model_name=$model,dtype=bfloat16,max_model_length=32768,gpu_memory_utilization=0.8"
arguments="$arguments,generation_parameters={max_new_tokens:32768,temperature:0.6,top_p:0.95}"

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
