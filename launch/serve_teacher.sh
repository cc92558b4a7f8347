#!/usr/bin/env bash
# Serves the teacher that writes proxy prompts; the keys are those of launch/serve_judge.sh, GPUS and SHARE among them.
#
#   bash launch/serve_teacher.sh                                      # Qwen3-VL 32B as "teacher", port 8082
#   GPUS=0,1,2,3 bash launch/serve_teacher.sh                         # split over four GPUs
#   DRY_RUN=1 bash launch/serve_teacher.sh                            # only says what it would run
#
# Then, with the key teacher.chat.url for another host or port:
#   python recipes/make_proxy_prompts.py data.folder=TRAIN teacher=openai teacher.chat.model=teacher \
#     teacher.chat.url=http://127.0.0.1:8082/v1
set -euo pipefail

export MODEL=${MODEL:-Qwen/Qwen3-VL-32B-Instruct} NAME=${NAME:-teacher} PORT=${PORT:-8082}
exec bash "$(dirname "$0")/serve_judge.sh"
