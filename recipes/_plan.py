"""What the plans of all trainings share."""

from pathlib import Path

from omegaconf import DictConfig

from clvr_train.models.trace import PUBLISHED_KLEIN

NODE = 8  # GPUs of an engine that has several


def model_name(model: DictConfig) -> str:
    """The folder of a `model` group, or where there is none the name of a published model."""
    folder, name = model.folder, model.name
    return name if name in PUBLISHED_KLEIN and not Path(folder).exists() else folder


def key_of(setting: str, section: str = "train") -> str:
    """What a setting is called on the command line; `section` holds the micro-batch."""
    return {"engine": "engine", "micro_batch": f"{section}.micro_batch"}.get(setting, f"engine.{setting}")
