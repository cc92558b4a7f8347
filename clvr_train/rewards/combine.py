"""The reward of a rollout from a proxy prompt and judges (CLVR 3.2)."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from PIL.Image import Image

from clvr_train.data.images import reference_image
from clvr_train.method.score import Generation, ProxyPrompt, Score, weighted_mean
from clvr_train.method.trajectory import Sample

GlobalJudge = Callable[[Image, str], Score]
EditJudge = Callable[[Image, Image, str], Score]
Item = TypeVar("Item")


class Judge(Protocol):
    """What scores images: UnifiedReward and UnifiedReward-Edit in the paper, an exact reader in the shapes world."""

    def global_score(self, image: Image, prompt: str) -> Score:
        """How well the image shows what the prompt describes."""

    def edit_score(self, source: Image, image: Image, instruction: str) -> Score:
        """How well the image is the source after the instruction, and nothing else changed."""


class Mix:
    """Several judges as one: weighted means of what they say of images and of edits.

    Args:
        of_images, of_edits: name -> (judge, weight). One judge alone is passed on as it is.
    """

    def __init__(
        self, of_images: Mapping[str, tuple[GlobalJudge, float]], of_edits: Mapping[str, tuple[EditJudge, float]]
    ) -> None:
        self._of_images, self._of_edits = dict(of_images), dict(of_edits)

    def global_score(self, image: Image, prompt: str) -> Score:
        return weighted_mean({name: (judge(image, prompt), w) for name, (judge, w) in self._of_images.items()})

    def edit_score(self, source: Image, image: Image, instruction: str) -> Score:
        scores = {name: (judge(source, image, instruction), w) for name, (judge, w) in self._of_edits.items()}
        return weighted_mean(scores)


def trajectory_reward(
    judge: Judge, generation: Generation, prompt: ProxyPrompt, *, weight_global: float = 0.5, weight_edit: float = 0.5
) -> Score:
    """`R = R_global(I, p_t2i)` at k = 1, else `w_g R_global + w_e R_edit(I_idx, I, p_i2i)`.

    With several reference images in `idx`, the edit is judged against the newest of them: it is the canvas that the
    instruction speaks of. A missing part makes the reward missing: the other part alone is on another scale. With
    `weight_edit` 0 edits are not judged.
    """
    score = judge.global_score(generation.image, prompt.p_t2i)
    if score.missing or prompt.p_i2i is None or not weight_edit:
        return score
    source = reference_image(generation.sample.references[max(prompt.idx) - 1])  # what the model looked at
    edit = judge.edit_score(source, generation.image, prompt.p_i2i)
    return weighted_mean({"global": (score, weight_global), "edit": (edit, weight_edit)})


def score_all(score: Callable[[Item], Score], items: Iterable[Item], workers: int) -> list[Score]:
    """The scores of all items, in order; so many at a time, or one after the other in this thread with `workers` 0.

    An item is judged as soon as it is there: what makes the items goes on meanwhile, in this thread.
    """
    if not workers:
        return [score(item) for item in items]
    pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
    try:
        return list(pool.map(score, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # of an interrupt: do not sit out the requests under way


def simple_prompt(sample: Sample) -> ProxyPrompt:
    """What the *simple RL* baseline shows the judge: the raw reasoning of this round and the newest image (CLVR
    A.9).
    """
    reasoning = sample.reasonings[-1]
    if not sample.references:
        return ProxyPrompt(reasoning)
    return ProxyPrompt(reasoning, reasoning, (len(sample.references),))
