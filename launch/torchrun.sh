#!/usr/bin/env bash
# Runs a recipe in one process for every GPU of this machine; without GPUs in one process, or in PROCESSES.
#
#   bash launch/torchrun.sh train_dit experiment=klein_4b_sft data.folder=my/data
#   PROCESSES=2 bash launch/torchrun.sh train_dit experiment=shapes_sft engine=ddp
#   bash launch/torchrun.sh train_dit -m experiment=klein_4b_sft data.folder=my/data train.lr=1e-5,2e-5    # a sweep
#   DRY_RUN=1 bash launch/torchrun.sh train_vlm experiment=qwen3vl_8b_sft       # only says what it would run
#
# CUDA_VISIBLE_DEVICES chooses among the GPUs; SAVING_S is how many seconds the processes have to save after SIGTERM. To
# resume, run the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ! -d .venv/bin ]] || export PATH="$PWD/.venv/bin:$PATH"

recipe=${1:?a recipe is needed, for example train_dit}
shift
[[ -f recipes/$recipe.py ]] || { echo "error: recipes/$recipe.py: no such recipe" >&2; exit 1; }

gpus() { # their number
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus | wc -l
  else
    echo 0
  fi
}

found=$(gpus)
PROCESSES=${PROCESSES:-$((found > 0 ? found : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((found > 0 ? 8 : 1))} TOKENIZERS_PARALLELISM=false
command=(torchrun --standalone --nproc_per_node "$PROCESSES" --shutdown-timeout "${SAVING_S:-280}" "recipes/$recipe.py" "$@")
for word in "$@"; do # a sweep starts torchrun for each of its jobs
  [[ $word != -m && $word != --multirun ]] || command=(python "recipes/$recipe.py" "$@" sweep.nproc="$PROCESSES")
done
printf '%q ' "${command[@]}"
echo
[[ -n ${DRY_RUN:-} ]] || exec "${command[@]}"
