"""What an epoch of PPRL draws: groups of (trajectory, step), text-to-image and editing in a set mix (CLVR A.6)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clvr_train.data.images import open_image
from clvr_train.method.score import Generation, ProxyPrompt, Score
from clvr_train.method.trajectory import Sample
from clvr_train.runtime.seeding import generator

HISTORY_SHARES = 4  # editing tasks with 1, 2, 3 and 4 or more images of history come in equal shares


@dataclass(frozen=True)
class Task:
    """A context to draw from and the prompt by which its rollouts are judged."""

    sample: Sample
    prompt: ProxyPrompt


def judgeable(tasks: Sequence[Task], reward: Callable[[Generation, Task], Score]) -> list[Task]:
    """The tasks whose own target image gets a score: a prompt that the judge cannot read would only give missing
    ones.
    """
    kept = []
    for task in tasks:
        demonstration = Generation(task.sample, open_image(task.sample.target), ("target", *task.sample.key))
        if not reward(demonstration, task).missing:
            kept.append(task)
    return kept


class TaskMix:
    """Chooses the groups of every epoch as a function of (seed, epoch).

    The share of text-to-image groups is exact over epochs (a running remainder, not a coin). Classes of history length
    that the data lacks leave their share to the others; `classes` says how many tasks each has.

    Raises:
        ValueError: without tasks, or without text-to-image or editing tasks where the share asks for them.
    """

    def __init__(self, tasks: Sequence[Task], *, t2i_share: float, seed: int) -> None:
        self.t2i_share, self.seed = t2i_share, seed
        self.classes: dict[int, list[Task]] = {}
        for task in sorted(tasks, key=lambda task: task.sample.key):
            self.classes.setdefault(min(len(task.sample.references), HISTORY_SHARES), []).append(task)
        if t2i_share > 0 and 0 not in self.classes:
            raise ValueError(f"t2i_share={t2i_share}, but no task has an empty history")
        self._editing = sorted(c for c in self.classes if c > 0)
        if t2i_share < 1 and not self._editing:
            raise ValueError(f"t2i_share={t2i_share}, but no task has images of history: set it to 1")

    def groups(self, epoch: int, num_groups: int) -> list[Task]:
        """The tasks of one epoch (from 0)."""
        first = epoch * num_groups
        chosen = []
        for position in range(first, first + num_groups):
            number, kind = self._class_of(position)
            tasks = self.classes[kind]
            cycle, offset = divmod(number, len(tasks))
            order = torch.randperm(len(tasks), generator=generator("tasks", self.seed, kind, cycle))
            chosen.append(tasks[int(order[offset])])
        return chosen

    def _class_of(self, position: int) -> tuple[int, int]:
        """(how many of its class came before, class) of the group at a position over all epochs."""
        t2i_before, t2i_after = (int(p * self.t2i_share + 1e-9) for p in (position, position + 1))
        if t2i_after > t2i_before:
            return t2i_before, 0
        number, index = divmod(position - t2i_before, len(self._editing))
        return number, self._editing[index]
