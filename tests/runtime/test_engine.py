"""The step: schedule, clipping, and that a non-finite gradient changes nothing."""

import pytest
import torch

from clvr_train.runtime.engine import Engine, lr_factor


def weights(seed=0):
    return [torch.nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)))]


def test_schedules():
    cosine = {"schedule": "cosine", "warmup_steps": 2, "total_steps": 10}
    assert [lr_factor(s, **cosine) for s in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, pytest.approx(0.5), 0.0]
    assert lr_factor(99, schedule="constant", warmup_steps=0, total_steps=10) == 1.0
    with pytest.raises(ValueError, match="schedule='linear'"):
        lr_factor(0, schedule="linear", warmup_steps=0, total_steps=1)


def test_a_step_is_adamw_on_the_clipped_gradient():
    ours, theirs = weights(), weights()
    engine = Engine(ours, lr=0.1, total_steps=10, schedule="constant", clip=0.5)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for p in (*ours, *theirs):
            p.grad = torch.full_like(p, 2.0)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        reference.step()
        assert engine.step()["grad_norm"] == pytest.approx(2.0 * 6**0.5)
    assert torch.equal(ours[0], theirs[0]) and ours[0].grad is None


def test_non_finite_gradients_are_skipped_and_too_many_are_an_error():
    parameters = weights()
    engine = Engine(parameters, lr=0.1, total_steps=10, max_skipped=2)
    before = parameters[0].detach().clone()
    for _ in range(2):
        parameters[0].grad = torch.full_like(parameters[0], float("nan"))
        assert engine.step()["skipped"] == 1.0
    assert torch.equal(parameters[0], before) and not engine.optimizer.state
    parameters[0].grad = torch.ones_like(parameters[0])
    assert engine.step()["skipped"] == 0.0 and engine.skipped_in_a_row == 0
    for _ in range(2):
        parameters[0].grad = torch.full_like(parameters[0], float("inf"))
        engine.step()
    parameters[0].grad = torch.full_like(parameters[0], float("inf"))
    with pytest.raises(FloatingPointError, match="3 gradients in a row"):
        engine.step()


def test_saved_and_resumed_goes_on_as_if_nothing_had_happened(tmp_path):
    def run(parameters, engine, steps):
        for _ in range(steps):
            parameters[0].grad = torch.full_like(parameters[0], float(engine.steps + 1))
            engine.step()

    whole = weights()
    run(whole, Engine(whole, lr=0.1, total_steps=6), 6)
    first = weights()
    engine = Engine(first, lr=0.1, total_steps=6)
    assert engine.resume(tmp_path) is None
    run(first, engine, 3)
    engine.save(tmp_path, 3, {"w": first[0]})
    second = weights(seed=9)
    engine = Engine(second, lr=0.1, total_steps=6)
    step, tensors = engine.resume(tmp_path)
    second[0].data.copy_(tensors["w"])
    run(second, engine, 3)
    assert step == 3 and torch.equal(second[0], whole[0])


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        Engine([torch.nn.Parameter(torch.ones(1), requires_grad=False)], lr=0.1, total_steps=1)
