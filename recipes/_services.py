"""What recipes build from the groups `teacher` and `reward`: clients, teachers, judges and the reward of a rollout."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from clvr_train.method.score import Generation, Score
from clvr_train.pprl.tasks import Task
from clvr_train.proxy.chat_teacher import ChatTeacher
from clvr_train.proxy.prompts import Teacher
from clvr_train.rewards.combine import Judge, Mix, trajectory_reward
from clvr_train.rewards.local import ClipScore, Rules, Saturation
from clvr_train.rewards.unified_reward import UnifiedReward, UnifiedRewardEdit
from clvr_train.services.chat import ChatClient
from clvr_train.services.options import ChatOptions
from clvr_train.shapes.judge import ShapesJudge
from clvr_train.shapes.teacher import ShapesTeacher

TEACHERS = ("shapes", "openai")
OF_IMAGES = ("shapes", "unified_reward", "clip", "rules", "saturation")
OF_EDITS = ("shapes", "unified_reward_edit", "rules")
# Play no part in the scores: a run may go on with other values.
REWARD_KEYS = ("reward.max_missing", "reward.wait_s", "reward.unified_reward.url", "reward.unified_reward_edit.url")
REWARD_KEYS += tuple(
    f"reward.chat.{name}"
    for name in ("key_env", "limit", "attempt_s", "deadline_s", "retries", "backoff_s", "max_reply_bytes", "breaker")
)
REWARD_KEYS += ("reward.chat.cooldown_s", "reward.chat.cache")


def build_teacher(teacher: DictConfig, stack: ExitStack) -> tuple[Teacher, ChatClient | None]:
    """The teacher of a `teacher` group, and its client if it has one, which the stack closes."""
    if teacher.name == "shapes":
        return ShapesTeacher(), None
    if teacher.name != "openai":
        raise ValueError(f"teacher.name={teacher.name!r} is not one of {', '.join(TEACHERS)}")
    client = stack.enter_context(ChatClient(ChatOptions(**teacher.chat)))
    options = {name: teacher[name] for name in ("language", "retries", "max_chars")}
    return ChatTeacher(client, **options), client


@dataclass(frozen=True)
class Reward:
    """The reward of a rollout, called with a generation and its task: the judges, how many rollouts at a time, and
    whether the servers behind them answer.
    """

    judge: Judge
    workers: int
    weights: dict[str, float]
    clients: tuple[ChatClient, ...]

    def __call__(self, generation: Generation, task: Task) -> Score:
        return trajectory_reward(self.judge, generation, task.prompt, **self.weights)

    def healthy(self) -> bool:
        return all(client.healthy() for client in self.clients)

    def counts(self) -> dict[str, float]:
        """Of all clients together, since they were made."""
        names = ("requests", "cached", "failed", "unusable", "tokens_in", "tokens_out", "seconds")
        names = names if self.clients else ()
        return {f"judge_{name}": sum(client.counts[name] for client in self.clients) for name in names}


def judge_latency(counts: dict[str, float]) -> dict[str, float]:
    """Of the counts of all ranks: mean seconds of a request that was not cached, and the share of those that were."""
    requests = counts.get("judge_requests", 0)
    if not requests:
        return {}
    asked = requests - counts["judge_cached"]
    latency = {"judge_latency_s": counts["judge_seconds"] / asked} if asked else {}
    return {"judge_cached_share": counts["judge_cached"] / requests} | latency


def build_reward(reward: DictConfig, weight_global: float, weight_edit: float, stack: ExitStack) -> Reward:
    """The judges of a `reward` group with a weight above 0; the stack closes their clients.

    Raises:
        ValueError: an unknown judge, or none for what has a weight.
    """
    clients: list[ChatClient] = []

    def client(section: DictConfig) -> ChatClient:
        options = ChatOptions(url=section.url, model=section.model, **reward.chat)
        clients.append(stack.enter_context(ChatClient(options)))
        return clients[-1]

    makers: dict[str, Callable[[], Any]] = {
        "shapes": ShapesJudge,
        "rules": Rules,
        "saturation": Saturation,
        "clip": lambda: ClipScore(_folder(reward.clip.folder), reward.clip.device),
        "unified_reward": lambda: UnifiedReward(
            client(reward.unified_reward), reward.unified_reward.weights, reward.unified_reward.template
        ),
        "unified_reward_edit": lambda: UnifiedRewardEdit(
            client(reward.unified_reward_edit),
            reward.unified_reward_edit.weights,
            reward.unified_reward_edit.following_template,
            reward.unified_reward_edit.quality_template,
        ),
    }
    of_images, of_edits = _weighted("of_images", reward, OF_IMAGES), _weighted("of_edits", reward, OF_EDITS)
    if not of_images:
        raise ValueError("reward.of_images: no judge has a weight above 0")
    if not of_edits and weight_edit:
        raise ValueError("reward.of_edits: no judge has a weight above 0; give one, or set pprl.weight_edit=0")
    for name in ("clip", "unified_reward", "unified_reward_edit"):
        if name in {**of_images, **of_edits} and name not in reward:
            raise ValueError(
                f"{name}: this reward has no settings of that judge; choose reward=unified_reward, or clip"
            )
    judges = {name: makers[name]() for name in {**of_images, **of_edits}}
    mix = Mix(
        {name: (judges[name].global_score, weight) for name, weight in of_images.items()},
        {name: (judges[name].edit_score, weight) for name, weight in of_edits.items()},
    )
    weights = {"weight_global": weight_global, "weight_edit": weight_edit}
    workers = 2 * reward.chat.limit if clients else 0  # some encode their images while others wait for replies
    return Reward(mix, workers, weights, tuple(clients))


def _weighted(section: str, reward: DictConfig, names: tuple[str, ...]) -> dict[str, float]:
    weights = dict(reward[section])
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"reward.{section}: {name!r} is not one of {', '.join(names)}")
        if weight < 0:
            raise ValueError(f"reward.{section}.{name}={weight}: a weight of at least 0 is needed")
    return {name: weight for name, weight in weights.items() if weight}


def _folder(folder: str | None) -> str:
    if folder is None:
        raise ValueError("reward.clip.folder: a folder of a CLIP model is needed")
    return folder
