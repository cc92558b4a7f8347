"""What is written is read back; what is not of the grammar is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import goal_texts, scenes

from clvr_train.shapes.edits import (
    Edit,
    apply_edits,
    find_edits,
    parse_edits,
    read_mentions,
    spec_of,
    write_edits,
)
from clvr_train.shapes.language import describe, goal_of, list_things, parse_goal, tokens, write_goal
from clvr_train.shapes.world import COLOURS, SHAPES, Spec, Thing, canonical, satisfied


@given(goal_texts())
def test_goals_survive_writing_and_reading(text):
    goal = parse_goal(text)
    assert canonical(parse_goal(write_goal(goal))) == canonical(goal)
    assert read_mentions(text) == goal  # the judge understands every clause of a goal


@given(scenes)
def test_descriptions_survive_and_name_one_scene(scene):
    assert parse_goal(describe(scene)) == goal_of(scene) == parse_goal(list_things(scene))
    assert satisfied(parse_goal(describe(scene)), scene)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("a red circle near a blue square", "near a blue square"),
        ("a pink circle", "a pink circle"),
        ("a red circle and", "the end of the goal"),
        ("", "empty"),
        ("a red circle left of the blue square", "left of the blue square"),
    ],
)
def test_what_is_not_of_the_grammar_is_named(text, phrase):
    with pytest.raises(ValueError, match=phrase):
        parse_goal(text)


def test_left_is_a_place_and_left_of_a_relation():
    assert parse_goal("a circle left").specs == (Spec(1, "circle", None, 3),)
    assert parse_goal("a circle left of a square").relations == ((0, "left of", 1),)


def test_commas_and_full_stops_are_words():
    assert tokens("A circle, a square.") == ["a", "circle", ",", "a", "square", "."]


@st.composite
def edits_of(draw, scene):
    thing = draw(st.sampled_from(scene))
    free = [cell for cell in range(9) if all(other.cell != cell for other in scene)]
    cell = draw(st.sampled_from(free))
    colour, shape = draw(st.sampled_from(COLOURS)), draw(st.sampled_from(SHAPES))
    changes = {
        "add": (Edit("add", Spec(1, shape, colour, cell)), (*scene, Thing(shape, colour, cell))),
        "remove": (Edit("remove", spec_of(thing)), tuple(t for t in scene if t != thing)),
        "recolour": (
            Edit("recolour", spec_of(thing), colour),
            tuple(Thing(t.shape, colour, t.cell) if t == thing else t for t in scene),
        ),
        "reshape": (
            Edit("reshape", spec_of(thing), shape),
            tuple(Thing(shape, t.colour, t.cell) if t == thing else t for t in scene),
        ),
        "move": (
            Edit("move", spec_of(thing), cell),
            tuple(Thing(t.shape, t.colour, cell) if t == thing else t for t in scene),
        ),
    }
    return changes[draw(st.sampled_from(sorted(changes)))]


@given(st.data(), scenes)
def test_edits_survive_and_do_what_they_say(data, scene):
    edit, after = data.draw(edits_of(scene))
    text = write_edits([edit])
    assert parse_edits(text) == find_edits(f"i see something . {text} .") == [edit]
    assert apply_edits(scene, parse_edits(text)) == tuple(sorted(after, key=lambda thing: thing.cell))


def test_edits_need_one_thing_and_a_free_cell():
    scene = (Thing("circle", "red", 0), Thing("circle", "blue", 1))
    with pytest.raises(ValueError, match="2 things fit 'the circle'"):
        apply_edits(scene, parse_edits("remove the circle"))
    with pytest.raises(ValueError, match="0 things fit"):
        apply_edits(scene, parse_edits("remove the square"))
    with pytest.raises(ValueError, match="the top is taken"):
        apply_edits(scene, parse_edits("move the red circle to the top"))
    with pytest.raises(ValueError, match="paint it green"):
        parse_edits("paint it green")


def test_lenient_reading_takes_explicit_clauses_only():
    plan = read_mentions("plan : red circle top-left , the other one directly below it .")
    assert plan.specs == (Spec(1, "circle", "red", 0),) and not plan.closed
    assert read_mentions("draw the goal as it stands .") is None
    report = read_mentions("i see green square centre . make the square in the centre blue .")
    assert report.specs == (
        Spec(1, "square", "green", 4),
        Spec(1, "square", "blue", 4),
    )  # seen and wished alike
    assert read_mentions("i see green square centre . the square should be blue .").specs == (
        Spec(1, "square", "green", 4),
    )
    assert read_mentions("remove the red circle in the top .") is None
