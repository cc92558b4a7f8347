"""What meets a goal, how partial credit grades, and when two goals are the same."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import goal_texts, scenes

from clvr_train.shapes.language import goal_of, parse_goal
from clvr_train.shapes.world import Goal, SeenThing, Spec, Thing, canonical, expand, match, passes, satisfied


def seen(scene, confidence=1.0):
    return tuple(SeenThing(thing.shape, thing.colour, thing.cell, confidence) for thing in scene)


RED = Thing("circle", "red", 0)
BLUE = Thing("square", "blue", 2)


@pytest.mark.parametrize(
    ("goal", "scene", "expected"),
    [
        ("a red circle left of a blue square", (RED, BLUE), True),
        ("a red circle right of a blue square", (RED, BLUE), False),
        ("a red circle above a blue square", (RED, BLUE), False),  # the same row
        ("a red circle", (RED, BLUE), False),  # goals are closed
        ("two things", (RED, BLUE), True),
        ("two things , none of them red", (RED, BLUE), False),
        ("a circle in the top-left and a square", (RED, BLUE), True),
        ("a circle in the top and a square", (RED, BLUE), False),
        ("two circles", (RED, Thing("circle", "blue", 5)), True),
        ("two circles", (RED,), False),
    ],
)
def test_satisfied_reads_the_goal(goal, scene, expected):
    assert satisfied(parse_goal(goal), scene) is expected


@given(scenes)
def test_a_scene_meets_its_own_goal_and_scores_one(scene):
    goal = goal_of(scene)
    assert (
        satisfied(goal, scene)
        and passes(goal, seen(scene))
        and match(goal, seen(scene)) == pytest.approx(1.0)
    )
    assert not passes(goal, seen(scene, confidence=0.4))


@given(scenes, st.floats(0.0, 0.9), st.floats(0.05, 0.1))
def test_match_grows_with_confidence(scene, low, step):
    goal = goal_of(scene)
    assert match(goal, seen(scene, low)) < match(goal, seen(scene, low + step)) <= 1.0


def test_an_empty_picture_scores_nothing():
    assert match(parse_goal("a circle and three squares"), ()) == 0.0


@given(goal_texts(), st.randoms())
def test_canonical_form_is_free_of_order_and_converse(text, random):
    goal = expand(parse_goal(text))
    order = list(range(len(goal.specs)))
    random.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    converse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    same = Goal(
        tuple(goal.specs[old] for old in order),
        tuple((place[j], converse[kind], place[i]) for i, kind, j in reversed(goal.relations)),
        tuple((place[i], word) for i, word in goal.bans),
    )
    assert canonical(same) == canonical(parse_goal(text))


def test_canonical_form_closes_relations_and_drops_what_is_implied():
    def same(first, second):
        return canonical(parse_goal(first)) == canonical(parse_goal(second))

    assert same("two circles", "a circle and a circle")
    assert same("a red circle in the top and a square in the left", "a square in the left , a red circle top")
    assert same(
        "a circle in the top and a square in the bottom", "a circle in the top above a square in the bottom"
    )
    assert same("a red circle that is not blue", "a red circle")
    assert not same("a red circle left of a square", "a red circle right of a square")
    chain = Goal(
        (Spec(1, "circle"), Spec(1, "square"), Spec(1, "triangle")), ((0, "above", 1), (1, "above", 2))
    )
    assert canonical(chain) == canonical(replace(chain, relations=(*chain.relations, (0, "above", 2))))


def test_drawing_more_than_was_asked_for_does_not_pay():
    goal = parse_goal("a red circle and a blue square")
    scene = (Thing("circle", "red", 0), Thing("square", "blue", 4))
    scores = [match(goal, scene + tuple(Thing("triangle", "green", 5 + i) for i in range(k))) for k in range(4)]
    assert scores == [1.0, 0.5, 0.0, 0.0], "a thing too many costs as much as one too few"
    assert match(goal, scene[:1]) == pytest.approx(1 / 2)
    hedged = (scene[0], Thing("square", "green", 1), Thing("circle", "blue", 2))
    assert match(goal, hedged) < match(goal, hedged[:2])
