"""The text that conditions the drawing model always fits its window, and keeps what matters longest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.method.truncation import fit_trace, trace

words = st.lists(st.text("abc画笔", min_size=1, max_size=9), min_size=1, max_size=8).map(" ".join)


@given(words, st.lists(words, max_size=4), st.integers(1, 60))
def test_the_trace_fits_and_keeps_the_goal_longest(goal, reasonings, window):
    text, cut = fit_trace(goal, reasonings, len, window)
    assert len(text) <= window and cut == len(trace(goal, reasonings)) - len(text)
    if len(goal) <= window:
        assert text.startswith(goal), "reasonings go first"
        newest = text[len(goal) :].lstrip("\n").split("\n")[-1]
        assert not reasonings or reasonings[-1].endswith(newest)
    else:
        assert goal.startswith(text) and text
        if " " in goal[: window + 1]:
            assert goal[len(text)] == " " or not goal[len(text) - 1 :].strip(), "whole words, where one fits"


def test_a_goal_without_spaces_is_cut_by_characters():
    assert fit_trace("画" * 400, [], len, 96) == ("画" * 96, 304)
    with pytest.raises(ValueError, match="text window of 0 tokens holds nothing of the goal 'a red circle'"):
        fit_trace("a red circle", [], len, 0)
