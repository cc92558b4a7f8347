"""Rollouts and their judges: side by side, missing ones judged again, an epoch that waits for judges that are away."""

import time

import pytest
import torch
from PIL import Image

from clvr_train.method.score import ProxyPrompt, Score, weighted_mean
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.reward_stats import reward_statistics
from clvr_train.pprl.rollout import Group, judge_missing, new_groups, roll_out, rollout_metrics, set_advantages
from clvr_train.pprl.tasks import Task
from clvr_train.pprl.waiting import MAX_TRIES, wait_for_scores

RED = Image.new("RGB", (96, 96), "red")
DOWN = Score(None, "down")


def group(name, scores):
    size = len(scores)
    task = Task(Sample(name, 1, "goal", ("r",)), ProxyPrompt("p"))
    seeds = [("rollout", name, k) for k in range(size)]
    return Group(0, task, seeds, torch.zeros(size, 4, 3), [RED] * size, list(scores))


def by_seed(generation, task):
    return Score(generation.seed[-1] / 10)


def test_the_way_rollouts_are_judged_makes_no_difference(tiny_klein):
    from clvr_train.models.adapters import add_policies

    klein = tiny_klein()
    add_policies(klein.transformer, rank=2, alpha=2, seed=0)
    sampler = Sampler(Conditioner(klein, (96, 96)), steps=1, cfg=1.0, batch=8)
    tasks = [group(name, [DOWN]).task for name in "ab"]

    def reward(generation, task):
        time.sleep(0.01 * (generation.seed[-1] % 2))
        return Score(generation.seed[-1] / 10)

    one, many = (new_groups(tasks, group_size=3, run_seed=0, epoch=0) for _ in range(2))
    for groups, workers in ((one, 0), (many, 6)):
        roll_out(sampler, groups, reward, workers)
    assert [g.scores for g in one] == [g.scores for g in many] == [[Score(0.0), Score(0.1), Score(0.2)]] * 2
    assert all(a.x0.equal(b.x0) for a, b in zip(one, many, strict=True))


def test_only_what_is_missing_is_judged_again():
    asked = []

    def reward(generation, task):
        asked.append((task.sample.trajectory_id, generation.seed))
        return by_seed(generation, task)

    groups = [group("a", [Score(1.0), DOWN]), group("b", [DOWN, Score(1.0)])]
    judge_missing(groups, reward)
    assert asked == [("a", ("rollout", "a", 1)), ("b", ("rollout", "b", 0))]
    assert [[s.value for s in g.scores] for g in groups] == [[1.0, 0.1], [0.0, 1.0]]


def test_mixing_by_dimensions_and_what_is_counted():
    def score(a, b):
        return weighted_mean({"a": (Score(a), 1.0), "b": (Score(b), 1.0)})

    groups = [group("a", [score(0.0, 1.0), score(1.0, 0.9), DOWN]), group("b", [score(0.5, 0.5), DOWN, DOWN])]
    with pytest.raises(ValueError, match="mix='sum' is not one of weighted, normalised"):
        set_advantages(groups, std="global", adv_clip_max=5.0, min_valid=2, mix="sum")
    found = {}
    for mix in ("weighted", "normalised"):
        set_advantages(groups, std="global", adv_clip_max=5.0, min_valid=2, mix=mix)
        found[mix] = groups[0].advantages[0]
        assert groups[0].advantages[2] is None and groups[1].advantages == [None] * 3
    assert found["weighted"] < -0.9 and abs(found["normalised"]) < 1  # the second dimension is as wide as the first
    metrics = rollout_metrics(groups)
    assert metrics["dropped_groups"] == 0.5 and metrics["missing_scores"] == 0.5
    means = reward_statistics(groups)
    assert means["part_a"] == pytest.approx(0.5) and means["part_b"] == pytest.approx(0.8)


class Judges:
    """Down until looked at for the n-th time; then they answer, or not."""

    def __init__(self, looks, answer=by_seed):
        self.looks, self.answer, self.saved, self.asked = looks, answer, 0, 0

    def healthy(self):
        self.looks -= 1
        return self.looks <= 0

    def save(self):
        self.saved += 1

    def reward(self, generation, task):
        self.asked += 1
        return self.answer(generation, task) if self.looks <= 0 else DOWN

    def wait(self, groups, ended=lambda: False, max_missing=0.2):
        return wait_for_scores(groups, self.reward, max_missing=max_missing, healthy=self.healthy, save=self.save,
                               ended=ended, wait_s=0.01)  # fmt: skip


def test_an_epoch_waits_for_its_judges_and_goes_on_with_the_same_rollouts():
    groups, judges = [group("a", [DOWN] * 3 + [Score(1.0)])], Judges(looks=4)
    images = list(groups[0].images)
    assert judges.wait(groups)
    assert (judges.saved, judges.asked) == (1, 3) and groups[0].images == images
    assert [s.value for s in groups[0].scores] == [0.0, 0.1, 0.2, 1.0]


def test_few_missing_scores_hold_nothing_up():
    judges = Judges(looks=1)
    assert judges.wait([group("a", [DOWN] + [Score(1.0)] * 4)])
    assert judges.wait([group("a", [DOWN] * 4)], max_missing=1.0)
    assert (judges.saved, judges.asked) == (0, 0)


def test_a_run_that_is_to_end_does_not_wait():
    judges, start = Judges(looks=10**6), time.monotonic()
    assert not judges.wait([group("a", [DOWN])], ended=lambda: time.monotonic() > start + 0.1)
    assert judges.saved == 1 and time.monotonic() - start < 2


def test_judges_that_are_away_again_are_waited_for():
    """They are healthy whenever they are looked at, and answer only the sixth time: no reply that was no score."""
    judges = Judges(looks=1, answer=lambda generation, task: by_seed(generation, task) if judges.asked > 5 else DOWN)
    groups = [group("a", [DOWN])]
    assert wait_for_scores(groups, judges.reward, max_missing=0.0, healthy=judges.healthy, save=judges.save,
                           ended=lambda: False, wait_s=0.01, unusable=lambda: 0.0)  # fmt: skip
    assert judges.asked == 6 > MAX_TRIES and judges.saved == 1 and not groups[0].scores[0].missing


def test_healthy_judges_that_give_no_scores_end_the_run():
    judges = Judges(looks=1, answer=lambda generation, task: Score(None, "reply: not the three lines"))
    with pytest.raises(ValueError, match=r"100 % of the scores are missing, .*judges answer: reply: not the three"):
        judges.wait([group("a", [DOWN] * 2)])
    assert (judges.saved, judges.asked) == (1, 2 * MAX_TRIES)


class SlowSampler(Sampler):
    """Takes `seconds` a batch, of the sleeping kind that a GPU is for its process."""

    seconds = 0.2

    def denoise(self, noise, cond):
        time.sleep(self.seconds)
        return noise

    def decode(self, x0, grid=None):
        return [RED] * len(x0)


def test_judges_work_while_the_next_rollouts_are_drawn(tiny_klein):
    """8 groups of 4, a batch each: 8 x 0.2 s of drawing, and the last batch's 0.4 s of judging. One after the other it
    would be 1.6 + 32 / 8 x 0.4 = 3.2 s.
    """
    from clvr_train.models.adapters import add_policies

    klein = tiny_klein()
    add_policies(klein.transformer, rank=2, alpha=2, seed=0)
    sampler = SlowSampler(Conditioner(klein, (96, 96)), steps=1, cfg=1.0, batch=4)
    tasks = [group(name, [DOWN]).task for name in "abcdefgh"]
    sampler.conditioner.prime([task.sample for task in tasks])

    def reward(generation, task):
        time.sleep(0.4)
        return by_seed(generation, task)

    walls = []
    for _ in range(3):  # a busy machine may be late once
        groups = new_groups(tasks, group_size=4, run_seed=0, epoch=0)
        start = time.monotonic()
        roll_out(sampler, groups, reward, workers=8)
        walls.append(time.monotonic() - start)
        assert all(not score.missing for g in groups for score in g.scores)
    assert min(walls) <= 1.10 * 2.0, walls
