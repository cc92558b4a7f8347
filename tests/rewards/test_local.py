"""Rewards without a server: CLIP against the library's own forward, and rules on pixels."""

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from clvr_train.models.tiny import train_tokenizer
from clvr_train.rewards.local import ClipScore, Rules, Saturation

NOISE = Image.effect_noise((64, 48), 90).convert("RGB")
RED = Image.new("RGB", (64, 64), (200, 30, 30))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red circle left of a blue square"] * 20, vocab_size=400)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    vision = size | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_scores_are_those_of_the_library(folder):
    judge = ClipScore(folder)
    model, images = CLIPModel.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = judge._texts
    scores = []
    for image in (NOISE, RED):
        inputs = images(image, return_tensors="pt") | tokenizer("a red circle", return_tensors="pt")
        with torch.no_grad():
            cosine = model(**inputs).logits_per_image.item() / model.logit_scale.exp().item()
        scores.append(judge.global_score(image, "a red circle").value)
        assert scores[-1] == pytest.approx((1 + cosine) / 2, abs=1e-6)
    assert scores[0] != scores[1] and judge.texts_cut == 0


def test_texts_beyond_the_window_are_cut_and_counted(folder, caplog):
    judge = ClipScore(folder)
    for _ in range(2):
        assert not judge.global_score(RED, "a red circle left of a blue square " * 9).missing
    assert judge.texts_cut == 2 and caplog.text.count("longer prompts are cut") == 1


@pytest.mark.parametrize("content", [None, "{}", "{"])
def test_a_folder_without_a_clip_model_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}: no "):
        ClipScore(tmp_path)


def test_rules_say_what_pixels_say():
    rules = Rules()
    assert rules.global_score(NOISE, "").parts["contrast"] == 1.0
    assert rules.global_score(RED, "").parts == {"exposure": 1.0, "contrast": 0.0}
    saturated = Image.new("RGB", (64, 64), (255, 0, 0))
    assert rules.global_score(saturated, "").value == 0.0
    assert rules.edit_score(RED, RED, "").value == 0.0 and rules.edit_score(RED, NOISE, "").value == 1.0
    faint = Image.new("RGB", (64, 64), (201, 31, 31))
    assert rules.edit_score(RED, faint, "").value == pytest.approx(1 / 255 / 0.01)
    with pytest.raises(ValueError, match="both must be above 0"):
        Rules(contrast_full=0.0)


def test_saturation_is_that_of_pure_colours():
    judge = Saturation()
    scores = [
        judge.global_score(image, "p").value for image in (Image.new("RGB", (4, 4), "blue"), RED, RED.convert("L"))
    ]
    assert scores == pytest.approx([1.0, 170 / 255, 0.0])
