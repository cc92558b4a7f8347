"""The task mix by counts, what takes part in an update, and the number of network evaluations."""

from collections import Counter

import pytest
import torch
from PIL import Image

from clvr_train.method.flow import inference_times, interpolate
from clvr_train.method.score import ProxyPrompt, Score
from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import OLD, POLICY, add_policies, parameters, use
from clvr_train.models.conditioning import Conditioner, predict_velocity
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.rollout import new_groups, roll_out, rollout_metrics, set_advantages
from clvr_train.pprl.tasks import Task, TaskMix, judgeable
from clvr_train.pprl.update import NFTOptions, backward_nft, training_items
from clvr_train.runtime.seeding import generator as seeded

RED = Image.new("RGB", (96, 96), "red")
OPTIONS = NFTOptions(beta_nft=0.5, beta_kl=0.01, adv_clip_max=5.0, weighting="adaptive")


def task(name, history=0):
    prompt = ProxyPrompt("p") if history == 0 else ProxyPrompt("p", "e", (history,))
    return Task(Sample(name, history + 1, "goal", ("r",), (RED,) * history, RED), prompt)


def mix_of(num=7, t2i_share=0.5):
    tasks = [task(f"{name}{i}", history) for history, name in enumerate("abcdef") for i in range(num + history)]
    return TaskMix(tasks, t2i_share=t2i_share, seed=0)


def test_mix_is_exact_over_epochs_whatever_their_size():
    for groups in (3, 4, 5):
        drawn = [t for epoch in range(80) for t in mix_of().groups(epoch, groups)]
        count = Counter(min(len(t.sample.references), 4) for t in drawn)
        total = len(drawn)
        assert count[0] == total // 2
        assert all(abs(count[history] - total / 8) <= 1 for history in (1, 2, 3, 4)), count


def test_every_task_of_a_class_comes_once_a_cycle_and_epochs_are_reproducible():
    mix = mix_of(num=6)
    first = [t.sample.key for epoch in range(3) for t in mix.groups(epoch, 4) if not t.sample.references]
    assert len(set(first)) == len(first) == 6
    assert mix.groups(5, 4) == mix_of(num=6).groups(5, 4)


def test_classes_that_lack_leave_their_share_and_impossible_shares_are_refused():
    mix = TaskMix([task("a"), task("b", 2)], t2i_share=0.5, seed=0)
    assert Counter(len(t.sample.references) for t in mix.groups(0, 8)) == {0: 4, 2: 4}
    with pytest.raises(ValueError, match="no sample has images of history"):
        TaskMix([task("a")], t2i_share=0.5, seed=0)
    with pytest.raises(ValueError, match="no sample has an empty history"):
        TaskMix([task("a", 1)], t2i_share=0.5, seed=0)


def test_runs_that_judge_different_tasks_meet_the_common_ones_in_the_same_order():
    tasks = [task(f"{name}{i}", history) for history, name in enumerate("abc") for i in range(12)]
    first, second = ([t for i, t in enumerate(tasks) if i % 6 != left_out] for left_out in (0, 4))
    common = {t.sample.key for t in first} & {t.sample.key for t in second}
    seen = []
    for part in (first, second):
        drawn = TaskMix(part, t2i_share=0.5, seed=3).groups(0, 40)  # one cycle of all classes
        for history in range(3):
            keys = [t.sample.key for t in drawn if len(t.sample.references) == history]
            seen.append([key for key in keys[:10] if key in common])
    assert len(common) == 24 and all(len(keys) == 8 for keys in seen)
    assert seen[:3] == seen[3:]


def test_tasks_that_the_judge_cannot_read_are_left_out():
    readable = judgeable(
        [task("a"), task("b")], lambda g, t: Score(None, "?") if t.sample.trajectory_id == "b" else Score(1.0)
    )
    assert [t.sample.trajectory_id for t in readable] == ["a"]


TIMES = inference_times(9, 4)[:-1].tolist()  # of 96 px in 9 tokens


def drawn(sampler, tasks, reward, size):
    groups = new_groups(tasks, group_size=size, run_seed=0, epoch=0)
    roll_out(sampler, groups, reward)
    return groups


@pytest.fixture
def setting(tiny_klein):
    klein = tiny_klein()
    add_policies(klein.transformer, rank=4, alpha=8, seed=0)
    calls = Counter()

    def count(module, args, kwargs):
        calls["samples"] += kwargs["hidden_states"].shape[0]

    klein.transformer.register_forward_pre_hook(count, with_kwargs=True)
    return Sampler(Conditioner(klein, (96, 96)), steps=4, cfg=3.0, batch=8), calls


def chance(generation, _):
    """A reward that differs within a group: untrained models draw pictures that no rule can tell apart."""
    return Score(torch.rand(1, generator=seeded(*generation.seed)).item())


def test_network_evaluations_are_those_of_the_formula(setting):
    """Rollout: 2 N a picture with guidance. Update: 3 forwards (old, reference, policy) a picture and time."""
    sampler, calls = setting
    groups = drawn(sampler, [task("a"), task("b", 2)], chance, size=3)
    assert calls["samples"] == 6 * 4 * 2 == sampler.nfe
    assert sampler.conditioner.text_calls == 2  # both groups have the same text here; and the empty one
    set_advantages(groups, std="global", adv_clip_max=5.0, min_valid=2)
    items = training_items(groups, TIMES, num_times=2, run_seed=0, epoch=0)
    assert len(items) == 6 * 2
    calls.clear()
    metrics = backward_nft(sampler.conditioner, items, OPTIONS, micro_batch=8)
    assert calls["samples"] == 3 * len(items)
    assert metrics["kl"] == 0 and metrics["v_minus_v_old"] == 0  # all three policies are equal at the start
    calls.clear()
    backward_nft(sampler.conditioner, items, NFTOptions(0.5, 0.0, 5.0, "adaptive"), micro_batch=8)
    assert calls["samples"] == 2 * len(items)


def test_the_branch_without_text_is_held_to_the_reference(setting):
    """Two more forwards an anchored item; the term is the mean square distance there, and nothing at the start."""
    sampler, calls = setting
    conditioner, transformer = sampler.conditioner, sampler.conditioner.klein.transformer
    groups = drawn(sampler, [task("a"), task("b", 2)], chance, size=4)
    set_advantages(groups, std="global", adv_clip_max=5.0, min_valid=2)
    items = training_items(groups, TIMES, num_times=2, run_seed=0, epoch=0, anchor_share=0.5)
    anchored = [item for item in items if item.anchored]
    assert 0 < len(anchored) < len(items) == 16
    plain, held = (NFTOptions(0.5, 0.0, 5.0, "adaptive", anchor) for anchor in (0.0, 2.0))
    calls.clear()
    metrics = backward_nft(conditioner, items, held, micro_batch=8)
    assert calls["samples"] == 2 * len(items) + 2 * len(anchored)
    assert metrics["anchor"] == 0.0 and metrics["loss"] == metrics["loss_policy"]
    with torch.no_grad():
        for parameter in parameters(transformer, POLICY):
            parameter.add_(0.05)
    expected = 0.0
    for item in anchored:
        free = conditioner.without_text(conditioner.batch([item.sample]))
        x_t = interpolate(item.x0[None], item.noise[None], torch.tensor([item.t]))
        with torch.no_grad():
            v = predict_velocity(transformer, x_t, torch.tensor([item.t]), free)
            with use(transformer, None):
                v_ref = predict_velocity(transformer, x_t, torch.tensor([item.t]), free)
        expected += (v - v_ref).square().mean().item() / len(items)
    transformer.zero_grad()
    without = backward_nft(conditioner, items, plain, micro_batch=8)
    gradient = [p.grad.clone() for p in parameters(transformer, POLICY)]
    transformer.zero_grad()
    metrics = backward_nft(conditioner, items, held, micro_batch=8)
    assert metrics["anchor"] == pytest.approx(expected, rel=1e-4) and without["anchor"] == 0.0
    assert metrics["loss"] == pytest.approx(without["loss"] + 2.0 * expected, rel=1e-5)
    assert any(not p.grad.equal(g) for p, g in zip(parameters(transformer, POLICY), gradient, strict=True))


def test_missing_and_flat_groups_cost_nothing_and_times_are_stratified(setting):
    sampler, _ = setting

    def reward(generation, task):
        k = generation.seed[-1]
        if task.sample.trajectory_id == "flat":
            return Score(0.5)
        return Score(None, "the judge failed") if k == 0 else Score(0.1 * k)

    groups = drawn(sampler, [task("flat"), task("a")], reward, size=4)
    set_advantages(groups, std="global", adv_clip_max=5.0, min_valid=2)
    metrics = rollout_metrics(groups)
    assert metrics["flat_groups"] == 0.5 and metrics["missing_scores"] == 1 / 8
    items = training_items(groups, TIMES, num_times=2, run_seed=0, epoch=0)
    # Of three with a reward the middle one has an advantage of 0.
    assert len(items) == 2 * 2 and {item.sample.trajectory_id for item in items} == {"a"}
    grid = inference_times(9, 4).tolist()
    assert Counter(item.t in grid[:2] for item in items) == {True: 2, False: 2}
    other = training_items(groups, TIMES, num_times=2, run_seed=0, epoch=1)
    assert not any(a.noise.equal(b.noise) for a in items for b in other)
    with pytest.raises(ValueError, match="num_times=5"):
        training_items(groups, TIMES, num_times=5, run_seed=0, epoch=0)
    grid = inference_times(groups[0].x0.shape[1], 4)
    items = training_items(groups, TIMES, num_times=2, run_seed=0, epoch=0, time_range=(0.25, 0.75))
    assert {item.t for item in items} == set(grid[1:3].tolist())
    with pytest.raises(ValueError, match="num_times=2: must lie between 1 and the 1 steps in time_range"):
        training_items(groups, TIMES, num_times=2, run_seed=0, epoch=0, time_range=(0.25, 0.5))
    with pytest.raises(ValueError, match=r"time_range=\[0.5, 0.5\]: no part of the 4 steps"):
        training_items(groups, TIMES, num_times=1, run_seed=0, epoch=0, time_range=(0.5, 0.5))


def test_times_that_are_not_stratified_are_any_two(setting):
    sampler, _ = setting
    groups = drawn(sampler, [task(name) for name in "abcdef"], chance, size=4)
    set_advantages(groups, std="global", adv_clip_max=5.0, min_valid=2)
    items = training_items(groups, TIMES, num_times=2, run_seed=0, epoch=0, stratified=False)
    pairs = {}
    for item in items:
        pairs.setdefault(item.seed[:-1], set()).add(TIMES.index(item.t))
    assert len(pairs) == 24 and all(len(pair) == 2 for pair in pairs.values())
    assert {frozenset(pair) for pair in pairs.values()} > {frozenset({0, 1}), frozenset({2, 3})}


def test_guidance_in_training_is_guided_throughout(setting):
    """All three predictions: at the start they are equal, so that the policy's gradient is that of the rewards."""
    sampler, calls = setting
    groups = drawn(sampler, [task("a"), task("b", 2)], chance, size=3)
    set_advantages(groups, std="global", adv_clip_max=5.0, min_valid=2)
    items = training_items(groups, TIMES, num_times=2, run_seed=0, epoch=0)
    calls.clear()
    guided = NFTOptions(0.5, 0.01, 5.0, "adaptive", cfg=3.0)
    metrics = backward_nft(sampler.conditioner, items, guided, micro_batch=8)
    assert calls["samples"] == 6 * len(items)
    assert metrics["kl"] == metrics["v_minus_v_old"] == 0.0
    transformer = sampler.conditioner.klein.transformer
    gradient = [p.grad.clone() for p in parameters(transformer, POLICY)]
    transformer.zero_grad()
    plain = backward_nft(sampler.conditioner, items, OPTIONS, micro_batch=8)
    assert metrics["loss_policy"] != plain["loss_policy"]
    assert any(not p.grad.equal(g) for p, g in zip(parameters(transformer, POLICY), gradient, strict=True))


def test_gradient_of_an_epoch_does_not_depend_on_the_micro_batch(setting):
    sampler, _ = setting
    groups = drawn(sampler, [task("a"), task("b", 1)], chance, size=3)
    set_advantages(groups, std="global", adv_clip_max=5.0, min_valid=2)
    items = training_items(groups, TIMES, num_times=1, run_seed=0, epoch=0)
    transformer = sampler.conditioner.klein.transformer
    gradients = []
    for micro_batch in (1, 8):
        backward_nft(sampler.conditioner, items, OPTIONS, micro_batch)
        gradients.append([p.grad.clone() for p in parameters(transformer, POLICY)])
        transformer.zero_grad()
    assert all(p.grad is None for p in parameters(transformer, OLD))
    assert any(g.abs().max() > 0 for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)  # measured 2e-7
