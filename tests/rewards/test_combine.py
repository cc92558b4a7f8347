"""The reward of the paper, and that a failed judge is missing."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clvr_train.method.score import Generation, ProxyPrompt, Score, weighted_mean
from clvr_train.method.trajectory import Sample
from clvr_train.rewards.combine import Mix, score_all, simple_prompt, trajectory_reward

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
    judge = ScriptedJudge(Score(0.5, parts={"match": 0.5}), Score(1.0, parts={"success": 1.0, "kept": 1.0}))
    score = trajectory_reward(judge, generation(3), ProxyPrompt("p", "e", (1, 2)), weight_global=1, weight_edit=3)
    assert score.value == pytest.approx(0.875)
    assert score.parts == {"global": 0.5, "edit": 1.0, "edit_success": 1.0, "edit_kept": 1.0}
    assert score.dimensions == {"global": (0.5, 0.25), "edit": (1.0, 0.75)}
    assert judge.sources == [(0, 128, 0)]


@pytest.mark.parametrize("parts", [(Score(None, "down"), Score(1.0)), (Score(1.0), Score(None, "down"))])
def test_a_missing_part_makes_the_reward_missing(parts):
    score = trajectory_reward(ScriptedJudge(*parts), generation(1), ProxyPrompt("p", "e", (1,)))
    assert score.missing and score.reason == "down"


def test_edits_of_no_weight_are_not_judged():
    judge = ScriptedJudge(Score(0.5), Score(None, "down"))
    assert trajectory_reward(judge, generation(1), ProxyPrompt("p", "e", (1,)), weight_edit=0).value == 0.5
    assert judge.sources == []


def test_a_mix_of_one_judge_is_that_judge_and_of_several_their_mean_by_dimension():
    one, other = ScriptedJudge(Score(0.5), Score(0.1)), ScriptedJudge(Score(1.0), Score(None, "down"))
    alone = Mix({"a": (one.global_score, 0.3)}, {"a": (one.edit_score, 2.0)})
    assert alone.global_score(IMAGES[0], "p") is one.whole and alone.edit_score(*IMAGES[:2], "e") is one.edit
    both = Mix({"a": (one.global_score, 1.0), "b": (other.global_score, 3.0)}, {"b": (other.edit_score, 1.0)})
    score = both.global_score(IMAGES[0], "p")
    assert score.value == pytest.approx(0.875) and score.weights == {"a": 0.25, "b": 0.75}
    assert both.edit_score(*IMAGES[:2], "e").reason == "down"


values = st.floats(0, 1)


@given(st.lists(st.tuples(values, values, st.floats(0.01, 10), st.floats(0.01, 10)), min_size=1, max_size=4))
def test_the_dimensions_of_nested_means_give_the_value(rows):
    nested = {
        str(n): (weighted_mean({"x": (Score(a), v), "y": (Score(b), w)}), v + w)
        for n, (a, b, v, w) in enumerate(rows)
    }
    score = weighted_mean(nested)
    pairs = score.dimensions.values()
    assert sum(weight for _, weight in pairs) == pytest.approx(1.0)
    assert sum(value * weight for value, weight in pairs) == pytest.approx(score.value, abs=1e-9)
    assert len(pairs) == 2 * len(rows)


@pytest.mark.parametrize("weights", [(0, 0), (-1, 2)])
def test_weights_that_make_no_mean_are_refused(weights):
    with pytest.raises(ValueError, match="all >= 0, one above"):
        weighted_mean({"a": (Score(0.5), weights[0]), "b": (Score(0.5), weights[1])})


def test_scores_come_in_order_whatever_finishes_first():
    def score(item):
        time.sleep(0.02 * (item % 3 == 0))
        return Score(item / 100)

    for workers in (0, 4):
        assert [s.value for s in score_all(score, range(20), workers)] == [n / 100 for n in range(20)]


def test_simple_rewards_see_the_newest_reasoning_and_image_only():
    assert simple_prompt(generation(0).sample) == ProxyPrompt("newest")
    assert simple_prompt(generation(2).sample) == ProxyPrompt("newest", "newest", (2,))
