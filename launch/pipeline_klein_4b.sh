#!/usr/bin/env bash
# The paper's whole run with FLUX.2 Klein 4B on 8 GPUs of 80 GB, a recipe a line. Run it again to go on where it stopped.
#
#   DATA=TRAIN HELD_OUT=OTHERS GOALS=goals.txt GENEVAL=geneval bash launch/pipeline_klein_4b.sh
#   DRY_RUN=1 bash launch/pipeline_klein_4b.sh                        # only says what it would run
#
# Teacher and judges are up only while they are asked. SERVERS=split gives each GPUs of its own; SERVERS=share puts all
# on the last two GPUs, the two judges with half of the memory each.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ ! -d .venv/bin ]] || export PATH="$PWD/.venv/bin:$PATH"
ROOT=${ROOT:-klein_4b}                               # everything is in runs/$ROOT
DATA=${DATA:-data/train}                             # trajectories (docs/data_format.md)
HELD_OUT=${HELD_OUT:-data/held_out}                  # trajectories that are not trained on
GOALS=${GOALS:-data/goals.txt}                       # to draw in closed loop, a line each
GENEVAL=${GENEVAL:-benchmarks/geneval}               # checkout of GenEval
GENEVAL_PYTHON=${GENEVAL_PYTHON:-null}               # interpreter of its scorer; null: this one
BASE=${BASE:-models/FLUX.2-klein-base-4B}
DISTILLED=${DISTILLED:-models/FLUX.2-klein-4B}
QWEN=${QWEN:-models/Qwen3-VL-8B-Instruct}
SERVERS=${SERVERS:-split}                            # split | share
GPUS=${GPUS:-0,1,2,3,4,5,6,7}                        # of SFT
RL_GPUS=${RL_GPUS:-0,1,2,3,4,5}                      # of PPRL, beside its judges
WAIT_S=${WAIT_S:-1800}                               # for a server to be up
case $SERVERS in
  split) TEACHER_GPUS=${TEACHER_GPUS:-0,1,2,3} JUDGE_GPUS=${JUDGE_GPUS:-6} EDITS_GPUS=${EDITS_GPUS:-7} share=1 ;;
  share) TEACHER_GPUS=${TEACHER_GPUS:-6,7} JUDGE_GPUS=${JUDGE_GPUS:-6,7} EDITS_GPUS=${EDITS_GPUS:-6,7} share=2 ;;
  *) echo "error: SERVERS=$SERVERS is not one of split, share" >&2; exit 1 ;;
esac
export DEVICE=cuda
DRY_RUN=${DRY_RUN:-}
RUNS=runs/$ROOT

recipe() { # recipe NAME [overrides]: in this process
  if [[ -n $DRY_RUN ]]; then printf '%q ' python "recipes/$1.py" "${@:2}"; echo; else python "recipes/$1.py" "${@:2}"; fi
}

ranks() { # ranks GPUS NAME [overrides]: in a process a GPU
  DRY_RUN=$DRY_RUN CUDA_VISIBLE_DEVICES=$1 bash launch/torchrun.sh "${@:2}"
}

stage() { # stage NAME COMMAND: runs it unless it is done, and notes its seconds
  local name=$1 start=$SECONDS
  if [[ -e $RUNS/.done/$name && -z $DRY_RUN ]]; then
    echo "== $name: done before"
    return
  fi
  echo "== $name"
  "${@:2}"
  [[ -n $DRY_RUN ]] || echo $((SECONDS - start)) >"$RUNS/.done/$name"
}

serve() { # serve PORT SCRIPT KEY=VALUE...: in the background until stop_servers; returns once it lists its models
  local port=$1 log=$RUNS/server_$1.log until=$((SECONDS + WAIT_S))
  if [[ -n $DRY_RUN ]]; then
    env PORT="$port" DRY_RUN=1 "${@:3}" bash "launch/$2"
    return
  fi
  env PORT="$port" "${@:3}" bash "launch/$2" >"$log" 2>&1 &
  local pid=$!
  until curl --silent --fail --max-time 5 --noproxy '*' --output /dev/null "http://127.0.0.1:$port/v1/models"; do
    kill -0 "$pid" 2>/dev/null || { echo "error: the server of port $port has ended: see $log" >&2; exit 1; }
    ((SECONDS < until)) || { echo "error: the server of port $port is not up after $WAIT_S s: see $log" >&2; exit 1; }
    sleep 2
  done
}

stop_servers() { # and what they have started: each of their groups of processes
  local pid
  for pid in $(jobs -p); do
    kill -- "-$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
}
set -m # what runs in the background is a group of processes, so that it can be stopped whole
trap stop_servers EXIT

validate() {
  recipe validate_data data="$DATA" report="$RUNS/validation.json"
  recipe validate_data data="$HELD_OUT" report="$RUNS/validation_held_out.json"
}

proxy() {
  serve 8082 serve_teacher.sh GPUS="$TEACHER_GPUS"
  recipe make_proxy_prompts data.folder="$DATA" teacher=openai teacher.chat.model=teacher teacher.chat.url=http://127.0.0.1:8082/v1
  stop_servers
}

pprl() {
  serve 8080 serve_judge.sh GPUS="$JUDGE_GPUS" SHARE="$share"
  serve 8081 serve_judge.sh GPUS="$EDITS_GPUS" SHARE="$share" MODEL=CodeGoat24/UnifiedReward-Edit-qwen3vl-8b NAME=UnifiedReward-Edit
  ranks "$RL_GPUS" train_pprl experiment=klein_4b_pprl run="$ROOT/pprl" data.folder="$DATA" model.folder="$RUNS/sft/model" reward=unified_reward
  stop_servers
}

evaluate() { # evaluate SYSTEM FOLDER [overrides]
  recipe evaluate benchmark=geneval benchmark.root="$GENEVAL" benchmark.python="$GENEVAL_PYTHON" run="$ROOT/eval/$1" \
    model=klein_4b model.folder="$2" "${@:3}"
}

if [[ -z $DRY_RUN ]]; then
  for path in "$DATA" "$HELD_OUT" "$GOALS" "$GENEVAL" "$BASE" "$DISTILLED" "$QWEN"; do
    [[ -e $path ]] || { echo "error: $path: not found; the keys at the top of launch/pipeline_klein_4b.sh name what it needs" >&2; exit 1; }
  done
  mkdir -p "$RUNS/.done"
fi

stage doctor     recipe doctor run="$ROOT" device=cuda
stage validate   validate
stage sft        ranks "$GPUS" train_dit experiment=klein_4b_sft run="$ROOT/sft" data.folder="$DATA" validation.folder="$HELD_OUT" \
  model.folder="$BASE"
stage controller ranks "$GPUS" train_vlm experiment=qwen3vl_8b_sft run="$ROOT/controller" data.folder="$DATA" \
  validation.folder="$HELD_OUT" controller.folder="$QWEN"
stage proxy      proxy
stage pprl       pprl
stage merge      recipe merge_weights run="$ROOT/merge" model=klein_4b model.folder="$BASE" distilled="$DISTILLED" aligned="$RUNS/pprl/model"
stage loop       recipe run_closed_loop run="$ROOT/closed_loop" goals_file="$GOALS" model=klein_4b model.folder="$RUNS/merge/model" \
  controller.folder="$RUNS/controller/model" controller.device=cuda controller.precision=bf16
stage base_eval   evaluate base   "$BASE"
stage sft_eval    evaluate sft    "$RUNS/sft/model"
stage pprl_eval   evaluate pprl   "$RUNS/pprl/model"
stage merged_eval evaluate merged "$RUNS/merge/model" steps=4 cfg=1
stage loop_eval   evaluate merged_closed_loop "$RUNS/merge/model" steps=4 cfg=1 mode=closed_loop controller="$RUNS/controller/model"
systems=("$ROOT"/eval/{base,sft,pprl,merged,merged_closed_loop})
stage report      recipe report run="$ROOT/report" "runs=[$(IFS=,; echo "${systems[*]}")]"
echo "== the runs are in $RUNS; the comparison is $RUNS/report"
