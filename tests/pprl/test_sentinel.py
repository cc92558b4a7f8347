"""The sentinel: its signals on made-up rollouts, its rules one by one, its state, no false alarm where all is well."""

import json
import math
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from clvr_train.method.score import ProxyPrompt, Score
from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import OLD, POLICY, add_policies, parameters
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.rollout import Group
from clvr_train.pprl.sentinel import LIMITS, Limits, Sentinel, as_tensor, from_tensor, note
from clvr_train.pprl.signals import (
    Probe,
    group_diversity,
    high_frequency,
    mean_signals,
    rollout_signals,
    saturation,
    spread,
)
from clvr_train.pprl.tasks import Task
from clvr_train.runtime.distributed import World

SIZE = 96


def picture(values):
    return Image.fromarray(np.asarray(values).clip(0, 255).astype(np.uint8))


def test_diversity_is_the_mean_distance_of_pairs():
    x = torch.randn(5, 9, 32, generator=torch.Generator().manual_seed(0))
    pairs = [(x[i] - x[j]).square().mean() for i in range(5) for j in range(i)]
    assert group_diversity(x) == pytest.approx(math.sqrt(torch.stack(pairs).mean() / x.square().mean()), rel=1e-5)
    assert group_diversity(7 * x) == pytest.approx(group_diversity(x), rel=1e-5)
    assert group_diversity(x[:1].expand(4, -1, -1)) == pytest.approx(0, abs=1e-6)
    assert group_diversity(x[:1]) == 0
    many = torch.randn(64, 99, 32, generator=torch.Generator().manual_seed(1))
    assert group_diversity(many) == pytest.approx(math.sqrt(2), rel=0.01)


@pytest.mark.parametrize("cycles", [2, 10, 20, 28, 40, 48])
@pytest.mark.parametrize("size", [(96, 96), (96, 64), (64, 95)])
def test_high_frequency_is_the_share_of_the_spectrum_above_the_cutoff(cycles, size):
    frequency = cycles / 96
    wave = 60 * np.cos(2 * np.pi * round(frequency * size[1]) / size[1] * np.arange(size[1]))
    share = high_frequency(picture(128 + wave[None].repeat(size[0], 0)))
    assert share == pytest.approx(float(frequency > 0.25), abs=0.03)
    assert high_frequency(picture(128 + wave[None].repeat(size[0], 0)).transpose(Image.Transpose.TRANSPOSE)) == (
        pytest.approx(share, rel=1e-6)
    )


def test_high_frequency_of_noise_is_the_area_beyond_the_cutoff_and_of_one_colour_is_nothing():
    noise = picture(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE)))
    frequencies = np.fft.fftfreq(SIZE)
    area = (np.hypot(frequencies[:, None], frequencies[None]) > 0.25).mean()
    assert high_frequency(noise) == pytest.approx(area, abs=0.02)
    assert high_frequency(Image.new("RGB", (SIZE, SIZE), "red")) == 0


def test_saturation():
    assert saturation(Image.new("RGB", (8, 8), "red")) == 1
    assert saturation(Image.new("RGB", (8, 8), "grey")) == 0
    assert saturation(Image.new("RGB", (8, 8), (200, 149, 98))) == pytest.approx(0.4)


def group(place, rewards, r=None, own=True):
    """A group as `roll_out` and `set_advantages` leave it, on the rank that has drawn it or on another."""
    return Group(
        place=place,
        task=Task(Sample(f"t{place}", 1, "goal", ("r",)), ProxyPrompt("p")),
        seeds=[("rollout", place, k) for k in range(len(rewards))],
        x0=torch.randn(len(rewards), 9, 32, generator=torch.Generator().manual_seed(place)) if own else None,
        scores=[Score(value, "" if value is not None else "failed") for value in rewards],
        advantages=[0.0] * len(rewards),
        r=r or [0.5] * len(rewards),
    )


def test_signals_of_rollouts():
    groups = [group(0, [0.2, 0.4, None], r=[0.0, 1.0, None]), group(1, [0.7, 0.7, 0.7]), group(2, [0.1], own=False)]
    found = rollout_signals(groups, World())
    assert found["flat"] == 0.5 and found["r_saturated"] == pytest.approx((1.0 + 0.0) / 2)
    assert found["diversity"] == pytest.approx((group_diversity(groups[0].x0) + group_diversity(groups[1].x0)) / 2)
    dropped = rollout_signals([group(0, [None, None], r=[None, None])], World())
    assert dropped["flat"] == 1 and "r_saturated" not in dropped


def test_signals_of_ranks_are_means_over_all_groups():
    groups = [group(i, [0.1 * i, 0.3]) for i in range(3)]

    class Two(World):
        def gather(self, value):
            own = rollout_rows[self.rank] = value
            return [rollout_rows.get(rank, own) for rank in range(2)]

    rollout_rows = {}
    rollout_signals(groups[1:], Two(1, 2))
    assert rollout_signals(groups[:1], Two(0, 2)) == rollout_signals(groups, World())
    assert mean_signals([]) == {}


@pytest.fixture
def setting(tiny_klein):
    klein = tiny_klein()
    add_policies(klein.transformer, rank=4, alpha=8, seed=0)
    calls = []
    klein.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    return Sampler(Conditioner(klein, (96, 96)), steps=4, cfg=3.0, batch=8), calls


RED = Image.new("RGB", (96, 96), "red")
TASKS = [
    Task(Sample("a", 1, "goal", ("r",)), ProxyPrompt("p")),
    Task(Sample("b", 2, "goal", ("r",), (RED,)), ProxyPrompt("p", "e", (1,))),
    Task(Sample("c", 1, "other", ("s",)), ProxyPrompt("p")),
]


def shift(transformer, adapter, by, seed=0):
    with torch.no_grad():
        for i, parameter in enumerate(parameters(transformer, adapter)):
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + i)))


def test_velocities_of_the_probe_compare_the_policies(setting):
    sampler, calls = setting
    transformer = sampler.conditioner.klein.transformer
    probe = Probe(sampler, TASKS, seed=0, world=World())
    assert sum(calls) == probe.nfe == 3 * (4 * 2 + 1) and sampler.nfe == 0
    calls.clear()
    same = {"velocity_ratio": 1.0, "velocity_drift": 0.0, "off_policy": 0.0, "sampler_step": 0.0}
    assert probe.velocities(old_decay=0.5) == same
    assert sum(calls) == 2 * 3 and probe.nfe == 3 * (4 * 2 + 3)
    shift(transformer, POLICY, 0.2)
    moved = probe.velocities(old_decay=0.25)
    assert moved["velocity_drift"] == moved["off_policy"] > 1e-3  # `old` is still the reference
    assert moved["sampler_step"] == pytest.approx(0.75 * moved["off_policy"])
    assert 0 < abs(moved["velocity_ratio"] - 1) <= moved["velocity_drift"]
    shift(transformer, OLD, 0.2)
    assert probe.velocities()["off_policy"] == pytest.approx(0, abs=1e-5)
    assert transformer.active_adapters() == [POLICY]
    again = Probe(sampler, TASKS, seed=0, world=World())  # whatever has been trained since
    assert again.velocities() == probe.velocities()
    assert Probe(sampler, TASKS, seed=1, world=World()).velocities() != probe.velocities()


def test_pictures_of_the_probe_differ_from_those_of_the_reference_by_the_policy_alone(setting):
    sampler, calls = setting
    transformer = sampler.conditioner.klein.transformer
    probe = Probe(sampler, TASKS, seed=0, world=World())
    judged = []

    def reward(generation, task):
        judged.append((generation.image.tobytes(), task.sample.trajectory_id, generation.seed))
        return Score(saturation(generation.image))

    def second(generation, task):
        return Score(None, "failed") if task.sample.trajectory_id == "c" else Score(1 - saturation(generation.image))

    calls.clear()
    first = probe.pictures(reward, second)
    assert sum(calls) == 3 * 4 * 2 and probe.nfe == 3 * (4 * 2 + 1) + 3 * 4 * 2
    assert first["probe_reward"] == first["held_out"] == first["held_out_error"] == 0
    assert first["saturation"] == first["high_frequency"] == 1 and first["held_out_missing"] == pytest.approx(1 / 3)
    assert len(judged) == 6 and len(set(judged)) == 3  # the reference's, and the same again
    shift(transformer, POLICY, 0.3)
    judged.clear()
    moved = probe.pictures(reward, second)
    pictures = {name: image for image, name, _ in judged}
    assert len(pictures) == 3
    changes = {
        task.sample.trajectory_id: saturation(Image.frombytes("RGB", (96, 96), pictures[task.sample.trajectory_id]))
        - saturation(before)
        for part in probe._parts
        for task, before in zip(part.tasks, part.images, strict=True)
    }
    assert moved["probe_reward"] == pytest.approx(sum(changes.values()) / 3) and moved["probe_reward"] != 0
    pair = [-changes["a"], -changes["b"]]
    assert moved["held_out"] == pytest.approx(sum(pair) / 2)
    assert moved["held_out_error"] == pytest.approx(abs(pair[0] - pair[1]) / 2)
    befores = [saturation(image) for part in probe._parts for image in part.images]
    assert moved["saturation"] == pytest.approx(1 + sum(changes.values()) / sum(befores))
    assert "held_out" not in probe.pictures(reward) and transformer.active_adapters() == [POLICY]
    assert Probe(sampler, TASKS, seed=0, world=World()).pictures(reward, second) == moved  # as after a resume


def test_a_judge_that_failed_on_the_reference_is_asked_again(setting):
    sampler, _ = setting
    probe = Probe(sampler, TASKS, seed=0, world=World())
    nothing = probe.pictures(lambda *_: Score(0.5), lambda *_: Score(None, "away"))
    assert nothing["held_out_missing"] == 1 and "held_out" not in nothing
    assert probe.pictures(lambda *_: Score(0.5), lambda *_: Score(0.7))["held_out"] == 0


def test_the_probe_is_spread_over_the_tasks():
    assert spread(range(10), 3) == [0, 3, 6] and spread(range(2), 8) == [0, 1] and spread(range(3), 0) == []


def well(epoch, rng):
    """A healthy epoch: rewards rise a little, everything is noisy."""
    return {
        "reward": 0.6 + rng.gauss(0, 0.05),
        "probe_reward": 0.004 * epoch + rng.gauss(0, 0.01),
        "held_out": 0.002 * epoch + rng.gauss(0, 0.008),
        "held_out_error": 0.015,
        "held_out_missing": 0.0,
        "merged_score": 0.5 + 0.002 * epoch + rng.gauss(0, 0.02),
        "saturation": 1 + 0.0006 * epoch + rng.gauss(0, 0.015),
        "high_frequency": 1 + rng.gauss(0, 0.1),
        "diversity": 0.8 * 0.995**epoch + rng.gauss(0, 0.05),
        "velocity_ratio": 1 + 0.001 * epoch,
        "velocity_drift": 0.01 * epoch,
        "off_policy": 0.02,
        "sampler_step": 0.02,
        "r_saturated": 0.05,
        "flat": max(0.0, rng.gauss(0.2, 0.15)),
        "loss": 5.0,
    }


def watched(sentinel, epochs, change=lambda epoch, values: values, seed=0):
    rng = Random(seed)
    return [sentinel.observe(change(epoch, well(epoch, rng))) for epoch in range(epochs)]


def test_a_healthy_run_is_healthy():
    acts, warnings = 0, 0
    for seed in range(50):
        verdicts = watched(Sentinel(action="stop"), 60, seed=seed)
        acts += any(verdict.action for verdict in verdicts)
        warnings += sum(not verdict.healthy for verdict in verdicts)
    assert acts == 0 and warnings <= 50 * 60 * 0.01


HARM = {
    "held_out": lambda e: {"held_out": -0.02 * e, "probe_reward": 0.1 + 0.01 * e},
    "merged_score": lambda e: {"merged_score": 0.5 - 0.05 * e},
    "saturation": lambda e: {"saturation": 1 + 0.1 * e},
    "high_frequency": lambda e: {"high_frequency": 0.9**e},
    "diversity": lambda e: {"diversity": 0.2},
    "velocity_ratio": lambda e: {"velocity_ratio": 1.4},
    "off_policy": lambda e: {"off_policy": 0.8},
    "r_saturated": lambda e: {"r_saturated": 0.8},
    "flat": lambda e: {"flat": 1.0},
    "sampler_step": lambda e: {"sampler_step": 0.0},
    "held_out_missing": lambda e: {"held_out_missing": 1.0},
}


def test_there_is_a_case_for_every_limit():
    assert HARM.keys() == set(LIMITS)


@pytest.mark.parametrize("name", LIMITS)
def test_every_signal_warns_then_acts_and_says_why(name):
    def change(epoch, values):
        return values | (HARM[name](epoch - 9) if epoch >= 10 else {})

    verdicts = watched(Sentinel(action="stop", patience=3), 25, change)
    assert all(verdict.healthy for verdict in verdicts[:10])
    states = [verdict.state for verdict in verdicts]
    first = next(i for i, state in enumerate(states) if state != "healthy")
    assert states[first : first + 2] == ["warned"] * 2
    message = verdicts[first].messages[0]
    assert f"(sentinel.limits.{name}=" in message and "\n" not in message
    if name == "held_out_missing":
        assert set(states) == {"healthy", "warned"}
    else:
        assert first <= 17 and states[first + 2] == "act" and verdicts[first + 2].action == "stop"
    off = Limits(**{name: None})
    assert all(verdict.healthy for verdict in watched(Sentinel(limits=off), 25, change))


def test_a_held_out_reward_that_falls_with_the_training_reward_is_no_hacking():
    def change(epoch, values):
        return values | ({"held_out": -0.1, "probe_reward": -0.2} if epoch >= 10 else {})

    assert all(verdict.healthy for verdict in watched(Sentinel(), 25, change))


def test_a_fall_within_the_error_of_the_probe_is_none():
    def change(epoch, values):
        return values | {"held_out": -0.08, "probe_reward": 0.2, "held_out_error": 0.06}

    assert all(verdict.healthy for verdict in watched(Sentinel(), 25, change))
    assert not all(verdict.healthy for verdict in watched(Sentinel(deviations=1.0), 25, change))


def test_rewards_that_rose_for_real_and_are_then_hacked_are_compared_with_the_best():
    def change(epoch, values):
        truly = 0.02 * min(epoch, 15) - 0.02 * max(0, epoch - 15)
        return values | {"held_out": truly, "probe_reward": 0.02 * epoch}

    verdicts = watched(Sentinel(action="stop"), 40, change)
    first = next(epoch for epoch, verdict in enumerate(verdicts) if not verdict.healthy)
    assert first == 18 and "held_out has fallen by 0.06 while the reward has risen by 0.06" in verdicts[18].messages[0]


def test_numbers_that_are_none_are_reported():
    verdicts = watched(Sentinel(), 12, lambda epoch, values: values | ({"diversity": math.nan} if epoch == 11 else {}))
    assert verdicts[11].messages == ("diversity is nan",)


def test_a_rare_signal_keeps_its_warning_until_it_is_measured_again():
    def change(epoch, values):
        harmed = values | (HARM["held_out"](epoch - 9) if epoch >= 10 else {})
        if epoch >= 10 and epoch % 3:
            del harmed["held_out"]
        return harmed

    sentinel = Sentinel(action="stop", patience=2)
    assert not sentinel.warned
    states = [verdict.state for verdict in watched(sentinel, 40, change)]
    first = states.index("warned")
    assert first % 3 == 0 and states[first : first + 4] == ["warned"] * 3 + ["act"]
    assert sentinel.warned


def test_roll_backs_are_counted_and_end_in_a_stop():
    sentinel = Sentinel(action="roll_back", patience=1, max_rollbacks=2)
    epochs = []
    for epoch in range(1, 60):
        rng = Random(epoch)
        verdict = sentinel.observe(well(epoch, rng) | (HARM["off_policy"](epoch) if epoch > 12 else {}))
        if sentinel.keeps(epoch, every=4):
            sentinel.kept = epoch
        if verdict.action == "roll_back":
            epochs.append(epoch)
            sentinel.rolled_back()
        elif verdict.action == "stop":
            break
    assert sentinel.kept == 12 and sentinel.rollbacks == 2 and len(epochs) == 2 and epoch > epochs[1]
    nothing_kept = Sentinel(action="roll_back", patience=1)
    assert nothing_kept.observe({"off_policy": 9.0}).action == "stop"
    assert Sentinel(patience=1).observe({"off_policy": 9.0}).action is None


def test_state_goes_through_json_and_tensors_and_a_resumed_watch_says_the_same():
    def change(epoch, values):
        return values | (HARM["off_policy"](epoch) if epoch >= 17 else {})

    for cut in (0, 1, 3, 5, 8, 18, 19):
        whole, first, second = (Sentinel(action="roll_back", patience=4) for _ in range(3))
        expected = watched(whole, 25, change)
        rng = Random(0)
        values = [change(epoch, well(epoch, rng)) for epoch in range(25)]
        for epoch in range(cut):
            first.observe(values[epoch])
        state = first.state_dict()
        assert json.loads(json.dumps(state)) == state == from_tensor(as_tensor(state))
        second.load_state_dict(from_tensor(as_tensor(state)))
        assert [second.observe(values[epoch]) for epoch in range(cut, 25)] == expected[cut:]
        assert second.state_dict() == whole.state_dict() != state


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"sentinel\.action='explode' is not one of warn, stop, roll_back"):
        Sentinel(action="explode")
    with pytest.raises(ValueError, match=r"sentinel\.baseline=1: at least 2 is needed"):
        Sentinel(baseline=1)


def test_verdicts_are_noted(tmp_path):
    sentinel = Sentinel(action="stop", patience=1)
    verdict = sentinel.observe({"off_policy": 9.0})
    note(tmp_path, 4, verdict, sentinel)
    row = json.loads((tmp_path / "sentinel.jsonl").read_text())
    assert row["epoch"] == 4 and row["state"] == "act" and row["action"] == "stop"
    assert row["messages"] == ["off_policy 9 is above 0.5 (sentinel.limits.off_policy=0.5)"]
    assert verdict.metrics() == {"sentinel": 2.0}
