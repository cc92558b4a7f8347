"""The reward of a rollout from a proxy prompt and a judge (CLVR 3.2)."""

from typing import Protocol

from PIL.Image import Image

from clvr_train.data.images import reference_image
from clvr_train.method.score import Generation, ProxyPrompt, Score
from clvr_train.method.trajectory import Sample


class Judge(Protocol):
    """What scores images: UnifiedReward and UnifiedReward-Edit in the paper, an exact reader in the shapes world."""

    def global_score(self, image: Image, prompt: str) -> Score:
        """How well the image shows what the prompt describes."""

    def edit_score(self, source: Image, image: Image, instruction: str) -> Score:
        """How well the image is the source after the instruction, and nothing else changed."""


def trajectory_reward(
    judge: Judge, generation: Generation, prompt: ProxyPrompt, *, weight_global: float = 0.5, weight_edit: float = 0.5
) -> Score:
    """`R = R_global(I, p_t2i)` at k = 1, else `w_g R_global + w_e R_edit(I_idx, I, p_i2i)`.

    With several reference images in `idx`, the edit is judged against the newest of them: it is the canvas that the
    instruction speaks of. A missing part makes the reward missing: the other part alone is on another scale.
    """
    score = judge.global_score(generation.image, prompt.p_t2i)
    if score.missing or prompt.p_i2i is None:
        return score
    source = reference_image(generation.sample.references[max(prompt.idx) - 1])  # what the model looked at
    edit = judge.edit_score(source, generation.image, prompt.p_i2i)
    if edit.missing:
        return edit
    total = weight_global + weight_edit
    value = (weight_global * score.value + weight_edit * edit.value) / total
    parts = {"global": score.value, "edit": edit.value} | {f"edit_{name}": part for name, part in edit.parts.items()}
    return Score(value, parts=parts)


def simple_prompt(sample: Sample) -> ProxyPrompt:
    """What the *simple RL* baseline shows the judge: the raw reasoning of this round and the newest image (CLVR
    A.9).
    """
    reasoning = sample.reasonings[-1]
    if not sample.references:
        return ProxyPrompt(reasoning)
    return ProxyPrompt(reasoning, reasoning, (len(sample.references),))
