"""Numbers of an epoch's rewards, by hand and by their properties."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.method.score import Score
from clvr_train.pprl.reward_stats import reward_statistics

values = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=40)


def group(scores) -> SimpleNamespace:
    """All that is looked at of a group."""
    return SimpleNamespace(scores=[Score(None, "no reply") if value is None else Score(value) for value in scores])


def test_by_hand() -> None:
    found = reward_statistics([group([0.0, 0.25, None]), group([0.5, 0.75, 1.0])])
    assert found == {
        "reward": 0.5, "reward_std": math.sqrt(0.125), "reward_q05": pytest.approx(0.05), "reward_q25": 0.25,
        "reward_q50": 0.5, "reward_q75": 0.75, "reward_q95": pytest.approx(0.95), "reward_top10": 1.0,
        "reward_top25": 1.0, "reward_top50": 0.875,
    }  # fmt: skip


def test_dimensions_have_their_own_numbers_and_missing_scores_none() -> None:
    scores = [Score(0.5, parts={"global": 0.0, "edit": 1.0, "edit_success": 1.0}, weights={"global": 0.5, "edit": 0.5}),
              Score(0.75, parts={"global": 1.0, "edit": 0.5}, weights={"global": 0.5, "edit": 0.5}),
              Score(0.25), Score(None, "no reply", parts={"global": 1.0})]  # fmt: skip
    found = reward_statistics([SimpleNamespace(scores=scores)])
    assert (found["reward"], found["part_global"], found["part_edit"]) == (0.5, 0.5, 0.75)
    assert (found["part_edit_top10"], found["part_edit_q50"], found["part_global_std"]) == (1.0, 0.75, 0.5)
    assert len(found) == 3 * 10 and not any("success" in name for name in found)


def test_an_epoch_without_scores_has_no_numbers() -> None:
    assert reward_statistics([group([None, None])]) == {} == reward_statistics([])


@given(st.lists(values, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_neither_missing_scores_nor_groups_nor_order_matter(groups, shuffle) -> None:
    found = reward_statistics([group(one) for one in groups])
    valid = [value for one in groups for value in one if value is not None]
    shuffle.shuffle(valid)
    assert found == (reward_statistics([group(valid)]) if valid else {})
    if valid:
        order = [found[f"reward_{name}"] for name in ("q05", "q25", "q50", "q75", "q95")]
        assert min(valid) <= order[0] and order == sorted(order) and order[-1] <= max(valid)
        best = [found[f"reward{name}"] for name in ("", "_top50", "_top25", "_top10")]
        assert np.all(np.diff(best) >= -1e-12) and best[-1] <= max(valid) + 1e-12
