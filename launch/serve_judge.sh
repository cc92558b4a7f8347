#!/usr/bin/env bash
# Serves a judge, or a teacher, on this machine: vLLM on one GPU, `transformers serve` on a CPU (pip install -e '.[serve]').
#
#   bash launch/serve_judge.sh                                        # UnifiedReward, port 8080
#   MODEL=CodeGoat24/UnifiedReward-Edit-qwen3vl-8b NAME=UnifiedReward-Edit PORT=8081 bash launch/serve_judge.sh
#   GPUS=6,7 SHARE=2 bash launch/serve_judge.sh                       # on both, with another server beside it
#   DEVICE=cpu MODEL=my/folder bash launch/serve_judge.sh             # its name is then the folder
#   DRY_RUN=1 bash launch/serve_judge.sh                              # only says what it would run
#
# A key that clients must give comes from VLLM_API_KEY; reward.chat.key_env names the variable on their side.
set -euo pipefail

MODEL=${MODEL:-CodeGoat24/UnifiedReward-2.0-qwen3vl-8b}
NAME=${NAME:-UnifiedReward}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8080}
IMAGES=${IMAGES:-16}          # most images in a request
CONTEXT=${CONTEXT:-32768}     # tokens of a request with its reply
GPUS=${GPUS:-}                # the GPUs to be on, split over them: 6 or 6,7; empty: the first that is visible
SHARE=${SHARE:-1}             # so many servers share these GPUs: each takes its part of the memory
DEVICE=${DEVICE:-$(command -v nvidia-smi >/dev/null && echo cuda || echo cpu)}

if [[ $DEVICE == cpu ]]; then
  # It lists its models from the hub's cache and fails where there is none; the list is how clients see that it is well.
  cache=${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}
  [[ -n ${DRY_RUN:-} ]] || mkdir -p "$cache"
  command=(transformers serve "$MODEL" --device cpu --host "$HOST" --port "$PORT")
else
  command=(vllm serve "$MODEL" --served-model-name "$NAME" --host "$HOST" --port "$PORT"
    --limit-mm-per-prompt.image "$IMAGES" --max-model-len "$CONTEXT"
    --gpu-memory-utilization "$(printf '0.%02d' $((90 / SHARE)))" --enable-prefix-caching)
  if [[ -n $GPUS ]]; then
    commas=${GPUS//[^,]/}
    command=(env CUDA_VISIBLE_DEVICES="$GPUS" "${command[@]}" --tensor-parallel-size $((${#commas} + 1)))
  fi
fi
printf '%q ' "${command[@]}"
echo
[[ -n ${DRY_RUN:-} ]] || exec "${command[@]}"
