"""Random scenes and goals for the tests of the shapes world."""

from random import Random

from hypothesis import strategies as st

from clvr_train.shapes.goals import SPLITS, TAG_SIZES, sample_goal
from clvr_train.shapes.world import COLOURS, SHAPES, Thing

things = st.tuples(st.sampled_from(SHAPES), st.sampled_from(COLOURS))
scenes = st.dictionaries(st.integers(0, 8), things, min_size=1, max_size=5).map(
    lambda cells: tuple(Thing(*cells[cell], cell) for cell in sorted(cells))
)
tag_sizes = st.sampled_from([(tag, size) for tag, sizes in TAG_SIZES.items() for size in sizes])


@st.composite
def goal_texts(draw, split=None):
    tag, size = draw(tag_sizes)
    return sample_goal(tag, size, Random(draw(st.integers(0, 10**9))), split or draw(st.sampled_from(SPLITS)))
