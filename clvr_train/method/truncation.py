"""Truncation of a trajectory at every image, and the accumulated text that conditions the diffusion model (CLVR 3.2,
3.3).
"""

from collections.abc import Callable, Sequence

from clvr_train.method.trajectory import Sample, Trajectory


def truncate(trajectory: Trajectory) -> list[Sample]:
    """One `Sample` for every image of the trajectory; nothing of a later round is in it."""
    samples = []
    reasonings: tuple[str, ...] = ()
    images: tuple = ()
    for step in trajectory.steps:
        reasonings += (step.reasoning,)
        if step.image is not None:
            number = len(images) + 1
            samples.append(Sample(trajectory.id, number, trajectory.goal, reasonings, images, step.image))
            images += (step.image,)
    return samples


def trace(goal: str, reasonings: Sequence[str]) -> str:
    """Trajectory-accumulative condition: the goal and every reasoning so far, a line each (CLVR 3.3)."""
    return "\n".join((goal, *reasonings))


def fit_trace(
    goal: str, reasonings: Sequence[str], count: Callable[[str], int], window: int
) -> tuple[str, int]:
    """The trace cut to `window` tokens: goal and newest reasoning stay, the oldest reasonings go first.

    A whole reasoning is dropped at a time. If the goal and the newest reasoning alone are too long, words are cut
    from the front of that reasoning; if the goal alone is too long, words are cut from its end, or characters where no
    word fits.

    Args:
        count: number of tokens of a text, template included.
        window: most tokens that the text encoder takes.

    Returns:
        The text, and how many tokens of the full trace it lacks (0: nothing was cut).

    Raises:
        ValueError: if not even one character of the goal fits.
    """
    text = trace(goal, reasonings)
    full = count(text)
    if full <= window:
        return text, 0
    kept = list(reasonings)
    while len(kept) > 1 and count(text) > window:
        kept.pop(0)
        text = trace(goal, kept)
    if kept and count(text) > window:
        words = kept[0].split(" ")
        while words and count(trace(goal, [" ".join(words)])) > window:
            words.pop(0)
        text = trace(goal, [" ".join(words)] if words else [])
    if count(text) > window:
        words = goal.split(" ")
        text = " ".join(words[: _most(len(words), lambda n: count(" ".join(words[:n])) <= window)])
        if not text.strip():  # a language without spaces, or one long word
            text = goal[: _most(len(goal), lambda n: count(goal[:n]) <= window)]
        if not text.strip():
            raise ValueError(f"text window of {window} tokens holds nothing of the goal {goal[:80]!r}")
    return text, full - count(text)


def _most(n: int, fits: Callable[[int], bool]) -> int:
    """The largest of 0 .. n that fits, where all smaller ones do."""
    low, high = 0, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
