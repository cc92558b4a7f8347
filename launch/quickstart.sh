#!/usr/bin/env bash
# The whole story on the shapes world, a recipe a line. Run it again to go on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=quickstart
RUNS=runs/$ROOT
mkdir -p "$RUNS/.done"

stage() { # stage NAME RECIPE [overrides]: runs it unless it is done, and notes its seconds
  local name=$1 start=$SECONDS
  shift
  if [[ -e $RUNS/.done/$name ]]; then
    echo "== $name: done before"
    return
  fi
  echo "== $name: python recipes/$*"
  python "recipes/$@"
  echo $((SECONDS - start)) >"$RUNS/.done/$name"
}

stage data       make_shapes.py        experiment=shapes_data         run=$ROOT/data
stage rl_data    make_shapes.py        experiment=shapes_rl_data      run=$ROOT/rl_data
stage sft        train_dit.py          experiment=shapes_sft          run=$ROOT/sft        data.folder=$RUNS/data
stage controller train_vlm.py          experiment=shapes_train_vlm    run=$ROOT/controller data.folder=$RUNS/data
stage proxy      make_proxy_prompts.py experiment=shapes_proxy        data.folder=$RUNS/rl_data
stage pprl       train_pprl.py         experiment=shapes_pprl         run=$ROOT/pprl       data.folder=$RUNS/rl_data model.folder=$RUNS/sft/model
stage merge      merge_weights.py      experiment=shapes_merge        run=$ROOT/merge      aligned=$RUNS/pprl/model
stage base_eval   evaluate.py experiment=shapes_eval run=$ROOT/eval/base
stage sft_eval    evaluate.py experiment=shapes_eval run=$ROOT/eval/sft    model.folder=$RUNS/sft/model
stage pprl_eval   evaluate.py experiment=shapes_eval run=$ROOT/eval/pprl   model.folder=$RUNS/pprl/model
stage merged_eval evaluate.py experiment=shapes_eval run=$ROOT/eval/merged model.folder=$RUNS/merge/model steps=4 cfg=1
stage loop_eval   evaluate.py experiment=shapes_eval run=$ROOT/eval/merged_closed_loop model.folder=$RUNS/merge/model steps=4 cfg=1 \
  mode=closed_loop controller=$RUNS/controller/model
python recipes/report.py run=$ROOT
