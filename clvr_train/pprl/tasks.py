"""What an epoch of PPRL draws: groups of (trajectory, step), text-to-image and editing in a set mix (CLVR A.6)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from clvr_train.data.images import open_image
from clvr_train.data.mixing import Shares, step_class, step_weights
from clvr_train.method.score import Generation, ProxyPrompt, Score
from clvr_train.method.trajectory import Sample
from clvr_train.rewards.combine import score_all
from clvr_train.runtime.distributed import World
from clvr_train.runtime.seeding import seed as position_seed


@dataclass(frozen=True)
class Task:
    """A context to draw from and the prompt by which its rollouts are judged."""

    sample: Sample
    prompt: ProxyPrompt


def judgeable(
    tasks: Sequence[Task], reward: Callable[[Generation, Task], Score], world: World | None = None, workers: int = 0
) -> list[Task]:
    """The tasks whose own target image gets a score: a prompt that the judge cannot read would only give missing
    ones. Ranks share the asking, `workers` tasks at a time on each, so that all have the same answer.
    """
    world = world or World()

    def score(task: Task) -> Score:
        return reward(Generation(task.sample, open_image(task.sample.target), ("target", *task.sample.key)), task)

    readable = [not found.missing for found in score_all(score, world.share(tasks), workers)]
    told = [one for rank in world.gather(readable) for one in rank]
    return [task for task, one in zip(tasks, told, strict=True) if one]


class TaskMix:
    """Chooses the groups of every epoch as a function of (seed, epoch).

    Shares of text to image and of every length of history are exact over epochs: see `data.mixing`. Within a class the
    tasks come in the order of a hash of their keys, one that changes from cycle to cycle: two runs whose judges read
    different tasks of the same trajectories meet those that both have in the same order.

    Raises:
        ValueError: without tasks, or without text-to-image or editing tasks where the share asks for them.
    """

    def __init__(self, tasks: Sequence[Task], *, t2i_share: float, seed: int) -> None:
        self.seed = seed
        self.classes: dict[int, list[Task]] = {}
        for task in tasks:
            self.classes.setdefault(step_class(task.sample), []).append(task)
        self._shares = Shares(step_weights(self.classes, t2i_share))
        self._cycle = lru_cache(maxsize=2 * len(self.classes))(self._sorted)

    def groups(self, epoch: int, num_groups: int) -> list[Task]:
        """The tasks of one epoch (from 0)."""
        first = epoch * num_groups
        return [self._at(position) for position in range(first, first + num_groups)]

    def _at(self, position: int) -> Task:
        kind, number = self._shares.at(position)
        cycle, offset = divmod(number, len(self.classes[kind]))
        return self._cycle(kind, cycle)[offset]

    def _sorted(self, kind: int, cycle: int) -> list[Task]:
        return sorted(self.classes[kind], key=lambda task: position_seed("tasks", self.seed, cycle, *task.sample.key))
