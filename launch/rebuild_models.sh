#!/usr/bin/env bash
# Rebuilds models/shapes/{base,distilled,controller} from nothing. Run it again to go on where it stopped.
# Needs the environment that `make .venv` makes. DEVICE=cuda trains on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cpu}       # cpu | cuda
export PATH="$PWD/.venv/bin:$PATH"

once() { # once FILE RECIPE [overrides]: runs the recipe unless FILE, its last product, is there
  local file=$1
  shift
  [[ -e $file ]] || python "recipes/$1" "${@:2}"
}

publish() { # publish NAME: runs/rebuild/NAME/model becomes models/shapes/NAME
  local staging=models/shapes/$1.staging
  rm -rf "$staging"
  mkdir -p models/shapes
  cp -r "runs/rebuild/$1/model" "$staging"
  rm -rf "models/shapes/$1"
  mv "$staging" "models/shapes/$1"
}

# The drawing model: VAE, text encoder and an untrained transformer, then pretraining, then distillation.
once runs/rebuild/parts/model      make_shapes_models.py experiment=shapes_models   device="$DEVICE"
once runs/rebuild/pretrained/model train_dit.py          experiment=shapes_pretrain model.device="$DEVICE"
once runs/rebuild/traces/trajectories.jsonl make_shapes.py run=rebuild/traces num=12000 seed=5 \
  habits.edit_slip=0 habits.plan_slip=0
once runs/rebuild/base/model       train_dit.py          experiment=shapes_base     model.device="$DEVICE"
once runs/rebuild/distilled/model  distill.py            experiment=shapes_distill  model.device="$DEVICE"

# The controller: SFT from random weights, then on trajectories in which more goes wrong and is repaired.
once runs/rebuild/vlm_data/trajectories.jsonl make_shapes.py run=rebuild/vlm_data num=6000
once runs/rebuild/controller_base/model       train_vlm.py   experiment=shapes_vlm_base controller.device="$DEVICE"
once runs/rebuild/vlm_repair_data/trajectories.jsonl make_shapes.py run=rebuild/vlm_repair_data num=12000 seed=1 \
  habits.draw_slip=0.4 habits.edit_slip=0.2 habits.smudge=0.15
once runs/rebuild/controller/model            train_vlm.py   experiment=shapes_vlm_repair controller.device="$DEVICE"

for name in base distilled controller; do publish "$name"; done
du -sh models/shapes
