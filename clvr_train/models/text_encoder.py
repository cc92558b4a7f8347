"""The text encoder of Klein, as much of it as is used: of Qwen3's 36 layers the first 27, and no head.

A hidden state of layer k depends on the first k layers alone, so the states are those of the whole encoder bit for bit
(a test holds that).
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3Model


def check_text_config(config: Qwen3Config, where: str | Path, layers: Sequence[int], window: int, states: int) -> None:
    """Holds the choices of a `model` group against the text encoder.

    Args:
        where: what messages name. layers: hidden states that are stacked. window: text tokens.
        states: width of the text that the transformer takes.

    Raises:
        ValueError: the encoder has no such layer or no such long window, or the transformer takes another width.
    """
    if not layers or min(layers) < 0 or max(layers) < 1:
        raise ValueError(f"model.layers={list(layers)}: expected numbers of layers from 0 on, one of them at least 1")
    if max(layers) > config.num_hidden_layers:
        raise ValueError(f"model.layers={list(layers)}: {where} has {config.num_hidden_layers} layers")
    if len(layers) * config.hidden_size != states:
        stacked = f"{len(layers)} states of {config.hidden_size} numbers"
        raise ValueError(f"model.layers={list(layers)}: {where} gives {stacked}, the transformer takes {states}")
    if window > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"model.window={window}: {where} takes at most {most} tokens (max_position_embeddings)")


class _FirstLayers(Qwen3Model):
    """Qwen3 of which a folder holds more: further layers and the head are not read."""

    _keys_to_ignore_on_load_unexpected = [r"(^|\.)layers\.\d+\.", r"^lm_head\."]


def load_text_encoder(folder: Path, layers: Sequence[int], dtype: torch.dtype) -> Qwen3Model:
    """The first max(`layers`) layers from a folder; of the others nothing is held.

    Raises:
        OSError: no such folder, or no weights in it. ValueError: tensors of the used layers are missing.
    """
    config = Qwen3Config.from_pretrained(folder, local_files_only=True)
    model, report = _FirstLayers.from_pretrained(
        folder, config=used_config(config, layers), dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(f"{folder}: has no tensor {min(report['missing_keys'])}")
    return _used(model, config)


def shape_text_encoder(config: Qwen3Config, layers: Sequence[int]) -> Qwen3Model:
    """The same of a configuration alone, with random weights on the current device (meta, for the planner)."""
    return _used(Qwen3Model(used_config(config, layers)), config)


def used_config(config: Qwen3Config, layers: Sequence[int]) -> Qwen3Config:
    """The configuration of the layers that are used."""
    used = copy.deepcopy(config)
    used.num_hidden_layers = max(layers)
    used.layer_types = config.layer_types[: max(layers)]
    return used


def _used(model: Qwen3Model, whole: Qwen3Config) -> Qwen3Model:
    """Without the norm, which stands behind the last layer of the whole encoder and not behind an earlier one."""
    if model.config.num_hidden_layers < whole.num_hidden_layers:
        model.norm = torch.nn.Identity()
    return model
