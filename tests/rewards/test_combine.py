"""The reward of the paper, and that a failed judge is missing."""

import pytest
from PIL import Image

from clvr_train.method.score import Generation, ProxyPrompt, Score
from clvr_train.method.trajectory import Sample
from clvr_train.rewards.combine import simple_prompt, trajectory_reward

IMAGES = tuple(Image.new("RGB", (96, 96), colour) for colour in ("red", "green", "blue"))


class ScriptedJudge:
    def __init__(self, whole, edit=None):
        self.whole, self.edit, self.sources = whole, edit, []

    def global_score(self, image, prompt):
        return self.whole

    def edit_score(self, source, image, instruction):
        self.sources.append(source.getpixel((0, 0)))
        return self.edit


def generation(history):
    return Generation(Sample("a", history + 1, "goal", ("first", "newest"), IMAGES[:history]), IMAGES[0], (0,))


def test_first_image_is_judged_as_a_whole():
    assert trajectory_reward(ScriptedJudge(Score(0.75)), generation(0), ProxyPrompt("p")).value == 0.75


def test_edits_weigh_both_parts_against_the_newest_image_of_idx():
    judge = ScriptedJudge(Score(0.5), Score(1.0, parts={"success": 1.0}))
    score = trajectory_reward(judge, generation(3), ProxyPrompt("p", "e", (1, 2)), weight_global=1, weight_edit=3)
    assert score.value == pytest.approx(0.875)
    assert score.parts == {"global": 0.5, "edit": 1.0, "edit_success": 1.0}
    assert judge.sources == [(0, 128, 0)]


@pytest.mark.parametrize("parts", [(Score(None, "down"), Score(1.0)), (Score(1.0), Score(None, "down"))])
def test_a_missing_part_makes_the_reward_missing(parts):
    score = trajectory_reward(ScriptedJudge(*parts), generation(1), ProxyPrompt("p", "e", (1,)))
    assert score.missing and score.reason == "down"


def test_simple_rewards_see_the_newest_reasoning_and_image_only():
    assert simple_prompt(generation(0).sample) == ProxyPrompt("newest")
    assert simple_prompt(generation(2).sample) == ProxyPrompt("newest", "newest", (2,))
