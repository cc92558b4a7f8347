#!/usr/bin/env bash
# Three seeds of base, SFT, SFT + simple RL, SFT + PPRL, the merge, and its closed loop. Run it again to go on.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
ROOT=ablation
SEEDS=${SEEDS:-"0 1 2"}
JOBS=${JOBS:-2}             # seeds side by side, a core each
EPOCHS=${EPOCHS:-100}       # of PPRL and of simple RL
DATA=runs/$ROOT/data
RL_DATA=runs/$ROOT/rl_data
CONTROLLER=runs/$ROOT/controller
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

once() { # once FILE RECIPE [overrides]: runs the recipe unless FILE, its last product, is there
  local file=$1
  shift
  [[ -e $file ]] || python "recipes/$1" "${@:2}"
}

seed() { # every system of one seed
  local run=$ROOT/seed$1 runs=runs/$ROOT/seed$1
  once "$runs/sft/model"    train_dit.py     experiment=shapes_sft   run="$run/sft"    seed="$1" data.folder=$DATA
  rl=(train_pprl.py experiment=shapes_pprl seed="$1" data.folder="$RL_DATA" model.folder="$runs/sft/model" pprl.epochs="$EPOCHS")
  once "$runs/pprl/model"   "${rl[@]}" run="$run/pprl"
  once "$runs/simple/model" "${rl[@]}" run="$run/simple" reward=simple
  once "$runs/merge/model"  merge_weights.py experiment=shapes_merge run="$run/merge"  aligned="$runs/pprl/model"
  evaluate=(evaluate.py experiment=shapes_eval seed="$1")
  once "$runs/eval/base/evaluation.json"   "${evaluate[@]}" run="$run/eval/base"
  once "$runs/eval/sft/evaluation.json"    "${evaluate[@]}" run="$run/eval/sft"    model.folder="$runs/sft/model"
  once "$runs/eval/simple/evaluation.json" "${evaluate[@]}" run="$run/eval/simple" model.folder="$runs/simple/model"
  once "$runs/eval/pprl/evaluation.json"   "${evaluate[@]}" run="$run/eval/pprl"   model.folder="$runs/pprl/model"
  once "$runs/eval/merged/evaluation.json" "${evaluate[@]}" run="$run/eval/merged" model.folder="$runs/merge/model" steps=4 cfg=1
  once "$runs/eval/merged_closed_loop/evaluation.json" "${evaluate[@]}" run="$run/eval/merged_closed_loop" \
    model.folder="$runs/merge/model" steps=4 cfg=1 mode=closed_loop controller=$CONTROLLER/model
}

mkdir -p "runs/$ROOT"
once $DATA/trajectories.jsonl    make_shapes.py        experiment=shapes_data    run=$ROOT/data
once $RL_DATA/trajectories.jsonl make_shapes.py        experiment=shapes_rl_data run=$ROOT/rl_data
once $RL_DATA/proxy_prompts.jsonl make_proxy_prompts.py experiment=shapes_proxy  data.folder=$RL_DATA
once $CONTROLLER/model           train_vlm.py          experiment=shapes_train_vlm run=$ROOT/controller data.folder=$DATA

pids=()
for s in $SEEDS; do
  while (($(jobs -rp | wc -l) >= JOBS)); do sleep 1; done
  seed "$s" >"runs/$ROOT/seed$s.log" 2>&1 &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  wait "$pid" || { echo "a seed failed: see runs/$ROOT/seed*.log" >&2; exit 1; }
done
python recipes/compare.py run=$ROOT
