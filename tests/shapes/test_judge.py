"""The judge: 1 for what was asked, less for every change, missing (never 0) where it cannot read."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import goal_texts, scenes

from clvr_train.shapes.base import captions
from clvr_train.shapes.controller import mutate
from clvr_train.shapes.edits import Edit, apply_edits, parse_edits, spec_of, write_edits
from clvr_train.shapes.goals import split_of
from clvr_train.shapes.judge import ShapesJudge
from clvr_train.shapes.language import describe, parse_goal
from clvr_train.shapes.layout import sample_scene
from clvr_train.shapes.render import render
from clvr_train.shapes.world import Thing, satisfied

JUDGE = ShapesJudge()


@settings(max_examples=60)
@given(scenes, st.integers(0, 10**6))
def test_descriptions_score_one_and_every_mutation_less(scene, seed):
    text = describe(scene)
    assert JUDGE.global_score(render(scene), text).value == pytest.approx(1.0)
    wrong = mutate(scene, random.Random(seed))
    assert JUDGE.global_score(render(wrong), text).value < 1.0 - 1e-6


@settings(max_examples=60)
@given(goal_texts(), st.integers(0, 10**6))
def test_goals_score_one_exactly_when_met(text, seed):
    rng = random.Random(seed)
    scene = sample_scene(parse_goal(text), rng)
    assert JUDGE.global_score(render(scene), text).value == pytest.approx(1.0)
    wrong = mutate(scene, rng)
    met = satisfied(parse_goal(text), wrong)
    assert (JUDGE.global_score(render(wrong), text).value > 1 - 1e-9) == met


def test_unreadable_text_gives_a_missing_score_with_its_reason():
    image = render((Thing("circle", "red", 0),))
    score = JUDGE.global_score(image, "draw the goal as it stands .")
    assert score.missing and "no readable clause" in score.reason
    assert JUDGE.edit_score(image, image, "fix that .").missing
    assert "does not fit" in JUDGE.edit_score(image, image, "remove the blue square").reason


def test_raw_reasoning_is_read_as_documented():
    wrong, right = render((Thing("square", "green", 4),)), render((Thing("square", "blue", 4),))
    seen = "i see green square centre . the square has the wrong colour . make it blue ."
    assert (
        JUDGE.global_score(wrong, seen).value > JUDGE.global_score(right, seen).value
    )  # seen reads as wished
    extra = render((Thing("square", "blue", 4), Thing("circle", "red", 0)))
    assert JUDGE.global_score(extra, "plan : a blue square in the centre .").value == pytest.approx(
        1.0
    )  # open
    assert JUDGE.global_score(extra, "a blue square in the centre and nothing else").value < 1.0


SCENE = (Thing("circle", "red", 0), Thing("square", "green", 4))


@pytest.mark.parametrize(
    "instruction",
    [
        "make the square blue",
        "turn the circle into a triangle",
        "move the circle to the bottom-right",
        "add a purple circle in the top",
        "remove the square",
        "make the square blue , then move the blue square to the top",
        "remove the square , then move the circle to the centre",
    ],
)
def test_an_edit_done_scores_one_and_doing_nothing_or_all_anew_much_less(instruction):
    source = render(SCENE)
    done = apply_edits(SCENE, parse_edits(instruction))
    assert JUDGE.edit_score(source, render(done), instruction).value == pytest.approx(1.0)
    assert JUDGE.edit_score(source, source, instruction).value <= 0.6
    anew = render((Thing("triangle", "yellow", 7), Thing("triangle", "orange", 2)))
    assert JUDGE.edit_score(source, anew, instruction).value < 0.5


@settings(max_examples=40)
@given(scenes, st.integers(0, 10**6))
def test_side_effects_cost(scene, seed):
    rng = random.Random(seed)
    edit = Edit("recolour", spec_of(scene[0]), "red" if scene[0].colour != "red" else "blue")
    done = apply_edits(scene, [edit])
    spoiled = mutate(done[1:], rng) if len(done) > 1 else ()
    result = (done[0], *(thing for thing in spoiled if thing.cell != done[0].cell))
    if set(result) != set(done):
        score = JUDGE.edit_score(render(scene), render(result), write_edits([edit]))
        assert score.parts["success"] == pytest.approx(1.0) and score.value < 1.0 - 1e-6


def test_captions_say_what_their_scenes_show():
    kinds = set()
    for caption in captions(150, seed=5):
        kinds.add(caption.kind)
        if caption.kind == "edit":
            assert apply_edits(caption.source, parse_edits(caption.text)) == caption.scene
        else:
            goal = parse_goal(caption.text)
            assert satisfied(goal, caption.scene) and split_of(goal) == "train"
    assert kinds == {"description", "goal", "edit"}
