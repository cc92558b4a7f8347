#!/usr/bin/env bash
# The whole story on the shapes world, a recipe a line. Run it again to go on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what does not wait for another stage runs beside it, a core each
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
  python "recipes/$1" "${@:2}"
  echo $((SECONDS - start)) >"$RUNS/.done/$name"
}

beside() { # beside NAME COMMAND: runs it in the background; what it prints goes to NAME.log
  echo "== $1: beside the next stages, see $RUNS/$1.log"
  "${@:2}" >"$RUNS/$1.log" 2>&1 &
  pids+=($!)
}

together() { # waits for what runs beside
  for pid in "${pids[@]}"; do
    wait "$pid" || { echo "a stage that ran beside failed: see $RUNS/*.log" >&2; exit 1; }
  done
  pids=()
}

before=$(cat "$RUNS/.seconds" 2>/dev/null || echo 0) # of earlier attempts
note_seconds() { echo $((before + SECONDS)) >"$RUNS/.seconds"; }
stop_all() { # also what runs beside: each of its groups of processes
  note_seconds
  for pid in $(jobs -p); do kill -- "-$pid" 2>/dev/null || true; done
}
pids=()
set -m # background stages are groups of processes, so that they can be stopped whole
trap stop_all EXIT

scores() { # of the models before PPRL
  stage base_eval evaluate.py experiment=shapes_eval run=$ROOT/eval/base
  stage sft_eval  evaluate.py experiment=shapes_eval run=$ROOT/eval/sft model.folder=$RUNS/sft/model
}

stage data    make_shapes.py        experiment=shapes_data    run=$ROOT/data
beside controller \
  stage controller train_vlm.py     experiment=shapes_train_vlm run=$ROOT/controller data.folder=$RUNS/data
stage rl_data make_shapes.py        experiment=shapes_rl_data run=$ROOT/rl_data
stage proxy   make_proxy_prompts.py experiment=shapes_proxy   data.folder=$RUNS/rl_data
stage sft     train_dit.py          experiment=shapes_sft     run=$ROOT/sft data.folder=$RUNS/data
together
beside scores scores
stage pprl    train_pprl.py         experiment=shapes_pprl    run=$ROOT/pprl data.folder=$RUNS/rl_data model.folder=$RUNS/sft/model
together
beside pprl_eval \
  stage pprl_eval evaluate.py       experiment=shapes_eval    run=$ROOT/eval/pprl model.folder=$RUNS/pprl/model
stage merge   merge_weights.py      experiment=shapes_merge   run=$ROOT/merge aligned=$RUNS/pprl/model
stage merged_eval evaluate.py       experiment=shapes_eval    run=$ROOT/eval/merged model.folder=$RUNS/merge/model steps=4 cfg=1
stage loop_eval   evaluate.py       experiment=shapes_eval    run=$ROOT/eval/merged_closed_loop model.folder=$RUNS/merge/model \
  steps=4 cfg=1 mode=closed_loop controller=$RUNS/controller/model
together
note_seconds
python recipes/report.py run=$ROOT
