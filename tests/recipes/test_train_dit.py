"""The order in which train_dit sees its samples."""

from collections import Counter

import pytest

from clvr_train.data.mixing import step_class
from clvr_train.method.trajectory import Sample
from recipes.train_dit import sample_order

# 70 first images, and edits with 1, 2, 3 and 5 images of history: 20, 6, 3 and 1 of them.
COUNTS = {0: 70, 1: 20, 2: 6, 3: 3, 5: 1}
SAMPLES = [
    Sample(f"{k}-{i}", k + 1, "goal", ("r",), tuple("x" * k)) for k, count in COUNTS.items() for i in range(count)
]


def test_shares_of_steps_are_exact():
    order = sample_order(SAMPLES, 0.5, 8, seed=0)
    drawn = [SAMPLES[index] for step in range(10) for _, index in order.batch(step)]
    assert Counter(map(step_class, drawn)) == {0: 40, 1: 10, 2: 10, 3: 10, 4: 10}


def test_without_shares_every_sample_comes_once_an_epoch():
    order = sample_order(SAMPLES, None, 10, seed=0)
    assert sorted(index for step in range(10) for _, index in order.batch(step)) == list(range(100))


def test_a_corpus_of_captions_has_no_edits():
    with pytest.raises(ValueError, match="t2i_share=0.5: a corpus of captions is all text to image"):
        sample_order(tuple(SAMPLES), 0.5, 8, seed=0)
