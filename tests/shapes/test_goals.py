"""Goals have the tag and size asked for, can be met, and no split shares a goal with another."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import goal_texts

from clvr_train.shapes.benchmark import benchmark_goals, grade
from clvr_train.shapes.controller import mutate
from clvr_train.shapes.edits import apply_edits
from clvr_train.shapes.goals import (
    MAX_GOAL_WORDS,
    SPLITS,
    TAG_SIZES,
    TAGS,
    sample_goal,
    sample_goals,
    split_of,
)
from clvr_train.shapes.language import parse_goal, tokens, write_goal
from clvr_train.shapes.layout import repair, sample_scene
from clvr_train.shapes.render import render
from clvr_train.shapes.world import canonical, expand, satisfied


@given(st.sampled_from(SPLITS), st.data())
def test_a_goal_belongs_to_its_split_however_it_is_worded(split, data):
    text = data.draw(goal_texts(split=split))
    goal = parse_goal(text)
    assert split_of(goal) == split_of(expand(goal)) == split_of(parse_goal(write_goal(goal))) == split
    assert len(tokens(text)) <= MAX_GOAL_WORDS


def test_splits_share_no_goal():
    forms = {split: {canonical(parse_goal(text)) for text in sample_goals(split, 400, 0)} for split in SPLITS}
    assert not (forms["train"] & forms["rl"] or forms["train"] & forms["eval"] or forms["rl"] & forms["eval"])


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_tag_and_size(split):
    for tag, sizes in TAG_SIZES.items():
        for size in sizes:
            assert parse_goal(sample_goal(tag, size, random.Random(0), split)).num_things == size


def test_samples_are_stratified_and_repeatable():
    goals = sample_goals("train", 100, 3)
    assert goals == sample_goals("train", 100, 3) != sample_goals("train", 100, 4)
    sizes = [parse_goal(text).num_things for text in goals]
    assert all(sizes.count(n) == 20 for n in range(1, 6))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'test' is not one of train, rl, eval"):
        sample_goals("test", 1, 0)
    with pytest.raises(ValueError, match="'size' is not one of"):
        sample_goal("size", 1, random.Random(0), "train")
    with pytest.raises(ValueError, match="have"):
        sample_goal("two_object", 3, random.Random(0), "train")


@settings(max_examples=60)
@given(goal_texts(), st.integers(0, 10**6))
def test_scenes_meet_the_goal_and_repairs_lead_back_to_it(text, seed):
    goal, rng = parse_goal(text), random.Random(seed)
    scene = sample_scene(goal, rng)
    assert satisfied(goal, scene) and repair(goal, scene, rng) == []
    broken = mutate(scene, rng)
    assert satisfied(goal, apply_edits(broken, repair(goal, broken, rng)))


def test_benchmark_is_held_out_and_balanced():
    goals = benchmark_goals(192)
    assert goals == benchmark_goals(192) and len({text for _, text, _ in goals}) == 192
    assert all(sum(tag == wanted for tag, _, _ in goals) == 32 for wanted in TAGS)
    assert sum(size >= 3 for _, _, size in goals) >= 0.4 * 192
    assert all(
        split_of(parse_goal(text)) == "eval" and parse_goal(text).num_things == n for _, text, n in goals
    )
    assert len(benchmark_goals(600)) == 600  # small tags repeat


def test_grading_passes_what_meets_the_goal_only():
    for _, text, _ in benchmark_goals(60):
        scene = sample_scene(parse_goal(text), random.Random(0))
        assert grade(text, render(scene)) == (True, pytest.approx(1.0))
        wrong = mutate(scene, random.Random(1))
        passed, score = grade(text, render(wrong))
        assert passed == satisfied(parse_goal(text), wrong) and (passed or score < 1.0)
