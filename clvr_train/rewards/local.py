"""Rewards that need no server: a CLIP model's similarity, and rules on pixels."""

import logging
import threading
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from clvr_train.method.score import Score, weighted_mean

logger = logging.getLogger(__name__)


class ClipScore:
    """Cosine of a CLIP model between image and text, mapped linearly from [-1, 1] to [0, 1]. It has no score of edits.

    Real cosines lie close together (some 0.15 to 0.35): mix them by normalised dimensions. Of a text that is longer
    than the model's window (77 tokens) the beginning counts; `texts_cut` says how often.

    Raises:
        ValueError: the folder holds no CLIP model that can be read.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"{folder}: no folder of a CLIP model (config.json is missing)")
        options = {"local_files_only": True}
        try:
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, **options)
            self._images = CLIPImageProcessorPil.from_pretrained(folder, **options)
            self._texts = AutoTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"{folder}: no CLIP model that can be read ({error})") from error
        self._model = model.to(device).eval()
        self._window = model.config.text_config.max_position_embeddings
        self._lock = threading.Lock()  # the tokenizer holds its settings of truncation
        self.texts_cut = 0

    @torch.no_grad()
    def global_score(self, image: Image, prompt: str) -> Score:
        with self._lock:
            if len(self._texts(prompt)["input_ids"]) > self._window:
                self.texts_cut += 1
                if self.texts_cut == 1:
                    logger.warning("CLIP reads %d tokens; longer prompts are cut", self._window)
            text = self._texts(prompt, truncation=True, max_length=self._window, return_tensors="pt")
            pixels = self._images(image.convert("RGB"), return_tensors="pt")
            outputs = self._model(**text.to(self._model.device), **pixels.to(self._model.device))
        cosine = (outputs.image_embeds * outputs.text_embeds).sum().item()  # both have norm 1
        return Score(min(1.0, max(0.0, (1.0 + cosine) / 2.0)))


class Rules:
    """What can be said of pixels alone: guards that a reward can be mixed with, not measures of quality.

    Of an image: `exposure`, the share of its channel values that are not clipped to 0 or 255, and `contrast`, the
    standard deviation of its brightness over `contrast_full` (in 0 .. 1), at most 1. Of an edit: the mean absolute
    difference to the source over `change_full`, at most 1, so that an unchanged copy scores 0.
    """

    def __init__(self, contrast_full: float = 0.1, change_full: float = 0.01) -> None:
        if contrast_full <= 0 or change_full <= 0:
            raise ValueError(f"contrast_full={contrast_full}, change_full={change_full}: both must be above 0")
        self._contrast_full, self._change_full = contrast_full, change_full

    def global_score(self, image: Image, prompt: str) -> Score:
        pixels = np.asarray(image.convert("RGB"))
        exposure = float(((pixels > 0) & (pixels < 255)).mean())
        contrast = min(1.0, float(np.asarray(image.convert("L")).std()) / 255 / self._contrast_full)
        return weighted_mean({"exposure": (Score(exposure), 0.5), "contrast": (Score(contrast), 0.5)})

    def edit_score(self, source: Image, image: Image, instruction: str) -> Score:
        before, after = (
            np.asarray(picture.convert("RGB").resize(image.size), dtype=np.float32) for picture in (source, image)
        )
        return Score(min(1.0, float(np.abs(after - before).mean()) / 255 / self._change_full))


class Saturation:
    """The mean of (largest - smallest channel) / 255 over an image's pixels: a judge that is easily hacked, to see how
    a run that is hacked looks and what the sentinel does (docs/pprl.md). It has no score of edits.
    """

    def global_score(self, image: Image, prompt: str) -> Score:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
        return Score(float((pixels.max(-1) - pixels.min(-1)).mean() / 255))
